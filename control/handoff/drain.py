"""How the side that moves bytes gives up: stop, let what is in flight end, then say so.

Invariant 2: a source block is not reused, nor a destination block of a read, before every
operation on it has ended here. Only then is the final answer given, so that the peer can trust it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .events import (
    CancelOperations,
    OperationEnded,
    Quarantine,
    Received,
    Settle,
    TearDownLink,
    TimerFired,
)
from .machine import Machine
from .messages import Cancel

if TYPE_CHECKING:
    from ..errors import HandoffError
    from .events import Event
    from .machine import Timing
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
        """Gives up with `error`; `answer` goes to the peer when nothing is in flight."""
        self._drain_error, self._drain_answer = error, answer
        self._clear_timers()
        self.state = DRAINING
        if self._ops:
            self._do(CancelOperations())
            self._set_timer("drain", self.timing.drain_s)
        else:
            self._drained()

    def _react_draining(self, event: Event) -> None:
        match event:
            case OperationEnded(op=op):
                self._ops.discard(op)
                if not self._ops:
                    self._drained()
            case Received(message=Cancel()):
                self._drain_answer = self._cancelled()
            case TimerFired(kind="drain"):
                reason = f"{len(self._ops)} cancelled operations of {self.handoff} do not end"
                self._do(TearDownLink(self.session, reason))
                self._set_timer("teardown", self.timing.teardown_s)
            case TimerFired(kind="teardown") if self._drain_error is not None:
                self._do(Quarantine(f"operations of {self.handoff} outlive their link"))
                self._fail(self._drain_error)

    def _drained(self) -> None:
        assert self._drain_answer is not None and self._drain_error is not None  # noqa: PT018
        self._do(Settle(self._drain_answer))
        self._release()
        self._fail(self._drain_error)
        self._finish()
