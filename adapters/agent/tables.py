"""Block ids as engines name them and as messages carry them; how many bytes they stand for."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from ...control.handoff.messages import BLOCK_ID_NBYTES, unpack_block_ids
from ...engine.errors import PlanError
from ...engine.plan.block_tables import FEW_IDS, block_table, check_distinct, check_ids
from ...engine.transfer.moves import states_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ...engine.transfer.plan import TransferPlan

    BlockIds = Sequence[int] | npt.NDArray[np.integer]

INT32 = (-(1 << 31), 1 << 31)


def pack_tables(
    side: str, tables: Sequence[BlockIds], num_blocks: int | None = None
) -> tuple[bytes, ...]:
    """Block tables as messages carry them: a row of little-endian int32 for each group.

    Args:
        side: whose they are, `source` or `destination`.
        num_blocks: of the cache, where whole blocks are moved: then each id has to name one, and a
            destination each only once. Tables of tokens may name what is not moved.

    Raises:
        BlockOutOfRange, PlanError: an id is not a block of the cache; these are no ids.
        OverlappingBlocks: one is named twice.
    """
    low, end = INT32 if num_blocks is None else (0, num_blocks)
    distinct = num_blocks is not None and side == "destination"
    packed = []
    for number, table in enumerate(tables):
        if type(table) is list and len(table) <= FEW_IDS and {*map(type, table)} == {int}:
            few = sorted(table)  # a few of Python's own numbers, which NumPy would take longer for
            if low <= few[0] and few[-1] < end and not (distinct and len({*few}) != len(few)):
                packed.append(struct.pack(f"<{len(few)}i", *table))
                continue
        ids = block_table(side, tables, number)
        if num_blocks is not None:
            check_ids(side, ids, num_blocks, None)
            if distinct:
                check_distinct(ids)
        elif len(ids) and not low <= int(ids.min()) <= int(ids.max()) < end:
            raise PlanError(
                f"{side} block table {number} has an id beyond 32 bits", operation="plan"
            )
        packed.append(ids.astype("<i4").tobytes())
    return tuple(packed)


def unpack_table(table: bytes) -> BlockIds:
    """Return one table for the engine, which moves a few ids without NumPy."""
    if len(table) <= FEW_IDS * BLOCK_ID_NBYTES:
        return unpack_block_ids(table)
    return np.frombuffer(table, "<i4")


def unpack_tables(tables: tuple[bytes, ...]) -> tuple[BlockIds, ...]:
    """Return all tables of a side for the engine."""
    return tuple(map(unpack_table, tables))


def expected_nbytes(
    plan: TransferPlan, dst_tables: tuple[bytes, ...], start: int, stop: int
) -> int:
    """Return what the counter of a handoff by tokens has to reach.

    Raises:
        PlanError: tokens that are no range.
    """
    if not 0 <= start <= stop:
        raise PlanError(f"tokens [{start}, {stop}) are no range of tokens", operation="receive")
    return plan.tokens.nbytes(start, stop, states=states_of(plan, unpack_tables(dst_tables)))
