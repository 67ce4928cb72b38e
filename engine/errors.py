"""Every error of the engine wing.

    EngineError
    ├── LayoutError            a layout contradicts itself or its tensors
    │   └── LayoutMismatch     two layouts cannot be reconciled, and what differs
    ├── PlanError              block ids that no plan can move
    │   ├── BlockOutOfRange
    │   └── OverlappingBlocks
    ├── RegionError            memory that may not be touched
    │   ├── NotRegistered      the tensor, or the peer's region, was never registered
    │   ├── OutOfRange         a range leaves its region
    │   ├── RegionGone         the memory was freed or resized while registered
    │   └── RegionRefused      the peer did not accept a range or a key of ours
    ├── ImmInUse               an imm whose counter is still live was used again
    ├── UnknownImmOverflow     a peer keeps writing to imms that nobody expects
    ├── TransportUnavailable   no transport that both ends have works here, and why
    ├── DeadlineExceeded       (also a TimeoutError) a wait ended without its event
    ├── Cancelled              this side cancelled
    ├── DeviceError            a GPU or its driver refused an operation
    ├── ForkedProcess          a child of fork() used what its parent has made
    └── LinkError              a link ended or lied
        ├── LinkClosed         this side closed it
        ├── PeerLost           the peer's process died, froze or became unreachable
        ├── PeerAborted        the peer gave up on an imm and said so
        ├── ChecksumMismatch   bytes that arrived are not the bytes that were sent
        ├── ProtocolError      bytes that are not kvferry's protocol
        ├── QuotaExceeded      the peer wants more kept for it at a time than one link may
        └── RailError          one rail of a link broke; the link lives on with the others
            ├── RemoteAccessError     the peer's device refused a key or a range
            ├── RemoteOperationError  the peer's device refused or failed otherwise
            ├── RetryExceeded         the peer's device does not answer
            ├── RailStalled           this side's device does not give up what goes nowhere
            ├── ReceiverNotReady      the peer posted too few receives
            ├── LocalAccessError      this side's device refused a work request
            ├── LinkFlushed           never sent: the rail had broken before
            └── DeviceLost            the device failed, or was unplugged

`retryable` says whether the same handoff, with a new imm, may succeed.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class _Where(TypedDict, total=False):
    """What every error may say of where it happened; see `EngineError`."""

    operation: str
    peer: str
    imm: int | None


class EngineError(Exception):
    """An engine operation failed.

    Attributes:
        operation: what was being done (`write`, `expect`, `connect`, …); where none is named, the
            class's `default_operation`.
        peer: the remote engine's name, or "" where no peer is concerned.
        imm: the imm concerned, if any.
        retryable: whether a retry (with a new imm) can help.
    """

    retryable = False
    default_operation = ""

    def __init__(
        self, message: str, *, operation: str = "", peer: str = "", imm: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.operation = operation or self.default_operation
        self.peer = peer
        self.imm = imm

    def __str__(self) -> str:
        where = [
            f"{name}={value}"
            for name, value in (("operation", self.operation), ("peer", self.peer))
            if value
        ]
        if self.imm is not None:
            where.append(f"imm={self.imm}")
        return f"{self.message} [{', '.join(where)}]" if where else self.message

    def again(self, **where: Unpack[_Where]) -> Self:
        """Copy it for another operation that it ends, or that came after it."""
        other = copy.copy(self)
        vars(other).update(where)
        return other


class LayoutError(EngineError, ValueError):
    """A layout contradicts itself, its tensors, or the peer's layout; names the axis."""

    default_operation = "layout"


class LayoutMismatch(LayoutError):
    """Two layouts cannot be reconciled; names what differs and both values."""

    default_operation = "plan"


class PlanError(EngineError, ValueError):
    """Block ids that no plan can move."""

    default_operation = "plan"


class BlockOutOfRange(PlanError):
    """A block id is not a slot of the cache."""


class OverlappingBlocks(PlanError):
    """A destination block id occurs twice, so two sources would write the same bytes."""


class RegionError(EngineError):
    """Memory that may not be touched."""


class NotRegistered(RegionError):
    """The tensor, or the peer's region, is not registered."""

    default_operation = "register"


class OutOfRange(RegionError, ValueError):
    """A range leaves its region."""

    default_operation = "access"


class RegionGone(RegionError):
    """The memory was freed, resized or deregistered while in use."""

    default_operation = "access"


class RegionRefused(RegionError):
    """The peer did not accept a range or a key: nothing was written there."""


class ImmInUse(EngineError):
    """An imm whose counter is still live was expected again."""


class UnknownImmOverflow(EngineError):
    """A peer wrote to more unexpected imms than are kept."""


class TransportUnavailable(EngineError):
    """No transport that both ends have works between them."""

    default_operation = "connect"


class DeadlineExceeded(EngineError, TimeoutError):
    """A wait ended without its event."""

    retryable = True


class Cancelled(EngineError):
    """This side cancelled the operation."""


class DeviceError(EngineError):
    """A GPU or its driver refused an operation.

    Attributes:
        code: CUDA's number for the error; 0 if it did not come from CUDA.
    """

    default_operation = "cuda"

    def __init__(self, message: str, *, code: int = 0, **where: Unpack[_Where]) -> None:
        super().__init__(message, **where)
        self.code = code


class ForkedProcess(EngineError):
    """A child of fork() used what its parent has made: it works in the parent alone."""

    default_operation = "use"


class LinkError(EngineError, ConnectionError):
    """A link ended or cannot be trusted any more."""

    retryable = True


class LinkClosed(LinkError):
    """This side closed the link."""


class PeerLost(LinkError):
    """The peer's process died, froze or became unreachable.

    Attributes:
        process_gone: whether the operating system confirmed that the process has ended. A
            frozen process may still wake up and write through a `cma` mapping.
    """

    def __init__(
        self, message: str, *, process_gone: bool = False, **where: Unpack[_Where]
    ) -> None:
        super().__init__(message, **where)
        self.process_gone = process_gone


class PeerAborted(LinkError):
    """The peer gave up on this imm: its counter will never reach the total."""


class ChecksumMismatch(LinkError):
    """Bytes that arrived are not the bytes that were sent; they were not counted."""


class ProtocolError(LinkError):
    """The peer sent bytes that are not kvferry's protocol; the link is closed."""

    retryable = False
    default_operation = "receive"


class QuotaExceeded(LinkError):
    """The peer wants more of this process at a time than one link may have; the link is closed."""

    retryable = False
    default_operation = "receive"


class RailError(LinkError):
    """One rail of a link broke, and with it what was on its way there. The link lives on.

    Attributes:
        vendor_code: the device's own number for it; 0 if it gave none.
        rail: the rail: its number and its device.
    """

    def __init__(
        self, message: str, *, vendor_code: int = 0, rail: str = "", **where: Unpack[_Where]
    ) -> None:
        super().__init__(message, **where)
        self.vendor_code = vendor_code
        self.rail = rail


class RemoteAccessError(RailError):
    """The peer's device refused a key or a range: nothing was written there."""

    retryable = False


class RemoteOperationError(RailError):
    """The peer's device refused or failed an operation for another reason."""


class RetryExceeded(RailError):
    """The peer's device does not answer."""


class RailStalled(RailError):
    """What was posted neither completed nor failed for too long."""


class ReceiverNotReady(RailError):
    """The peer had no receive posted for a write with an imm."""


class LocalAccessError(RailError):
    """This side's device refused a work request."""

    retryable = False


class LinkFlushed(RailError):
    """It was never sent: the rail had broken before."""


class DeviceLost(RailError):
    """The device failed, or was unplugged."""
