"""Conformance: what every transport does with writes, reads, signals and counters.

The destination is filled with a sentinel and compared whole, so a byte beside a piece cannot hide.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.wire.channel import MAX_UNSENT_NBYTES
from kvferry.engine.wire.tables import PIECE_ROW

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvferry.engine.link.link import Link
    from tests.conftest import Gate, Peer, Pool

    Columns = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]

SENTINEL = 0xA5
ODD_SIZES = (1, 63, 100, 2000, 4097)
LARGE = (9 << 20) + 5  # is cut, and takes several frames and chunks


def scattered(sizes: list[int], seed: int) -> tuple[Columns, int]:
    """Source offsets, destination offsets and sizes, shuffled on both sides with gaps between the
    pieces; and how large each pool must be."""
    random = np.random.default_rng(seed)
    nbytes = np.array(sizes, np.int64)
    columns = []
    for _ in range(2):
        order = random.permutation(len(sizes))
        gaps = random.integers(1, 70, len(sizes))
        offsets = np.empty(len(sizes), np.int64)
        offsets[order] = np.cumsum(nbytes[order] + gaps) - nbytes[order]
        columns.append(offsets)
    span = int(nbytes.sum()) + 70 * len(sizes) + 70
    return (columns[0], columns[1], nbytes), span


def moved(src: npt.NDArray[np.uint8], nbytes: int, pieces: Columns) -> npt.NDArray[np.uint8]:
    """What a destination of sentinels must hold after the pieces of `src` have come."""
    expected = np.full(nbytes, SENTINEL, np.uint8)
    for here, there, size in zip(*(column.tolist() for column in pieces), strict=True):
        expected[there : there + size] = src[here : here + size]
    return expected


@pytest.mark.parametrize("with_imm", [True, False])
def test_a_write_places_its_pieces_and_nothing_else(
    link: Link, peer: Peer, new_pool: Callable[..., Pool], with_imm: bool
) -> None:
    pieces, span = scattered([*ODD_SIZES, LARGE, *ODD_SIZES], seed=1)
    src, dst = new_pool(span), peer.call("pool", span, SENTINEL)
    imm = peer.call("new_imm") if with_imm else None
    total = int(pieces[2].sum())
    ticket = link.write(src.region, pieces[0], dst, pieces[1], pieces[2], imm=imm)
    assert ticket.wait() == total
    if imm is not None:
        assert peer.call("wait", peer.call("expect", imm, nbytes=total, writes=1)) == total
    assert np.array_equal(peer.contents(dst), moved(src.bytes, span, pieces))


def test_a_read_places_its_pieces_and_nothing_else(
    link: Link, peer: Peer, new_pool: Callable[..., Pool]
) -> None:
    pieces, span = scattered([*ODD_SIZES, LARGE, *ODD_SIZES], seed=2)
    src, dst = peer.call("pool", span, 0), new_pool(span, fill=SENTINEL)
    content = np.random.default_rng(2).integers(0, 256, span, np.uint8)
    peer.call("poke", src.region_id, 0, content.tobytes())
    ticket = link.read(dst.region, pieces[1], src, pieces[0], pieces[2])
    assert ticket.wait() == int(pieces[2].sum())
    assert np.array_equal(dst.bytes, moved(content, span, pieces))


@pytest.mark.parametrize("size", [1, 16, 64, 100])
@pytest.mark.parametrize("gap", [0, 1, 64])
def test_more_pieces_than_one_system_call_or_frame_takes(
    link: Link, peer: Peer, new_pool: Callable[..., Pool], size: int, gap: int
) -> None:
    count = 10_000
    random = np.random.default_rng(size + gap)
    slots = np.arange(count, dtype=np.int64) * (size + gap) + gap
    pieces = (random.permutation(slots), random.permutation(slots), np.full(count, size, np.int64))
    span = count * (size + gap) + gap
    src, there = new_pool(span), peer.call("pool", span, SENTINEL)
    assert link.write(src.region, pieces[0], there, pieces[1], size).wait() == count * size
    assert np.array_equal(peer.contents(there), moved(src.bytes, span, pieces))
    back = new_pool(span, fill=SENTINEL)
    assert link.read(back.region, pieces[0], there, pieces[1], size).wait() == count * size
    assert np.array_equal(back.bytes, moved(src.bytes, span, (pieces[0], pieces[0], pieces[2])))


def test_a_read_of_more_pieces_than_may_be_asked_for_at_once(peer: Peer, transport: str) -> None:
    """What asks for them is larger than what a peer that is busy may leave in the control channel."""
    count, nbytes = 2 * MAX_UNSENT_NBYTES // PIECE_ROW.itemsize, 2
    offsets = np.arange(count) * 3
    expected = np.full((count, 3), 7, np.uint8)
    expected[:, nbytes:] = SENTINEL
    with TransferEngine(name="patient", peer_timeout_s=3600.0) as patient:
        link = patient.connect(peer.address, transport=transport)
        memory = np.full(3 * count, SENTINEL, np.uint8)
        src, dst = peer.call("pool", 3 * count, 7), patient.register(memory)
        peer.freeze()
        try:
            ticket = link.read(dst, offsets, src, offsets[::-1], nbytes)
            given_up = link.read(dst, offsets, src, offsets[::-1], nbytes)
            given_up.cancel()  # before it is asked for, or too late
        finally:
            peer.thaw()
        assert ticket.wait() == nbytes * count
        assert link.read(dst, 0, src, 0, 2).wait() == 2
        assert given_up.done()
        assert link.error is None
    assert np.array_equal(memory, expected.ravel())


@pytest.mark.parametrize("pieces", [([], [], []), ([5, 9], [7, 30], [0, 0])])
def test_a_write_of_nothing_counts_as_a_write(
    link: Link, peer: Peer, new_pool: Callable[..., Pool], pieces: tuple[list[int], ...]
) -> None:
    src, dst = new_pool(64), peer.call("pool", 64, SENTINEL)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, writes=1)
    assert link.write(src.region, pieces[0], dst, pieces[1], pieces[2], imm=imm).wait() == 0
    assert peer.call("wait", ticket) == 0
    assert bool((peer.contents(dst) == SENTINEL).all())


def test_empty_pieces_among_others_are_skipped(
    link: Link, peer: Peer, new_pool: Callable[..., Pool]
) -> None:
    src, dst = new_pool(64), peer.call("pool", 64, SENTINEL)
    here, there, nbytes = np.array([[0, 64, 9, 3], [64, 5, 20, 0], [0, 0, 8, 0]], np.int64)
    assert link.write(src.region, here, dst, there, nbytes).wait() == 8
    assert np.array_equal(peer.contents(dst), moved(src.bytes, 64, (here, there, nbytes)))


def test_a_signal_is_a_write_without_bytes(link: Link, peer: Peer) -> None:
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, writes=2, nbytes=0)
    assert link.signal(imm).wait() == 0
    assert not peer.call("done", ticket)
    assert link.signal(imm).wait() == 0
    assert peer.call("wait", ticket) == 0


def arrived(link: Link, peer: Peer) -> None:
    """Returns once the peer has counted everything that was written before."""
    marker = peer.call("new_imm")
    ticket = peer.call("expect", marker, writes=1)
    link.signal(marker).wait()
    peer.call("wait", ticket)


@pytest.mark.parametrize("expect_first", [True, False])
@pytest.mark.parametrize("by", ["nbytes", "writes", "both"])
def test_an_expectation_may_come_before_or_after_the_bytes(
    link: Link, peer: Peer, new_pool: Callable[..., Pool], expect_first: bool, by: str
) -> None:
    src, dst = new_pool(3000), peer.call("pool", 3000, SENTINEL)
    imm = peer.call("new_imm")
    wanted = {"nbytes": {"nbytes": 3000}, "writes": {"writes": 3}}
    goal = wanted.get(by, {"nbytes": 3000, "writes": 3})
    ticket = peer.call("expect", imm, **goal) if expect_first else None
    for start in (1000, 0, 2000):
        if ticket is not None:
            assert not peer.call("done", ticket)
        assert link.write(src.region, start, dst, start, 1000, imm=imm).wait() == 1000
    if ticket is None:
        arrived(link, peer)
        ticket = peer.call("expect", imm, **goal)
        assert peer.call("done", ticket)
    assert peer.call("wait", ticket) == 3000
    assert np.array_equal(peer.contents(dst), src.bytes)


def test_an_incomplete_sum_does_not_complete(
    link: Link, peer: Peer, new_pool: Callable[..., Pool]
) -> None:
    src, dst = new_pool(1000), peer.call("pool", 1000, SENTINEL)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=1000, writes=2)
    link.write(src.region, 0, dst, 0, 1000, imm=imm).wait()  # enough bytes, one write too few
    arrived(link, peer)
    assert not peer.call("done", ticket)
    link.signal(imm).wait()
    assert peer.call("wait", ticket) == 1000


def test_bytes_of_several_links_add_up(
    link: Link, peer: Peer, transport: str, new_pool: Callable[..., Pool]
) -> None:
    src, dst = new_pool(500_000), peer.call("pool", 1_000_000, SENTINEL)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=1_000_000, writes=2)
    with TransferEngine(name="other") as other:
        second = other.connect(peer.address, transport=transport)
        region = other.register(src.bytes)
        tickets = [
            link.write(src.region, 0, dst, 0, 500_000, imm=imm),
            second.write(region, 0, dst, 500_000, 500_000, imm=imm),
        ]
        assert peer.call("wait", ticket) == 1_000_000
        assert [t.wait() for t in tickets] == [500_000, 500_000]
    assert np.array_equal(peer.contents(dst), np.tile(src.bytes, 2))


def test_the_other_end_of_a_link_writes_and_reads_too(
    link: Link, engine: TransferEngine, peer: Peer, new_pool: Callable[..., Pool]
) -> None:
    mine = new_pool(5000, fill=SENTINEL)
    theirs = peer.call("pool", 5000, 7)
    imm = engine.new_imm()
    ticket = engine.expect(imm, nbytes=2000, writes=1, links=[link])
    sent = peer.call(
        "write", engine.engine_id, theirs.region_id, 0, mine.descriptor, 1500, 2000, imm
    )
    assert ticket.wait() == 2000
    assert peer.call("wait", sent) == 2000
    expected = np.full(5000, SENTINEL, np.uint8)
    expected[1500:3500] = 7
    assert np.array_equal(mine.bytes, expected)
    got = peer.call("read", engine.engine_id, theirs.region_id, 100, mine.descriptor, 1400, 300)
    assert peer.call("wait", got) == 300
    expected_there = np.full(5000, 7, np.uint8)
    expected_there[100:400] = mine.bytes[1400:1700]
    assert np.array_equal(peer.contents(theirs), expected_there)


def test_only_the_links_that_are_named_complete_an_expectation(
    link: Link, engine: TransferEngine, peer: Peer, transport: str, new_pool: Callable[..., Pool]
) -> None:
    """imms are easily guessed; and another peer may make a mistake."""
    mine = new_pool(1000, fill=SENTINEL)
    theirs = peer.call("pool", 1000, 7)
    imm, marker = engine.new_imm(), engine.new_imm()
    foreign = engine.foreign_writes
    with TransferEngine(name="another") as another:
        other = another.connect(engine.address, transport=transport)
        region = another.register(np.zeros(1000, np.uint8))
        other.write(region, 0, mine.descriptor, 0, 500, imm=imm).wait(15.0)  # before it is expected
        ticket = engine.expect(imm, nbytes=1000, writes=1, links=[link])
        other.write(region, 0, mine.descriptor, 0, 500, imm=imm).wait(15.0)
        other.abort(imm, "no")
        meeting = engine.expect(marker, writes=1)
        other.signal(marker).wait(15.0)
        meeting.wait(15.0)
        assert not ticket.done()
        assert engine.foreign_writes > foreign
    sent = peer.call("write", engine.engine_id, theirs.region_id, 0, mine.descriptor, 0, 1000, imm)
    assert ticket.wait(15.0) == 1000
    assert peer.call("wait", sent) == 1000
    assert bool((mine.bytes == 7).all())


def test_both_ends_write_much_at_once(
    link: Link, engine: TransferEngine, peer: Peer, new_pool: Callable[..., Pool]
) -> None:
    nbytes = 24 << 20
    mine, inbox = new_pool(nbytes), new_pool(nbytes, fill=SENTINEL)
    theirs, outbox = peer.call("pool", nbytes, SENTINEL), peer.call("pool", nbytes, 3)
    imm = engine.new_imm()
    ticket = engine.expect(imm, nbytes=nbytes)
    sent = link.write(mine.region, 0, theirs, 0, nbytes)
    back = peer.call(
        "write", engine.engine_id, outbox.region_id, 0, inbox.descriptor, 0, nbytes, imm
    )
    assert (sent.wait(), ticket.wait(), peer.call("wait", back)) == (nbytes, nbytes, nbytes)
    assert np.array_equal(peer.contents(theirs), mine.bytes)
    assert bool((inbox.bytes == 3).all())


def test_threads_may_share_a_link(link: Link, peer: Peer, new_pool: Callable[..., Pool]) -> None:
    pieces, span = scattered([100 + 37 * i for i in range(200)], seed=3)
    src, dst = new_pool(span), peer.call("pool", span, SENTINEL)
    total = int(pieces[2].sum())
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=total, writes=200)
    failures: list[BaseException] = []

    def write_some(first: int) -> None:
        try:
            tickets = [
                link.write(src.region, here, dst, there, size, imm=imm)
                for here, there, size in zip(*(c[first::4] for c in pieces), strict=True)
            ]
            assert sum(t.wait() for t in tickets) == int(pieces[2][first::4].sum())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write_some, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert peer.call("wait", ticket) == total
    assert np.array_equal(peer.contents(dst), moved(src.bytes, span, pieces))


def test_tickets_can_be_awaited(
    link: Link,
    peer: Peer,
    new_pool: Callable[..., Pool],
    hold: Callable[[str], Gate],
) -> None:
    src, dst = new_pool(1000), peer.call("pool", 1000, SENTINEL)

    async def several() -> list[int]:
        first = await link.write(src.region, 0, dst, 0, 10)
        gate = hold("write")
        pending = [link.write(src.region, i, dst, i, 1) for i in range(10, 20)]
        waiting = asyncio.gather(*(_awaited(ticket) for ticket in pending))
        await asyncio.to_thread(gate.reached.wait)
        assert not any(ticket.done() for ticket in pending)
        gate.open()
        return [first, *await waiting]

    assert asyncio.run(several()) == [10] + [1] * 10
    assert np.array_equal(peer.contents(dst)[:20], src.bytes[:20])


async def _awaited(ticket: Any) -> int:
    nbytes: int = await ticket
    return nbytes


def test_scatter_and_barrier_speak_to_several_links(
    link: Link, engine: TransferEngine, peer: Peer, transport: str, new_pool: Callable[..., Pool]
) -> None:
    src, dst = new_pool(100), peer.call("pool", 100, SENTINEL)
    second = engine.connect(peer.address, transport=transport)
    imm, meeting = peer.call("new_imm"), peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=30, writes=2)
    everybody = peer.call("expect", meeting, writes=2)
    links = [link, second]
    whole = engine.scatter(links, src.region, [0, 50], [dst, dst], [5, 70], [10, 20], imm=imm)
    assert whole.wait() == 30
    assert engine.barrier(links, meeting).wait() == 0
    assert peer.call("wait", ticket) == 30
    assert peer.call("wait", everybody) == 0
    expected = np.full(100, SENTINEL, np.uint8)
    expected[5:15], expected[70:90] = src.bytes[:10], src.bytes[50:70]
    assert np.array_equal(peer.contents(dst), expected)
    second.close()
