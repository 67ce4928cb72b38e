"""Decode's side of a handoff: `DecodePush` is written to, `DecodePull` reads.

    DecodePush   requested → accepted → (sent) → finished
    DecodePull   requested → accepted → reading → finished

and from anywhere, after a failure, through `recall.py` (push) or `drain.py` (pull).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import (
    BlocksMismatch,
    HandoffCancelled,
    HandoffTimeout,
    LinkLost,
    SendFailed,
)
from .drain import DRAINING, Draining
from .events import (
    CounterEnded,
    Expect,
    LinkDown,
    OperationEnded,
    Quiesced,
    Received,
    RetireCounter,
    SendRefused,
    Settle,
    StartRead,
    TimerFired,
    UserCancelled,
)
from .messages import Accepted, Cancel, Cancelled, Done, Failed, Ready, Sent
from .recall import RECALL_STATES, Recalling

if TYPE_CHECKING:
    from ..errors import HandoffError
    from .events import Action, Event
    from .machine import Timing
    from .messages import Request

REQUESTED = "requested"
ACCEPTED = "accepted"
SENT = "sent"
READING = "reading"


class DecodePush(Recalling):
    """Decode asks, prefill writes into decode's blocks, a counter says when all is there.

    Owns the destination blocks from `start` until `ReleaseBlocks`.
    """

    operation = "receive"
    side = "decode"

    def __init__(self, request: Request, peer: str, timing: Timing) -> None:
        super().__init__(request.session, request.handoff, peer, timing)
        self.request = request

    def start(self) -> list[Action]:
        """The first actions: count before asking, so that not a byte comes unexpected."""
        self.state = REQUESTED
        self._do(Expect(self.request.imm, self.request.nbytes))
        self._start_repeating(self.request)
        self._set_timer("deadline", self.request.timeout_s)
        return self._taken()

    def _react(self, event: Event) -> None:
        if self.state in RECALL_STATES:
            self._react_recalling(event)
            return
        match event:
            case CounterEnded(error=None, nbytes=nbytes):
                self._succeed(nbytes)
            case CounterEnded(error=error) if error is not None:
                self._give_up(self._transfer_error(error))
            case Received(message=Accepted()) if self.state == REQUESTED:
                self.state = ACCEPTED
                self._clear_timers("retry")
            case Received(message=Sent(nbytes=nbytes)):
                self._sent(nbytes)
            case Received(message=Failed() | Cancelled() as message):
                self._fail(self._error_of_peer(message))
                self._give_back()
            case TimerFired(kind="retry"):
                self._send_repeatedly(self.request)
            case TimerFired(kind="deadline"):
                self._give_up(
                    self._error(
                        HandoffTimeout,
                        f"not complete after {self.request.timeout_s} s ({self.state})",
                    )
                )
            case TimerFired(kind="settle"):
                self._give_up(
                    self._error(
                        HandoffTimeout,
                        "the peer has written everything, but the bytes were not counted within "
                        f"{self.timing.settle_s} s",
                    )
                )
            case UserCancelled(reason=reason):
                self._give_up(self._error(HandoffCancelled, reason))
            case SendRefused(reason=reason):
                self._give_up(self._error(SendFailed, f"cannot send to the peer: {reason}"))
            case LinkDown(reason=reason) if self.state == SENT:
                self._give_up(self._error(LinkLost, f"the link went down: {reason}"))
            case LinkDown():
                self._react_link_down(event)
            case Quiesced():
                self._react_link_down(LinkDown("the peer is gone", quiesced=True))

    def _sent(self, nbytes: int) -> None:
        """Prefill's final answer: no byte moves any more; the counter is about to end, or never."""
        if self.state == SENT:
            return
        self.state = SENT
        self._clear_timers("retry")
        self._set_timer("settle", self.timing.settle_s)
        if nbytes != self.request.nbytes:
            self._give_up(
                self._error(
                    BlocksMismatch,
                    f"the peer wrote {nbytes} bytes, {self.request.nbytes} were asked for",
                )
            )

    def _give_up(self, error: HandoffError) -> None:
        if self.state == SENT:
            self._fail(error)
            self._give_back()
        else:
            self._recall(error)

    def _retire(self) -> None:
        self._do(RetireCounter(self.request.imm))


class DecodePull(Draining):
    """Decode asks, prefill says when its blocks are ready, decode reads them.

    Owns the destination blocks from `start` until `ReleaseBlocks`.
    """

    operation = "receive"
    side = "decode"

    def __init__(self, request: Request, peer: str, timing: Timing) -> None:
        super().__init__(request.session, request.handoff, peer, timing)
        self.request = request

    def start(self) -> list[Action]:
        """The first actions."""
        self.state = REQUESTED
        self._set_timer("deadline", self.request.timeout_s)
        self._start_repeating(self.request)
        return self._taken()

    def _react(self, event: Event) -> None:
        if self.state == DRAINING:
            self._react_draining(event)
            return
        match event:
            case Received(message=Accepted()) if self.state == REQUESTED:
                self.state = ACCEPTED
                self._clear_timers("retry")
            case Received(message=Ready() as ready) if self.state != READING:
                self._read(ready)
            case OperationEnded(op=op, nbytes=nbytes, error=error) if op in self._ops:
                self._ops.discard(op)
                self._read_ended(nbytes, error)
            case Received(message=Failed() | Cancelled() as message):
                self._give_up(self._error_of_peer(message))
            case Received(message=Cancel(reason=reason)):
                error = self._error(
                    HandoffCancelled, f"the peer cancelled: {reason}", retryable=True
                )
                self._drain(error, self._cancelled())
            case TimerFired(kind="retry"):
                self._send_repeatedly(self.request)
            case TimerFired(kind="deadline"):
                self._give_up(
                    self._error(
                        HandoffTimeout,
                        f"not complete after {self.request.timeout_s} s ({self.state})",
                    )
                )
            case UserCancelled(reason=reason):
                self._give_up(self._error(HandoffCancelled, reason))
            case SendRefused(reason=reason) if self.state != READING:
                self._give_up(self._error(SendFailed, f"cannot send to the peer: {reason}"))
            case LinkDown(reason=reason):
                self._give_up(self._error(LinkLost, f"the link went down: {reason}"))

    def _read(self, ready: Ready) -> None:
        if not self.request.stop_token and ready.num_blocks != self.request.num_blocks:
            self._give_up(
                self._error(
                    BlocksMismatch,
                    f"the peer has {ready.num_blocks} blocks, "
                    f"{self.request.num_blocks} were asked for",
                )
            )
            return
        self.state = READING
        self._clear_timers("retry")
        self._do(StartRead(self._new_op(), ready))

    def _read_ended(self, nbytes: int, error: Exception | None) -> None:
        if error is not None:
            self._give_up(self._transfer_error(error))
            return
        self._do(Settle(Done(self.session, self.handoff, nbytes)))
        self._succeed(nbytes)

    def _give_up(self, error: HandoffError) -> None:
        self._drain(error, self._failed(error))
