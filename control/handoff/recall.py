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

from typing import TYPE_CHECKING, ClassVar

from ..errors import LinkLost
from .events import (
    CounterEnded,
    LinkDown,
    Quarantine,
    Quiesced,
    SendRefused,
    TearDownLink,
    UserCancelled,
)
from .machine import MAX_REASON_CHARS, Machine
from .messages import FINAL_ANSWERS, Cancel, Cancelled, Failed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..errors import HandoffError
    from .events import TimerFired
    from .machine import Reactions
    from .messages import HandoffMessage

RECALLING = "recalling"
TEARING = "tearing"
QUARANTINED = "quarantined"


class Recalling(Machine):
    """A machine whose blocks the peer may touch."""

    _cancel_reason = ""

    def _recall(self, error: HandoffError) -> None:
        """Fail with `error` at once, and ask the peer to stop."""
        self._cancel_reason = error.message[:MAX_REASON_CHARS]
        self._clear_timers()
        self._fail(error)
        self.state = RECALLING
        self._repeat(self._cancel())
        self._set_timer("recall", self.timing.recall_s)

    def _peer_ended(self, message: Failed | Cancelled) -> None:
        """The peer gave a final answer unasked: it touches nothing any more."""
        self._fail(self._error_of_peer(message))
        self._give_back()

    def _link_down(self, event: LinkDown) -> None:
        """The link went down while the peer could touch the blocks."""
        self._fail(self._error(LinkLost, f"the link went down: {event.reason}"))
        if event.quiesced:
            self._give_back()
        elif self.state != QUARANTINED:
            self._quarantine(event.reason)

    def _peer_gone(self, _: Quiesced) -> None:
        self._link_down(LinkDown("the peer is gone", quiesced=True))

    exposed: ClassVar[Reactions] = {
        Failed: _peer_ended,
        Cancelled: _peer_ended,
        "retry": Machine._send_again,
        UserCancelled: Machine._user_cancelled,
        SendRefused: Machine._send_refused,
        LinkDown: _link_down,
        Quiesced: _peer_gone,
    }

    # While it is recalled

    def _answered(self, _: HandoffMessage) -> None:
        self._give_back()

    def _counted_after_all(self, event: CounterEnded) -> None:
        if event.error is None:
            self._give_back()

    def _unanswered(self, _: TimerFired) -> None:
        self.state = TEARING
        reason = f"no answer to Cancel of {self.handoff} in {self.timing.recall_s} s"
        self._do(TearDownLink(self.session, reason))
        self._set_timer("teardown", self.timing.teardown_s)

    def _not_torn_down(self, _: TimerFired) -> None:
        self._quarantine("the link does not come down")

    def _quarantine(self, reason: str) -> None:
        self._clear_timers()
        self.state = QUARANTINED
        self._do(Quarantine(reason))
        self._repeat(self._cancel())

    def _give_back(self) -> None:
        """Nobody can touch the blocks any more."""
        self._retire()
        self._release()
        self._finish()

    def _retire(self) -> None:
        """End what else this side kept for the handoff; decode's counter in push mode."""

    def _cancel(self) -> Cancel:
        return Cancel(self.session, self.handoff, self.side, self._cancel_reason)

    _recalled: ClassVar[Reactions] = {
        **dict.fromkeys(FINAL_ANSWERS, _answered),
        CounterEnded: _counted_after_all,
        Quiesced: _peer_gone,
        LinkDown: _link_down,
        "retry": Machine._send_again,
        "recall": _unanswered,
        "teardown": _not_torn_down,
    }
    reactions: ClassVar[Mapping[str, Reactions]] = {
        RECALLING: _recalled,
        TEARING: _recalled,
        QUARANTINED: _recalled,
    }
