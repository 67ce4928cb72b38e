"""A link: a live connection to one peer over one transport.

The front checks every range and key, and turns calls into `Transfer`s; the transport's `DataPath`
moves them; the control channel carries counts, acknowledgements, heartbeats and goodbyes.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import errors, wire
from .block_ids import UploadedIds, check_ids, check_on_gpu
from .bound_pieces import NO_PIECES, BoundPieces, bind
from .control_channel import ControlChannel
from .conversion import Conversion
from .counters import check_imm
from .errors import (
    EngineError,
    LinkClosed,
    LinkError,
    NotRegistered,
    PeerAborted,
    PeerLost,
    PlanError,
    RegionGone,
    RegionRefused,
)
from .failure_detector import FailureDetector
from .grants import Grants
from .memory import MemoryRegion, RegionDescriptor, RegisteredCache, check_ranges
from .tickets import Ticket
from .token_move import TokenMove, as_tables, bind_tokens, check_move
from .transfer_plan import check_block_ids
from .transports.base import DataPath, Transfer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    import torch

    from .core import EngineCore
    from .handshake import Identity
    from .plan import BlockIds
    from .transfer_plan import TransferPlan
    from .transports.base import RailState
    from .transports.cuda_graph import GraphWrite
    from .wire import LinkMessage

    Offsets = int | Sequence[int] | npt.NDArray[np.integer]

DEFAULT_TIMEOUT_S = 30.0
# Pieces from here on keep up with the link in any order of their destinations (256 MiB over NVLink:
# 366 GB/s random, 367 ordered); 8 KiB ones do not (266 and 365).
ORDERED_BELOW_NBYTES = 16 << 10


class Link:
    """A live connection to one peer. Made by `TransferEngine.connect` and `accept_link`.

    Symmetric: both ends write, read and count. Safe to use from any thread. Every pending ticket
    ends when the link does.

    Attributes:
        peer: who is at the other end.
        transport: `cuda_ipc`, `cma`, `verbs` or `tcp`.
        token_id: names the one-time token that opened it (`admission.py`); b"" without one.
        down: a ticket that ends, with the error, when the link goes down.
        quiesced: a ticket that ends well once the peer can no longer reach this process's memory
            over this link: it said goodbye, its sockets are down, or its process is gone.
    """

    def __init__(
        self,
        core: EngineCore,
        sock: socket.socket,
        peer: Identity,
        transport: str,
        make_path: Callable[[Link], DataPath],
    ) -> None:
        self.core = core
        self.peer = peer
        self.transport = transport
        self.token_id = b""
        self.quiesced = Ticket("quiesce", peer=peer.name)
        self.down = Ticket("link", peer=peer.name)
        self._channel = ControlChannel(sock, core.progress, peer.name, self.fail)
        self._detector = FailureDetector(core, peer, send=self._channel.send, fail=self.fail)
        self._lock = threading.Lock()
        self._transfers: dict[int, Transfer] = {}
        self._conversions: set[Conversion] = set()
        self._numbers = itertools.count(1)
        self._error: EngineError | None = None
        self._halted = False
        self._peer_silent = False
        self._peer_stopped = False
        self._closing_deadline_s = 0.0
        self._revoked_here: set[int] = set()
        self._revocations: dict[int, threading.Event] = {}
        self._grants = Grants(self)
        # The regions of plans that have been checked and granted: looked at once, not each time.
        self._passed: dict[int, tuple[RegionDescriptor, ...]] = {}
        # Plans of GPU memory that were checked and granted: their blocks take the shortest way.
        self._express: dict[tuple[int, tuple[int, ...] | None], Any] = {}
        self._path = make_path(self)

    def __repr__(self) -> str:
        state = "up" if self._error is None else f"down: {self._error}"
        return f"<Link {self.transport} to {self.peer.name} {state}>"

    # What users call.

    @property
    def error(self) -> EngineError | None:
        """Why the link is down; None while it is up."""
        return self._error

    @property
    def closed(self) -> bool:
        """Whether the link is down."""
        return self._error is not None

    @property
    def rails(self) -> tuple[RailState, ...]:
        """The rails of a `verbs` link, as they are now; empty for other transports."""
        return self._path.rail_states()

    def write(
        self,
        src: MemoryRegion,
        src_offsets: Offsets,
        dst: RegionDescriptor,
        dst_offsets: Offsets,
        nbytes: Offsets,
        *,
        imm: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Ticket:
        """Writes pieces of a region into a peer's region.

        Args:
            src: a region of this engine.
            src_offsets, dst_offsets: bytes from each region's start; an int or an array.
            dst: the descriptor that the peer sent.
            nbytes: bytes of each piece, or one int for all.
            imm: what the peer counts the bytes under, once they are visible; not counted if None.
            timeout_s: deadline; the write is stopped then, and the peer told so.

        Returns:
            A ticket that ends when all bytes are placed and the source may be reused.

        Transfers of one link may overtake each other: what must come first is waited for by its
        ticket. Blocks of GPU memory alone (`write_blocks`, `read_blocks` over `cuda_ipc`) move in
        the order of their calls.

        Raises:
            OutOfRange, NotRegistered, RegionGone, LinkError: before any byte moves.
        """
        local, remote = _pieces(src_offsets, dst_offsets, nbytes)
        return self._simple("write", src, local, dst, remote, imm, timeout_s)

    def read(
        self,
        dst: MemoryRegion,
        dst_offsets: Offsets,
        src: RegionDescriptor,
        src_offsets: Offsets,
        nbytes: Offsets,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Ticket:
        """Reads pieces of a peer's region into a region of this engine.

        Arguments, result and errors are those of `write`, with the roles exchanged.
        """
        local, remote = _pieces(dst_offsets, src_offsets, nbytes)
        return self._simple("read", dst, local, src, remote, None, timeout_s)

    def signal(self, imm: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Ticket:
        """Counts one write of zero bytes under `imm` at the peer."""
        return self._submit("write", (), NO_PIECES, (), imm, timeout_s)

    def write_blocks(
        self,
        plan: TransferPlan,
        src_block_ids: BlockIds | torch.Tensor | UploadedIds,
        dst_block_ids: BlockIds | torch.Tensor | None = None,
        *,
        imm: int | None = None,
        layers: Sequence[int] | None = None,
        stream: torch.cuda.Stream | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Ticket:
        """Writes blocks of this engine's cache into blocks of the peer's.

        Args:
            plan: from `TransferEngine.plan(mine, theirs)`.
            src_block_ids, dst_block_ids: equally many; see `Plan.pieces`. For GPU memory also int32
                or int64 tensors there, which the kernel checks instead, or the first alone, from
                `upload_ids`: with either the call takes the host as long for any number of blocks.
            layers: global layer indices; all if None.
            stream: for GPU memory, the stream whose work so far comes first (the compute that made
                the blocks); the device's current one if None. The host waits for nothing.
            imm, timeout_s: as for `write`.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: the ids; and as for `write`.
        """
        ids = (src_block_ids, dst_block_ids)
        return self._blocks("write", plan, ids, imm, layers, stream, timeout_s)

    def read_blocks(
        self,
        plan: TransferPlan,
        src_block_ids: BlockIds | torch.Tensor | UploadedIds,
        dst_block_ids: BlockIds | torch.Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
        stream: torch.cuda.Stream | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Ticket:
        """Reads blocks of the peer's cache into blocks of this engine's.

        As `write_blocks`, with a plan from `TransferEngine.plan(theirs, mine)`.
        """
        ids = (src_block_ids, dst_block_ids)
        return self._blocks("read", plan, ids, None, layers, stream, timeout_s)

    def write_tokens(
        self,
        plan: TransferPlan,
        src_tables: Any,
        dst_tables: Any,
        *,
        stop: int,
        start: int = 0,
        imm: int | None = None,
        layers: Sequence[int] | None = None,
        stream: torch.cuda.Stream | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Ticket:
        """Writes tokens `[start, stop)` of a request into the peer's blocks, whatever their size.

        Args:
            plan: from `TransferEngine.plan(mine, theirs)`.
            src_tables, dst_tables: a block table for each group of the layouts, or the one table;
                see `TokenPlan.moves`. Over `cuda_ipc` also int32 or int64 tensors on the GPU,
                which the kernel checks instead.
            layers, stream, imm, timeout_s: as for `write_blocks`. The peer expects
                `plan.tokens.nbytes(start, stop)` bytes; numbers that change their type come as
                several writes where they are many.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: the tables; and as for `write`.
        """
        only = None if layers is None else tuple(layers)
        move = TokenMove(as_tables(src_tables), as_tables(dst_tables), start, stop, only)
        return self._tokens("write", plan, move, imm, stream, timeout_s)

    def read_tokens(
        self,
        plan: TransferPlan,
        src_tables: Any,
        dst_tables: Any,
        *,
        stop: int,
        start: int = 0,
        layers: Sequence[int] | None = None,
        stream: torch.cuda.Stream | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Ticket:
        """Reads tokens of a request out of the peer's blocks into blocks of this engine's.

        As `write_tokens`, with a plan from `TransferEngine.plan(theirs, mine)`.
        """
        only = None if layers is None else tuple(layers)
        move = TokenMove(as_tables(src_tables), as_tables(dst_tables), start, stop, only)
        return self._tokens("read", plan, move, None, stream, timeout_s)

    def prepare(self, plan: TransferPlan, *, layers: Sequence[int] | None = None) -> None:
        """Does beforehand what the first transfer of a plan would have to do; may take seconds.

        Over `cuda_ipc`: compiles and loads kernels, maps the peer's memory, allocates scratch.
        Call it before a stream of this process waits on a ticket (`Ticket.wait_on`): CUDA may do
        these things only when no stream is waiting. Elsewhere it does nothing.

        Raises:
            TransportUnavailable: the peer's memory cannot be reached from here.
        """
        self._ask_leave(plan)
        self._path.prepare(plan, layers)

    def upload_ids(
        self,
        plan: TransferPlan,
        src_block_ids: BlockIds | torch.Tensor,
        dst_block_ids: BlockIds | torch.Tensor,
    ) -> UploadedIds:
        """Checks and orders block ids and copies them to the GPU, for any number of transfers.

        What one request's layers have in common, say. Waits for the copy.

        Args:
            plan: whose GPU memory the transfers will be for.
            src_block_ids, dst_block_ids: as for `write_blocks`; of tensors on the GPU the values are
                not read, but ordered by destination there.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: the ids, or the plan is for host memory.
        """
        import torch

        if not (self._path.orders_streams and self._path.takes_blocks(plan)):
            raise PlanError(
                "upload_ids is for GPU memory: give lists of block ids to write_blocks",
                operation="upload",
                peer=self.peer.name,
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
        *,
        layers: Sequence[int] | None = None,
    ) -> GraphWrite:
        """A write of blocks that a CUDA graph repeats, each time with other ids and another imm.

        Call it before the capture: it compiles and allocates. `GraphWrite` has the rules.

        Args:
            plan: from `TransferEngine.plan(mine, theirs)`, of GPU memory.
            src_block_ids, dst_block_ids: int32 or int64 tensors on the GPU, as long as the most
                blocks that one replay moves. The kernel reads them, so keep them, and write them
                between replays.
            order: int64 `[2]` on the GPU: the imm, and how many of the ids count.
            layers: global layer indices; all if None.

        Raises:
            PlanError: the plan or the tensors do not fit. RegionGone, LinkError: as for `write`.
        """
        if not plan.writes or not (self._path.orders_streams and self._path.takes_blocks(plan)):
            raise PlanError(
                "a graph write needs a plan for writing GPU memory over cuda_ipc",
                operation="graph_write",
                peer=self.peer.name,
            )
        check_on_gpu(plan, src_block_ids, dst_block_ids)
        check_on_gpu(plan, order, order)
        if len(order) != 2 or order.element_size() != 8 or not len(src_block_ids):
            raise PlanError(
                "a graph write needs ids and an order of two int64: the imm, and how many ids",
                operation="graph_write",
                peer=self.peer.name,
            )
        self._check_regions("graph_write", (plan.local,), plan.remote.regions)
        self._ask_leave(plan)
        ticket = Ticket("graph_write", peer=self.peer.name)
        transfer = self._new_transfer(ticket, plan, nbytes=1)  # which are never placed
        route = self._path.route(plan, layers)
        self._admit(transfer, route)
        try:
            tensors = (src_block_ids, dst_block_ids, order)
            write: GraphWrite = self._path.repeat_blocks(transfer, route, tensors)
        except BaseException:
            transfer.abandon(LinkClosed("a graph write was not made", operation="graph_write"))
            raise
        return write

    def abort(self, imm: int, reason: str) -> None:
        """Tells the peer that this imm's counter will never reach its total."""
        imm = check_imm(imm, "abort")
        self.send(wire.Abort(imm, reason[:1000]))

    def close(self, timeout_s: float = 2.0) -> None:
        """Ends the link: pending tickets end with `LinkClosed`, the peer is told.

        Returns when no thread of this process touches memory over it any more and the peer has
        confirmed, or after `timeout_s`; `quiesced` says which. Safe to call again.
        """
        self._go_down(
            LinkClosed("this side closed the link", operation="close", peer=self.peer.name)
        )
        if not self.core.progress.on_thread:
            with contextlib.suppress(EngineError):
                self.quiesced.wait(timeout_s)

    # What data paths call.

    def transfer(self, number: int) -> Transfer | None:
        """The transfer of this number, if it has not ended."""
        return self._transfers.get(number)

    def grant(self, claim: wire.Claim, register: Callable[[MemoryRegion], tuple[int, ...]]) -> None:
        """Answers a peer that asks for leave to reach a region; `register` yields its keys."""
        self._grants.answer(claim, register)

    def heard(self) -> None:
        """The peer gave a sign of life."""
        self._detector.heard()

    def count(self, imm: int, nbytes: int, writes: int, *, staged: bool = False) -> None:
        """Counts bytes of the peer's that are visible here; `staged`: they came through staging."""
        try:
            self.core.counters.arrived(
                imm, nbytes, writes, self, self.peer.engine_id, staged=staged
            )
        except EngineError as error:
            error.peer = self.peer.name
            self.fail(error)
        if self._error is not None:
            # It came while the link went down: whoever expects the rest must not wait for it.
            self.core.counters.source_lost(self, self._counter_error)

    def reject(self, transfer: int, imm: int | None, error: EngineError, *, first: int = 0) -> None:
        """Refuses part of a peer's write: both ends' tickets end."""
        if imm is not None:
            error.imm = imm
            self.core.counters.fail(imm, error, remember=True, origin=self.peer.engine_id)
        self.send(wire.Refuse(transfer, type(error).__name__, error.message, first))

    def refusal(self, transfer: Transfer, error: str, reason: str) -> EngineError:
        """The error for a transfer that the peer refused with an error of this class name."""
        kind = {
            "ChecksumMismatch": errors.ChecksumMismatch,
            "RegionGone": RegionGone,
            "OutOfRange": errors.OutOfRange,
            "RailError": errors.RailError,
        }.get(error, RegionRefused)
        return kind(
            f"the peer refused: {reason}",
            operation=transfer.ticket.operation,
            peer=self.peer.name,
            imm=transfer.imm,
        )

    def fail(self, error: EngineError) -> None:
        """Takes the link down because of `error`."""
        error.peer = error.peer or self.peer.name
        self._go_down(error)

    def suspect(self) -> None:
        """A socket ended without goodbye: the progress thread finds out why, then fails."""
        if self._error is None and self._detector.suspect():
            self.core.progress.call_soon(lambda: self.tick(time.monotonic()))

    def send(self, message: LinkMessage) -> None:
        """Sends a control message; never blocks. On a link that is down it does nothing."""
        self._channel.send(message)

    # What the engine calls.

    def start(self) -> None:
        """Begins to serve the control channel."""
        self._channel.start(heard=self._detector.heard, handle=self._handle, ended=self._broken)
        self._path.start()
        self._detector.start(self._process_ended)

    def tick(self, now: float) -> None:
        """Heartbeats, deadlines and loose ends; on the progress thread."""
        if self._error is not None:
            late = self._closing_deadline_s and now > self._closing_deadline_s
            if late and not self._path.peer_reaches_memory:
                self._close_socket()
            # A frozen peer that reaches memory may yet wake and say goodbye; if nothing else tells
            # that its process is gone, its entry in /proc does.
            closed = self._halted and self._channel.closed
            if closed and not self._detector.watches_process and not self._peer_stopped:
                self._peer_stopped = self._detector.process_gone()
                self._settle()
            return
        self._path.tick()
        for transfer in list(self._transfers.values()):
            deadline_s = transfer.ticket.deadline_s
            if deadline_s is not None and now > deadline_s:
                self._expire(transfer, now - deadline_s)
        self._detector.tick(now)

    def discard(self) -> None:
        """Closes what is still open: the engine's threads have stopped.

        Ends `quiesced` badly where a peer's live process may still reach memory.
        """
        self._close_socket()
        self._detector.close()
        self.quiesced._fail(
            errors.DeadlineExceeded(
                "this engine was closed while the peer could still reach its memory",
                operation="quiesce",
                peer=self.peer.name,
            )
        )

    def forgive(self, seconds: float) -> None:
        """This process itself was asleep: the peer's silence does not count."""
        self._detector.forgive(seconds)

    def revoke(self, region_id: int, deadline_s: float) -> None:
        """Returns once the peer has stopped using a region of this engine.

        Raises:
            DeadlineExceeded: it did not answer, and its process lives.
        """
        if not self._grants.lent(region_id) or self.quiesced.done():
            return
        answered = self._revocations.setdefault(region_id, threading.Event())
        self.quiesced.add_done_callback(lambda _: answered.set())
        self.send(wire.Revoke(region_id))
        if answered.wait(max(0.0, deadline_s - time.monotonic())):
            self._revocations.pop(region_id, None)
        else:
            raise errors.DeadlineExceeded(
                f"the peer may still write into region {region_id}: its memory is kept until the "
                "peer's process ends",
                operation="deregister",
                peer=self.peer.name,
            )

    # Submitting.

    def _simple(
        self,
        operation: str,
        mine: MemoryRegion,
        local: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
        theirs: RegionDescriptor,
        remote: npt.NDArray[np.int64],
        imm: int | None,
        timeout_s: float,
    ) -> Ticket:
        self._check_registered(operation, mine, theirs)
        offsets, sizes = local
        check_ranges(offsets, sizes, mine.nbytes, "local")
        index = np.zeros(len(sizes), np.int64)
        pieces = bind(offsets + mine.address, sizes, index, remote, (theirs,))
        return self._submit(operation, (mine,), pieces, (theirs,), imm, timeout_s)

    def _check_registered(self, operation: str, mine: object, theirs: object) -> None:
        if not isinstance(mine, MemoryRegion):
            problem = f"a {type(mine).__name__} is no region: register() it first"
        elif mine.descriptor.engine_id != self.core.identity.engine_id:
            problem = f"region {mine.region_id} is registered with another engine of this process"
        elif not isinstance(theirs, RegionDescriptor):
            problem = (
                f"a {type(theirs).__name__} is no descriptor: give the peer's region.descriptor"
            )
        else:
            return
        raise NotRegistered(problem, operation=operation, peer=self.peer.name)

    def _blocks(
        self,
        operation: str,
        plan: TransferPlan,
        ids: tuple[Any, Any],
        imm: int | None,
        layers: Sequence[int] | None,
        stream: torch.cuda.Stream | None,
        timeout_s: float,
    ) -> Ticket:
        route = self._express.get((id(plan), None if layers is None else tuple(layers)))
        if route is not None and plan.writes == (operation == "write"):
            return self._copy_on_gpu(operation, route, ids, imm, stream, timeout_s)
        if self._takes_whole(operation, plan, stream):
            if self._path.orders_streams:
                route = self._path.route(plan, layers)
                return self._copy_on_gpu(operation, route, ids, imm, stream, timeout_s)
            ids = check_block_ids(plan, *ids)
            nbytes = plan.nbytes(len(ids[1]), layers=layers)
            return self._submit(
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
        if ids[1] is None or any(getattr(one, "is_cuda", False) for one in ids):
            raise PlanError(
                "block ids on a GPU, or uploaded there, need GPU memory at both ends and cuda_ipc: here they are "
                "needed in host memory",
                operation=operation,
                peer=self.peer.name,
            )
        return self._submit(
            operation,
            (plan.local,),
            plan.pieces(*ids, layers),
            plan.remote.regions,
            imm,
            timeout_s,
            stream=stream,
        )

    def _tokens(
        self,
        operation: str,
        plan: TransferPlan,
        move: TokenMove,
        imm: int | None,
        stream: torch.cuda.Stream | None,
        timeout_s: float,
    ) -> Ticket:
        pieces, start, nbytes = NO_PIECES, None, None
        if self._takes_whole(operation, plan, stream) and self._path.orders_streams:
            nbytes = check_move(plan, move)
            start = partial(self._path.submit_tokens, plan=plan, move=move)
        elif plan.tokens.converts:
            return self._convert(operation, plan, move, imm, timeout_s)
        else:
            pieces = bind_tokens(plan, move)
        return self._submit(
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
        self, operation: str, plan: TransferPlan, move: TokenMove, imm: int | None, timeout_s: float
    ) -> Ticket:
        """Begins a transfer of numbers that change their type, in chunks."""
        if imm is not None:
            imm = check_imm(imm, operation)
        self._check_regions(operation, (plan.local,), plan.remote.regions)
        conversion = Conversion(self, operation, plan, move, imm, timeout_s)
        plan.local.acquire()
        with self._lock:
            down = self._error is not None
            if not down:
                self._conversions.add(conversion)
        if down:
            plan.local.release()
            raise self._down_error(operation)
        return conversion.start()

    def _conversion_ended(self, conversion: Conversion) -> None:
        self._conversions.discard(conversion)

    def _takes_whole(
        self, operation: str, plan: TransferPlan, stream: torch.cuda.Stream | None
    ) -> bool:
        """Checks a plan for use; whether the path moves its blocks without a list of pieces."""
        if plan.writes != (operation == "write"):
            raise PlanError(
                f"this plan is for {'writing' if plan.writes else 'reading'}: make another with "
                "the two caches exchanged",
                operation=operation,
                peer=self.peer.name,
            )
        if stream is not None and plan.local.kind == "host":
            raise PlanError(
                "stream= orders GPU memory, but this plan's cache is host memory",
                operation=operation,
                peer=self.peer.name,
            )
        if plan.local.kind == "host":
            plan.local.check_intact()
        takes = self._path.takes_blocks(plan)
        # Asked for once, and waited for: a transfer that came later must not overtake one that
        # still waits for leave, since streams at both ends may depend on their order.
        unknown = plan.remote.regions is not self._passed.get(id(plan.remote.regions))
        if takes and self._path.orders_streams and unknown:
            self._ask_leave(plan)
        return takes

    def _copy_on_gpu(
        self,
        operation: str,
        route: Any,
        ids: tuple[Any, Any],
        imm: int | None,
        stream: torch.cuda.Stream | None,
        timeout_s: float,
    ) -> Ticket:
        """Checks and begins a transfer of blocks of GPU memory. The host's share of a transfer is
        this and what the path does: every line counts."""
        if imm is not None:
            imm = check_imm(imm, operation)
        plan: TransferPlan = route.plan
        src, dst = ids
        ordered = route.finest_nbytes < ORDERED_BELOW_NBYTES
        checked = check_ids(plan, src, dst, ordered=ordered)
        ticket = Ticket(operation, peer=self.peer.name, imm=imm, timeout_s=timeout_s)
        transfer = self._new_transfer(ticket, plan, checked.num_blocks * route.block_nbytes)
        if self._admit(transfer, route):
            self._path.copy_on_gpu(transfer, route, checked, stream)
            return ticket
        # On the progress thread nobody can be asked and waited for.
        transfer.start = lambda it: self._path.copy_on_gpu(it, route, checked, None)
        self._path.before(transfer, stream)
        if self._grants.admit(transfer):
            self._begin(transfer)
        return ticket

    def _new_transfer(self, ticket: Ticket, plan: TransferPlan, nbytes: int) -> Transfer:
        transfer = Transfer(
            next(self._numbers),
            write=plan.writes,
            pieces=NO_PIECES,
            local_regions=(plan.local,),
            remote_regions=plan.remote.regions,
            imm=ticket.imm,
            ticket=ticket,
            on_end=self._ended,
        )
        transfer.total_nbytes = nbytes
        ticket._stop_hook = transfer.stop
        return transfer

    def _admit(self, transfer: Transfer, route: Any) -> bool:
        """Registers a transfer of blocks; False if the peer has not given leave yet.

        Raises:
            RegionGone, LinkError: it must not begin.
        """
        plan: TransferPlan = route.plan
        plan.local.acquire()
        try:
            with self._lock:  # with `_revoked`
                if self._error is not None:
                    raise self._down_error(transfer.ticket.operation)
                granted = self._express.get(route.key) is route
                if not granted:
                    for region in plan.remote.regions:
                        if region.region_id in self._revoked_here:
                            raise self._revoked_error(
                                transfer.ticket.operation, region.region_id, transfer.imm
                            )
                    granted = self._grants.has(plan.remote.regions)
                    if granted:
                        self._express[route.key] = route
                self._transfers[transfer.id] = transfer
        except EngineError:
            plan.local.release()
            raise
        return granted

    def _submit(
        self,
        operation: str,
        local_regions: tuple[MemoryRegion | RegisteredCache, ...],
        pieces: BoundPieces,
        remote_regions: tuple[RegionDescriptor, ...],
        imm: int | None,
        timeout_s: float,
        start: Callable[[Transfer], None] | None = None,
        nbytes: int | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> Ticket:
        """Checks and begins a transfer of pieces, or of `nbytes` bytes that `start` begins."""
        name = self.peer.name
        if imm is not None:
            imm = check_imm(imm, operation)
        known = start is not None and self._passed.get(id(remote_regions)) is remote_regions
        if not known:
            self._check_regions(operation, local_regions, remote_regions)
        ticket = Ticket(operation, peer=name, imm=imm, timeout_s=timeout_s)
        transfer = Transfer(
            next(self._numbers),
            write=operation == "write",
            pieces=pieces,
            local_regions=local_regions,
            remote_regions=remote_regions,
            imm=imm,
            ticket=ticket,
            on_end=self._ended,
        )
        ticket._stop_hook = transfer.stop
        transfer.start = start
        if nbytes is not None:
            transfer.total_nbytes = nbytes
        acquired = 0
        try:
            for mine in local_regions:
                mine.acquire()
                acquired += 1
            with self._lock:
                if self._error is not None:
                    raise self._down_error(operation)
                for region in () if known and not self._revoked_here else remote_regions:
                    if region.region_id in self._revoked_here:
                        raise self._revoked_error(operation, region.region_id, imm)
                self._transfers[transfer.id] = transfer
        except EngineError:
            for mine in local_regions[:acquired]:
                mine.release()
            raise
        self._path.before(transfer, stream)
        if (
            (known and not self._revoked_here)
            or not self._path.asks_leave
            or self._grants.admit(transfer)
        ):
            if start is not None:
                self._passed[id(remote_regions)] = remote_regions
            self._begin(transfer)
        return ticket

    def _check_regions(
        self,
        operation: str,
        local_regions: tuple[MemoryRegion | RegisteredCache, ...],
        remote_regions: tuple[RegionDescriptor, ...],
    ) -> None:
        kinds = {region.kind for region in local_regions}
        kinds |= {region.kind for region in remote_regions}
        for kind in kinds - self._path.kinds:
            raise NotRegistered(
                f"a {self.transport} link does not move {kind} memory: register GPU memory before "
                "connect(), or name the transport there",
                operation=operation,
                peer=self.peer.name,
            )
        for region in remote_regions:
            if region.engine_id != self.peer.engine_id:
                raise NotRegistered(
                    f"region {region.region_id} belongs to another engine than this link's peer, "
                    "or to one that has restarted: fetch its descriptor again",
                    operation=operation,
                    peer=self.peer.name,
                )

    def _ask_leave(self, plan: TransferPlan) -> None:
        """Waits until the peer has let this link reach a plan's regions, if it has to be asked."""
        if not (self._path.orders_streams and self._path.takes_blocks(plan)):
            return
        if self.core.progress.on_thread:
            return
        self._submit(
            "prepare",
            (),
            NO_PIECES,
            plan.remote.regions,
            None,
            DEFAULT_TIMEOUT_S,
            _nothing,
            0,
        ).wait()

    def _begin(self, transfer: Transfer) -> None:
        (transfer.start or self._path.submit)(transfer)

    def _down_error(self, operation: str) -> EngineError:
        """The link's error again, for an operation that came after it."""
        error = self._error
        if isinstance(error, PeerLost):
            return PeerLost(
                error.message,
                operation=operation,
                peer=self.peer.name,
                process_gone=error.process_gone,
            )
        kind = type(error) if isinstance(error, LinkError) else LinkClosed
        message = error.message if error is not None else "the link is down"
        return kind(message, operation=operation, peer=self.peer.name)

    def _ended(self, transfer: Transfer) -> None:
        """A transfer has ended: its memory is free, and a peer that counts on it is told."""
        with self._lock:
            if self._transfers.pop(transfer.id, None) is None:
                return
        for region in transfer.local_regions:
            region.release()
        error = transfer.stopped
        if error is not None and transfer.write and transfer.imm is not None:
            self.abort(transfer.imm, error.message)
        if self._revoked_here:
            for region_id in self._revoked_here & {r.region_id for r in transfer.remote_regions}:
                self._confirm_revoked(region_id)

    def _expire(self, transfer: Transfer, late_s: float) -> None:
        transfer.ticket._expire()
        if late_s > self.core.peer_timeout_s and transfer.id in self._transfers:
            # A thread is stuck in it, or the peer never acknowledged: only taking the link down
            # makes its memory safe.
            self.fail(
                PeerLost(
                    "the peer did not take a transfer within its deadline",
                    operation=transfer.ticket.operation,
                    peer=self.peer.name,
                    imm=transfer.imm,
                )
            )

    # The control channel; on the progress thread.

    def _broken(self) -> None:
        """The control socket has ended: everything that the peer said is read."""
        self._peer_silent = True
        self._channel.unwatch()
        if self._error is None:
            self.suspect()
        elif self._halted:
            self._close_socket()

    def _handle(self, message: LinkMessage) -> None:
        if isinstance(message, wire.Heartbeat) or self._path.handle(message):
            return
        if isinstance(message, wire.Arrived) and (
            self._path.peer_reaches_memory or not message.nbytes
        ):  # bytes that pass through this process are counted where they are placed
            self.count(message.imm, message.nbytes, message.writes)
        elif isinstance(message, wire.Refuse):
            self._refused(message)
        elif isinstance(message, wire.Abort):
            self.core.counters.fail(
                message.imm,
                PeerAborted(
                    f"the peer gave up: {message.reason}",
                    operation="expect",
                    peer=self.peer.name,
                    imm=message.imm,
                ),
                remember=True,
                origin=self.peer.engine_id,
            )
        elif isinstance(message, wire.Claim) and self._path.asks_leave:
            self.grant(message, lambda _: ())
        elif isinstance(message, wire.Granted):
            for transfer in self._grants.answered(message, self._revoked_here):
                self._begin(transfer)
        elif isinstance(message, wire.Revoke):
            self._revoked(message.region)
        elif isinstance(message, wire.Revoked):
            event = self._revocations.get(message.region)
            if event is not None:
                self._grants.returned(message.region)
                event.set()
        elif isinstance(message, wire.Bye):
            self._peer_stopped = True
            self._path.drain()
            why = f": {message.reason}" if message.reason else ""
            self.fail(PeerLost(f"the peer closed the link{why}", operation="link"))
            if self._halted:
                self._close_socket()  # two goodbyes crossed: neither is answered
        elif isinstance(message, wire.ByeToo) and self._error is not None:
            self._peer_stopped = True
            self._close_socket()
        else:
            self.fail(
                errors.ProtocolError(
                    f"{type(message).__name__} is no message of transport {self.transport}",
                    operation="receive",
                )
            )

    def _refused(self, message: wire.Refuse) -> None:
        transfer = self._transfers.get(message.transfer)
        if transfer is not None:
            transfer.stop(self.refusal(transfer, message.error, message.reason))
            transfer.end(0)

    def _revoked(self, region_id: int) -> None:
        """The peer takes a region back: running transfers to it stop, no new one begins."""
        with self._lock:  # with `_submit`: a transfer is either seen here or refused there
            self._revoked_here.add(region_id)
            self._express = {
                key: route
                for key, route in self._express.items()
                if all(region.region_id != region_id for region in route.plan.remote.regions)
            }
        self._grants.drop(region_id)
        using = [
            transfer
            for transfer in list(self._transfers.values())
            if any(region.region_id == region_id for region in transfer.remote_regions)
        ]
        for transfer in using:
            transfer.stop(self._revoked_error(transfer.ticket.operation, region_id, transfer.imm))
        self._confirm_revoked(region_id)

    def _revoked_error(self, operation: str, region_id: int, imm: int | None) -> RegionGone:
        return RegionGone(
            f"the peer has deregistered region {region_id}",
            operation=operation,
            peer=self.peer.name,
            imm=imm,
        )

    def _confirm_revoked(self, region_id: int) -> None:
        for transfer in list(self._transfers.values()):
            if any(region.region_id == region_id for region in transfer.remote_regions):
                return
        self._path.forget(region_id)
        self.send(wire.Revoked(region_id))

    # Going down.

    def _process_ended(self) -> None:
        self._detector.unwatch()
        while not self._channel.closed and self._channel.take():
            pass  # it may have finished its work, and said so, just before
        self._path.drain()
        self._peer_stopped = True
        self.fail(
            PeerLost(
                "the peer's process has ended",
                operation="link",
                peer=self.peer.name,
                process_gone=True,
            )
        )
        self._close_socket()
        self._settle()

    def _go_down(self, error: EngineError) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
        self._closing_deadline_s = time.monotonic() + self.core.peer_timeout_s
        for transfer in list(self._transfers.values()):
            transfer.stop(self._down_error(transfer.ticket.operation))
        for conversion in list(self._conversions):
            conversion.stop(self._down_error(conversion.ticket.operation))
        self.core.counters.source_lost(self, self._counter_error)
        self._grants.clear()
        self._path.halt(self._path_halted)
        self.down._fail(error)

    def _counter_error(self, imm: int) -> EngineError:
        error = self._down_error("expect")
        error.imm = imm
        return error

    def _path_halted(self) -> None:
        """No thread of this process touches memory over this link any more."""
        for transfer in list(self._transfers.values()):
            transfer.abandon(self._down_error(transfer.ticket.operation))
        self._halted = True
        if self._peer_stopped:
            self.send(wire.ByeToo())
            self._close_socket()
        else:
            reason = "" if isinstance(self._error, LinkClosed) else str(self._error)
            self.send(wire.Bye(reason[:1000]))
            lost = isinstance(self._error, PeerLost) and not self._path.peer_reaches_memory
            if lost or self._peer_silent:
                self._close_socket()
        self._settle()

    def _close_socket(self) -> None:
        if self._channel.close():
            self._settle()

    def _settle(self) -> None:
        """Ends `quiesced` once nothing on either side can touch memory over this link."""
        if not (self._halted and self._channel.closed):
            return
        if self._path.peer_reaches_memory and not self._peer_stopped:
            return  # its process lives and may still copy: wait for the process descriptor
        self._detector.unwatch()
        self._detector.close()
        if self.quiesced._finish(0):
            self.core.forget(self)


def _nothing(transfer: Transfer) -> None:
    if transfer.begin():
        transfer.end(0)


def _pieces(
    local: Offsets, remote: Offsets, nbytes: Offsets
) -> tuple[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Equally long int64 columns out of ints and arrays."""
    columns = [np.atleast_1d(np.asarray(column)) for column in (local, remote, nbytes)]
    # NumPy takes an empty list for floats.
    columns = [column if column.size else column.astype(np.int64) for column in columns]
    for name, column in zip(("local offsets", "remote offsets", "nbytes"), columns, strict=True):
        if column.ndim != 1 or column.dtype.kind not in "iu":
            raise PlanError(f"{name} must be an int or a row of ints", operation="transfer")
    try:
        here, there, sizes = np.broadcast_arrays(*columns)
    except ValueError as error:
        raise PlanError(
            f"{len(columns[0])} local offsets, {len(columns[1])} remote offsets and "
            f"{len(columns[2])} lengths do not go together",
            operation="transfer",
        ) from error
    return (here.astype(np.int64), sizes.astype(np.int64)), there.astype(np.int64)
