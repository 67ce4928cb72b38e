"""Block tables as users give them: checked as far as they are used, before anything moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import BlockOutOfRange, OverlappingBlocks, PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from .mapping import TablePair

    BlockTable = Sequence[int] | npt.NDArray[np.integer]
    Ids = npt.NDArray[np.int64]


def block_table(side: str, tables: Sequence[BlockTable], group: int) -> Ids:
    """One group's table as int64.

    Raises:
        PlanError: it is missing, or no row of integers.
    """
    if group >= len(tables):
        raise PlanError(
            f"{len(tables)} {side} block tables, but group {group} is to be moved: give one for "
            "each group of the layout"
        )
    ids = np.asarray(tables[group])
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise PlanError(
            f"{side} block table {group} must be one row of integers, not {ids.dtype} of shape "
            f"{ids.shape}"
        )
    return ids.astype(np.int64, copy=False)


def state_ids(pair: TablePair, src_ids: Ids, dst_ids: Ids) -> tuple[Ids, Ids]:
    """The pages of state to move, without the null slots."""
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


def check_ids(side: str, ids: Ids, num_slots: int, null: int | None) -> None:
    """Checks that every id names a block.

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


def check_distinct(ids: Ids) -> None:
    """Checks that no id comes twice.

    Raises:
        OverlappingBlocks: naming the id.
    """
    ordered = np.sort(ids)
    same = ordered[1:] == ordered[:-1]
    if bool(same.any()):
        twice = int(ordered[1:][same][0])
        raise OverlappingBlocks(f"destination block id {twice} is named twice")
