"""One handoff, seen from one side: what every state machine of it shares.

A handoff has two sides twice over. *Prefill* has the source blocks, *decode* the destination
blocks. And one of them *moves* the bytes (prefill in push, decode in pull) while the other's memory
is *touched* by its peer. What is dangerous depends on the second pair alone:

    moves bytes     drain.py    its own operations have to end before its blocks are free
    is touched      recall.py   the peer has to stop, or be stopped, before its blocks are free

    prefill.py      PrefillHandoff: push moves, pull is touched
    decode.py       DecodePush is touched, DecodePull moves

Every machine obeys four rules:

* exactly one outcome (`Succeed` or `Fail`) and exactly one `ReleaseBlocks`; after success the
  blocks are free at once, after failure when nobody can reach them;
* no state without a timer until the outcome is known;
* an event that a state's table does not name changes nothing: messages come late, twice or never;
* the final answer about a serial is given only when not a byte of it moves any more, and a serial
  that has one never moves another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import msgspec

from ..errors import (
    BlocksMismatch,
    HandoffCancelled,
    HandoffError,
    HandoffTimeout,
    LinkLost,
    PeerFailed,
    SendFailed,
    TransferFailed,
)
from .events import ClearTimer, Fail, Received, ReleaseBlocks, Send, SetTimer, Succeed, TimerFired
from .messages import Cancelled, Failed, HandoffId

if TYPE_CHECKING:
    from .events import Action, Event, LinkDown, SendRefused, TimerKind, UserCancelled
    from .messages import Message, Side

FINISHED = "finished"
# Errors of a handoff as a whole: which side noticed first makes no difference to its user.
SHARED_ERRORS: dict[str, type[HandoffError]] = {
    kind.__name__: kind for kind in (BlocksMismatch, HandoffCancelled, HandoffTimeout, LinkLost)
}
MAX_REASON_CHARS = 1024  # what the messages take


class Timing(msgspec.Struct, frozen=True):
    """How long the machines wait, in seconds."""

    retry_s: float = 0.25  # first repetition of a message; doubles from there
    retry_max_s: float = 2.0
    grace_s: float = 1.0  # that prefill adds to decode's deadline, so that one clock decides
    settle_s: float = 2.0  # between the peer's `Sent` and the last byte being counted
    drain_s: float = 5.0  # for cancelled operations to end before the link is torn down
    recall_s: float = 5.0  # for the peer to answer `Cancel` before the link is torn down
    teardown_s: float = 2.0  # for a link to come down
    remember_s: float = 30.0  # a session that is down; a peer repeats itself for recall_s at most


Reaction = Callable[..., None]  # a method; takes the event, or the message that came with it
Reactions = Mapping[object, Reaction]  # by an event's type, its message's type or its timer's kind
NOTHING: Reactions = {}


class StateMachine:
    """Takes events, returns actions; `reactions` say what each state reacts to.

    An event that the table of the present state does not name changes nothing.

    Attributes:
        state: where it is.
        timers: the timers that are running.
    """

    reactions: ClassVar[Mapping[str, Reactions]] = {}

    def __init_subclass__(cls) -> None:
        """Look every reaction up by its name, so that a subclass's own is the one that is
        called."""
        super().__init_subclass__()
        cls.reactions = {
            state: {cause: getattr(cls, react.__name__) for cause, react in table.items()}
            for state, table in cls.reactions.items()
        }

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.state = "new"
        self.timers: set[TimerKind] = set()
        self._repeated: Message | None = None
        self._retry_s = timing.retry_s
        self._actions: list[Action] = []

    def handle(self, event: Event) -> list[Action]:
        """Take one event; return what to do, in this order. A timer that was stopped is none."""
        cause: object = type(event)
        about: object = event
        if isinstance(event, Received):
            about = event.message
            cause = type(about)
        elif isinstance(event, TimerFired):
            cause = event.kind
            if cause not in self.timers:
                return []
            self.timers.discard(event.kind)
        react = self.reactions.get(self.state, NOTHING).get(cause)
        if react is None:
            return []
        react(self, about)
        actions, self._actions = self._actions, []
        return actions

    def _do(self, action: Action) -> None:
        self._actions.append(action)

    def _taken(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    def _set_timer(self, kind: TimerKind, seconds: float) -> None:
        self.timers.add(kind)
        self._do(SetTimer(kind, seconds))

    def _clear_timers(self, *kinds: TimerKind) -> None:
        for kind in kinds or sorted(self.timers):
            if kind in self.timers:
                self.timers.discard(kind)
                self._do(ClearTimer(kind))

    def _repeat(self, message: Message) -> None:
        """Send `message` whenever the timer `retry` fires: first soon, then less and less often."""
        self._repeated = message
        self._retry_s = self.timing.retry_s
        self._send_again()

    def _send_again(self, _: TimerFired | None = None) -> None:
        if self._repeated is not None:
            self._do(Send(self._repeated))
            self._set_timer("retry", self._retry_s)
            self._retry_s = min(2 * self._retry_s, self.timing.retry_max_s)


class Machine(StateMachine):
    """One side of one handoff. Not thread-safe: one owner tells it events, one at a time.

    Attributes:
        state: where it is; `finished` is the last.
        outcome: the `Succeed` or `Fail` that was asked for, or None.
        released: whether its blocks were given back.
    """

    operation = ""  # what this side does, for its errors
    side: ClassVar[Side]

    def __init__(self, session: int, handoff: HandoffId, peer: str, timing: Timing) -> None:
        super().__init__(timing)
        self.session = session
        self.handoff = handoff
        self.peer = peer
        self.outcome: Succeed | Fail | None = None
        self.released = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.handoff} {self.state}>"

    @property
    def finished(self) -> bool:
        """Whether nothing can happen any more: the outcome is known and the blocks are back."""
        return self.state == FINISHED

    # What several machines react to alike

    def _user_cancelled(self, event: UserCancelled) -> None:
        self._give_up(self._error(HandoffCancelled, event.reason))

    def _send_refused(self, event: SendRefused) -> None:
        self._give_up(self._error(SendFailed, f"cannot send to the peer: {event.reason}"))

    def _link_lost(self, event: LinkDown) -> None:
        self._give_up(self._error(LinkLost, f"the link went down: {event.reason}"))

    def _give_up(self, error: HandoffError) -> None:
        """Fail with `error`; the blocks come back when nobody can reach them."""
        raise NotImplementedError

    # Outcomes

    def _succeed(self, nbytes: int) -> None:
        """End well: the blocks are free, and then the outcome is told."""
        self._release()
        self._finish()
        self._deliver(Succeed(nbytes))  # last: whoever waits runs at once

    def _fail(self, error: Exception) -> None:
        self._deliver(Fail(error))

    def _deliver(self, outcome: Succeed | Fail) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._do(outcome)

    def _release(self) -> None:
        if not self.released:
            self.released = True
            self._do(ReleaseBlocks())

    def _finish(self) -> None:
        self._clear_timers()
        self.state = FINISHED

    # Errors and answers

    def _error(
        self,
        kind: type[HandoffError],
        message: str,
        *,
        retryable: bool | None = None,
        cause: Exception | None = None,
    ) -> HandoffError:
        error = kind(
            message,
            handoff=str(self.handoff),
            peer=self.peer,
            operation=self.operation,
            retryable=retryable,
        )
        error.__cause__ = cause
        return error

    def _transfer_error(self, cause: Exception) -> HandoffError:
        return self._error(
            TransferFailed,
            f"moving the bytes failed: {cause}",
            retryable=bool(getattr(cause, "retryable", False)),
            cause=cause,
        )

    def _error_of_peer(self, message: Failed | Cancelled) -> HandoffError:
        """Return the error for a final answer with which the peer ended the handoff unasked."""
        if isinstance(message, Cancelled):
            return self._error(
                PeerFailed, "the peer has given this handoff up already", retryable=True
            )
        return self._error(
            SHARED_ERRORS.get(message.error, PeerFailed),
            f"the peer gave up: {message.reason} ({message.error})",
            retryable=message.retryable,
        )

    def _failed(self, error: HandoffError) -> Failed:
        """Return the final answer that tells the peer about an error of this side."""
        return Failed(
            self.session,
            self.handoff,
            self.side,
            type(error).__name__,
            error.message[:MAX_REASON_CHARS],
            error.retryable,
        )

    def _cancelled(self) -> Cancelled:
        """Return the final answer to `Cancel`."""
        return Cancelled(self.session, self.handoff, self.side)
