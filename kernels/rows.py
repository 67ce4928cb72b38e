"""Rows: equally long runs of numbers, from any addresses to any, that change their type on the way.

For what is converted into staging or out of it, where one end is dense and the other end's places
come out of a list. All rows of a launch share a tile width, so that short ones (the 128 numbers of
one head) fill a program as long ones do. Tables are read by address: whoever launches knows the
memory, and needs no tensor around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .cast import LIMITS
from .errors import ShapeError
from .paged import WIDEST_NBYTES
from .runtime import jit
from .scaling import larger, saturated
from .walk import triton_type

if TYPE_CHECKING:
    import numpy.typing as npt
    import triton.language as tl
else:
    from .runtime import tl

TILE_WORDS = 4096
_NUM_WARPS = 8
# Two widths alone, since each is a compilation: the longest row of one head, and what long rows fill.
NARROW_WORDS = 128
WIDE_WORDS = 1024


class RowTypes(NamedTuple):
    """What rows are made of, at both ends. Hashable.

    Attributes:
        src, dst: types of the numbers; the same where bits are moved.
        src_unit, dst_unit: bytes that divide every address of that end: 16, or one number.
    """

    src: torch.dtype
    dst: torch.dtype
    src_unit: int
    dst_unit: int


def row_types(
    src: npt.NDArray[np.int64],
    dst: npt.NDArray[np.int64],
    elements: int,
    src_dtype: torch.dtype,
    dst_dtype: torch.dtype,
) -> RowTypes:
    """Look at how the addresses of rows lie.

    Raises:
        ShapeError: the ends are not equally many, or a number lies where no kernel could read it.
    """
    if src.shape != dst.shape or src.ndim != 1:
        raise ShapeError(f"{src.shape} sources, but {dst.shape} destinations")
    units = []
    for side, addresses, dtype in (("source", src, src_dtype), ("destination", dst, dst_dtype)):
        every = int(np.bitwise_or.reduce(addresses)) if addresses.size else 0
        if every % dtype.itemsize:
            raise ShapeError(
                f"numbers of the {side} do not lie at multiples of {dtype.itemsize} bytes, where a "
                "kernel could read them"
            )
        wide = (every | elements * dtype.itemsize) % WIDEST_NBYTES == 0
        units.append(WIDEST_NBYTES if wide else dtype.itemsize)
    return RowTypes(src_dtype, dst_dtype, *units)


@jit(fixed=("src_table", "dst_table", "factors", "num_rows", "elements", "row_chunks"))
def rows_kernel(
    src_table: tl.int64,
    dst_table: tl.int64,
    factors: tl.int64,
    num_rows: tl.int64,
    elements: tl.int64,
    row_chunks: tl.int64,
    SRC_WORD: tl.constexpr,
    DST_WORD: tl.constexpr,
    SRC_UNIT: tl.constexpr,
    DST_UNIT: tl.constexpr,
    STEP: tl.constexpr,
    CONVERT: tl.constexpr,
    LIMIT: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Grid: any number of programs; each takes tile after tile of ROWS chunks of WORDS numbers."""
    # Rows are whole units too, which makes the last accesses as wide as the others; a hint on an
    # argument is lost in the loop, what is worked out is not.
    length = elements // STEP * STEP
    tile = tl.program_id(0).to(tl.int64)
    while tile * ROWS < num_rows * row_chunks:
        # Shapes: [ROWS].
        chunk = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        row = chunk // row_chunks
        first = chunk % row_chunks * WORDS
        good = row < num_rows
        src = tl.load(src_table.to(tl.pointer_type(tl.int64)) + row, mask=good, other=0)
        dst = tl.load(dst_table.to(tl.pointer_type(tl.int64)) + row, mask=good, other=0)
        src_start = tl.multiple_of(src.to(tl.pointer_type(SRC_WORD)), SRC_UNIT)
        dst_start = tl.multiple_of(dst.to(tl.pointer_type(DST_WORD)), DST_UNIT)
        # Shapes: [ROWS, WORDS].
        word = first[:, None] + tl.arange(0, WORDS)[None, :]
        mask = good[:, None] & (word < length)
        value = tl.load(src_start[:, None] + word, mask=mask)
        if CONVERT:
            factor = tl.load(factors.to(tl.pointer_type(tl.float32)) + row, mask=good, other=1.0)
            number = value.to(tl.float32) * factor[:, None]
            value = saturated(number, LIMIT, ROUND).to(DST_WORD)
        tl.store(dst_start[:, None] + word, value, mask=mask)
        tile += tl.num_programs(0)


