"""A peer dies, freezes, wakes up or comes back: every ticket ends, by the right name."""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvferry.engine.connect import handshake
from kvferry.engine.errors import (
    DeadlineExceeded,
    EngineError,
    LinkError,
    NotRegistered,
    PeerLost,
    RailError,
    RegionGone,
    TransportUnavailable,
)
from kvferry.engine.link import liveness
from kvferry.engine.memory import iovec
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.transports.verbs import queue_pair as verbs_qp
from tests.support.leaks import LeakCheck

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer.ticket import Ticket
    from tests.conftest import Gate, Peer, Pool

SENTINEL = 0xA5
LARGE = 64 << 20
PATIENCE_S = 60.0  # for what must come; how soon it came is printed. An emulated machine needs 20 s


def connected(engine: TransferEngine, peer: Peer, transport: str) -> Link:
    link = engine.connect(peer.address, transport=transport)
    peer.call("accept", engine.engine_id)
    return link


def lost(tickets: list[Ticket], since_s: float, what: str) -> list[PeerLost]:
    """The tickets' errors, all of which must be `PeerLost`; prints when the last one ended."""
    errors = []
    for ticket in tickets:
        with pytest.raises(PeerLost) as caught:
            ticket.wait(PATIENCE_S)
        errors.append(caught.value)
    print(f"{what}: every ticket ended {1e3 * (time.monotonic() - since_s):.0f} ms later")
    return errors


def test_a_killed_peer_ends_every_ticket_of_its_link(
    engine: TransferEngine,
    peer: Peer,
    start_peer: Callable[..., Peer],
    transport: str,
    new_pool: Callable[..., Pool],
    hold: Callable[[str], Gate],
) -> None:
    victim = start_peer(name="victim")
    link, other = connected(engine, victim, transport), connected(engine, peer, transport)
    mine, theirs = new_pool(LARGE), victim.call("pool", LARGE, SENTINEL)
    waiting = engine.expect(engine.new_imm(), nbytes=1, links=[link])
    unconcerned = engine.expect(engine.new_imm(), nbytes=1, links=[other])
    gate = hold("write")
    writes = [link.write(mine.region, 0, theirs, 0, LARGE, imm=7) for _ in range(3)]
    assert gate.reached.wait(PATIENCE_S)
    since_s = time.monotonic()
    victim.kill()
    (error,) = lost([waiting], since_s, f"{transport}: killed")
    assert error.process_gone
    assert (error.peer, error.operation, error.imm) == ("victim", "expect", waiting.imm)
    assert error.retryable
    gate.open()
    for error in lost(writes, since_s, f"{transport}: killed, writes"):
        assert error.operation == "write"
    assert link.quiesced.wait(PATIENCE_S) == 0
    with pytest.raises(PeerLost) as caught:
        link.write(mine.region, 0, theirs, 0, 1)
    assert caught.value.process_gone
    with pytest.raises(PeerLost):
        engine.expect(engine.new_imm(), nbytes=1, links=[link]).wait(PATIENCE_S)
    mine.region.deregister()
    assert not unconcerned.done()
    assert unconcerned.cancel()
    other.close()


def test_a_frozen_peer_is_lost_and_its_memory_stays_in_quarantine(
    engine: TransferEngine,
    start_peer: Callable[..., Peer],
    transport: str,
    new_pool: Callable[..., Pool],
) -> None:
    victim = start_peer(name="victim")
    link = connected(engine, victim, transport)
    mine, theirs = new_pool(4096, fill=SENTINEL), victim.call("pool", 4096, 1)
    # The peer holds the key to my memory and has used it.
    sent = victim.call("write", engine.engine_id, theirs.region_id, 0, mine.descriptor, 0, 1)
    assert victim.call("wait", sent) == 1
    waiting = engine.expect(engine.new_imm(), nbytes=1, links=[link])
    since_s = time.monotonic()
    victim.freeze()
    (error,) = lost([waiting], since_s, f"{transport}: frozen")
    assert "silent" in str(error)
    assert not error.process_gone
    if link._path.peer_reaches_memory:
        # Nothing stops that process from writing when it wakes up.
        assert not link.quiesced.done()
        with pytest.raises(DeadlineExceeded, match="may still write"):
            mine.region.deregister(timeout_s=0.05)
        victim.kill()
    assert link.quiesced.wait(PATIENCE_S) == 0
    mine.region.deregister()


