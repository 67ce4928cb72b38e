"""Transfers by a plan: blocks or tokens of one cache into those of another.

Here the way is chosen: a kernel of the path's own, a list of pieces, or chunks that are converted.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..convert.conversion import Conversion, warm
from ..errors import EngineError, PlanError
from ..transfer.counters import check_imm
from ..transfer.moves import bind_tokens, check_move
from ..transfer.pieces import NO_PIECES
from ..transfer.plan import check_block_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from ..convert.workspaces import Workplaces
    from ..transfer.moves import TokenMove
    from ..transfer.plan import TransferPlan
    from ..transfer.ticket import Ticket
    from .gpu_blocks import GpuBlocks
    from .submit import Submitter


class PlannedTransfers:
    """What a link does with plans. Thread-safe.

    Arguments and errors are those of `Link`'s methods.
    """

    def __init__(self, submitter: Submitter, gpu_blocks: GpuBlocks, workplaces: Workplaces) -> None:
        self._workplaces = workplaces
        self._submitter = submitter
        self._gpu_blocks = gpu_blocks
        self._path = submitter.path
        self._table = submitter.table
        self._peer = submitter.context.peer.name

    def move_blocks(
        self,
        operation: str,
        plan: TransferPlan,
        ids: tuple[Any, Any],
        imm: int | None,
        layers: Sequence[int] | None,
        stream: torch.cuda.Stream | None,
        timeout_s: float,
    ) -> Ticket:
        """Begins a write or a read of blocks; `ids` are those of source and destination."""
        route = self._table.routes.get((id(plan), None if layers is None else tuple(layers)))
        if route is not None and plan.writes == (operation == "write"):
            return self._gpu_blocks.copy(operation, route, ids, imm, stream, timeout_s)
        if self._takes_whole(operation, plan, stream):
            if self._path.orders_streams:
                route = self._path.route(plan, layers)
                return self._gpu_blocks.copy(operation, route, ids, imm, stream, timeout_s)
            ids = check_block_ids(plan, *ids)
            nbytes = plan.nbytes(len(ids[1]), layers=layers)
            return self._submitter.submit(
                operation,
                (plan.local,),
                NO_PIECES,
                plan.remote.regions,
                imm,
                timeout_s,
                lambda transfer: self._path.submit_blocks(transfer, plan, *ids, layers),
                nbytes,
                stream,
            )
        if ids[1] is None or _any_on_gpu(ids):
            raise self._not_here("block ids on a GPU, or uploaded there,", operation)
        return self._submitter.submit(
            operation,
            (plan.local,),
            plan.pieces(*ids, layers),
            plan.remote.regions,
            imm,
            timeout_s,
            stream=stream,
        )

    def move_tokens(
        self,
        operation: str,
        plan: TransferPlan,
        move: TokenMove,
        imm: int | None,
        stream: torch.cuda.Stream | None,
        timeout_s: float,
    ) -> Ticket:
        """Begins a write or a read of tokens."""
        pieces, start, nbytes = NO_PIECES, None, None
        if self._takes_whole(operation, plan, stream) and self._path.orders_streams:
            nbytes = check_move(plan, move)
            start = partial(self._path.submit_tokens, plan=plan, move=move)
        elif _any_on_gpu((*move.src_tables, *move.dst_tables)):
            raise self._not_here("block tables on a GPU", operation)
        elif plan.tokens.converts:
            return self._convert(operation, plan, move, imm, stream, timeout_s)
        else:
            pieces = bind_tokens(plan, move)
        return self._submitter.submit(
            operation,
            (plan.local,),
            pieces,
            plan.remote.regions,
            imm,
            timeout_s,
            start,
            nbytes,
            stream,
        )

    def _convert(
        self,
        operation: str,
        plan: TransferPlan,
        move: TokenMove,
        imm: int | None,
        stream: torch.cuda.Stream | None,
        timeout_s: float,
    ) -> Ticket:
        """Begins a transfer of numbers that change their type, in chunks."""
        if imm is not None:
            imm = check_imm(imm, operation)
        self._submitter.check_regions(operation, (plan.local,), plan.remote.regions)
        conversion = Conversion(
            self._submitter, self._workplaces, operation, plan, move, imm, timeout_s, stream
        )
        plan.local.acquire()
        try:
            self._table.add_conversion(conversion)
        except EngineError:
            plan.local.release()
            raise
        return conversion.start()

    def prepare(self, plan: TransferPlan) -> None:
        """Does beforehand what converting on a GPU would have to do. May block."""
        direct = self._submitter.copies_on_gpu(plan)
        if plan.tokens.converts and plan.local.device >= 0 and not direct:
            warm(self._workplaces, plan)

    def _not_here(self, what: str, operation: str) -> PlanError:
        return PlanError(
            f"{what} need GPU memory at both ends and cuda_ipc: here they are needed in host memory",
            operation=operation,
            peer=self._peer,
        )

    def _takes_whole(
        self, operation: str, plan: TransferPlan, stream: torch.cuda.Stream | None
    ) -> bool:
        """Checks a plan for use; whether the path moves its blocks without a list of pieces."""
        if plan.writes != (operation == "write"):
            raise PlanError(
                f"this plan is for {'writing' if plan.writes else 'reading'}: make another with "
                "the two caches exchanged",
                operation=operation,
                peer=self._peer,
            )
        if stream is not None and plan.local.kind == "host":
            raise PlanError(
                "stream= orders GPU memory, but this plan's cache is host memory",
                operation=operation,
                peer=self._peer,
            )
        if plan.local.kind == "host":
            plan.local.check_intact()
        takes = self._path.takes_blocks(plan)
        # Asked for once, and waited for: a transfer that came later must not overtake one that
        # still waits for leave, since streams at both ends may depend on their order.
        if takes and self._path.orders_streams and not self._submitter.knows(plan.remote.regions):
            self._submitter.ask_leave(plan)
            takes = self._path.takes_blocks(plan)  # it has tried now whether it reaches them
        return takes


def _any_on_gpu(ids: Iterable[Any]) -> bool:
    return any(getattr(one, "is_cuda", False) for one in ids)
