"""A link: a live connection to one peer over one transport.

Here is what users and the engine call; nothing below knows the link. The work is done by its parts,
each of which owns its state: `Submitter` chooses the way of a move, begins and ends transfers,
`TransferTable` knows them, `Access` and `Revocation` say which regions may be reached, `Host` is what
the transport's `DataPath` sees, `ControlChannel` carries what the two ends tell each other,
`FailureDetector` watches the peer, `Teardown` ends it all. Messages go to them by a table of types.
docs/structure.md lists the locks and their order.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ..convert.workspace import Workspaces
from ..errors import EngineError, LinkClosed, ProtocolError
from ..runtime import fork
from ..transfer.moves import NOTHING, BlockMove, Op, TokenMove
from ..transfer.ticket import DEFAULT_TIMEOUT_S, Ticket
from ..transports.workers import fail_with, guard
from ..wire import messages as wire
from ..wire.channel import ControlChannel
from .access import Access, Revocation
from .context import LinkContext
from .host import Host
from .liveness import FailureDetector
from .submit import Submitter
from .teardown import Teardown
from .transfers import TransferTable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    import torch

    from ..context import EngineContext
    from ..memory.descriptors import RegionDescriptor
    from ..memory.regions import MemoryRegion
    from ..plan.block_tables import BlockIds
    from ..transfer.block_ids import UploadedIds
    from ..transfer.pieces import Offsets
    from ..transfer.plan import TransferPlan
    from ..transports.base import DataPath, Handlers, PathHost, RailState
    from ..transports.cuda_ipc.graph_write import GraphWrite
    from ..wire.identity import Identity
    from ..wire.messages import LinkMessage


class Link:
    """A live connection to one peer. Made by `TransferEngine.connect` and `accept_link`.

    Symmetric: both ends write, read and count. Safe to use from any thread. Every pending ticket
    ends when the link does.

    Attributes:
        peer: who is at the other end.
        transport: `cuda_ipc`, `cma`, `verbs` or `tcp`.
        source: what counters know it by.
        token_id: names the one-time token that opened it (`Admissions`); b"" without one.
        down: a ticket that ends, with the error, when the link goes down.
        quiesced: a ticket that ends well once the peer can no longer reach this process's memory
            over this link: it said goodbye, its sockets are down, or its process is gone.
        down_error, revoke, forgive, discard: for the engine; its parts say what they do.
    """

    def __init__(
        self,
        core: EngineContext,
        sock: socket.socket,
        peer: Identity,
        transport: str,
        make_path: Callable[[PathHost], DataPath],
    ) -> None:
        self.core = core
        self.peer = peer
        self.transport = transport
        self.token_id = b""
        self.quiesced = Ticket("quiesce", peer=peer.name)
        self.down = Ticket("link", peer=peer.name)
        self._channel = channel = ControlChannel(sock, core.progress, peer.name, self.fail)
        self.source = context = LinkContext(
            core, peer, transport, channel.send, self.fail, self._suspect, self.down, self.quiesced
        )
        self._detector = FailureDetector(
            core, peer, send=channel.send, fail=self.fail, owed_s=channel.owed_s
        )
        access = Access(context)
        self._table = table = TransferTable(peer.name, access.has)
        self._host = host = Host(context, table, access, self._detector.heard)
        self._path = path = make_path(host)
        revocation = Revocation(context, table, access, path.forget)
        workspaces = Workspaces(context, core.max_programs)
        self._submitter = submitter = Submitter(
            context, path, table, access, workspaces, revocation.ended
        )
        self._teardown = teardown = Teardown(
            context, host.lost, path, table, access, channel, self._detector, workspaces
        )
        self.down_error, self.revoke = table.down_error, revocation.ask
        self.forgive, self.discard = self._detector.forgive, teardown.discard
        self._handlers = _dispatch(
            path.handlers,
            {
                wire.Heartbeat: lambda _: None,
                wire.Arrived: host.arrived if path.peer_reaches_memory else host.signalled,
                wire.Abort: host.aborted,
                wire.Refuse: submitter.refused,
                wire.Granted: submitter.granted,
                wire.Revoke: revocation.obey,
                wire.Revoked: revocation.answered,
                wire.Bye: teardown.said_bye,
                wire.ByeToo: teardown.answered_bye,
            },
            {wire.Claim: host.claimed} if path.asks_access else {},
        )
        self._generation = fork.generation
        fork.disown_in_child(self)

    def __repr__(self) -> str:
        state = "up" if self.error is None else f"down: {self.error}"
        return f"<Link {self.transport} to {self.peer.name} {state}>"

    # What users call.

    @property
    def error(self) -> EngineError | None:
        """Why the link is down; None while it is up."""
        return self._table.error

    @property
    def closed(self) -> bool:
        """Whether the link is down."""
        return self._table.error is not None

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
        """Write pieces of a region into a peer's region.

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
        op = Op("write", imm, timeout_s)
        return self._submitter.submit_pieces(op, src, dst, (src_offsets, dst_offsets), nbytes)

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
        """Read pieces of a peer's region into a region of this engine.

        Arguments, result and errors are those of `write`, with the roles exchanged.
        """
        op = Op("read", None, timeout_s)
        return self._submitter.submit_pieces(op, dst, src, (dst_offsets, src_offsets), nbytes)

    def signal(self, imm: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Ticket:
        """Count one write of zero bytes under `imm` at the peer."""
        return self._submitter.submit(Op("write", imm, timeout_s), NOTHING)

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
        """Write blocks of this engine's cache into blocks of the peer's.

        Args:
            plan: from `TransferEngine.plan(mine, theirs)`.
            src_block_ids, dst_block_ids: equally many; see `BlockPlan.pieces`. For GPU memory also int32
                or int64 tensors there, which the kernel checks instead, or the first alone, from
                `upload_ids`: with either the call takes the host as long for any number of blocks.
            layers: global layer indices; all if None.
            stream: for GPU memory, the stream whose work so far comes first (the compute that made
                the blocks); the device's current one if None. The host waits for nothing.
            imm, timeout_s: as for `write`.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: the ids; and as for `write`.
        """
        move = BlockMove(plan, src_block_ids, dst_block_ids, layers)
        return self._submitter.move(Op("write", imm, timeout_s, stream), move)

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
        """Read blocks of the peer's cache into blocks of this engine's.

        As `write_blocks`, with a plan from `TransferEngine.plan(theirs, mine)`.
        """
        move = BlockMove(plan, src_block_ids, dst_block_ids, layers)
        return self._submitter.move(Op("read", None, timeout_s, stream), move)

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
        """Write tokens `[start, stop)` of a request into the peer's blocks, whatever their size.

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
        move = TokenMove(plan, src_tables, dst_tables, start, stop, layers)
        return self._submitter.move(Op("write", imm, timeout_s, stream), move)

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
        """Read tokens of a request out of the peer's blocks into blocks of this engine's.

        As `write_tokens`, with a plan from `TransferEngine.plan(theirs, mine)`.
        """
        move = TokenMove(plan, src_tables, dst_tables, start, stop, layers)
        return self._submitter.move(Op("read", None, timeout_s, stream), move)

    def prepare(self, plan: TransferPlan, *, layers: Sequence[int] | None = None) -> None:
        """Do beforehand what the first transfer of a plan would have to do; may take seconds.

        Of GPU memory: compiles and loads kernels, maps the peer's memory, allocates scratch.
        Call it before a stream of this process waits on a ticket (`Ticket.wait_on`): CUDA may do
        these things only when no stream is waiting. Of host memory it does nothing.

        Raises:
            TransportUnavailable: the peer's memory cannot be reached from here.
        """
        self._submitter.prepare(plan, layers)

    def upload_ids(
        self,
        plan: TransferPlan,
        src_block_ids: BlockIds | torch.Tensor,
        dst_block_ids: BlockIds | torch.Tensor,
    ) -> UploadedIds:
        """Check and orders block ids and copies them to the GPU, for any number of transfers.

        What one request's layers have in common, say. Waits for the copy.

        Args:
            plan: whose GPU memory the transfers will be for.
            src_block_ids, dst_block_ids: as for `write_blocks`; of tensors on the GPU the values are
                not read, but ordered by destination there.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: the ids, or the plan is for host memory.
        """
        return self._submitter.upload_ids(plan, src_block_ids, dst_block_ids)

    def graph_write(
        self,
        plan: TransferPlan,
        src_block_ids: torch.Tensor,
        dst_block_ids: torch.Tensor,
        order: torch.Tensor,
        *,
        layers: Sequence[int] | None = None,
    ) -> GraphWrite:
        """Return a write of blocks that a CUDA graph repeats, each time with other ids and another
        imm.

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
        return self._submitter.graph_write(plan, (src_block_ids, dst_block_ids), order, layers)

    def abort(self, imm: int, reason: str) -> None:
        """Tell the peer that this imm's counter will never reach its total."""
        self._host.abort(imm, reason)

    def close(self, timeout_s: float = 2.0) -> None:
        """End the link: pending tickets end with `LinkClosed`, the peer is told.

        Returns when no thread of this process touches memory over it any more and the peer has
        confirmed, or after `timeout_s`; `quiesced` says which. Safe to call again. In a child of
        fork() it does nothing.
        """
        if fork.generation != self._generation:
            return
        self._teardown.go_down(
            LinkClosed("this side closed the link", operation="close", peer=self.peer.name)
        )
        if not self.core.progress.on_thread:
            with contextlib.suppress(EngineError):
                self.quiesced.wait(timeout_s)

    # What its parts call.

    def fail(self, error: EngineError) -> None:
        """Take the link down because of `error`."""
        error.peer = error.peer or self.peer.name
        self._teardown.go_down(error)

    def _suspect(self) -> None:
        """Find out, on the progress thread, why a socket ended without goodbye; then fail."""
        if self._table.error is None and self._detector.suspect():
            self.core.progress.call_soon(lambda: self.tick(time.monotonic()))

    def _handle(self, message: LinkMessage) -> None:
        """Hand a message to the part that it concerns; one that concerns none takes the link down."""
        handler = self._handlers.get(type(message))
        try:
            taken = handler is not None and handler(message) is not False
        except Exception as error:  # what the peer counts on is not done: this link alone is lost
            fail_with(self.source, f"handling {type(message).__name__}", error)
            return
        if not taken:
            self.fail(
                ProtocolError(
                    f"{type(message).__name__} is no message of transport {self.transport}"
                )
            )

    # What the engine calls.

    def start(self) -> None:
        """Begin to serve the control channel."""
        self._channel.start(
            heard=self._detector.heard,
            handle=self._handle,
            ended=self._teardown.channel_ended,
        )
        self._path.start()
        self._detector.start(self._teardown.process_ended)

    def forked(self) -> tuple[int, ...]:
        """Refuse everything, in a child."""
        self._table.error = fork.error("link")
        for part in ("_submitter", "_host", "_path"):
            setattr(self, part, fork.Inherited())
        return ()

    def tick(self, now: float) -> None:
        """Heartbeats, deadlines and loose ends; on the progress thread. Raises nothing: other links
        have deadlines too."""
        guard(self.source, "a link's tick", partial(self._tick, now))

    def _tick(self, now: float) -> None:
        if self._table.error is not None:
            self._teardown.tick(now)
            return
        self._path.tick()
        self._submitter.expire(now)
        self._detector.tick(now)


def _dispatch(
    path: Handlers, *parts: Handlers
) -> dict[type[LinkMessage], Callable[[Any], bool | None]]:
    """Put the tables of a link's parts together. The path's comes first: what it declines goes on.

    Raises:
        ValueError: two parts want one message.
    """
    table: dict[type[LinkMessage], Callable[[Any], bool | None]] = {}
    for part in parts:
        for kind, handler in part.items():
            if kind in table:
                raise ValueError(f"two parts of a link handle {kind.__name__}")
            table[kind] = handler
    for kind, first in path.items():
        then = table.get(kind)
        table[kind] = first if then is None else partial(_declined, first, then)
    return table


def _declined(
    first: Callable[[Any], bool | None], then: Callable[[Any], bool | None], message: LinkMessage
) -> bool | None:
    return then(message) if first(message) is False else True
