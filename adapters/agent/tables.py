"""Handoffs by tokens: between caches whose blocks are not alike, or that have several block tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...control.errors import BlocksMismatch
from ...engine.errors import PlanError
from ...engine.plan.block_tables import as_row
from ...engine.transfer.moves import TokenMove, as_tables, states_of

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from ...control.handoff.events import StartRead, StartWrite
    from ...engine.link.link import Link
    from ...engine.transfer.plan import TransferPlan
    from ...engine.transfer.ticket import Ticket

MARGIN_S = 10.0  # beyond a handoff's deadline, which the machines keep
NEVER_S = 1e9


def pack_tables(tables: Any) -> tuple[bytes, ...]:
    """Block tables as messages carry them: a row of little-endian int32 for each group.

    Raises:
        PlanError: a table is no row of integers, or an id does not fit.
    """
    packed = []
    for number, table in enumerate(as_tables(tables)):
        ids = as_row(f"block table {number}", table)
        if ids.size and not -(2**31) <= int(ids.min()) <= int(ids.max()) < 2**31:
            raise PlanError(f"block table {number} has an id beyond 32 bits", operation="plan")
        packed.append(ids.astype("<i4").tobytes())
    return tuple(packed)


def _unpack(tables: tuple[bytes, ...]) -> tuple[npt.NDArray[np.int32], ...]:
    return tuple(np.frombuffer(table, "<i4") for table in tables)


def expected_nbytes(
    plan: TransferPlan, dst_tables: tuple[bytes, ...], start: int, stop: int
) -> int:
    """What the counter of a handoff has to reach.

    Raises:
        PlanError: tokens that are no range.
    """
    if not 0 <= start <= stop:
        raise PlanError(f"tokens [{start}, {stop}) are no range of tokens", operation="receive")
    return plan.tokens.nbytes(start, stop, states=states_of(plan, _unpack(dst_tables)))


def write_tokens(
    link: Link,
    plan: TransferPlan,
    action: StartWrite,
    held: tuple[int, ...],
    stream: torch.cuda.Stream | None,
) -> Ticket | None:
    """Writes what a request wants of some layers; None if decode's rank holds others.

    `stream` is what GPU memory has to wait for.

    Raises:
        BlocksMismatch: decode counts on other bytes than these. EngineError: from the engine.
    """
    request = action.request
    span = (request.start_token, request.stop_token)
    move = TokenMove(plan, _unpack(action.tables), _unpack(request.tables), *span)
    if move.nbytes != request.nbytes:
        raise BlocksMismatch(
            f"decode expects {request.nbytes} bytes, prefill would write {move.nbytes}"
        )
    layers = tuple(layer for layer in held[slice(*action.layers)] if layer in plan.layers)
    if not layers:
        return None
    return link.write_tokens(
        plan,
        move.src_tables,
        move.dst_tables,
        start=move.start,
        stop=move.stop,
        imm=request.imm,
        layers=layers,
        stream=stream,
        timeout_s=request.timeout_s + MARGIN_S,
    )


def read_tokens(
    link: Link,
    plan: TransferPlan,
    action: StartRead,
    fields: dict[str, Any],
    stream: torch.cuda.Stream | None,
) -> Ticket:
    """Reads what was asked for out of the blocks that prefill has named; `stream` as above."""
    return link.read_tokens(
        plan,
        _unpack(action.ready.tables),
        _unpack(fields["tables"]),
        start=fields["start_token"],
        stop=fields["stop_token"],
        stream=stream,
        timeout_s=NEVER_S,
    )