def test_a_peer_that_wakes_up_again_is_harmless_and_gives_memory_back(
    engine: TransferEngine,
    start_peer: Callable[..., Peer],
    transport: str,
    new_pool: Callable[..., Pool],
) -> None:
    sleeper = start_peer(name="sleeper")
    link = connected(engine, sleeper, transport)
    mine, theirs = new_pool(1 << 20, fill=SENTINEL), sleeper.call("pool", 1 << 20, 1)
    there = sleeper.call("expect", sleeper.call("new_imm"), nbytes=1, linked=(engine.engine_id,))
    sleeper.call("stream", engine.engine_id, theirs.region_id, mine.descriptor, 1 << 20)
    marker = sleeper.call("new_imm")
    link.signal(marker).wait(PATIENCE_S)
    sleeper.freeze()
    waiting = engine.expect(engine.new_imm(), nbytes=1, links=[link])
    lost([waiting], time.monotonic(), f"{transport}: frozen in a stream")
    sleeper.thaw()
    with pytest.raises(PeerLost):
        sleeper.call("wait", there)
    assert link.quiesced.wait(PATIENCE_S) == 0  # it has said that it stopped
    assert isinstance(sleeper.call("link_down", engine.engine_id), PeerLost)
    mine.region.deregister()
    mine.bytes[:] = SENTINEL
    again = connected(engine, sleeper, transport)
    imm = sleeper.call("new_imm")
    ticket = sleeper.call("expect", imm, writes=1)
    again.signal(imm).wait(PATIENCE_S)
    assert sleeper.call("wait", ticket) == 0
    assert (mine.bytes == SENTINEL).all()
    again.close()


def test_a_frozen_process_that_slept_itself_forgives_its_peers(
    engine: TransferEngine, start_peer: Callable[..., Peer], transport: str
) -> None:
    """Seen from the sleeper: its peer was silent only because nobody listened.

    With an hour of patience here, the link must survive two seconds of sleep there.
    """
    sleeper = start_peer(name="sleeper")
    with TransferEngine(name="patient", peer_timeout_s=3600.0) as patient:
        link = connected(patient, sleeper, transport)
        sleeper.freeze()
        # Longer than the sleeper's own patience; a deadline passes instead of a sleep.
        with pytest.raises(DeadlineExceeded):
            patient.expect(patient.new_imm(), nbytes=1, timeout_s=2.0).wait()
        sleeper.thaw()
        for _ in range(3):
            imm = sleeper.call("new_imm")
            ticket = sleeper.call("expect", imm, writes=1, linked=(patient.engine_id,))
            link.signal(imm).wait(PATIENCE_S)
            assert sleeper.call("wait", ticket) == 0


