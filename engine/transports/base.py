"""The contract of a transport: it moves bytes between regions and knows nothing of requests.

A transport gives each link a `DataPath`. The link checks ranges and keys, makes a `Transfer` and
hands it to the path, by one door; the path moves bytes, begins and ends work on the transfer as it goes, and
counts arrivals. What every path must keep:

1. `submit` never blocks the caller.
2. Bytes are visible at the peer before they are counted there.
3. `Transfer.end` is called for a part only when the source may be reused and the bytes are placed.
4. After `halt` has called back, no thread of this process touches any memory through the path.
5. Nothing is written outside a registered region.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..transfer.compute_gate import note_compute

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..context import EngineContext
    from ..errors import EngineError
    from ..memory.descriptors import RegionDescriptor
    from ..memory.regions import MemoryRegion
    from ..transfer.moves import BlockMove, TokenMove
    from ..transfer.plan import TransferPlan
    from ..transfer.transfer import Transfer
    from ..wire.identity import Identity
    from ..wire.messages import Claim, LinkMessage

    # By the type of a message. A path's False means: not dealt with, the link's own parts get it.
    Handlers = Mapping[type[LinkMessage], Callable[[Any], bool | None]]


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

    core: EngineContext
    peer: Identity

    @property
    def closed(self) -> bool:
        """Whether the link is down."""

    def transfer(self, number: int) -> Transfer | None:
        """Return the transfer of this number, if it has not ended."""

    def grant(self, claim: Claim, register: Callable[[MemoryRegion], tuple[int, ...]]) -> None:
        """Answer a peer that asks for leave to reach a region."""

    def has_access(self, regions: tuple[RegionDescriptor, ...]) -> bool:
        """Return whether the peer has granted all of these regions."""

    def heard(self) -> None:
        """The peer gave a sign of life."""

    def count(
        self, imm: int, nbytes: int, writes: int, *, write_nbytes: int = 0, staged: bool = False
    ) -> None:
        """Count bytes of the peer's that are visible here."""

    def reject(self, transfer: int, imm: int | None, error: EngineError, *, first: int = 0) -> None:
        """Refuse part of a peer's write: both ends' tickets end."""

    def abort(self, imm: int, reason: str) -> None:
        """Tell the peer that this imm's counter will never reach its total."""

    def send(self, message: LinkMessage) -> None:
        """Send a control message; never blocks."""

    def fail(self, error: EngineError) -> None:
        """Take the link down."""

    def suspect(self) -> None:
        """A socket ended without goodbye."""

    def down_error(self, operation: str) -> EngineError:
        """Return the link's error again, for an operation that came after it."""


class Kernels(Protocol):
    """What a path offers that launches kernels on GPU memory, in the order of CUDA streams."""

    def reaches(self, plan: TransferPlan) -> bool:
        """Say whether kernels reach a plan's memory and are quicker than staging it."""

    def compile(self, plan: TransferPlan, layers: tuple[int, ...] | None) -> Any:
        """Return what `launch` needs of a plan; it has `key` and `plan`. Made with the first call."""

    def launch(self, transfer: Transfer, compiled: Any, stream: Any) -> None:
        """Start a transfer of blocks without a detour. Never blocks; errors end the transfer.

        Args:
            stream: the caller's, or None for the device's current one. If `before` has noted already
                what comes first, it is not looked at.
        """

    def repeat(self, transfer: Transfer, compiled: Any, ids: Any) -> Any:
        """Make a write that a CUDA graph repeats; the transfer ends when that is closed."""


class DataPath(abc.ABC):
    """One link's bulk data, over one transport."""

    peer_reaches_memory = False
    """Whether the peer can touch this process's memory without this process's help, and nothing but
    the end of its process stops it for certain."""

    asks_access = False
    """Whether the owner of a region is asked before the peer first reaches it."""

    kernels: Kernels | None = None
    """What launches kernels on GPU memory and orders streams, if it does."""

    kinds = frozenset({"host"})
    """The kinds of memory that it moves."""

    handlers: Handlers
    """What it does with each type of message, on the progress thread, and whether that was all: what
    is False goes on to the link."""

    def start(self) -> None:  # noqa: B027 - most paths have no threads of their own
        """Start what the path needs; called once, when the link is known to the engine."""

    @abc.abstractmethod
    def submit(self, transfer: Transfer) -> None:
        """Start a transfer: of a move that it takes, or of a list of pieces. Never blocks; errors end
        the transfer."""

    def before(self, transfer: Transfer, stream: Any) -> None:
        """On the caller's thread, before the transfer starts there or elsewhere: notes what must
        be done first. `stream` is the caller's, or None. Never blocks."""
        note_compute(transfer, stream)

    def takes(self, move: BlockMove | TokenMove) -> bool:
        """Say whether it multiplies this move out by itself, without a list of pieces."""
        return False

    def prepare(self, plan: TransferPlan, layers: Sequence[int] | None) -> None:  # noqa: B027
        """Do beforehand what the first transfer of a plan would have to do. May block."""

    def tick(self) -> None:  # noqa: B027 - most paths are told what happens
        """Look at what nobody tells it; every 50 ms, on the progress thread."""

    def granted(self, region: RegionDescriptor, keys: tuple[int, ...]) -> None:  # noqa: B027
        """The peer lets this end reach a region, with these keys of its devices. Never blocks."""

    def drain(self) -> None:  # noqa: B027 - only where arrivals are noticed by asking
        """Count what has arrived and is not counted: nothing more will be said about it."""

    def rail_states(self) -> tuple[RailState, ...]:
        """Return the link's rails, where the path has several that live and die by themselves."""
        return ()

    def forget(self, region_id: int) -> None:  # noqa: B027 - most paths keep nothing of a region
        """The peer takes a region back and no transfer uses it. Never blocks."""

    @abc.abstractmethod
    def halt(self, halted: Callable[[], None]) -> None:
        """Stop all work, then calls `halted` once, from any thread. Never blocks."""
