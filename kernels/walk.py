"""How the tokens of one unit are walked from one cache to another, and a launch's constants for it."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .cast import LIMITS
from .paged import WIDEST_NBYTES
from .tiles import chunk_words, words_of_tile

if TYPE_CHECKING:
    import triton.language as tl

    from .tiles import Tuning
else:
    from .runtime import tl


class End(NamedTuple):
    """One end of a move, in bytes.

    Attributes:
        num_blocks: block ids that exist.
        units: of a block.
        block_stride, unit_stride, outer_stride, inner_stride: between neighbours.
        dtype: of the numbers.
        alignment: of every base address, at most 16.
    """

    num_blocks: int
    units: int
    block_stride: int
    unit_stride: int
    outer_stride: int
    inner_stride: int
    dtype: torch.dtype
    alignment: int


class Walk(NamedTuple):
    """How one unit is walked: `outer` x `inner` runs of `run` numbers, outermost first at the
    destination. Hashable, so that a launch's constants are cached by it.

    Attributes:
        tokens: of a unit; 1 where whole slots are moved.
        token_axis, head_axis: 1 for outer, 2 for inner, 0 for neither.
        group: units that the destination interleaves with its outer axis.
    """

    src: End
    dst: End
    outer: int
    inner: int
    run: int
    tokens: int
    token_axis: int
    head_axis: int
    group: int

    @property
    def unit_nbytes(self) -> int:
        """Bytes of one unit of one entry at the destination."""
        return self.outer * self.inner * self.run * self.dst.dtype.itemsize


class WalkConstants(NamedTuple):
    """Chunks of a unit of one entry, chunks of a tile, and SRC_PER to ROUND."""

    unit_chunks: int
    chunks: int
    arguments: tuple[object, ...]


@functools.lru_cache(maxsize=1024)
def walk_constants(walk: Walk, converts: bool, tuning: Tuning) -> WalkConstants:
    """Return the kernel's constants for a walk: how wide it reads and writes, and how it is cut
    up."""
    ends = (walk.src, walk.dst)
    strides = [
        (
            end.block_stride,
            end.unit_stride if end.units > 1 else 0,
            end.outer_stride if walk.outer > 1 else 0,
            end.inner_stride if walk.inner > 1 else 0,
        )
        for end in ends
    ]
    units = [
        math.gcd(WIDEST_NBYTES, end.alignment, walk.run * end.dtype.itemsize, *steps)
        for end, steps in zip(ends, strides, strict=True)
    ]
    if converts:
        words: list[Any] = [triton_type(end.dtype) for end in ends]
        run_words, word_nbytes = walk.run, max(end.dtype.itemsize for end in ends)
    else:
        word_nbytes = min(8, *units)
        words = [{8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[word_nbytes]] * 2
        run_words = walk.run * walk.src.dtype.itemsize // word_nbytes
    tile_words = words_of_tile(tuning, word_nbytes)
    width = chunk_words(run_words, tile_words)
    run_chunks = -(-run_words // width)
    per_unit = [
        tuple(step // unit for step in steps) for steps, unit in zip(strides, units, strict=True)
    ]
    arguments = (
        walk.src.units,
        *per_unit[0],
        walk.dst.units,
        *per_unit[1],
        walk.outer,
        walk.inner,
        walk.group,
        walk.tokens,
        walk.token_axis,
        walk.head_axis,
        run_words,
        run_chunks,
        width,
        tile_words // width,
        *units,
        *words,
        LIMITS.get(walk.dst.dtype, 0.0) if converts else 0.0,
        converts and walk.dst.dtype == torch.int8,
    )
    return WalkConstants(walk.outer * walk.inner * run_chunks, tile_words // width, arguments)


def triton_type(dtype: torch.dtype) -> Any:
    """Return a type of numbers, or of bits, as kernels name it."""
    return {
        torch.uint8: tl.uint8,
        torch.int16: tl.int16,
        torch.int32: tl.int32,
        torch.int64: tl.int64,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float8_e4m3fn: tl.float8e4nv,
        torch.float8_e5m2: tl.float8e5,
        torch.int8: tl.int8,
    }[dtype]
