"""How a launch is cut into tiles: what is contiguous on both sides, how wide, how much a program.

A *piece* is one maximal run of a block that is contiguous on both sides. Pieces are cut into
chunks of at most `words` words; a tile is `chunks` consecutive chunks of one layer and plane, and
one program moves a tile at a time. Short pieces share a tile, a long one spreads over several: a
program always has the same number of accesses in flight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from .paged import WIDEST_NBYTES

if TYPE_CHECKING:
    from .paged import Geometry

_FEWEST_WORDS = 16  # 128 bytes: one cache line
_MOST_WORDS = 8192  # a program's words live in registers


class Tuning(NamedTuple):
    """How a launch is cut up: bytes that one program moves at a time, and its warps."""

    tile_nbytes: int
    num_warps: int


# 256 MiB and 1 GiB over NVLink: 367.6 and 371.1 GB/s with 32 KiB and 8 warps, 366.5 and 370.3 with
# 16 KiB. Below about 4 MiB there are fewer such tiles than an H200 has places for programs: 1 MiB
# from stream to stream takes 11.0 us with 8 KiB and 8 warps, 11.2 with 4 KiB and 4.
LARGE = Tuning(tile_nbytes=32 << 10, num_warps=8)
SMALL = Tuning(tile_nbytes=8 << 10, num_warps=8)
STAGED = Tuning(tile_nbytes=4 << 10, num_warps=4)
SMALL_BELOW_NBYTES = 4 << 20
# A capped launch has about one program on each multiprocessor it may use, which alone has to cover
# the time that memory takes to answer: as much in flight as a program can have.
CAPPED = Tuning(tile_nbytes=64 << 10, num_warps=32)


def default_tuning(nbytes: int, *, staged: bool, capped: bool) -> Tuning:
    """Return the tuning for a launch that moves `nbytes`; `staged` if one side is dense staging.

    With staging, small tiles are the fastest at every size: 1 GiB in pieces of 1 KiB to 256 KiB on
    an H200, share of a device memcpy: gather 0.97 to 0.98 with 4 KiB and 4 warps, 0.94 to 0.96 with
    16 KiB and 8 warps; scatter 0.95 and 0.93. Between two paged sides they are slow (0.72 and 0.90).
    """
    if capped and nbytes >= SMALL_BELOW_NBYTES:
        return CAPPED
    if staged:
        return STAGED
    return SMALL if nbytes < SMALL_BELOW_NBYTES else LARGE


class Strides(NamedTuple):
    """Strides of one side, in units of the plan's `unit_nbytes`."""

    block: int
    outer: int
    inner: int


class TilePlan(NamedTuple):
    """The constants of a launch: the shape of a block in pieces, of a piece in chunks, of a tile."""

    unit_nbytes: int
    word_nbytes: int
    outer: int
    inner: int
    piece_words: int
    piece_chunks: int
    words: int
    chunks: int
    src: Strides
    dst: Strides

    @property
    def block_chunks(self) -> int:
        """Chunks of one block of one layer and plane."""
        return self.outer * self.inner * self.piece_chunks


def plan_tiles(
    src: Geometry | None, dst: Geometry | None, alignment_nbytes: int, tuning: Tuning
) -> TilePlan:
    """Merge what is contiguous on both sides, then chooses the access width and the tile.

    Args:
        src: None for dense staging, which holds block after block; so is `dst`, but not both.
        dst: as `src`.
        alignment_nbytes: largest power of two that divides the address of the staging.
        tuning: no tile is smaller than a word for each thread.
    """
    paged = [side for side in (src, dst) if side is not None]
    outer, inner, piece_nbytes = paged[0].outer, paged[0].inner, paged[0].dim_nbytes
    if inner == 1 or all(side.inner_stride_nbytes == piece_nbytes for side in paged):
        piece_nbytes, inner = piece_nbytes * inner, 1
    if outer == 1 or (
        inner == 1 and all(side.outer_stride_nbytes == piece_nbytes for side in paged)
    ):
        piece_nbytes, outer = piece_nbytes * outer if inner == 1 else piece_nbytes, 1
    strides_nbytes = [
        (
            side.block_stride_nbytes,
            side.outer_stride_nbytes if outer > 1 else 0,
            side.inner_stride_nbytes if inner > 1 else 0,
        )
        if side is not None
        else (outer * inner * piece_nbytes, inner * piece_nbytes, piece_nbytes)
        for side in (src, dst)
    ]
    unit_nbytes = math.gcd(
        WIDEST_NBYTES,
        alignment_nbytes,
        piece_nbytes,
        *(side.alignment_nbytes for side in paged),
        *(stride for side in strides_nbytes for stride in side),
    )
    word_nbytes = min(8, unit_nbytes)
    piece_words = piece_nbytes // word_nbytes
    tile_words = words_of_tile(tuning, word_nbytes)
    words = chunk_words(piece_words, tile_words)
    return TilePlan(
        unit_nbytes=unit_nbytes,
        word_nbytes=word_nbytes,
        outer=outer,
        inner=inner,
        piece_words=piece_words,
        piece_chunks=-(-piece_words // words),
        words=words,
        chunks=tile_words // words,
        src=Strides(*(stride // unit_nbytes for stride in strides_nbytes[0])),
        dst=Strides(*(stride // unit_nbytes for stride in strides_nbytes[1])),
    )


def words_of_tile(tuning: Tuning, word_nbytes: int) -> int:
    """Count the words of a tile: a power of two, and no fewer than one for each thread."""
    words = min(_MOST_WORDS, tuning.tile_nbytes // word_nbytes)
    return max(tuning.num_warps * 32, 1 << (words.bit_length() - 1))


def chunk_words(piece_words: int, tile_words: int) -> int:
    """Return the largest power of two that leaves at most an eighth of the lanes idle."""
    words = min(tile_words, 1 << (piece_words - 1).bit_length())
    while words > _FEWEST_WORDS and -(-piece_words // words) * words * 8 > piece_words * 9:
        words //= 2
    return words
