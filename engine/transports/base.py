"""The contract of a transport: it moves pieces between regions and never knows what a KV cache is.

A transport gives each link a `DataPath`. The link checks ranges and keys, makes a `Transfer` and
hands it to the path; the path moves bytes, begins and ends work on the transfer as it goes, and
counts arrivals. What every path must keep:

1. `submit` never blocks the caller.
2. Bytes are visible at the peer before they are counted there.
3. `Transfer.end` is called for a part only when the source may be reused and the bytes are placed.
4. After `halt` has called back, no thread of this process touches any memory through the path.
5. Nothing is written outside a registered region.
"""

from __future__ import annotations

import abc
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..errors import EngineError, NotRegistered
from ..memory import iovec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..connect.handshake import Identity
    from ..context import EngineCore
    from ..memory.descriptors import RegionDescriptor
    from ..memory.regions import MemoryRegion, RegisteredCache
    from ..transfer.block_ids import CheckedIds
    from ..transfer.moves import TokenMove
    from ..transfer.pieces import BoundPieces
    from ..transfer.plan import TransferPlan
    from ..transfer.ticket import Ticket
    from ..wire.messages import Claim, LinkMessage


class Availability(NamedTuple):
    """Whether a transport works on this machine, and why not."""

    ok: bool
    reason: str


class RailState(NamedTuple):
    """One rail of a link, at this moment.

    Attributes:
        up: it takes transfers.
        sent_nbytes, received_nbytes: written by this end, and by the peer, over all its lives.
        error: why it is out; None while it is up, or not yet.
    """

    number: int
    device: str
    up: bool
    sent_nbytes: int
    received_nbytes: int
    error: EngineError | None


class PathHost(Protocol):
    """What a data path may ask of its link."""

    core: EngineCore
    peer: Identity

    @property
    def closed(self) -> bool:
        """Whether the link is down."""

    def transfer(self, number: int) -> Transfer | None:
        """The transfer of this number, if it has not ended."""

    def grant(self, claim: Claim, register: Callable[[MemoryRegion], tuple[int, ...]]) -> None:
        """Answers a peer that asks for leave to reach a region."""

    def has_leave(self, regions: tuple[RegionDescriptor, ...]) -> bool:
        """Whether the peer has granted all of these regions."""

    def heard(self) -> None:
        """The peer gave a sign of life."""

    def count(
        self, imm: int, nbytes: int, writes: int, *, write_nbytes: int = 0, staged: bool = False
    ) -> None:
        """Counts bytes of the peer's that are visible here."""

    def reject(self, transfer: int, imm: int | None, error: EngineError, *, first: int = 0) -> None:
        """Refuses part of a peer's write: both ends' tickets end."""

    def refusal(self, transfer: Transfer, error: str, reason: str) -> EngineError:
        """The error for a transfer that the peer refused."""

    def abort(self, imm: int, reason: str) -> None:
        """Tells the peer that this imm's counter will never reach its total."""

    def send(self, message: LinkMessage) -> None:
        """Sends a control message; never blocks."""

    def fail(self, error: EngineError) -> None:
        """Takes the link down."""

    def suspect(self) -> None:
        """A socket ended without goodbye."""

    def down_error(self, operation: str) -> EngineError:
        """The link's error again, for an operation that came after it."""


