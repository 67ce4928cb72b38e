"""Tokens of one request between two caches, bound to memory: what is asked for, and by which way.

Over host memory, bits go as pieces from cache to cache; numbers that change their type go through
staging (`converting.py`). Over `cuda_ipc` a kernel moves either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import PlanError
from .pieces import bind

if TYPE_CHECKING:
    from .pieces import BoundPieces
    from .plan import TransferPlan


class TokenMove(NamedTuple):
    """What of a request is moved.

    Attributes:
        src_tables, dst_tables: a block table for each group of the side's layout, from the
            request's first token on; over `cuda_ipc` also tensors on the GPU.
        start, stop: tokens `[start, stop)`.
        layers: global layer indices; all if None.
    """

    src_tables: tuple[Any, ...]
    dst_tables: tuple[Any, ...]
    start: int
    stop: int
    layers: tuple[int, ...] | None = None


def as_tables(tables: Any) -> tuple[Any, ...]:
    """Block tables as a tuple; a single table may be given as it is."""
    if hasattr(tables, "ndim") and hasattr(tables, "shape"):
        return (tables,)
    several: tuple[Any, ...] = tuple(tables)
    one = all(isinstance(entry, int | np.integer) for entry in several)
    return (several,) if one else several


def states_of(plan: TransferPlan, move: TokenMove) -> int:
    """How many pages of state the destination's tables name."""
    counts = {
        len(move.dst_tables[pair.dst_group])
        - int(
            pair.dst_null is not None
            and np.count_nonzero(np.asarray(move.dst_tables[pair.dst_group]) == pair.dst_null)
        )
        for pair in plan.tokens.pairs
        if not pair.unit and pair.dst_group < len(move.dst_tables)
    }
    if len(counts) > 1:
        raise PlanError(f"groups of state have {sorted(counts)} pages", operation="plan")
    return counts.pop() if counts else 1


def check_move(plan: TransferPlan, move: TokenMove) -> int:
    """Checks tables that are in host memory; returns the bytes that they move.

    Raises:
        BlockOutOfRange, OverlappingBlocks, PlanError: as for `TokenPlan.moves`.
    """
    tokens = plan.tokens
    on_gpu = [getattr(table, "is_cuda", False) for table in (*move.src_tables, *move.dst_tables)]
    if not any(on_gpu):
        for pair in tokens.pairs:
            tokens.check(pair, move.src_tables, move.dst_tables, move.start, move.stop)
    elif not all(on_gpu) or any(not pair.unit or pair.aligned for pair in tokens.pairs):
        raise PlanError(
            "block tables on a GPU must all be there, and name blocks of tokens: give tables of "
            "state in host memory",
            operation="plan",
        )
    states = 1 if any(on_gpu) else states_of(plan, move)
    return tokens.nbytes(move.start, move.stop, layers=move.layers, states=states)


def bind_tokens(plan: TransferPlan, move: TokenMove) -> BoundPieces:
    """Every piece of a plan that moves bits, its addresses here and its ranges there.

    Raises:
        BlockOutOfRange, OverlappingBlocks, PlanError: as for `TokenPlan.pieces`.
    """
    src_tables, dst_tables, start, stop, layers = move
    pieces = plan.tokens.pieces(src_tables, dst_tables, start, stop, layers=layers)
    here, here_offset = pieces.src_region, pieces.src_offset
    there, there_offset = pieces.dst_region, pieces.dst_offset
    if not plan.writes:
        here, here_offset, there, there_offset = there, there_offset, here, here_offset
    return bind(
        plan.addresses[here] + here_offset, pieces.nbytes, there, there_offset, plan.remote.regions
    )
