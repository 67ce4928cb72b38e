"""How the side that moves bytes gives up: stop, let what is in flight end, then say so.

Invariant 2: a source block is not reused, nor a destination block of a read, before every
operation on it has ended here. Only then is the final answer given, so that the peer can trust it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..errors import HandoffCancelled
from .events import (
    CancelOperations,
    LinkDown,
    OperationEnded,
    Quarantine,
    Settle,
    TearDownLink,
    UserCancelled,
)
from .machine import Machine
from .messages import Cancel, Cancelled, Failed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..errors import HandoffError
    from .events import TimerFired
    from .machine import Reactions, Timing
    from .messages import HandoffId, HandoffMessage

DRAINING = "draining"


class Draining(Machine):
    """A machine that moves bytes. `_ops` are its operations in flight."""

    def __init__(self, session: int, handoff: HandoffId, peer: str, timing: Timing) -> None:
        super().__init__(session, handoff, peer, timing)
        self._ops: set[int] = set()
        self._next_op = 0
        self._drain_error: HandoffError | None = None
        self._drain_answer: HandoffMessage | None = None

    def _new_op(self) -> int:
        self._next_op += 1
        self._ops.add(self._next_op)
        return self._next_op

    def _drain(self, error: HandoffError, answer: HandoffMessage) -> None:
        """Give up with `error`; `answer` goes to the peer when nothing is in flight."""
        self._drain_error, self._drain_answer = error, answer
        self._clear_timers()
        self.state = DRAINING
        if self._ops:
            self._do(CancelOperations())
            self._set_timer("drain", self.timing.drain_s)
        else:
            self._drained()

    def _give_up(self, error: HandoffError) -> None:
        self._drain(error, self._failed(error))

    def _peer_cancelled(self, message: Cancel) -> None:
        reason = f"the peer cancelled: {message.reason}"
        self._drain(self._error(HandoffCancelled, reason, retryable=True), self._cancelled())

    def _peer_gave_up(self, message: Failed | Cancelled) -> None:
        self._give_up(self._error_of_peer(message))

    moving: ClassVar[Reactions] = {
        Cancel: _peer_cancelled,
        Failed: _peer_gave_up,
        Cancelled: _peer_gave_up,
        UserCancelled: Machine._user_cancelled,
        LinkDown: Machine._link_lost,
    }

    # While it drains

    def _op_drained(self, event: OperationEnded) -> None:
        self._ops.discard(event.op)
        if not self._ops:
            self._drained()

    def _cancelled_meanwhile(self, _: Cancel) -> None:
        self._drain_answer = self._cancelled()

    def _tear_down(self, _: TimerFired) -> None:
        reason = f"{len(self._ops)} cancelled operations of {self.handoff} do not end"
        self._do(TearDownLink(self.session, reason))
        self._set_timer("teardown", self.timing.teardown_s)

    def _outlived(self, _: TimerFired) -> None:
        assert self._drain_error is not None
        self._do(Quarantine(f"operations of {self.handoff} outlive their link"))
        self._fail(self._drain_error)

    def _drained(self) -> None:
        assert self._drain_answer is not None and self._drain_error is not None  # noqa: PT018
        self._do(Settle(self._drain_answer))
        self._release()
        self._fail(self._drain_error)
        self._finish()

    reactions: ClassVar[Mapping[str, Reactions]] = {
        DRAINING: {
            OperationEnded: _op_drained,
            Cancel: _cancelled_meanwhile,
            "drain": _tear_down,
            "teardown": _outlived,
        }
    }
