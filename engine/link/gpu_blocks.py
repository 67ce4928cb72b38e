"""Blocks of GPU memory that one kernel moves: the shortest way, uploaded ids, graph writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LinkClosed, PlanError
from ..transfer.block_ids import UploadedIds, check_ids, check_on_gpu
from ..transfer.counters import check_imm
from ..transfer.ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ..plan.block_tables import BlockIds
    from ..transfer.plan import TransferPlan
    from ..transports.base import Transfer
    from ..transports.cuda_ipc.graph_write import GraphWrite
    from .submit import Submitter

# Pieces from here on keep up with the link in any order of their destinations (256 MiB over NVLink:
# 366 GB/s random, 367 ordered); 8 KiB ones do not (266 and 365).
ORDERED_BELOW_NBYTES = 16 << 10


class GpuBlocks:
    """What a link does with blocks, where its path orders streams. Thread-safe.

    Arguments and errors are those of `Link`'s methods.
    """

    def __init__(self, submitter: Submitter) -> None:
        self._submitter = submitter
        self._path = submitter.path
        self._table = submitter.table
        self._peer = submitter.context.peer.name

    def copy(
        self,
        operation: str,
        route: Any,
        ids: tuple[Any, Any],
        imm: int | None,
        stream: torch.cuda.Stream | None,
        timeout_s: float,
    ) -> Ticket:
        """Checks and begins a transfer of blocks. The host's share of a transfer is this and what
        the path does: every line counts."""
        if imm is not None:
            imm = check_imm(imm, operation)
        plan: TransferPlan = route.plan
        src, dst = ids
        ordered = route.finest_nbytes < ORDERED_BELOW_NBYTES
        checked = check_ids(plan, src, dst, ordered=ordered)
        ticket = Ticket(operation, peer=self._peer, imm=imm, timeout_s=timeout_s)
        transfer = self._transfer(ticket, plan, checked.num_blocks * route.block_nbytes)
        if self._table.add_routed(transfer, route):
            self._path.copy_on_gpu(transfer, route, checked, stream)
            return ticket
        # On the progress thread nobody can be asked and waited for.
        transfer.start = lambda it: self._path.copy_on_gpu(it, route, checked, None)
        self._path.before(transfer, stream)
        if self._submitter.grants.admit(transfer):
            self._submitter.begin(transfer)
        return ticket

    def upload_ids(
        self,
        plan: TransferPlan,
        src_block_ids: BlockIds | torch.Tensor,
        dst_block_ids: BlockIds | torch.Tensor,
    ) -> UploadedIds:
        """As `Link.upload_ids`."""
        import torch

        if not self._submitter.copies_on_gpu(plan):
            raise PlanError(
                "upload_ids is for GPU memory: give lists of block ids to write_blocks",
                operation="upload",
                peer=self._peer,
            )
        ids = check_ids(plan, src_block_ids, dst_block_ids)
        device = torch.device("cuda", plan.local.device)
        if ids.on_gpu:
            order = torch.argsort(ids.dst)
            rows = torch.stack([ids.src[order].long(), ids.dst[order].long()])
        else:
            rows = torch.from_numpy(np.stack([ids.src, ids.dst])).to(device)
        torch.cuda.current_stream(device).synchronize()
        return UploadedIds(plan, rows)

    def graph_write(
        self,
        plan: TransferPlan,
        src_block_ids: torch.Tensor,
        dst_block_ids: torch.Tensor,
        order: torch.Tensor,
        layers: Sequence[int] | None,
    ) -> GraphWrite:
        """As `Link.graph_write`."""
        if not plan.writes or not self._submitter.copies_on_gpu(plan):
            raise PlanError(
                "a graph write needs a plan for writing GPU memory over cuda_ipc",
                operation="graph_write",
                peer=self._peer,
            )
        check_on_gpu(plan, src_block_ids, dst_block_ids)
        check_on_gpu(plan, order, order)
        if len(order) != 2 or order.element_size() != 8 or not len(src_block_ids):
            raise PlanError(
                "a graph write needs ids and an order of two int64: the imm, and how many ids",
                operation="graph_write",
                peer=self._peer,
            )
        self._submitter.check_regions("graph_write", (plan.local,), plan.remote.regions)
        self._submitter.ask_leave(plan)
        ticket = Ticket("graph_write", peer=self._peer)
        transfer = self._transfer(ticket, plan, nbytes=1)  # which are never placed
        route = self._path.route(plan, layers)
        self._table.add_routed(transfer, route)
        try:
            tensors = (src_block_ids, dst_block_ids, order)
            write: GraphWrite = self._path.repeat_blocks(transfer, route, tensors)
        except BaseException:
            transfer.abandon(LinkClosed("a graph write was not made", operation="graph_write"))
            raise
        return write

    def _transfer(self, ticket: Ticket, plan: TransferPlan, nbytes: int) -> Transfer:
        local, remote = (plan.local,), plan.remote.regions
        return self._submitter.make(ticket, local, remote, write=plan.writes, nbytes=nbytes)
