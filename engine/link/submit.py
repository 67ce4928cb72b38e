"""Transfers of one link from what is asked for to their end.

Here the way of a move is chosen: by kernels of the path's own, whole, as a list of pieces, or in
chunks that are converted. What is submitted is checked, entered in the table, and begun: at once, or
when the peer has granted access to its region. What ends frees its memory, and a peer that counts on
it is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..convert.conversion import Conversion, warm
from ..errors import EngineError, LinkClosed, NotRegistered, PeerLost, PlanError
from ..memory.descriptors import RegionDescriptor
from ..memory.regions import MemoryRegion, check_ranges
from ..transfer.block_ids import check_on_gpu, upload_ids
from ..transfer.counters import check_imm
from ..transfer.moves import BlockMove, Op, PieceMove, TokenMove
from ..transfer.pieces import as_columns, bind
from ..transfer.ticket import Ticket
from ..transfer.transfer import Transfer
from ..wire import messages as wire
from .context import refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from ..convert.workspace import Workspaces
    from ..transfer.block_ids import UploadedIds
    from ..transfer.moves import Local, Move
    from ..transfer.pieces import Offsets
    from ..transfer.plan import TransferPlan
    from ..transports.base import DataPath
    from ..transports.cuda_ipc.graph_write import GraphWrite
    from .access import Access
    from .context import LinkContext
    from .transfers import TransferTable

    Remote = tuple[RegionDescriptor, ...]


class Submitter:
    """Begins and ends the transfers of a link. Thread-safe.

    Args:
        ended: called with each transfer that ends while the peer takes regions back.
    """

    def __init__(
        self,
        context: LinkContext,
        path: DataPath,
        table: TransferTable,
        access: Access,
        workspaces: Workspaces,
        ended: Callable[[Transfer], None],
    ) -> None:
        self._context = context
        self._path = path
        self._kernels = path.kernels
        self._table = table
        self._access = access
        self._workspaces = workspaces
        self._on_ended = ended
        self._peer = context.peer.name
        # The regions of plans that have been checked and granted: looked at once, not each time.
        self._passed: dict[int, Remote] = {}

    def move(self, op: Op, move: BlockMove | TokenMove) -> Ticket:
        """Begin a move by a plan, as `Link.write_blocks` and `Link.write_tokens`.

        Raises:
            PlanError: the plan is not for this; and as for `submit`.
        """
        plan, kernels = move.plan, self._kernels
        by_kernel = move if kernels is not None and isinstance(move, BlockMove) else None
        if by_kernel is not None:
            compiled = self._table.compiled.get(by_kernel.key)
            if compiled is not None and plan.writes == (op.kind == "write"):
                return self._launch(op, by_kernel, compiled)
        self._check_plan(op, plan)
        if self._takes(move):
            if kernels is not None and by_kernel is not None:
                return self._launch(op, by_kernel, kernels.compile(plan, move.layers))
            return self.submit(op, move)
        if move.on_gpu:
            tokens = isinstance(move, TokenMove)
            what = "tables on a GPU" if tokens else "ids on a GPU, or uploaded there,"
            raise PlanError(
                f"block {what} need GPU memory at both ends and cuda_ipc: here they are needed in "
                "host memory",
                operation=op.kind,
                peer=self._peer,
            )
        if isinstance(move, TokenMove) and plan.tokens.converts:
            return self._convert(op, move)
        return self.submit(op, PieceMove(move.local, move.remote, move.pieces()))

    def submit_pieces(
        self,
        op: Op,
        mine: MemoryRegion,
        theirs: RegionDescriptor,
        offsets: tuple[Offsets, Offsets],
        nbytes: Offsets,
    ) -> Ticket:
        """Begin a transfer between two regions, as `Link.write` and `Link.read`.

        Args:
            offsets: bytes from the start of `mine`, and of `theirs`.
        """
        (here, sizes), there = as_columns(*offsets, nbytes)
        self._check_registered(op, mine, theirs)
        check_ranges(here, sizes, mine.nbytes, "local")
        index = np.zeros(len(sizes), np.int64)
        pieces = bind(here + mine.address, sizes, index, there, (theirs,))
        return self.submit(op, PieceMove((mine,), (theirs,), pieces))

    def submit(
        self,
        op: Op,
        move: Move,
        start: Callable[[Transfer], None] | None = None,
        *,
        computed: bool = False,
    ) -> Ticket:
        """Check and begin a transfer: the path's, or what `start` begins instead.

        Args:
            computed: whether its memory is ready, whatever streams still have to do.

        Raises:
            NotRegistered, OutOfRange, RegionGone, LinkError: before any byte moves.
        """
        remote, kind, table = move.remote, op.kind, self._table
        known = move.listed is None and self._passed.get(id(remote)) is remote
        if not known:
            self._check_regions(kind, move.local, remote)
        ticket = self._ticket(op)
        transfer = self._make(ticket, move, write=kind == "write", start=start)
        table.add(transfer)
        if not computed:
            self._path.before(transfer, op.stream)
        if (
            (known and not table.revoked)
            or not self._path.asks_access
            or self._access.admit(transfer)
        ):
            if move.listed is None:
                self._passed[id(remote)] = remote
            self._begin(transfer)
        return ticket

    def prepare(self, plan: TransferPlan, layers: Sequence[int] | None) -> None:
        """Do beforehand what the first transfer of a plan would have to do. May block."""
        self._ask_access(plan)
        self._path.prepare(plan, layers)
        if plan.tokens.converts and plan.local.device >= 0 and not self._copies_on_gpu(plan):
            warm(self._workspaces, plan)

    def upload_ids(self, plan: TransferPlan, src: Any, dst: Any) -> UploadedIds:
        """Upload ids for the kernels of the path, as `Link.upload_ids`."""
        if not self._copies_on_gpu(plan):
            raise PlanError(
                "upload_ids is for GPU memory: give lists of block ids to write_blocks",
                operation="upload",
                peer=self._peer,
            )
        return upload_ids(plan, src, dst)

    def graph_write(
        self,
        plan: TransferPlan,
        ids: tuple[torch.Tensor, torch.Tensor],
        order: torch.Tensor,
        layers: Sequence[int] | None,
    ) -> GraphWrite:
        """Make a write that a CUDA graph repeats, as `Link.graph_write`."""
        kernels, problem = self._kernels, ""
        if kernels is None or not plan.writes or not self._copies_on_gpu(plan):
            problem = "a plan for writing GPU memory over cuda_ipc"
        else:
            check_on_gpu(plan, order, order)
            if len(order) != 2 or order.element_size() != 8 or not len(ids[0]):
                problem = "ids and an order of two int64: the imm, and how many ids"
        if kernels is None or problem:
            raise PlanError(
                f"a graph write needs {problem}", operation="graph_write", peer=self._peer
            )
        move = BlockMove(plan, *ids, layers)
        if not move.on_gpu:
            check_on_gpu(plan, *ids)  # says so
        self._check_regions("graph_write", move.local, move.remote)
        plan.local.check_intact()
        self._ask_access(plan)
        transfer = self._make(Ticket("graph_write", peer=self._peer), move, write=True)
        transfer.total_nbytes = 1  # which is never placed
        compiled = kernels.compile(plan, move.layers)
        self._table.add_compiled(transfer, compiled)
        try:
            write: GraphWrite = kernels.repeat(transfer, compiled, (*ids, order))
        except BaseException:
            transfer.abandon(LinkClosed("a graph write was not made", operation="graph_write"))
            raise
        return write

    def expire(self, now: float) -> None:
        """End what is past its deadline; on the progress thread."""
        for transfer in self._table.transfers():
            deadline_s = transfer.ticket.deadline_s
            if deadline_s is not None and now > deadline_s:
                self._expire(transfer, now - deadline_s)
        for conversion in self._table.conversions():
            deadline_s = conversion.ticket.deadline_s
            if deadline_s is not None and now > deadline_s:
                conversion.ticket._expire()  # it may wait for a stream, with no transfer begun

    def granted(self, message: wire.Granted) -> None:
        """Begin what waited for the peer's answer."""
        answered = self._access.answered(message, self._table.revoked, self._path.granted)
        for transfer in answered:
            self._begin(transfer)

    def refused(self, message: wire.Refuse) -> None:
        """End a transfer that the peer refuses."""
        transfer = self._table.get(message.transfer)
        if transfer is not None:
            transfer.stop(refused(transfer.ticket, message.error, message.reason))
            transfer.end(0)

    def _launch(self, op: Op, move: BlockMove, compiled: Any) -> Ticket:
        """Begin a move of blocks by a kernel. The host's share of it is this and what the path does:
        every line counts."""
        compiled.check_local()
        ticket = self._ticket(op)
        transfer = self._make(ticket, move, write=move.plan.writes)
        kernels = self._kernels
        assert kernels is not None
        if self._table.add_compiled(transfer, compiled):
            kernels.launch(transfer, compiled, op.stream)
            return ticket
        # On the progress thread nobody can be asked and waited for.
        self._path.before(transfer, op.stream)
        if self._access.admit(transfer):
            self._begin(transfer)
        return ticket

    def _convert(self, op: Op, move: TokenMove) -> Ticket:
        """Begin a transfer of numbers that change their type, in chunks."""
        if op.imm is not None:
            check_imm(op.imm, op.kind)
        self._check_regions(op.kind, move.local, move.remote)
        core = self._context.core
        conversion = Conversion(
            op,
            move,
            self._workspaces,
            core.copiers,
            core.gate,
            peer=self._peer,
            submit=self.submit,
            begin=self._path.submit,
            ended=self._conversion_ended,
        )
        move.plan.local.acquire()
        try:
            self._table.add_conversion(conversion)
        except EngineError:
            move.plan.local.release()
            raise
        return conversion.start()

    def _make(
        self,
        ticket: Ticket,
        move: Move,
        *,
        write: bool,
        start: Callable[[Transfer], None] | None = None,
    ) -> Transfer:
        """Make a transfer that `ticket` can stop, and that is not in the table yet."""
        transfer = Transfer(
            next(self._table.numbers),
            move,
            write=write,
            ticket=ticket,
            on_end=self._ended,
            start=start,
        )
        ticket._stop_hook = transfer.stop
        return transfer

    def _copies_on_gpu(self, plan: TransferPlan) -> bool:
        """Say whether kernels of the path move a plan's blocks, in the order of streams."""
        return self._kernels is not None and self._kernels.reaches(plan)

    def _check_regions(self, operation: str, local: Local, remote: Remote) -> None:
        """Check that the link moves memory of these kinds, and that the peer is the one they name.

        Raises:
            NotRegistered: it is not so.
        """
        kinds = {region.kind for region in local} | {region.kind for region in remote}
        for kind in kinds - self._path.kinds:
            raise NotRegistered(
                f"a {self._context.transport} link does not move {kind} memory: register GPU memory "
                "before connect(), or name the transport there",
                operation=operation,
                peer=self._peer,
            )
        for region in remote:
            if region.engine_id != self._context.peer.engine_id:
                raise NotRegistered(
                    f"region {region.region_id} belongs to another engine than this link's peer, "
                    "or to one that has restarted: fetch its descriptor again",
                    operation=operation,
                    peer=self._peer,
                )

    def _ask_access(self, plan: TransferPlan) -> None:
        """Wait until the peer has granted access to a plan's regions, if it has to be asked."""
        if self._copies_on_gpu(plan) and not self._context.core.progress.on_thread:
            self.submit(Op("prepare"), _AskAccess(plan.remote.regions), Transfer.end_empty).wait()

    def _ticket(self, op: Op) -> Ticket:
        imm = op.imm
        if imm is not None:
            imm = check_imm(imm, op.kind)
        return Ticket(op.kind, peer=self._peer, imm=imm, timeout_s=op.timeout_s)

    def _takes(self, move: BlockMove | TokenMove) -> bool:
        """Say whether the path moves this without a list of pieces."""
        takes = self._path.takes(move)
        # Asked for once, and waited for: a transfer that came later must not overtake one that
        # still waits for access, since streams at both ends may depend on their order.
        if takes and self._kernels is not None:
            remote = move.remote
            if self._passed.get(id(remote)) is not remote:
                self._ask_access(move.plan)
                takes = self._path.takes(move)  # it has tried now whether it reaches them
        return takes

    def _begin(self, transfer: Transfer) -> None:
        """Hand a transfer to the path, if nothing stands in its way."""
        if transfer.stopped is None:
            (transfer.start or self._path.submit)(transfer)

    def _ended(self, transfer: Transfer) -> None:
        """A transfer has ended: its memory is free, and a peer that counts on it is told."""
        if not self._table.remove(transfer):
            return
        error = transfer.stopped
        if error is not None and transfer.write and transfer.imm is not None:
            self._context.send(wire.Abort(transfer.imm, error.message[:1000]))
        if self._table.revoked:
            self._on_ended(transfer)

    def _conversion_ended(self, conversion: Conversion) -> None:
        """A peer that counts on it is told, also if no chunk had begun that would tell it."""
        self._table.remove_conversion(conversion)
        ticket = conversion.ticket
        error = ticket.exception()
        if isinstance(error, EngineError) and ticket.imm is not None:
            self._context.send(wire.Abort(ticket.imm, error.message[:1000]))

    def _check_plan(self, op: Op, plan: TransferPlan) -> None:
        if plan.writes != (op.kind == "write"):
            raise PlanError(
                f"this plan is for {'writing' if plan.writes else 'reading'}: make another with "
                "the two caches exchanged",
                operation=op.kind,
                peer=self._peer,
            )
        if plan.local.kind == "host" and op.stream is not None:
            raise PlanError(
                "stream= orders GPU memory, but this plan's cache is host memory",
                operation=op.kind,
                peer=self._peer,
            )
        plan.local.check_intact()

    def _check_registered(self, op: Op, mine: object, theirs: object) -> None:
        if not isinstance(mine, MemoryRegion):
            problem = f"a {type(mine).__name__} is no region: register() it first"
        elif mine.descriptor.engine_id != self._context.core.identity.engine_id:
            problem = f"region {mine.region_id} is registered with another engine of this process"
        elif not isinstance(theirs, RegionDescriptor):
            problem = (
                f"a {type(theirs).__name__} is no descriptor: give the peer's region.descriptor"
            )
        else:
            return
        raise NotRegistered(problem, operation=op.kind, peer=self._peer)

    def _expire(self, transfer: Transfer, late_s: float) -> None:
        transfer.ticket._expire()
        if late_s > self._context.core.peer_timeout_s and self._table.get(transfer.id) is not None:
            # A thread is stuck in it, or the peer never acknowledged: only taking the link down
            # makes its memory safe.
            why = "the peer did not take a transfer within its deadline"
            self._context.fail(transfer.ticket._make_error(PeerLost, why))


class _AskAccess:
    """A move of nothing, for which the peer is asked for access to its regions."""

    local = ()
    nbytes = 0
    listed = None

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