@jit(fixed=("src_table", "dst_table", "factors", "num_rows", "elements"))
def maxima_kernel(
    src_table: tl.int64,
    dst_table: tl.int64,
    factors: tl.int64,
    num_rows: tl.int64,
    elements: tl.int64,
    SRC_WORD: tl.constexpr,
    SRC_UNIT: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Grid: any number of programs; each takes ROWS rows after ROWS rows.

    Stores the largest magnitude of each row's numbers times its factor, as float32.
    """
    length = elements // STEP * STEP
    tile = tl.program_id(0).to(tl.int64)
    while tile * ROWS < num_rows:
        # Shapes: [ROWS].
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        good = row < num_rows
        src = tl.load(src_table.to(tl.pointer_type(tl.int64)) + row, mask=good, other=0)
        dst = tl.load(dst_table.to(tl.pointer_type(tl.int64)) + row, mask=good, other=0)
        factor = tl.load(factors.to(tl.pointer_type(tl.float32)) + row, mask=good, other=1.0)
        src_start = tl.multiple_of(src.to(tl.pointer_type(SRC_WORD)), SRC_UNIT)
        # Shapes: [ROWS, WORDS].
        largest = (good[:, None] & (tl.arange(0, WORDS)[None, :] < 0)).to(tl.float32)
        for first in range(0, length, WORDS):
            word = first + tl.arange(0, WORDS).to(tl.int64)[None, :]
            mask = good[:, None] & (word < length)
            number = tl.load(src_start[:, None] + word, mask=mask).to(tl.float32)
            real = tl.abs(number * factor[:, None])
            real = tl.where(mask & (real == real), real, 0.0)  # NaN counts for nothing
            real = tl.minimum(real, 3.4028234663852886e38)
            largest = tl.maximum(largest, real)
        found = tl.reduce(largest, 1, larger)
        tl.store(dst.to(tl.pointer_type(tl.float32)), found, mask=good)
        tile += tl.num_programs(0)


def move_rows(
    types: RowTypes,
    table: int,
    factors: int | None,
    num_rows: int,
    elements: int,
    *,
    max_programs: int,
) -> None:
    """Move rows, on the current stream; the caller keeps the table until it has passed.

    Args:
        table: address, as the launching device sees it, of int64 `[2, row]`: sources and
            destinations.
        factors: address of float32 `[row]` that numbers are multiplied by; None where bits move.
        elements: of each row.
    """
    if not num_rows or not elements:
        return
    words = _words(elements)
    chunks = -(-elements // words)
    per_tile = TILE_WORDS // words
    rows_kernel[(min(max_programs, -(-num_rows * chunks // per_tile)),)](
        table,
        table + 8 * num_rows,
        factors or 0,
        num_rows,
        elements,
        chunks,
        *row_constants(types, elements, converts=factors is not None),
        num_warps=_NUM_WARPS,
    )


def row_constants(types: RowTypes, elements: int, *, converts: bool) -> tuple[Any, ...]:
    """Return the constants of `rows_kernel`."""
    words = _words(elements)
    return (
        triton_type(types.src),
        triton_type(types.dst),
        types.src_unit,
        types.dst_unit,
        max(types.src_unit // types.src.itemsize, types.dst_unit // types.dst.itemsize),
        converts,
        LIMITS.get(types.dst, 0.0) if converts else 0.0,
        converts and types.dst == torch.int8,
        TILE_WORDS // words,
        words,
    )


def find_maxima(
    types: RowTypes, table: int, factors: int, num_rows: int, elements: int, *, max_programs: int
) -> None:
    """Store the largest real magnitude of each row, float32, at the row's destination.

    Arguments are those of `move_rows`; NaN counts for nothing, infinity for the largest float32.
    """
    if not num_rows:
        return
    words = _words(elements)
    per_tile = TILE_WORDS // words
    maxima_kernel[(min(max_programs, -(-num_rows // per_tile)),)](
        table,
        table + 8 * num_rows,
        factors,
        num_rows,
        elements,
        triton_type(types.src),
        types.src_unit,
        types.src_unit // types.src.itemsize,
        per_tile,
        words,
        num_warps=_NUM_WARPS,
    )


def _words(elements: int) -> int:
    return NARROW_WORDS if elements <= NARROW_WORDS else WIDE_WORDS
