"""The request that `kvferry bench transfer` moves: its blocks, the pool that holds them, its bytes.

Needs NumPy and nothing of kvferry: other libraries run this file in environments of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Int64s = npt.NDArray[np.int64]

NUM_REQUESTS = 16  # different ones, cycled, so that no library can keep "the" request prepared
NUM_SAMPLES = 64
MAX_SAMPLE_NBYTES = 32 << 10
POISON = 0xA5
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so every word of a pool differs from every other


@dataclasses.dataclass(frozen=True)
class Shape:
    """A pool `[plane][layer][block][byte]`, and how many of its blocks one request has.

    The block ids are the same in every plane and layer, as in a paged cache.
    """

    name: str
    num_planes: int
    num_layers: int
    pool_blocks: int
    num_blocks: int
    block_nbytes: int

    @property
    def num_rows(self) -> int:
        """Layers of all planes together."""
        return self.num_planes * self.num_layers

    @property
    def num_pieces(self) -> int:
        """Pieces of one request, before anybody joins neighbours."""
        return self.num_rows * self.num_blocks

    @property
    def nbytes(self) -> int:
        """Bytes of one request."""
        return self.num_pieces * self.block_nbytes

    @property
    def pool_nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_rows * self.pool_blocks * self.block_nbytes


# 128 MiB three times over, and one short prompt: 8 blocks of 16 tokens.
LARGE_BLOCKS = Shape("32 KiB blocks", 2, 32, 128, 64, 32 << 10)
SMALL_BLOCKS = Shape("4 KiB blocks", 2, 32, 1024, 512, 4 << 10)
CONTIGUOUS = Shape("one piece", 1, 1, 2, 1, 128 << 20)
SMALL_HANDOFF = Shape("128 tokens", 2, 32, 1024, 8, 4 << 10)


@functools.lru_cache(maxsize=256)
def block_ids(shape: Shape, request: int) -> tuple[Int64s, Int64s]:
    """Source and destination block ids of a request: independent random permutations."""
    rng = np.random.default_rng((7, shape.pool_blocks, shape.num_blocks, request % NUM_REQUESTS))
    src, dst = rng.permutation(shape.pool_blocks), rng.permutation(shape.pool_blocks)
    return src[: shape.num_blocks].astype(np.int64), dst[: shape.num_blocks].astype(np.int64)


def piece_numbers(shape: Shape, ids: Int64s) -> Int64s:
    """Return which blocks of the pool, counted from its start, the pieces of these ids are."""
    rows = np.arange(shape.num_rows, dtype=np.int64) * shape.pool_blocks
    numbers: Int64s = (rows[:, None] + ids).reshape(-1)
    return numbers


def sides(shape: Shape, request: int, *, write: bool) -> tuple[Int64s, Int64s]:
    """Piece numbers of a request, at the end that asks for the transfer and at the other."""
    src, dst = (piece_numbers(shape, ids) for ids in block_ids(shape, request))
    return (src, dst) if write else (dst, src)


class Pool:
    """Anonymous, page-aligned host memory, as an allocator gives it to an inference engine."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self.nbytes = nbytes

    def fill(self) -> None:
        """Write the pattern: no two words of the pool are equal."""
        words = self.bytes.view(np.uint64)
        words[:] = np.arange(1, len(words) + 1, dtype=np.uint64)
        words *= np.uint64(_MULTIPLIER)

    def clear(self) -> None:
        """Write zeros, so that every page is there before a clock runs."""
        self.bytes[:] = 0

    def blocks(self, shape: Shape) -> Bytes:
        """Return the pool's blocks as rows."""
        return self.bytes[: shape.pool_nbytes].reshape(-1, shape.block_nbytes)

    def poison(self, shape: Shape, request: int) -> None:
        """Spoil the sampled bytes of a request's destination."""
        for _, dst_offset, nbytes in _samples(shape, request):
            self.bytes[dst_offset : dst_offset + nbytes] = POISON

    def holds(self, shape: Shape, request: int) -> bool:
        """Return whether the sampled bytes of a request's destination are those of its source."""
        return all(
            np.array_equal(
                self.bytes[dst_offset : dst_offset + nbytes], _pattern(src_offset, nbytes)
            )
            for src_offset, dst_offset, nbytes in _samples(shape, request)
        )


def _samples(shape: Shape, request: int) -> Iterator[tuple[int, int, int]]:
    """Source offset, destination offset and length of samples spread over a request.

    Whole blocks, or parts of them where blocks are large; the first and the last byte are among
    them.
    """
    src, dst = sides(shape, request, write=True)
    nbytes = min(shape.block_nbytes, MAX_SAMPLE_NBYTES)
    parts = -(-shape.block_nbytes // nbytes)
    count = min(NUM_SAMPLES, shape.num_pieces * parts)
    for sample in np.linspace(0, shape.num_pieces * parts - 1, count).astype(int).tolist():
        piece, part = divmod(sample, parts)
        begin = min(part * nbytes, shape.block_nbytes - nbytes)
        yield (
            int(src[piece]) * shape.block_nbytes + begin,
            int(dst[piece]) * shape.block_nbytes + begin,
            nbytes,
        )


def _pattern(offset: int, nbytes: int) -> Bytes:
    first = offset // 8 + 1
    words = np.arange(first, first + nbytes // 8, dtype=np.uint64) * np.uint64(_MULTIPLIER)
    pattern: Bytes = words.view(np.uint8)
    return pattern
