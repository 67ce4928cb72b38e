"""Check block ids and block tables as users give them, before anything moves.

A few ids stay a list of Python's own numbers all the way to the system call: `are_few` says which.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BlockOutOfRange, OverlappingBlocks, PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeGuard

    import numpy.typing as npt

    from .reconcile import TablePair

    BlockIds = Sequence[int] | npt.NDArray[np.integer]
    Row = npt.NDArray[np.int64]
    Ids = list[int] | Row  # checked and ordered; a few may be a list


# Up to so many ids Python's own sort and comparisons are quicker than NumPy's ten calls, which cost
# 10 to 20 microseconds each when the caches are cold.
FEW_IDS = 32
_INT64_MAX = (1 << 63) - 1


def as_row(what: str, values: object, *, operation: str = "plan") -> npt.NDArray[np.integer]:
    """Read numbers as one row of integers, of the type that they have; none at all as int64.

    Raises:
        PlanError: they are no such row; says of `what`.
    """
    row = np.asarray(values)
    if row.size == 0:
        return np.zeros(0, np.int64)
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise PlanError(
            f"{what} must be one row of integers, not {row.dtype} of shape {row.shape}",
            operation=operation,
        )
    return row


def as_ids(what: str, values: object) -> Row:
    """Read ids as one row of int64.

    Raises:
        PlanError: they are no row of integers.
        BlockOutOfRange: one is so large that no cache has it.
    """
    row = as_row(what, values)
    if row.dtype == np.uint64 and int(row.max()) > _INT64_MAX:
        raise BlockOutOfRange(f"{what}: {int(row.max())} is a block of no cache")
    return row.astype(np.int64, copy=False)


def block_table(side: str, tables: Sequence[BlockIds], group: int) -> Row:
    """Read one group's table as int64.

    Raises:
        BlockOutOfRange, PlanError: it is missing, or as for `as_ids`.
    """
    if group >= len(tables):
        raise PlanError(
            f"{len(tables)} {side} block tables, but group {group} is to be moved: give one for "
            "each group of the layout"
        )
    return as_ids(f"{side} block table {group}", tables[group])


def state_ids(pair: TablePair, src_ids: Row, dst_ids: Row) -> tuple[Row, Row]:
    """Return the pages of state to move, without the null slots."""
    if len(src_ids) != len(dst_ids):
        raise PlanError(
            f"{len(src_ids)} source pages of {pair.kind} state but {len(dst_ids)} destination pages"
        )
    keep = np.ones(len(src_ids), bool)
    if pair.src_null is not None and pair.dst_null is not None:
        keep = (src_ids != pair.src_null) | (dst_ids != pair.dst_null)
    src_ids, dst_ids = src_ids[keep], dst_ids[keep]
    check_ids("source", src_ids, pair.src_slots, pair.src_null)
    check_ids("destination", dst_ids, pair.dst_slots, pair.dst_null)
    check_distinct(dst_ids)
    return src_ids, dst_ids


def check_ids(side: str, ids: Row, num_slots: int, null: int | None) -> None:
    """Check that every id names a block.

    Raises:
        BlockOutOfRange: naming the side and the id.
    """
    if not len(ids):
        return
    if null is not None and bool((ids == null).any()):
        raise BlockOutOfRange(
            f"{side} block id {null} stands for no block, but tokens in it are to be moved"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_slots:
        raise BlockOutOfRange(
            f"{side} block id {low if low < 0 else high} is not in a cache of {num_slots} blocks"
        )


def check_distinct(ids: Row) -> None:
    """Check that no id comes twice.

    Raises:
        OverlappingBlocks: naming the id.
    """
    ordered = np.sort(ids)
    same = ordered[1:] == ordered[:-1]
    if bool(same.any()):
        twice = int(ordered[1:][same][0])
        raise OverlappingBlocks(f"destination block id {twice} is named twice")


def are_few(ids: object) -> TypeGuard[list[int]]:
    """Return whether ids are a list of a few of Python's own numbers."""
    return type(ids) is list and 0 < len(ids) <= FEW_IDS and {*map(type, ids)} == {int}


def as_list(ids: Ids) -> list[int]:
    """Ids that `check_ids` or `order_few` has returned, as Python's own numbers."""
    return ids if isinstance(ids, list) else ids.tolist()


def have_neighbours(src_ids: Ids, dst_ids: Ids) -> bool:
    """Return whether any two blocks that follow each other are neighbours on both sides."""
    if len(src_ids) < 2:
        return False
    if isinstance(src_ids, list) or isinstance(dst_ids, list) or len(src_ids) <= FEW_IDS:
        ids = list(zip(as_list(src_ids), as_list(dst_ids), strict=True))
        return any(a + 1 == c and b + 1 == d for (a, b), (c, d) in itertools.pairwise(ids))
    return bool(((src_ids[1:] - src_ids[:-1] == 1) & (dst_ids[1:] - dst_ids[:-1] == 1)).any())
