"""Decode's side of a handoff: `DecodePush` is written to, `DecodePull` reads.

    DecodePush   requested → accepted → (sent) → finished
    DecodePull   requested → accepted → reading → finished

and from anywhere, after a failure, through `recall.py` (push) or `drain.py` (pull).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..errors import BlocksMismatch, HandoffTimeout
from .drain import Draining
from .events import (
    CounterEnded,
    Expect,
    LinkDown,
    OperationEnded,
    RetireCounter,
    SendRefused,
    Settle,
    StartRead,
    UserCancelled,
)
from .machine import Machine
from .messages import Accepted, Done, Ready, Sent
from .recall import Recalling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..errors import HandoffError
    from .events import Action, TimerFired
    from .machine import Reactions, Timing
    from .messages import Request

REQUESTED = "requested"
ACCEPTED = "accepted"
SENT = "sent"
READING = "reading"


class Asking(Machine):
    """Decode's side, whoever moves the bytes: asks until it is heard, and waits until its deadline.

    Owns the destination blocks from `start` until `ReleaseBlocks`.
    """

    operation = "receive"
    side = "decode"

    def __init__(self, request: Request, peer: str, timing: Timing) -> None:
        super().__init__(request.session, request.handoff, peer, timing)
        self.request = request

    def start(self) -> list[Action]:
        """Return the first actions."""
        self.state = REQUESTED
        self._repeat(self.request)
        self._set_timer("deadline", self.request.timeout_s)
        return self._taken()

    def _accepted(self, _: Accepted) -> None:
        """Prefill has heard it. It is still asked, now and then: an answer may be lost."""
        self.state = ACCEPTED
        self._retry_s = self.timing.retry_max_s

    def _too_late(self, _: TimerFired) -> None:
        waited = f"not complete after {self.request.timeout_s:.4g} s"
        name = self.handoff.request_id
        if self.state == REQUESTED:
            what = f"{waited}: {self.peer} has not answered"
        elif self.state == ACCEPTED:
            what = f"{waited}: {self.peer} heard of it, and sent too little of {name!r}, or never"
            what += " offered anything under that id"
        else:
            what = f"{waited} ({self.state})"
        self._give_up(self._error(HandoffTimeout, what))

    waiting: ClassVar[Reactions] = {
        "retry": Machine._send_again,
        "deadline": _too_late,
        UserCancelled: Machine._user_cancelled,
    }


class DecodePush(Asking, Recalling):
    """Decode asks, prefill writes into decode's blocks, a counter says when all is there."""

    def start(self) -> list[Action]:
        """Return the first actions: count before asking, so that not a byte comes unexpected."""
        self._do(Expect(self.request.imm, self.request.nbytes))
        return super().start()

    def _counted(self, event: CounterEnded) -> None:
        if event.error is None:
            self._succeed(event.nbytes)
        else:
            self._give_up(self._transfer_error(event.error))

    def _sent(self, message: Sent) -> None:
        """Prefill's final answer: no byte moves any more; the counter is about to end, or never."""
        self.state = SENT
        self._clear_timers("retry")
        self._set_timer("settle", self.timing.settle_s)
        if message.nbytes != self.request.nbytes:
            what = f"the peer wrote {message.nbytes} bytes, {self.request.nbytes} were asked for"
            self._give_up(self._error(BlocksMismatch, what))

    def _not_counted(self, _: TimerFired) -> None:
        what = (
            "the peer has written everything, but the bytes were not counted within "
            f"{self.timing.settle_s} s"
        )
        self._give_up(self._error(HandoffTimeout, what))

    def _give_up(self, error: HandoffError) -> None:
        if self.state == SENT:
            self._fail(error)
            self._give_back()
        else:
            self._recall(error)

    def _retire(self) -> None:
        self._do(RetireCounter(self.request.imm))

    _exposed: ClassVar[Reactions] = {
        **Asking.waiting,
        **Recalling.exposed,
        CounterEnded: _counted,
    }
    _unsent: ClassVar[Reactions] = {**_exposed, Sent: _sent}
    reactions: ClassVar[Mapping[str, Reactions]] = {
        **Recalling.reactions,
        REQUESTED: {**_unsent, Accepted: Asking._accepted},
        ACCEPTED: _unsent,
        SENT: {**_exposed, "settle": _not_counted, LinkDown: Machine._link_lost},
    }


class DecodePull(Asking, Draining):
    """Decode asks, prefill says when its blocks are ready, decode reads them."""

    def _read(self, ready: Ready) -> None:
        if not self.request.stop_token and ready.num_blocks != self.request.num_blocks:
            what = (
                f"the peer has {ready.num_blocks} blocks, {self.request.num_blocks} were asked for"
            )
            self._give_up(self._error(BlocksMismatch, what))
            return
        self.state = READING
        self._clear_timers("retry")
        self._do(StartRead(self._new_op(), ready))

    def _read_ended(self, event: OperationEnded) -> None:
        if event.op not in self._ops:
            return
        self._ops.discard(event.op)
        if event.error is not None:
            self._give_up(self._transfer_error(event.error))
            return
        self._do(Settle(Done(self.session, self.handoff, event.nbytes)))
        self._succeed(event.nbytes)

    _moving: ClassVar[Reactions] = {**Asking.waiting, **Draining.moving}
    _unready: ClassVar[Reactions] = {
        **_moving,
        SendRefused: Machine._send_refused,
        Ready: _read,
    }
    reactions: ClassVar[Mapping[str, Reactions]] = {
        **Draining.reactions,
        REQUESTED: {**_unready, Accepted: Asking._accepted},
        ACCEPTED: _unready,
        READING: {**_moving, OperationEnded: _read_ended},
    }
