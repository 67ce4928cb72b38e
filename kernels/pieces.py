"""Pieces: runs of bytes from any addresses to any addresses, in one launch, out of a table.

For what has no block structure; blocks of a cache go by `copy_kernel`, whose tables are smaller.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .errors import ShapeError
from .rows import RowTypes, move_rows
from .runtime import jit
from .walk import triton_type

if TYPE_CHECKING:
    import numpy.typing as npt
    import triton.language as tl

    from .signal import Signal
else:
    from .runtime import tl

# A program moves one row of the table: rows of 64 KiB keep 132 multiprocessors busy from 16 MiB on
# and the table small.
ROW_NBYTES = 64 << 10
# A program waits 2 us for what it reads over PCIe, and has one row of `pieces_kernel` in flight: 4 KiB
# fill the bus with 32 programs (decision 0016). So many or more equal rows that are shorter are
# walked by `rows_kernel`, many at a time.
SHORT_ROW_NBYTES = 4096
FEWEST_SHORT_ROWS = 16
_BLOCK_WORDS = 2048
_NUM_WARPS = 8


class PieceTable(NamedTuple):
    """Rows of at most `ROW_NBYTES`, as int64 columns, and the widest word that divides them all.

    Attributes:
        columns: `[3, row]` in host memory: source address, destination address, words.
        word_nbytes: 1, 2, 4 or 8.
        unit_nbytes: what divides every address and size: `word_nbytes`, or 16.
        nbytes: of all rows together.
        short: whether its rows are many, equal and short.
    """

    columns: npt.NDArray[np.int64]
    word_nbytes: int
    unit_nbytes: int
    nbytes: int
    short: bool


def make_table(
    src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]
) -> PieceTable:
    """Cut pieces into rows, neighbours at both ends as one. O(1) NumPy calls, whatever their
    number.

    Args:
        src, dst: addresses as the launching GPU sees them, int64 `[piece]`.
        nbytes: of each piece.

    Raises:
        ShapeError: the columns are not equally long.
    """
    if not src.shape == dst.shape == nbytes.shape or src.ndim != 1:
        raise ShapeError(f"src {src.shape}, dst {dst.shape} and nbytes {nbytes.shape} differ")
    total_nbytes = int(nbytes.sum())
    apart = (src[1:] != src[:-1] + nbytes[:-1]) | (dst[1:] != dst[:-1] + nbytes[:-1])
    if not bool(apart.all()):
        first = np.concatenate(([0], np.flatnonzero(apart) + 1))
        src, dst, nbytes = src[first], dst[first], np.add.reduceat(nbytes, first)
    if len(nbytes) and int(nbytes.min()) > 0 and int(nbytes.max()) <= ROW_NBYTES:
        sizes, columns = nbytes, np.stack([src, dst, nbytes])  # each is a row
    else:
        parts = -(-nbytes // ROW_NBYTES)
        row = np.repeat(np.arange(len(nbytes)), parts)
        begin = (np.arange(len(row)) - (np.cumsum(parts) - parts)[row]) * ROW_NBYTES
        sizes = np.minimum(nbytes[row] - begin, ROW_NBYTES)
        columns = np.stack([src[row] + begin, dst[row] + begin, sizes])
    unit = math.gcd(16, int(np.bitwise_or.reduce(columns, axis=None)) if columns.size else 16)
    word = min(8, unit)
    short = len(sizes) >= FEWEST_SHORT_ROWS and 0 < int(sizes[0]) < SHORT_ROW_NBYTES
    short = short and bool((sizes == sizes[0]).all())
    columns[2] //= word
    return PieceTable(columns, word, unit, total_nbytes, short)


@jit(fixed=("num_rows", "counter", "nbytes"), unaligned=("table", "finished"))
def pieces_kernel(
    table: tl.tensor,
    num_rows: tl.int64,
    finished: tl.tensor,
    counter: tl.int64,
    nbytes: tl.int64,
    WORDS: tl.constexpr,
    UNIT: tl.constexpr,
    WORD: tl.constexpr,
) -> None:
    """Grid: any number of programs; each takes row after row.

    The last program to finish adds `nbytes` to the counter, as in `copy_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    while row < num_rows:
        src = tl.multiple_of(tl.load(table + row).to(tl.pointer_type(WORD)), UNIT)
        dst = tl.multiple_of(tl.load(table + num_rows + row).to(tl.pointer_type(WORD)), UNIT)
        words = tl.load(table + 2 * num_rows + row)
        for start in range(0, words, WORDS):
            offset = start + tl.arange(0, WORDS).to(tl.int64)
            # Sizes are whole units too, which makes the last accesses as wide as the others.
            inside = offset < tl.multiple_of(words, UNIT * 8 // WORD.primitive_bitwidth)
            tl.store(dst + offset, tl.load(src + offset, mask=inside), mask=inside)
        row += tl.num_programs(0)
    if finished is not None:
        tl.debug_barrier()
        before = tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu")
        if before == tl.num_programs(0) - 1:
            tl.store(finished, 0)
            tl.atomic_add(counter.to(tl.pointer_type(tl.int64)), nbytes, sem="release", scope="sys")


def copy_pieces(
    table: PieceTable,
    columns: torch.Tensor,
    *,
    signal: Signal | None = None,
    max_programs: int | None = None,
) -> None:
    """Move the pieces of a table, on the current stream of the columns' device.

    Args:
        table: from `make_table`.
        columns: the table's columns where the GPU can read them: int64 `[3, row]`, contiguous. The
            caller keeps them, and everything they point to, until the stream has passed.
        signal: the counter to which the last program adds the bytes.
        max_programs: upper bound on the programs that run at a time.

    Raises:
        ShapeError: `columns` is not the table's.
    """
    if columns.dtype != torch.int64 or tuple(columns.shape) != table.columns.shape:
        raise ShapeError(
            f"columns must be int64 {list(table.columns.shape)}, not {columns.dtype} "
            f"{list(columns.shape)}"
        )
    num_rows = table.columns.shape[1]
    if not num_rows:
        return
    if table.short and signal is None:
        bits = _BITS[table.word_nbytes]
        move_rows(
            RowTypes(bits, bits, table.unit_nbytes, table.unit_nbytes),
            columns.data_ptr(),
            None,
            num_rows,
            int(table.columns[2, 0]),
            max_programs=num_rows if max_programs is None else max_programs,
        )
        return
    programs = num_rows if max_programs is None else min(num_rows, max_programs)
    pieces_kernel[(programs,)](
        columns,
        num_rows,
        None if signal is None else signal.state,
        0 if signal is None else signal.counter_address,
        table.nbytes,
        _BLOCK_WORDS,
        table.unit_nbytes,
        triton_type(_BITS[table.word_nbytes]),
        num_warps=_NUM_WARPS,
    )


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
