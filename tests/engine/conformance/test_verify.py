"""Conformance: `verify=True` notices bytes that changed on their way, and is free when it is off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import ChecksumMismatch
from kvferry.engine.memory import iovec
from kvferry.engine.transfer_engine import TransferEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.link.link import Link
    from tests.conftest import Peer, Pool

SENTINEL = 0xA5
NBYTES = (20 << 20) + 3  # several frames and chunks


@pytest.fixture(scope="module")
def careful() -> Iterator[TransferEngine]:
    with TransferEngine(name="careful", verify=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def careful_peer(start_module_peer: Callable[..., Peer]) -> Peer:
    return start_module_peer(name="careful peer", verify=True)


@pytest.fixture
def checked(careful: TransferEngine, careful_peer: Peer, transport: str) -> Iterator[Link]:
    link = careful.connect(careful_peer.address, transport=transport)
    careful_peer.call("accept", careful.engine_id)
    yield link
    careful_peer.call("spoil_checksums", False)
    link.close()


def pieces_of(nbytes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Offsets and sizes of odd pieces that fill a pool but for one byte between them."""
    sizes = np.array([1, 63, 100, 2000, 4097, 5 << 20, 9 << 20, 1 << 20], np.int64)
    return np.cumsum(sizes + 1) - sizes - 1, sizes


def test_verified_bytes_arrive_and_count_once(
    checked: Link, careful: TransferEngine, careful_peer: Peer
) -> None:
    offsets, sizes = pieces_of(NBYTES)
    total = int(sizes.sum())
    content = np.random.default_rng(5).integers(0, 256, NBYTES, np.uint8)
    mine, theirs = careful.register(content), careful_peer.call("pool", NBYTES, SENTINEL)
    imm = careful_peer.call("new_imm")
    ticket = careful_peer.call("expect", imm, nbytes=total, writes=1)
    assert checked.write(mine, offsets, theirs, offsets, sizes, imm=imm).wait(15.0) == total
    assert careful_peer.call("wait", ticket) == total
    expected = np.full(NBYTES, SENTINEL, np.uint8)
    for start, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        expected[start : start + size] = content[start : start + size]
    assert np.array_equal(careful_peer.contents(theirs), expected)
    back = np.full(NBYTES, SENTINEL, np.uint8)
    region = careful.register(back)
    assert checked.read(region, offsets, theirs, offsets, sizes).wait(15.0) == total
    assert np.array_equal(back, expected)
    imm = careful_peer.call("new_imm")
    ticket = careful_peer.call("expect", imm, writes=1)
    checked.signal(imm).wait(15.0)
    assert careful_peer.call("wait", ticket) == 0
    for each in (mine, region):
        each.deregister()


def test_a_write_that_changed_on_its_way_is_not_counted(
    checked: Link, careful: TransferEngine, careful_peer: Peer
) -> None:
    mine, theirs = careful.register(np.ones(NBYTES, np.uint8)), careful_peer.call("pool", NBYTES, 0)
    imm = careful_peer.call("new_imm")
    ticket = careful_peer.call("expect", imm, nbytes=NBYTES)
    careful_peer.call("spoil_checksums", True)
    with pytest.raises(ChecksumMismatch, match="not the bytes that were sent") as sender:
        checked.write(mine, 0, theirs, 0, NBYTES, imm=imm).wait(15.0)
    with pytest.raises(ChecksumMismatch) as receiver:
        careful_peer.call("wait", ticket)
    for caught, peer in ((sender, "careful peer"), (receiver, "careful")):
        assert (caught.value.imm, caught.value.peer) == (imm, peer)
        assert caught.value.retryable
    careful_peer.call("spoil_checksums", False)
    assert checked.error is None  # the same handoff, with a new imm, may succeed
    imm = careful_peer.call("new_imm")
    ticket = careful_peer.call("expect", imm, nbytes=NBYTES)
    assert checked.write(mine, 0, theirs, 0, NBYTES, imm=imm).wait(15.0) == NBYTES
    assert careful_peer.call("wait", ticket) == NBYTES
    mine.deregister()


def test_a_read_that_changed_on_its_way_fails(
    checked: Link, careful: TransferEngine, careful_peer: Peer
) -> None:
    mine, theirs = careful.register(np.ones(NBYTES, np.uint8)), careful_peer.call("pool", NBYTES, 0)
    careful_peer.call("spoil_checksums", True)
    with pytest.raises(ChecksumMismatch):
        checked.read(mine, 0, theirs, 0, NBYTES).wait(15.0)
    careful_peer.call("spoil_checksums", False)
    assert checked.read(mine, 0, theirs, 0, NBYTES).wait(15.0) == NBYTES
    mine.deregister()


def test_the_reader_decides_whether_a_read_is_verified(
    careful: TransferEngine, peer: Peer, transport: str
) -> None:
    """`peer` was started without `verify`."""
    link = careful.connect(peer.address, transport=transport)
    peer.call("accept", careful.engine_id)
    mine, theirs = careful.register(np.ones(NBYTES, np.uint8)), peer.call("pool", NBYTES, 0)
    peer.call("spoil_checksums", True)
    with pytest.raises(ChecksumMismatch):
        link.read(mine, 0, theirs, 0, NBYTES).wait(15.0)
    peer.call("spoil_checksums", False)
    mine.deregister()
    link.close()


def test_nothing_is_summed_up_without_verify(
    engine: TransferEngine,
    peer: Peer,
    transport: str,
    new_pool: Callable[..., Pool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(_: object) -> int:
        raise AssertionError("a checksum was computed")

    monkeypatch.setattr(iovec, "checksum", never)
    link = engine.connect(peer.address, transport=transport)
    peer.call("accept", engine.engine_id)
    peer.call("spoil_checksums", True)  # would be noticed if it were compared
    mine, theirs = new_pool(1000), peer.call("pool", 1000, SENTINEL)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=1000)
    assert link.write(mine.region, 0, theirs, 0, 1000, imm=imm).wait(15.0) == 1000
    assert peer.call("wait", ticket) == 1000
    assert link.read(mine.region, 0, theirs, 0, 1000).wait(15.0) == 1000
    peer.call("spoil_checksums", False)
    link.close()