@pytest.mark.parametrize("host", ["this host", "another"])
def test_a_peer_whose_interpreter_is_busy_is_not_lost(
    start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """It answers nothing for much longer than the engines' patience, but its kernel does."""
    if host == "another":
        monkeypatch.setattr(handshake, "host_id", lambda: "mars")
    busy = start_peer(name="busy", transports=["tcp"], peer_timeout_s=0.5)
    with TransferEngine(name="here", transports=["tcp"], peer_timeout_s=0.5) as here:
        link = connected(here, busy, "tcp")
        mine, theirs = here.register(np.zeros(10, np.uint8)), busy.call("pool", 10, SENTINEL)
        writes = [link.write(mine, 0, theirs, 0, 10) for _ in range(3)]
        busy.call("hold_interpreter", 2.0)
        assert [write.wait(PATIENCE_S) for write in writes] == [10, 10, 10]
        assert link.write(mine, 0, theirs, 0, 10).wait(PATIENCE_S) == 10
        assert link.error is None


def test_a_frozen_process_of_another_host_is_lost_in_the_end(
    start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "host_id", lambda: "mars")
    monkeypatch.setattr(liveness, "BUSY_PEER_S", 1.0)
    victim = start_peer(name="victim", transports=["tcp"])
    with TransferEngine(name="far", transports=["tcp"], peer_timeout_s=0.2) as far:
        link = far.connect(victim.address)
        victim.freeze()
        with pytest.raises(PeerLost, match=r"silent for .* frozen"):
            link.down.wait(PATIENCE_S)
        link.quiesced.wait(PATIENCE_S)


def test_a_restarted_peer_is_another_one(
    engine: TransferEngine,
    start_peer: Callable[..., Peer],
    transport: str,
    new_pool: Callable[..., Pool],
) -> None:
    before = start_peer(name="server")
    link = connected(engine, before, transport)
    mine, theirs = new_pool(100), before.call("pool", 100, SENTINEL)
    link.write(mine.region, 0, theirs, 0, 100).wait(PATIENCE_S)
    before.kill()
    link.quiesced.wait(PATIENCE_S)
    after = start_peer(name="server")
    with pytest.raises(TransportUnavailable, match="refused"):
        engine.connect(before.address, transport=transport)
    again = connected(engine, after, transport)
    with pytest.raises(NotRegistered, match="one that has restarted: fetch its descriptor again"):
        again.write(mine.region, 0, theirs, 0, 100)
    fresh = after.call("pool", 100, SENTINEL)
    assert again.write(mine.region, 0, fresh, 0, 100).wait(PATIENCE_S) == 100
    assert np.array_equal(after.contents(fresh), mine.bytes)
    again.close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ESRCH, PeerLost),
        (errno.EPERM, TransportUnavailable),
        (errno.EFAULT, RegionGone),
        (errno.ENOMEM, LinkError),
        (errno.EPIPE, LinkError),
    ],
)
def test_errors_of_system_calls_become_the_engines(
    start_peer: Callable[..., Peer],
    transport: str,
    code: int,
    kind: type[EngineError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with TransferEngine() as engine:
        peer = start_peer()
        link = connected(engine, peer, transport)
        mine, theirs = engine.register(np.zeros(10, np.uint8)), peer.call("pool", 10, SENTINEL)

        def fail(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        for module, name in ((iovec, "process_vm"), (iovec, "send"), (verbs_qp, "post")):
            monkeypatch.setattr(module, name, fail)
        wanted: dict[str, type[EngineError]] = {"cma": kind, "tcp": PeerLost, "verbs": RailError}
        with pytest.raises(wanted[transport]) as caught:
            link.write(mine, 0, theirs, 0, 10).wait(PATIENCE_S)
        assert caught.value.operation == "write"
        monkeypatch.undo()
        mine.deregister()


def test_a_kernel_without_process_descriptors_still_tells_that_a_peer_is_gone(
    start_peer: Callable[..., Peer], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", missing)
    with TransferEngine() as engine:
        peer = start_peer()
        link = connected(engine, peer, transport)
        waiting = engine.expect(engine.new_imm(), nbytes=1, links=[link])
        since_s = time.monotonic()
        peer.kill()
        (error,) = lost([waiting], since_s, f"{transport}: killed, seen by sockets alone")
        assert "without a goodbye" in str(error)
        assert link.quiesced.wait(PATIENCE_S) == 0


def deaths(transport: str, start_peer: Callable[..., Peer], rounds: int, seed: int) -> None:
    """Kills peers at random points of a stream in both directions; counts what is left of them."""
    random = np.random.default_rng(seed)
    with TransferEngine(name="survivor") as engine:
        size = 8 << 20
        source, inbox = np.ones(size, np.uint8), np.full(size + 128, SENTINEL, np.uint8)
        mine, box = engine.register(source), engine.register(inbox)
        window = inbox[64:-64]
        # Copiers start with the first bytes, which the first victim may not live to see.
        with TransferEngine(name="witness") as other:
            link = engine.connect(other.address, transport=transport)
            theirs = other.register(np.zeros(size, np.uint8)).descriptor
            assert link.write(mine, 0, theirs, 0, size).wait(PATIENCE_S) == size
        assert link.quiesced.wait(PATIENCE_S) == 0
        leaks = LeakCheck()
        for _ in range(rounds):
            victim = start_peer()
            link = connected(engine, victim, transport)
            theirs, outbox = victim.call("pool", size, 0), victim.call("pool", size, 2)
            imm = engine.new_imm()
            waiting = engine.expect(imm, nbytes=1 << 60, links=[link])
            into = engine.register(window)
            victim.call("stream", engine.engine_id, outbox.region_id, into.descriptor, size)
            tickets = [waiting]
            fate = threading.Timer(float(random.uniform(0, 0.05)), victim.process.kill)
            fate.start()
            try:
                while True:
                    tickets.append(link.write(mine, 0, theirs, 0, size, imm=1))
                    tickets.append(link.read(box, 64, theirs, 0, 1))
                    if len(tickets) > 16:
                        tickets[-10].wait(PATIENCE_S)
            except PeerLost:
                pass
            fate.join()
            victim.process.wait()
            for ticket in tickets:
                try:
                    ticket.wait(PATIENCE_S)
                except EngineError as error:
                    assert isinstance(error, PeerLost), error  # noqa: PT017
            assert isinstance(waiting.exception(), PeerLost)
            assert link.quiesced.wait(PATIENCE_S) == 0
            into.deregister()
            assert (inbox[:64] == SENTINEL).all()
            assert (inbox[-64:] == SENTINEL).all()
            assert mine._uses == 0
            assert engine.links == ()
            victim.end()
            leaks.take()
        replacement = start_peer()
        link = connected(engine, replacement, transport)
        theirs = replacement.call("pool", size, 0)
        assert link.write(mine, 0, theirs, 0, size).wait(PATIENCE_S) == size
        assert (replacement.contents(theirs) == 1).all()


def test_peers_may_die_at_any_moment(transport: str, start_peer: Callable[..., Peer]) -> None:
    deaths(transport, start_peer, rounds=10, seed=1)


@pytest.mark.soak
def test_peers_may_die_at_any_moment_for_long(
    transport: str, start_peer: Callable[..., Peer]
) -> None:
    deaths(transport, start_peer, rounds=300, seed=2)
