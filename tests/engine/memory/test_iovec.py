"""Scatter-gather lists, walked by the system call itself on this very process."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os

import numpy as np
import pytest

from kvferry.engine.memory import iovec

SENTINEL = 0xA5
PIECE = 24


def pieces(array: np.ndarray[tuple[int], np.dtype[np.uint8]], offsets: list[int]) -> iovec.Iovec:
    return iovec.make(array.ctypes.data + np.array(offsets), np.full(len(offsets), PIECE))


def mapped(nbytes: int) -> tuple[int, ctypes.CDLL]:
    """Maps memory that nobody else frees; its address, and what unmaps it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0), libc


@pytest.mark.parametrize("run", [2, 16, 1024, 3000])
def test_pieces_that_are_neighbours_there_are_joined(run: int) -> None:
    """Of 3,000 pieces in random order, runs of so many lie side by side at the remote end."""
    rng = np.random.default_rng(run)
    count = 3000
    here = rng.integers(0, 256, count * PIECE, np.uint8)
    there = np.full(count * 2 * PIECE + PIECE, SENTINEL, np.uint8)
    places = [PIECE + (n + n // run * run) * PIECE for n in range(count)]
    order = rng.permutation(count)
    sources = [int(n) * PIECE for n in rng.permutation(count)]
    local = pieces(here, [sources[n] for n in order])
    remote = pieces(there, [places[n] for n in order])
    want = there.copy()
    for source, place in zip(sources, places, strict=True):
        want[place : place + PIECE] = here[source : source + PIECE]
    joined = iovec.join_remote(local, remote)
    neighbours = sum(b - a == PIECE for a, b in itertools.pairwise(places))
    assert len(joined[1]) == count - neighbours
    assert len(joined[0]) == count
    iovec.process_vm(os.getpid(), *joined, count * PIECE, write=True)
    assert np.array_equal(there, want)


def test_what_joins_little_stays_as_it_is() -> None:
    memory = np.zeros(1000 * PIECE, np.uint8)
    local, remote = (pieces(memory, [n * 3 * PIECE for n in range(300)]) for _ in range(2))
    same = iovec.join_remote(local, remote)
    assert same[0] is local
    assert same[1] is remote


@pytest.mark.parametrize("write", [True, False])
def test_a_few_entries_are_copied_without_numpy(write: bool) -> None:
    ours, theirs = (np.full(10 * PIECE, value, np.uint8) for value in (1, SENTINEL))
    want = [ours.copy(), theirs.copy()]
    entries: list[list[int]] = [[], []]
    for number, (here, there) in enumerate([(7, 1), (2, 8), (5, 5)]):
        source, target = (ours, theirs) if write else (theirs, ours)
        fresh = np.arange(number, number + PIECE, dtype=np.uint8)
        for array, place in ((ours, here), (theirs, there)):
            copied = array is target
            want[copied == write][place * PIECE : (place + 1) * PIECE] = fresh
            if array is source:
                array[place * PIECE : (place + 1) * PIECE] = fresh
        entries[0] += [ours.ctypes.data + here * PIECE, PIECE]
        entries[1] += [theirs.ctypes.data + there * PIECE, PIECE]
    local, remote = iovec.few(entries[0]), iovec.few(entries[1])
    iovec.process_vm(os.getpid(), local, remote, 3 * PIECE, write=write)
    assert np.array_equal(ours, want[0])
    assert np.array_equal(theirs, want[1])


def test_a_few_entries_that_cannot_all_be_copied_fail_as_many_do() -> None:
    """Memory that is not mapped, behind one entry that is: the first is copied, the error told."""
    ours, theirs = np.arange(PIECE, dtype=np.uint8), np.full(PIECE, SENTINEL, np.uint8)
    local = iovec.few([ours.ctypes.data, PIECE, ours.ctypes.data, PIECE])
    remote = iovec.few([theirs.ctypes.data, PIECE, 16, PIECE])
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number says which
        iovec.process_vm(os.getpid(), local, remote, 2 * PIECE, write=True)
    assert caught.value.errno == errno.EFAULT
    assert np.array_equal(theirs, ours)


def test_holes_between_pieces_are_none_in_them() -> None:
    """Pieces in two mappings, in any order, one inside another; then pieces that reach the hole."""
    page = mmap.PAGESIZE
    base, libc = mapped(64 * page)
    rng = np.random.default_rng(1)
    low = rng.integers(0, 8 * page - PIECE, 50)
    high = rng.integers(12 * page, 64 * page - PIECE, 50)
    addresses = base + rng.permutation(np.concatenate((low, high)))
    assert iovec.is_mapped(addresses, 8 * page - PIECE)
    assert libc.munmap(base + 8 * page, 4 * page) == 0
    assert iovec.is_mapped(addresses, PIECE)
    with_a_long_one, nbytes = np.append(addresses, base), np.full(101, PIECE)
    for reach, whole in ((8 * page, True), (8 * page + 1, False)):
        nbytes[-1] = reach
        assert iovec.is_mapped(with_a_long_one, nbytes) is whole
    for place, whole in ((8 * page - PIECE, True), (12 * page - 1, False), (10 * page, False)):
        assert iovec.is_mapped(np.append(addresses, base + place), PIECE) is whole
    assert libc.munmap(base, 64 * page) == 0
    assert not iovec.is_mapped(addresses, PIECE)
    assert iovec.is_mapped(addresses[:0], PIECE)