class Transfer:
    """One write or read on its way, and who still touches its memory.

    Its ticket ends when no thread works on it any more: well when all bytes are placed, or with the
    first error. A stopped transfer begins no further work (invariant 2: a source block is not
    reused before every read from it has completed).
    """

    __slots__ = (
        "_active",
        "_concluded",
        "_error",
        "_lock",
        "_on_end",
        "_placed_nbytes",
        "after",
        "id",
        "imm",
        "keep",
        "local",
        "local_regions",
        "nbytes",
        "on_placed",
        "on_stop",
        "remote_index",
        "remote_offset",
        "remote_regions",
        "scratch",
        "start",
        "ticket",
        "total_nbytes",
        "write",
    )

    def __init__(
        self,
        number: int,
        *,
        write: bool,
        pieces: BoundPieces,
        local_regions: tuple[MemoryRegion | RegisteredCache, ...],
        remote_regions: tuple[RegionDescriptor, ...],
        imm: int | None,
        ticket: Ticket,
        on_end: Callable[[Transfer], None],
    ) -> None:
        self.id = number
        self.write = write
        self.local, self.nbytes, self.remote_index, self.remote_offset, self.total_nbytes = pieces
        self.local_regions = local_regions
        self.remote_regions = remote_regions
        self.imm = imm
        self.ticket = ticket
        # Once, before the ticket ends well; with the EngineError that it raises, if it does.
        self.on_placed: Callable[[], None] | None = None
        self.on_stop: Callable[[], None] | None = None  # once, when stopped while at work
        self.start: Callable[[Transfer], None] | None = None  # instead of the path's `submit`
        self.after: Any = None  # what must be done before its memory is touched, if anything
        self.keep: Any = None  # what must live as long as it
        self.scratch = False  # its local pieces lie in memory of the engine's own, in no region
        self._on_end = on_end
        self._lock = threading.Lock()
        self._active = 0
        self._placed_nbytes = 0
        self._error: EngineError | None = None
        self._concluded = False

    def take(self, pieces: BoundPieces) -> None:
        """Gives it the list of pieces, before its first work begins."""
        self.local, self.nbytes, self.remote_index, self.remote_offset, self.total_nbytes = pieces

    @property
    def stopped(self) -> EngineError | None:
        """The error it will end with, if it was stopped."""
        return self._error

    def device(self) -> int:
        """The GPU that holds its local memory; -1 for host memory.

        Raises:
            NotRegistered: it is spread over several.
        """
        regions = self.local_regions
        devices = {region.device for region in regions} or {-1}
        if len(devices) > 1 or any(r.device < 0 and r.kind != "host" for r in regions):
            raise NotRegistered(
                "the local regions are on several GPUs, or partly in host memory: make one "
                "transfer for each",
                operation=self.ticket.operation,
                peer=self.ticket.peer,
            )
        return devices.pop()

    def remote_iovec(self) -> iovec.Iovec:
        """The pieces' virtual addresses in the peer's process."""
        if len(self.remote_regions) == 1:
            return iovec.make(self.remote_offset + self.remote_regions[0].address, self.nbytes)
        bases = np.array([region.address for region in self.remote_regions], np.int64)
        return iovec.make(bases[self.remote_index] + self.remote_offset, self.nbytes)

    def begin(self, count: int = 1) -> bool:
        """Begins `count` works on its memory; False if it has ended or must, and nothing may begin.

        A thread that works on the memory and an answer that is awaited from the peer are two works:
        a peer that answers early, or twice, must not free memory under a thread.
        """
        with self._lock:
            if self._error is not None or self._concluded:
                return False
            self._active += count
            return True

    def end(self, nbytes: int) -> None:
        """Ends work that was begun; `nbytes` bytes are placed."""
        with self._lock:
            self._active -= 1
            self._placed_nbytes += nbytes
            error = self._error
            if error is None and self._placed_nbytes < self.total_nbytes:
                return
            if self._active or self._concluded:
                return
            self._concluded = True
        if error is None and self.on_placed is not None:
            try:
                self.on_placed()
            except EngineError as failed:
                error = self._error = failed
        self._conclude(error)

    def stop(self, error: EngineError) -> None:
        """Begins nothing more; ends with `error` once nobody works on it."""
        with self._lock:
            if self._concluded:
                return
            first = self._error is None
            if first:
                self._error = error
            at_work = self._active > 0
            self._concluded = not at_work
        if not at_work:
            self._conclude(self._error)
        elif first and self.on_stop is not None:
            self.on_stop()

    def abandon(self, error: EngineError) -> None:
        """Ends now: the caller knows that every thread of the path has left."""
        with self._lock:
            if self._concluded:
                return
            self._error = self._error or error
            self._concluded = True
        self._conclude(self._error)

    def _conclude(self, error: EngineError | None) -> None:
        self._on_end(self)
        if error is None:
            self.ticket._finish(self.total_nbytes)
        else:
            self.ticket._fail(error)


