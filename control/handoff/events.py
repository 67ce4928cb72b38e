"""What a state machine is told (events) and what it asks for (actions).

A machine does no I/O and has no clock: whoever owns it (a registry in a test, an agent in a process)
tells it what happened and carries out, in order, what it asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from .messages import HandoffMessage, Message, Ready, Request

TimerKind = Literal["retry", "deadline", "source", "settle", "drain", "recall", "teardown"]
Layers = tuple[int, int]  # first, and one past the last


# Events ------------------------------------------------------------------------------------------


class Event(msgspec.Struct, frozen=True):
    """What happened: told to one machine."""


class Received(Event, frozen=True, gc=False):
    """A message of the peer arrived that concerns this machine."""

    message: Message


class OperationEnded(Event, frozen=True):
    """A write or a read *is over and drained*: it touches neither side's memory any more."""

    op: int
    nbytes: int = 0
    error: Exception | None = None


class CounterEnded(Event, frozen=True):
    """The counter of this handoff's imm reached its total; or, with an error, never will."""

    nbytes: int = 0
    error: Exception | None = None


class TimerFired(Event, frozen=True, gc=False):
    """A timer that the machine set ran out."""

    kind: TimerKind


class LinkDown(Event, frozen=True):
    """The link to the peer is down.

    `quiesced` says that the peer can reach no memory of this process any more: its sockets are
    down, it took its leave, or its process is gone.
    """

    reason: str
    quiesced: bool


class Quiesced(Event, frozen=True):
    """The peer of a link that is down can reach no memory of this process any more."""


class SendRefused(Event, frozen=True):
    """A message could not be queued for the peer."""

    reason: str


class UserCancelled(Event, frozen=True):
    """The owner of this side's handoff wants no more of it."""

    reason: str = "cancelled"


class SourceOffered(Event, frozen=True, gc=False):
    """Prefill has, or is computing, the source blocks of a request: a table for each group."""

    tables: tuple[bytes, ...]
    num_layers: int
    timeout_s: float


class SourceReady(Event, frozen=True, gc=False):
    """These layers of the source blocks are computed."""

    layers: Layers


class SourceFinished(Event, frozen=True, gc=False):
    """All layers are computed."""


# Actions -----------------------------------------------------------------------------------------


class Action(msgspec.Struct, frozen=True):
    """What a machine asks for."""


class Send(Action, frozen=True, gc=False):
    """Send this message, now."""

    message: Message


class Settle(Action, frozen=True, gc=False):
    """Send this final answer, and give it again whenever the peer asks about its serial."""

    message: HandoffMessage


class Expect(Action, frozen=True, gc=False):
    """Start a counter for `imm`: it ends when `nbytes` bytes have arrived."""

    imm: int
    nbytes: int


class RetireCounter(Action, frozen=True, gc=False):
    """Stop counting for `imm`: whatever still arrives completes nothing."""

    imm: int


class StartWrite(Action, frozen=True, gc=False):
    """Write these layers of the source blocks, `tables`, into the request's."""

    op: int
    request: Request
    tables: tuple[bytes, ...]
    layers: Layers


class StartRead(Action, frozen=True, gc=False):
    """Read the source blocks that `ready` names into the destination blocks."""

    op: int
    ready: Ready


class CancelOperations(Action, frozen=True, gc=False):
    """Stop this handoff's writes or reads soon; each still ends with `OperationEnded`."""


class ReleaseBlocks(Action, frozen=True, gc=False):
    """This side's blocks may be given back: nobody reads or writes them for this handoff."""


class Quarantine(Action, frozen=True):
    """The link is down and yet the peer may still touch the blocks: keep them."""

    reason: str


class TearDownLink(Action, frozen=True):
    """Take the link of this session down: the peer does not answer."""

    session: int
    reason: str


class SetTimer(Action, frozen=True, gc=False):
    """Start, or start again, the timer of this kind."""

    kind: TimerKind
    seconds: float


class ClearTimer(Action, frozen=True, gc=False):
    """Stop the timer of this kind."""

    kind: TimerKind


class Succeed(Action, frozen=True, gc=False):
    """The handoff is complete on this side."""

    nbytes: int


class Fail(Action, frozen=True):
    """The handoff failed on this side. Its blocks come back with `ReleaseBlocks`, now or later."""

    error: Exception
