"""Conformance: cancel, deadlines, aborts, goodbyes and late writes, on every transport.

Whatever ends early ends every ticket that hung on it, at both ends, with an error that says why.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvferry.engine.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    ImmInUse,
    LinkClosed,
    PeerAborted,
    PeerLost,
    RegionGone,
)
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.wire.messages import Revoke

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.regions import MemoryRegion
    from tests.conftest import Gate, Peer, Pool

SENTINEL = 0xA5
LARGE = 40 << 20  # many frames and chunks: most have not begun when the first one is held


@pytest.mark.parametrize("operation", ["write", "read"])
def test_a_cancelled_transfer_ends_once_nothing_touches_its_memory(
    link: Link,
    peer: Peer,
    new_pool: Callable[..., Pool],
    hold: Callable[[str], Gate],
    operation: str,
) -> None:
    mine, theirs = new_pool(LARGE, fill=SENTINEL), peer.call("pool", LARGE, 1)
    gate = hold(operation)
    if operation == "write":
        ticket = link.write(mine.region, 0, theirs, 0, LARGE)
    else:
        ticket = link.read(mine.region, 0, theirs, 0, LARGE)
    assert gate.reached.wait(15.0)
    assert ticket.cancel()
    assert not ticket.done()  # a thread is still at its memory
    gate.open()
    with pytest.raises(Cancelled, match="cancelled by this side") as caught:
        ticket.wait(15.0)
    assert caught.value.operation == operation
    assert caught.value.peer == "peer"
    assert not ticket.cancel()
    mine.region.deregister()  # nothing holds it any more
    assert link.error is None


def test_a_cancelled_write_is_aborted_at_the_receiver(
    link: Link,
    engine: TransferEngine,
    peer: Peer,
    new_pool: Callable[..., Pool],
    hold: Callable[[str], Gate],
) -> None:
    mine, theirs = new_pool(LARGE), peer.call("pool", LARGE, SENTINEL)
    imm = peer.call("new_imm")
    expected = peer.call("expect", imm, nbytes=LARGE, linked=(engine.engine_id,))
    gate = hold("write")
    ticket = link.write(mine.region, 0, theirs, 0, LARGE, imm=imm)
    assert gate.reached.wait(15.0)
    ticket.cancel()
    gate.open()
    with pytest.raises(Cancelled):
        ticket.wait(15.0)
    with pytest.raises(PeerAborted, match="cancelled") as caught:
        peer.call("wait", expected)
    assert caught.value.imm == imm
    assert caught.value.peer == "here"
    assert caught.value.retryable


def test_a_cancelled_expectation_ends_at_once_and_late_writes_complete_nothing(
    link: Link, engine: TransferEngine, peer: Peer, new_pool: Callable[..., Pool]
) -> None:
    mine = new_pool(100, fill=SENTINEL)
    theirs = peer.call("pool", 100, 9)
    imm = engine.new_imm()
    ticket = engine.expect(imm, nbytes=100)
    assert ticket.cancel()
    with pytest.raises(Cancelled) as caught:
        ticket.wait(0)
    assert caught.value.imm == imm
    late = engine.late_writes
    sent = peer.call("write", engine.engine_id, theirs.region_id, 0, mine.descriptor, 0, 100, imm)
    assert peer.call("wait", sent) == 100
    marker = engine.new_imm()
    assert marker != imm
    meeting = engine.expect(marker, writes=1)
    peer.call("signal", engine.engine_id, marker)
    meeting.wait(15.0)
    assert engine.late_writes > late
    assert isinstance(ticket.exception(), Cancelled)


def test_a_late_write_of_the_old_attempt_does_not_complete_the_new_one(
    link: Link, engine: TransferEngine, peer: Peer, new_pool: Callable[..., Pool]
) -> None:
    mine, theirs = new_pool(100), peer.call("pool", 100, SENTINEL)
    old, new = peer.call("new_imm"), peer.call("new_imm")
    peer.call("cancel", peer.call("expect", old, nbytes=100))
    retry = peer.call("expect", new, nbytes=100)
    link.write(mine.region, 0, theirs, 0, 100, imm=old).wait()
    assert not peer.call("done", retry)
    link.write(mine.region, 0, theirs, 0, 100, imm=new).wait()
    assert peer.call("wait", retry) == 100


def test_an_expectation_that_nobody_answers_ends_at_its_deadline(
    link: Link, engine: TransferEngine
) -> None:
    ticket = engine.expect(engine.new_imm(), nbytes=1, links=[link], timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match="deadline passed") as caught:
        ticket.wait()
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.retryable
    assert caught.value.peer == "peer"

    async def awaited() -> int:
        return await engine.expect(engine.new_imm(), writes=1, timeout_s=0.05)

    with pytest.raises(DeadlineExceeded):
        asyncio.run(awaited())


@pytest.mark.parametrize("operation", ["write", "read"])
def test_a_transfer_ends_at_its_deadline(
    link: Link,
    peer: Peer,
    new_pool: Callable[..., Pool],
    hold: Callable[[str], Gate],
    operation: str,
) -> None:
    mine, theirs = new_pool(LARGE), peer.call("pool", LARGE, 1)
    gate = hold(operation)
    if operation == "write":
        ticket = link.write(mine.region, 0, theirs, 0, LARGE, timeout_s=1.0)
    else:
        ticket = link.read(mine.region, 0, theirs, 0, LARGE, timeout_s=1.0)
    assert gate.reached.wait(15.0)
    with pytest.raises(DeadlineExceeded, match="still pending"):
        ticket.wait(1.2)  # the deadline has passed, but a thread is at the memory
    gate.open()
    with pytest.raises(DeadlineExceeded, match="deadline passed"):
        ticket.wait(15.0)


def test_waiting_shorter_than_the_operation_leaves_it_running(
    link: Link,
    peer: Peer,
    new_pool: Callable[..., Pool],
    hold: Callable[[str], Gate],
) -> None:
    mine, theirs = new_pool(100), peer.call("pool", 100, 1)
    gate = hold("write")
    ticket = link.write(mine.region, 0, theirs, 0, 100)
    with pytest.raises(DeadlineExceeded, match=r"still pending after waiting 0\.01 s"):
        ticket.wait(0.01)
    gate.open()
    assert ticket.wait() == 100


@pytest.mark.parametrize("expect_first", [True, False])
def test_an_abort_ends_the_expectation_at_the_receiver(
    link: Link, engine: TransferEngine, peer: Peer, expect_first: bool
) -> None:
    imm = engine.new_imm()
    if expect_first:
        ticket = engine.expect(imm, nbytes=10, links=[link])
        peer.call("abort", engine.engine_id, imm, "the GPU caught fire")
    else:
        peer.call("abort", engine.engine_id, imm, "the GPU caught fire")
        meeting = engine.expect(engine.new_imm(), writes=1)
        assert meeting.imm is not None
        peer.call("signal", engine.engine_id, meeting.imm)
        meeting.wait(15.0)
        ticket = engine.expect(imm, nbytes=10, links=[link])
    with pytest.raises(PeerAborted, match="the GPU caught fire") as caught:
        ticket.wait(15.0)
    assert (caught.value.imm, caught.value.peer) == (imm, "peer")
    assert link.error is None


def test_an_abort_after_completion_changes_nothing(
    link: Link, engine: TransferEngine, peer: Peer
) -> None:
    imm = engine.new_imm()
    ticket = engine.expect(imm, writes=1)
    peer.call("signal", engine.engine_id, imm)
    assert ticket.wait(15.0) == 0
    peer.call("abort", engine.engine_id, imm, "too late")
    assert ticket.wait() == 0


@pytest.mark.parametrize("closes", ["here", "there", "both"])
def test_closing_in_flight_ends_every_ticket_at_both_ends(
    link: Link,
    engine: TransferEngine,
    peer: Peer,
    new_pool: Callable[..., Pool],
    hold: Callable[[str], Gate],
    closes: str,
) -> None:
    mine, theirs = new_pool(LARGE), peer.call("pool", LARGE, 1)
    imm_here, imm_there = engine.new_imm(), peer.call("new_imm")
    there = peer.call("expect", imm_there, nbytes=LARGE, linked=(engine.engine_id,))
    here = engine.expect(imm_here, nbytes=1, links=[link])
    gate = hold("write")
    tickets = [link.write(mine.region, 0, theirs, 0, LARGE, imm=imm_there) for _ in range(3)]
    assert gate.reached.wait(15.0)
    link_error: type[EngineError] = LinkClosed if closes == "here" else PeerLost
    if closes == "there":
        peer.call("close_link", engine.engine_id, timeout_s=0.05)  # I cannot answer yet
    else:
        # `fail` is `close` without its wait, which would last as long as the gate is shut.
        link.fail(LinkClosed("this side closed the link", operation="close"))
    if closes == "both":
        peer.call("close_link", engine.engine_id, timeout_s=0.05)
        link_error = LinkClosed
    with pytest.raises(link_error):
        here.wait(15.0)
    assert not link.quiesced.done()
    gate.open()
    for ticket in tickets:
        with pytest.raises(link_error):
            ticket.wait(15.0)
    assert link.quiesced.wait(15.0) == 0
    with pytest.raises((PeerAborted, PeerLost, LinkClosed)):
        peer.call("wait", there)
    down = peer.call("link_down", engine.engine_id)
    assert isinstance(down, PeerLost if closes == "here" else LinkClosed)
    assert link.closed
    with pytest.raises(link_error):
        link.signal(imm_there)
    with pytest.raises(link_error):
        engine.expect(engine.new_imm(), nbytes=1, links=[link]).wait(15.0)
    mine.region.deregister()


def test_both_ends_closing_at_once_quiesce_at_once(
    engine: TransferEngine, start_peer: Callable[..., Peer], transport: str
) -> None:
    """Two goodbyes that cross must not wait for each other's answer.

    With an hour of peer timeout, only the goodbyes themselves can end the link in time.
    """
    with (
        TransferEngine(name="left", peer_timeout_s=3600.0) as left,
        TransferEngine(name="right", peer_timeout_s=3600.0) as right,
    ):
        ours = left.connect(right.address, transport=transport)
        theirs = right.accept_link(left.engine_id)
        for link in (ours, theirs):
            link.fail(LinkClosed("this side closed the link", operation="close"))
        assert ours.quiesced.wait(15.0) == 0
        assert theirs.quiesced.wait(15.0) == 0


def test_what_was_written_before_a_goodbye_still_counts(
    engine: TransferEngine, peer: Peer, transport: str, new_pool: Callable[..., Pool]
) -> None:
    mine = new_pool(100, fill=SENTINEL)
    link = engine.connect(peer.address, transport=transport)
    peer.call("accept", engine.engine_id)
    theirs = peer.call("pool", 100, 4)
    whole, half = engine.new_imm(), engine.new_imm()
    for imm in (whole, half):
        sent = peer.call(
            "write", engine.engine_id, theirs.region_id, 0, mine.descriptor, 0, 100, imm
        )
        peer.call("wait", sent)
    peer.call("close_link", engine.engine_id)
    link.quiesced.wait(15.0)
    assert engine.expect(whole, nbytes=100, writes=1).wait(15.0) == 100
    with pytest.raises(PeerLost) as caught:
        engine.expect(half, nbytes=101).wait(15.0)
    assert caught.value.imm == half
    assert bool((mine.bytes == 4).all())


def test_an_imm_that_is_live_cannot_be_expected_again(
    link: Link, engine: TransferEngine, peer: Peer
) -> None:
    imm = engine.new_imm()
    first = engine.expect(imm, writes=1)
    with pytest.raises(ImmInUse, match="still live") as caught:
        engine.expect(imm, writes=1)
    assert caught.value.imm == imm
    peer.call("signal", engine.engine_id, imm)
    assert first.wait(15.0) == 0


def test_deregister_waits_for_transfers_and_then_refuses(
    link: Link,
    peer: Peer,
    new_pool: Callable[..., Pool],
    hold: Callable[[str], Gate],
) -> None:
    mine, theirs = new_pool(1000), peer.call("pool", 1000, 1)
    gate = hold("write")
    ticket = link.write(mine.region, 0, theirs, 0, 1000)
    assert gate.reached.wait(15.0)
    with pytest.raises(DeadlineExceeded, match="still used by 1 transfers"):
        mine.region.deregister(timeout_s=0.05)
    with pytest.raises(RegionGone, match="is deregistered"):
        link.write(mine.region, 0, theirs, 0, 1000)
    gate.open()
    assert ticket.wait(15.0) == 1000
    mine.region.deregister()
    mine.region.deregister()


def test_a_peer_that_deregisters_waits_for_my_writes_and_then_refuses_them(
    link: Link,
    peer: Peer,
    new_pool: Callable[..., Pool],
    hold: Callable[[str], Gate],
) -> None:
    mine, theirs = new_pool(LARGE), peer.call("pool", LARGE, SENTINEL)
    link.write(mine.region, 0, theirs, 0, 1).wait()
    gate = hold("write")
    ticket = link.write(mine.region, 0, theirs, 0, LARGE)
    assert gate.reached.wait(15.0)
    if link._path.asks_access:
        # Whoever can reach the memory without its owner's help must be asked to stop.
        with pytest.raises(DeadlineExceeded, match="the peer may still write"):
            peer.call("deregister", theirs.region_id, timeout_s=0.05)
    else:
        peer.call("deregister", theirs.region_id)
    gate.open()
    with pytest.raises(EngineError, match=r"deregistered|not registered"):
        ticket.wait(15.0)
    peer.call("deregister", theirs.region_id)
    before = peer.contents(theirs)
    with pytest.raises(EngineError, match=r"deregistered|not registered"):
        link.write(mine.region, 0, theirs, 0, LARGE).wait(15.0)
    assert np.array_equal(peer.contents(theirs), before)
    assert link.error is None


def test_a_write_that_begins_while_its_region_is_revoked_is_refused(
    link: Link, peer: Peer, new_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer must not be told that I stopped, and then be written to."""
    mine, theirs = new_pool(10), peer.call("pool", 10, SENTINEL)
    link.write(mine.region, 0, theirs, 0, 1).wait()
    acquire = type(mine.region).acquire

    def acquire_late(region: MemoryRegion) -> None:
        acquire(region)  # the checks are over, the transfer is not known to the link yet
        link._handle(Revoke(theirs.region_id))

    monkeypatch.setattr(type(mine.region), "acquire", acquire_late)
    if not link._path.asks_access:  # whose owner checks what arrives, and asks nobody to stop
        link.write(mine.region, 0, theirs, 0, 1).wait(15.0)
        assert not link._table.revoked
        return
    with pytest.raises(RegionGone, match="has deregistered"):
        link.write(mine.region, 0, theirs, 1, 9)
    monkeypatch.undo()
    mine.region.deregister()
    assert (peer.contents(theirs)[1:] == SENTINEL).all()


def test_an_engine_that_closes_ends_everything(
    peer: Peer, transport: str, hold: Callable[[str], Gate]
) -> None:
    engine = TransferEngine(name="leaver")
    link = engine.connect(peer.address, transport=transport)
    peer.call("accept", engine.engine_id)
    array = np.zeros(1000, np.uint8)
    region, theirs = engine.register(array), peer.call("pool", 1000, SENTINEL)
    linked = engine.expect(engine.new_imm(), nbytes=1, links=[link])
    alone = engine.expect(engine.new_imm(), nbytes=1)
    there = peer.call("expect", peer.call("new_imm"), nbytes=1, linked=(engine.engine_id,))
    link.write(region, 0, theirs, 0, 1000).wait()
    engine.close()
    engine.close()
    for ticket in (linked, alone):
        with pytest.raises(LinkClosed):
            ticket.wait(0)
    with pytest.raises(PeerLost, match="closed the link"):
        peer.call("wait", there)
    assert link.quiesced.done()
    for refused in (
        lambda: engine.register(array),
        lambda: engine.expect(1, nbytes=1),
        lambda: engine.connect(peer.address),
        lambda: link.signal(1),
    ):
        with pytest.raises(LinkClosed):
            refused()
