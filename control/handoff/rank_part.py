"""One decode rank's part of a request that its engine takes with several ranks.

The parts themselves are ordinary handoffs. What is added is that a rank believes in the request only
when all ranks have theirs, and drops it as soon as one has not, though the ranks know nothing of each
other. All of them are connected to the first prefill rank, which keeps the roll (`rank_rolls.py`):

    pending   its handoffs are under way                   `Part("pending")` is repeated
    ready     they ended well; do all others' too?         `Part("ready")` is repeated
    failed    the outcome is known; the others must hear   `Part("failed")` is repeated
    finished  after the verdict, or when the keeper of the roll is gone
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import (
    HandoffCancelled,
    HandoffTimeout,
    LinkLost,
    PeerFailed,
    SendFailed,
)
from .events import (
    CancelParts,
    LinkDown,
    PartsEnded,
    Received,
    SendRefused,
    Succeed,
    TimerFired,
    UserCancelled,
)
from .machine import MAX_REASON_CHARS, SHARED_ERRORS, Machine
from .messages import HandoffId, Part, Verdict

if TYPE_CHECKING:
    from .events import Action, Event
    from .machine import Timing
    from .messages import Message, PartState

PENDING: PartState = "pending"
READY: PartState = "ready"
FAILED: PartState = "failed"


class RankPart(Machine):
    """One decode rank's part of one attempt at one request. It owns no blocks: its handoffs do."""

    operation = "receive"
    side = "decode"

    def __init__(
        self,
        session: int,
        request_id: str,
        attempt: int,
        peer: str,
        timing: Timing,
        timeout_s: float,
    ) -> None:
        super().__init__(session, HandoffId(request_id, attempt, 0), peer, timing)
        self.timeout_s = timeout_s
        self._nbytes = 0
        self._report = Part(session, request_id, attempt, PENDING)

    def start(self) -> list[Action]:
        """The first actions: the others' failures are heard of from here on."""
        self.state = PENDING
        # The handoffs keep the deadline; this is for ranks that never ask.
        self._set_timer("deadline", self.timeout_s + self.timing.grace_s)
        self._repeat(self._report)
        return self._taken()

    def handle(self, event: Event) -> list[Action]:
        """Takes one event; returns what to do, in this order."""
        kind = getattr(event, "kind", None)
        message = getattr(event, "message", None)
        stopped = kind is not None and kind not in self.timers
        self.timers.discard(kind)
        if not (self.finished or stopped) and (message is None or self._concerns(message)):
            self._react(event)
        return self._taken()

    def _concerns(self, message: Message) -> bool:
        return (
            isinstance(message, Verdict)
            and message.session == self.session
            and message.request_id == self.handoff.request_id
            and message.attempt == self.handoff.attempt
        )

    def _react(self, event: Event) -> None:
        match event:
            case PartsEnded(error=None, nbytes=nbytes) if self.state == PENDING:
                self._nbytes = nbytes
                self._tell_others(Part(*self._named, READY))
            case PartsEnded(error=error) if error is not None and self.state == PENDING:
                self._give_up(error)
            case Received(message=Verdict(error="")):
                if self.state == READY:
                    self._deliver(Succeed(self._nbytes))
                    self._finish()
                elif self.state == FAILED:  # it was ready, and wanted no more of it too late
                    self._finish()
            case Received(message=Verdict() as verdict):
                self._drop(
                    self._error(
                        SHARED_ERRORS.get(verdict.error, PeerFailed),
                        f"another rank failed: {verdict.reason} ({verdict.error})",
                        retryable=verdict.retryable,
                    )
                )
            case TimerFired(kind="retry"):
                self._send_again()
            case TimerFired(kind="deadline") if self.state == FAILED:
                self._finish()
            case TimerFired(kind="deadline"):
                self._give_up(
                    self._error(
                        HandoffTimeout,
                        f"not ready on all ranks after {self.timeout_s} s (here: {self.state})",
                    )
                )
            case UserCancelled(reason=reason) if self.state != FAILED:
                self._give_up(self._error(HandoffCancelled, reason))
            case SendRefused(reason=reason):
                self._drop(self._error(SendFailed, f"cannot send to the peer: {reason}"))
            case LinkDown(reason=reason):
                self._drop(
                    self._error(
                        LinkLost, f"the first prefill rank, which all ranks ask, is gone: {reason}"
                    )
                )

    @property
    def _named(self) -> tuple[int, str, int]:
        return self.session, self.handoff.request_id, self.handoff.attempt

    def _tell_others(self, report: Part) -> None:
        self.state = report.state
        self._report = report
        self._repeat(report)

    def _give_up(self, error: Exception) -> None:
        """Fails here, and sees to it that all others do."""
        reason = str(getattr(error, "message", error))[:MAX_REASON_CHARS]
        self._clear_timers()
        self._end_badly(error, reason)
        retryable = bool(getattr(error, "retryable", False))
        self._tell_others(Part(*self._named, FAILED, type(error).__name__, reason, retryable))
        self._set_timer("deadline", self.timing.recall_s)

    def _drop(self, error: Exception) -> None:
        """Fails here, if it has not yet; the others know, or nobody can tell them."""
        if self.state != FAILED:
            self._end_badly(error, str(error))
        self._finish()

    def _end_badly(self, error: Exception, reason: str) -> None:
        self._fail(error)
        self._do(CancelParts(f"another rank failed: {reason}"))
