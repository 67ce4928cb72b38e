"""How the side whose memory is touched gets its blocks back after a failure.

Invariant 1: a block that a peer may touch is given back only when no writer can reach it. In order
of preference: the peer gives its final answer; the link to it is torn down, which ends what it can
do; or, where a live process keeps its hands on the memory (`cma`), the process is gone.

    recalling    `Cancel` is repeated; any final answer frees the blocks
    tearing      no answer in `recall_s`: the link is being torn down
    quarantined  the link is down, the peer may still reach the blocks; `Cancel` is still repeated,
                 in case the peer wakes up, but nobody waits: the outcome is known
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import LinkLost
from .events import (
    CounterEnded,
    LinkDown,
    Quarantine,
    Quiesced,
    Received,
    TearDownLink,
    TimerFired,
)
from .machine import MAX_REASON_CHARS, Machine
from .messages import FINAL_ANSWERS, Cancel

if TYPE_CHECKING:
    from ..errors import HandoffError
    from .events import Event

RECALLING = "recalling"
TEARING = "tearing"
QUARANTINED = "quarantined"
RECALL_STATES = frozenset({RECALLING, TEARING, QUARANTINED})


class Recalling(Machine):
    """A machine whose blocks the peer may touch."""

    _cancel_reason = ""

    def _recall(self, error: HandoffError) -> None:
        """Fails with `error` at once, and asks the peer to stop."""
        self._cancel_reason = error.message[:MAX_REASON_CHARS]
        self._clear_timers()
        self._fail(error)
        self.state = RECALLING
        self._start_repeating(self._cancel())
        self._set_timer("recall", self.timing.recall_s)

    def _react_link_down(self, event: LinkDown) -> None:
        """The link went down while the peer could touch the blocks."""
        self._fail(self._error(LinkLost, f"the link went down: {event.reason}"))
        if event.quiesced:
            self._give_back()
        elif self.state != QUARANTINED:
            self._quarantine(event.reason)

    def _react_recalling(self, event: Event) -> None:
        match event:
            case Received(message=message) if isinstance(message, FINAL_ANSWERS):
                self._give_back()
            case CounterEnded(error=None) | Quiesced():
                self._give_back()
            case LinkDown():
                self._react_link_down(event)
            case TimerFired(kind="retry"):
                self._send_repeatedly(self._cancel())
            case TimerFired(kind="recall"):
                self.state = TEARING
                reason = f"no answer to Cancel of {self.handoff} in {self.timing.recall_s} s"
                self._do(TearDownLink(self.session, reason))
                self._set_timer("teardown", self.timing.teardown_s)
            case TimerFired(kind="teardown"):
                self._quarantine("the link does not come down")

    def _quarantine(self, reason: str) -> None:
        self._clear_timers()
        self.state = QUARANTINED
        self._do(Quarantine(reason))
        self._start_repeating(self._cancel())

    def _give_back(self) -> None:
        """Nobody can touch the blocks any more."""
        self._retire()
        self._release()
        self._finish()

    def _retire(self) -> None:
        """Ends what else this side kept for the handoff; decode's counter in push mode."""

    def _cancel(self) -> Cancel:
        return Cancel(self.session, self.handoff, self.side, self._cancel_reason)
