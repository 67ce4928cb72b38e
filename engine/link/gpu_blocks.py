"""Blocks of GPU memory that one kernel moves often: uploaded ids, and writes that graphs repeat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import LinkClosed, PlanError
from ..transfer.block_ids import UploadedIds, check_ids, check_on_gpu
from ..transfer.moves import BlockMove
from ..transfer.ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ..plan.block_tables import BlockIds
    from ..transfer.plan import TransferPlan
    from ..transports.base import Kernels
    from ..transports.cuda_ipc.graph_write import GraphWrite
    from .submit import Submitter
    from .transfers import TransferTable


class GpuBlocks:
    """What a link offers for blocks, where its path launches kernels. Thread-safe.

    Arguments and errors are those of `Link`'s methods.
    """

    def __init__(
        self, submitter: Submitter, kernels: Kernels | None, table: TransferTable, peer: str
    ) -> None:
        self._submitter = submitter
        self._kernels = kernels
        self._table = table
        self._peer = peer

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
        kernels = self._kernels
        if kernels is None or not plan.writes or not self._submitter.copies_on_gpu(plan):
            raise PlanError(
                "a graph write needs a plan for writing GPU memory over cuda_ipc",
                operation="graph_write",
                peer=self._peer,
            )
        check_on_gpu(plan, order, order)
        if len(order) != 2 or order.element_size() != 8 or not len(src_block_ids):
            raise PlanError(
                "a graph write needs ids and an order of two int64: the imm, and how many ids",
                operation="graph_write",
                peer=self._peer,
            )
        move = BlockMove(plan, src_block_ids, dst_block_ids, layers)
        if not move.on_gpu:
            check_on_gpu(plan, src_block_ids, dst_block_ids)  # says so
        self._submitter.check_regions("graph_write", move.local, move.remote)
        self._submitter.ask_access(plan)
        ticket = Ticket("graph_write", peer=self._peer)
        transfer = self._submitter.make(ticket, move, write=True)
        transfer.total_nbytes = 1  # which is never placed
        compiled = kernels.compile(plan, move.layers)
        self._table.add_compiled(transfer, compiled)
        try:
            write: GraphWrite = kernels.repeat(
                transfer, compiled, (src_block_ids, dst_block_ids, order)
            )
        except BaseException:
            transfer.abandon(LinkClosed("a graph write was not made", operation="graph_write"))
            raise
        return write
