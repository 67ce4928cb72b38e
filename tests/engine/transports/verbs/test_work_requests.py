"""Pieces into work requests: what is joined, how shares are cut, and that nothing is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.transports.verbs.work_requests import (
    MAX_REQUEST_NBYTES,
    SHARE_ALIGN_NBYTES,
    Pieces,
    Share,
    cuts,
    own_regions,
    pieces_of,
    split,
    starts_of_requests,
)

if TYPE_CHECKING:
    from kvferry.engine.transfer_engine import TransferEngine

KEYS = (np.array([11, 22]), np.array([33, 44]))
TRANSFER: Any = None  # shares only hold on to it


def columns(rows: list[tuple[int, int, int, int, int]]) -> Pieces:
    return Pieces(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))


@st.composite
def some_pieces(draw: st.DrawFn) -> Pieces:
    sizes = draw(st.lists(st.integers(1, 300_000), min_size=1, max_size=40))
    gaps = draw(st.lists(st.sampled_from([0, 0, 5]), min_size=len(sizes), max_size=len(sizes)))
    rows, remote = [], 1 << 30
    for number, (size, gap) in enumerate(zip(sizes, gaps, strict=True)):
        rows.append(((number * 1_000_003) % 7 << 24, remote, size, number // 20, number % 2))
        remote += size + gap
    return columns(rows)


def bytes_of(pieces: Pieces) -> list[tuple[int, int, int, int]]:
    """Local address, remote address and both regions of every 1,000th byte and of each end."""
    marks = []
    for local, remote, nbytes, owner, source in zip(*(c.tolist() for c in pieces), strict=True):
        assert nbytes > 0
        first = -(-remote // 1000) * 1000
        marks += [
            (local + at - remote, at, owner, source) for at in range(first, remote + nbytes, 1000)
        ]
    return marks


@given(some_pieces(), st.integers(1, 9))
def test_shares_have_every_byte_once_and_are_even(pieces: Pieces, parts: int) -> None:
    shares = split(pieces, parts)
    assert 1 <= len(shares) <= parts
    assert [mark for share in shares for mark in bytes_of(share)] == bytes_of(pieces)
    total = int(pieces.nbytes.sum())
    assert sum(int(share.nbytes.sum()) for share in shares) == total
    for share in shares:
        assert abs(int(share.nbytes.sum()) - total / len(shares)) <= 2 * SHARE_ALIGN_NBYTES


@given(some_pieces(), st.integers(1, 16), st.integers(1, 7))
def test_work_requests_have_every_byte_once(pieces: Pieces, entries: int, step: int) -> None:
    share = Share(TRANSFER, pieces, entries, KEYS)
    rows: list[list[int]] = []
    nbytes = 0
    while share.left:
        some, size = share.take(min(step, share.left))
        rows += some
        nbytes += size
    assert nbytes == int(pieces.nbytes.sum())
    row = 0
    for address, key, *local in rows:
        for here, size, local_key in zip(local[::3], local[1::3], local[2::3], strict=True):
            assert (here, size) == (pieces.local[row], pieces.nbytes[row])
            assert local_key == KEYS[0][pieces.source[row]]
            assert key == KEYS[1][pieces.owner[row]]
            assert address == pieces.remote[row]
            address += size
            row += 1
        assert len(local) <= 3 * entries
    assert row == len(pieces.local)


def test_neighbours_at_the_peer_share_a_request() -> None:
    pieces = columns(
        [(0, 100, 10, 0, 0), (50, 110, 10, 0, 0), (90, 120, 5, 0, 0), (0, 200, 1, 0, 0)]
    )
    assert starts_of_requests(pieces, 16).tolist() == [0, 3]
    assert starts_of_requests(pieces, 2).tolist() == [0, 2, 3]
    assert starts_of_requests(pieces, 1).tolist() == [0, 1, 2, 3]


def test_neighbours_in_different_regions_do_not() -> None:
    pieces = columns([(0, 100, 10, 0, 0), (50, 110, 10, 1, 0)])
    assert starts_of_requests(pieces, 16).tolist() == [0, 1]


@pytest.mark.parametrize("nested", [False, True])
def test_each_piece_finds_its_region(nested: bool) -> None:
    spans = [(1000, 500), (100, 5000)] if nested else [(5000, 100), (1000, 500)]
    regions = tuple(SimpleNamespace(address=start, nbytes=size) for start, size in spans)
    transfer: Any = SimpleNamespace(
        local=np.array(
            [[1000, 500], [1400, 100], [1450, 100] if nested else [5050, 50]], np.uint64
        ),
        nbytes=np.array([500, 100, 100 if nested else 50]),
        local_regions=regions,
        remote_regions=(SimpleNamespace(address=1 << 20),),
        remote_index=np.zeros(3, np.int64),
        remote_offset=np.arange(3) * 1000,
    )
    pieces = pieces_of(transfer)
    assert pieces.source.tolist() == ([0, 0, 1] if nested else [1, 1, 0])
    assert pieces.remote.tolist() == [1 << 20, (1 << 20) + 1000, (1 << 20) + 2000]


@given(
    st.lists(st.integers(1, 3 * MAX_REQUEST_NBYTES), min_size=1, max_size=6),
    st.integers(1, MAX_REQUEST_NBYTES),
)
def test_cuts_have_every_byte_once_and_none_too_long(sizes: list[int], limit: int) -> None:
    limit = max(limit, 1000)
    nbytes = np.array(sizes, np.int64)
    row, begin, parts = cuts(nbytes, limit)
    assert parts.min() > 0
    assert parts.max() <= limit
    assert np.array_equal(np.bincount(row, parts).astype(np.int64), nbytes)
    for number, size in enumerate(sizes):
        mine = row == number
        assert begin[mine].tolist() == list(range(0, size, limit))


def test_a_piece_longer_than_a_device_takes_is_cut_into_work_requests() -> None:
    total = 5 << 30  # only addresses: nothing of it is touched
    region = SimpleNamespace(address=1 << 40, nbytes=total)
    transfer: Any = SimpleNamespace(
        local=np.array([[1 << 40, total]], np.uint64),
        nbytes=np.array([total]),
        remote_index=np.array([0]),
        remote_offset=np.array([64]),
        remote_regions=(SimpleNamespace(address=1 << 50),),
        local_regions=(region,),
    )
    pieces = pieces_of(transfer)
    assert pieces.nbytes.max() == MAX_REQUEST_NBYTES
    assert pieces.nbytes.sum() == total
    assert (pieces.local - (1 << 40) == pieces.remote - (1 << 50) - 64).all()
    share = Share(TRANSFER, pieces, 16, KEYS)
    assert share.batch * MAX_REQUEST_NBYTES <= 16 << 20
    posted = 0
    while share.left:
        rows, nbytes = share.take(min(share.batch, share.left))
        assert nbytes <= 16 << 20
        posted += sum(row[3] for row in rows)
    assert posted == total


def test_a_batch_of_small_pieces_is_as_many_as_a_doorbell_takes() -> None:
    pieces = columns([(at << 20, at << 21, 4096, 0, 0) for at in range(100)])
    assert Share(TRANSFER, pieces, 16, KEYS).batch == 32


def test_pieces_of_a_cache_find_their_region(engine: TransferEngine) -> None:
    layers = [np.zeros((4, 8, 8), np.uint8) for _ in range(3)]
    cache = engine.register_cache(KVLayout.from_tensors(layers, "block token dim"), layers)
    transfer: Any = SimpleNamespace(
        local=np.array([[layers[n].ctypes.data + 64 * n, 64] for n in (2, 0, 1)], np.uint64),
        nbytes=np.array([64, 64, 64]),
        remote_index=np.array([0, 0, 0]),
        remote_offset=np.array([0, 64, 128]),
        remote_regions=(SimpleNamespace(address=1 << 50),),
        local_regions=(cache,),
    )
    own = own_regions(transfer)
    found = [own[row].address for row in pieces_of(transfer).source]
    assert found == [layers[n].ctypes.data for n in (2, 0, 1)]
    cache.deregister()