class DataPath(abc.ABC):
    """One link's bulk data, over one transport."""

    peer_reaches_memory = False
    """Whether the peer can touch this process's memory without this process's help, and nothing but
    the end of its process stops it for certain."""

    asks_leave = False
    """Whether the owner of a region is asked before the peer first reaches it."""

    orders_streams = False
    """Whether it begins a transfer after the work of a CUDA stream."""

    kinds = frozenset({"host"})
    """The kinds of memory that it moves."""

    def start(self) -> None:  # noqa: B027 - most paths have no threads of their own
        """Starts what the path needs; called once, when the link is known to the engine."""

    @abc.abstractmethod
    def submit(self, transfer: Transfer) -> None:
        """Starts a transfer. Never blocks; errors end the transfer."""

    def before(self, transfer: Transfer, stream: Any) -> None:  # noqa: B027 - for streams alone
        """On the caller's thread, before the transfer starts there or elsewhere: notes what must
        be done first. `stream` is the caller's, or None. Never blocks."""

    def takes_blocks(self, plan: TransferPlan) -> bool:
        """Whether it moves this plan's blocks by `submit_blocks`, without a list of pieces."""
        return False

    def prepare(self, plan: TransferPlan, layers: Sequence[int] | None) -> None:  # noqa: B027
        """Does beforehand what the first transfer of a plan would have to do. May block."""

    def submit_blocks(
        self,
        transfer: Transfer,
        plan: TransferPlan,
        src_block_ids: Any,
        dst_block_ids: Any,
        layers: Sequence[int] | None,
    ) -> None:
        """Starts a transfer of blocks; the transfer has no pieces. As `submit` otherwise."""
        raise NotImplementedError

    def submit_tokens(self, transfer: Transfer, plan: TransferPlan, move: TokenMove) -> None:
        """Starts a transfer of tokens, as `submit_blocks`; the tables are checked already, if they
        are in host memory."""
        raise NotImplementedError

    def route(self, plan: TransferPlan, layers: Sequence[int] | None) -> Any:
        """What `copy_on_gpu` needs of a plan, made with the first call: it has `block_nbytes` and
        `finest_nbytes`, of the smallest piece. Of paths that order streams."""
        raise NotImplementedError

    def copy_on_gpu(self, transfer: Transfer, route: Any, ids: CheckedIds, stream: Any) -> None:
        """`submit_blocks` for a path that orders streams, without a detour.

        Args:
            stream: the caller's, or None for the device's current one. If `before` has noted already
                what comes first, it is not looked at.
        """
        raise NotImplementedError

    def repeat_blocks(self, transfer: Transfer, route: Any, ids: Any) -> Any:
        """Makes a write that a CUDA graph repeats; the transfer ends when that is closed."""
        raise NotImplementedError

    def tick(self) -> None:  # noqa: B027 - most paths are told what happens
        """Looks at what nobody tells it; every 50 ms, on the progress thread."""

    def granted(self, region: RegionDescriptor, keys: tuple[int, ...]) -> None:  # noqa: B027
        """The peer lets this end reach a region, with these keys of its devices. Never blocks."""

    def drain(self) -> None:  # noqa: B027 - only where arrivals are noticed by asking
        """Counts what has arrived and is not counted: nothing more will be said about it."""

    def rail_states(self) -> tuple[RailState, ...]:
        """The link's rails, where the path has several that live and die by themselves."""
        return ()

    def forget(self, region_id: int) -> None:  # noqa: B027 - most paths keep nothing of a region
        """The peer takes a region back and no transfer uses it. Never blocks."""

    @abc.abstractmethod
    def handle(self, message: LinkMessage) -> bool:
        """Handles a control message on the progress thread; False if it is not this path's."""

    @abc.abstractmethod
    def halt(self, halted: Callable[[], None]) -> None:
        """Stops all work, then calls `halted` once, from any thread. Never blocks."""
