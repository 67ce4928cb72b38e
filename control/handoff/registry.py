"""The registries: all handoffs of one agent, as prefill and as decode.

A registry finds the machine that a message or an event concerns, joins sources with requests, and
answers for handoffs that are over. Like the machines it is pure: what is to be done comes back as
steps, `(key, action)`, where the key names the handoff on this side (0: none).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import HandoffError, LinkLost
from .decode import DecodePull, DecodePush
from .events import LinkDown, Quiesced, Received, Send, Settle
from .ledger import Ledger
from .machine import Machine, Timing
from .messages import Cancel, Cancelled, Failed, HandoffId, Ready, Request
from .prefill import PrefillHandoff

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .events import Action, Event, SourceOffered
    from .messages import HandoffMessage, Mode, Side

Steps = list[tuple[int, "Action"]]

MAX_WANTED = 65_536  # requests whose source is not known yet; about 2 KB each
DOWN_REMEMBERED = 64  # sessions that are down and still answer `Cancel`


class Handoffs:
    """What both registries share. Not thread-safe: one owner."""

    side: Side
    unknown: ClassVar[Mapping[type[HandoffMessage], Callable[..., Steps]]]

    def __init__(self, timing: Timing | None = None) -> None:
        self.timing = timing or Timing()
        self.machines: dict[int, Machine] = {}
        self._keys = itertools.count(1)
        self._ledgers: dict[int, Ledger] = {}

    def open_session(self, session: int, peer: str) -> None:
        """Handoffs with `peer` may begin."""
        self._ledgers[session] = Ledger(peer)

    def knows(self, session: int) -> bool:
        """Return whether messages of this session still mean something."""
        return session in self._ledgers

    def busy(self, session: int) -> bool:
        """Return whether a handoff of this session is under way."""
        ledger = self._ledgers.get(session)
        return ledger is not None and bool(ledger.live)

    def receive(self, message: HandoffMessage) -> Steps:
        """Return a message of a session that this registry knows, addressed to this side."""
        ledger = self._ledgers.get(message.session)
        if ledger is None:
            return []
        key = ledger.live.get(message.handoff.serial)
        if key is None:
            answer = self.unknown.get(type(message))
            return answer(self, ledger, message) if answer is not None else []
        machine = self.machines[key]
        if machine.handoff != message.handoff:
            return []  # another request by its serial
        return self._carry(key, machine, machine.handle(Received(message)))

    def handle(self, key: int, event: Event) -> Steps:
        """Return an event for one handoff; one that is over ignores it."""
        machine = self.machines.get(key)
        return self._carry(key, machine, machine.handle(event)) if machine else []

    def link_down(self, session: int, reason: str, *, quiesced: bool) -> Steps:
        """Return the session's link went down: nothing new begins, and its handoffs fail."""
        ledger = self._ledgers.get(session)
        if ledger is None:
            return []
        ledger.up = False
        steps = self._tell_all(session, LinkDown(reason, quiesced))
        self._forget_sessions()
        return steps

    def quiesced(self, session: int) -> Steps:
        """Note that the peer of a session that is down can touch nothing any more."""
        return self._tell_all(session, Quiesced())

    def forget(self, session: int) -> None:
        """Nobody asks about a session that is down any more; one with live handoffs is kept."""
        ledger = self._ledgers.get(session)
        if ledger is not None and ledger.idle:
            del self._ledgers[session]

    def _tell_all(self, session: int, event: Event) -> Steps:
        ledger = self._ledgers.get(session)
        keys = list(ledger.live.values()) if ledger is not None else []
        return [step for key in keys for step in self.handle(key, event)]

    def _carry(self, key: int, machine: Machine, actions: list[Action]) -> Steps:
        """Note final answers, and forget machines that are finished."""
        steps: Steps = []
        ledger = self._ledgers.get(machine.session)
        serial = machine.handoff.serial
        for action in actions:
            if isinstance(action, Settle):
                if ledger is not None:
                    ledger.settle(serial, action.message)
                steps.append((key, Send(action.message)))
            else:
                steps.append((key, action))
        if machine.finished:
            del self.machines[key]
            if ledger is not None and serial in ledger.live:
                ledger.settle(serial, self._over(machine.session, machine.handoff))
        return steps

    def _over(self, session: int, handoff: HandoffId) -> Cancelled:
        return Cancelled(session, handoff, self.side)

    def _forget_sessions(self) -> None:
        idle = [s for s, ledger in self._ledgers.items() if ledger.idle]
        for session in idle[: max(0, len(idle) - DOWN_REMEMBERED)]:
            del self._ledgers[session]


class DecodeHandoffs(Handoffs):
    """The handoffs that this agent asked for."""

    side = "decode"

    def __init__(self, timing: Timing | None = None) -> None:
        super().__init__(timing)
        self._serials = itertools.count(1)

    def begin(
        self,
        session: int,
        request_id: str,
        *,
        attempt: int,
        mode: Mode,
        imm: int,
        tables: tuple[bytes, ...] = (),
        **fields: Any,
    ) -> tuple[int, Steps]:
        """Ask for a request's blocks; return the handoff's key and the first steps.

        `tables` name the destination, in either mode; the other `fields` are those of `Request`.

        Raises:
            LinkLost: the session's link is down.
            ValueError: the tables do not hold `num_blocks` block ids.
        """
        ledger = self._ledgers.get(session)
        handoff = HandoffId(request_id, attempt, next(self._serials))
        if ledger is None or not ledger.up:
            raise LinkLost(
                "the link is down: connect again",
                handoff=str(handoff),
                peer=ledger.peer if ledger is not None else "",
                operation="receive",
            )
        machine: DecodePush | DecodePull
        if mode == "push":
            request = Request(session, handoff, mode, imm=imm, tables=tables, **fields)
            machine = DecodePush(request, ledger.peer, self.timing)
        else:
            request = Request(session, handoff, mode, **fields)
            machine = DecodePull(request, ledger.peer, self.timing)
        key = next(self._keys)
        self.machines[key] = machine
        ledger.begin(handoff.serial, key)
        return key, self._carry(key, machine, machine.start())

    def _asked_about(self, ledger: Ledger, message: Ready | Cancel) -> Steps:
        """Prefill asks about a handoff that is over: it learns so, and gives its blocks back."""
        over = self._over(message.session, message.handoff)
        return [(0, Send(ledger.answer(message.handoff.serial) or over))]

    unknown = {Ready: _asked_about, Cancel: _asked_about}  # noqa: RUF012


class PrefillHandoffs(Handoffs):
    """The handoffs that others ask for, and the sources that wait to be asked for."""

    side = "prefill"

    def __init__(self, timing: Timing | None = None) -> None:
        super().__init__(timing)
        # By request id and key: of one id either all are offers, or nobody has offered it.
        self._waiting: dict[str, dict[int, PrefillHandoff]] = {}
        self._num_wanted = 0

    def offer(self, request_id: str, source: SourceOffered) -> tuple[int, Steps]:
        """Return a source, for the newest request of that id, or the first one to come.

        Returns the handoff's key and the first steps. Each offer serves one request.
        """
        waiting = self._waiting.get(request_id, {})
        key = max(waiting, default=0)
        if key and waiting[key].request is not None:
            machine = self._take(waiting, request_id, key)
            self._num_wanted -= 1
        else:
            key, machine = self._wait(request_id)
        return key, self._carry(key, machine, machine.offered(source))

    def _cancelled(self, ledger: Ledger, message: Cancel) -> Steps:
        serial = message.handoff.serial
        answer = ledger.answer(serial)
        if answer is None:
            answer = self._over(message.session, message.handoff)
            ledger.settle(serial, answer)  # or the late Request would begin it
        return [(0, Send(answer))]

    def _requested(self, ledger: Ledger, request: Request) -> Steps:
        serial = request.handoff.serial
        if ledger.over(serial):
            over = ledger.answer(serial) or self._over(request.session, request.handoff)
            return [(0, Send(over))]
        if not ledger.up:
            return self._refuse(ledger, request, LinkLost("the link is down: connect again"))
        if self._num_wanted >= MAX_WANTED:
            busy = HandoffError(f"{MAX_WANTED} requests wait for their source", retryable=True)
            return self._refuse(ledger, request, busy)
        request_id = request.handoff.request_id
        waiting = self._waiting.get(request_id, {})
        key = min(waiting, default=0)
        if key and waiting[key].request is None:
            machine = self._take(waiting, request_id, key)
        else:
            key, machine = self._wait(request_id)
            self._num_wanted += 1
        ledger.begin(serial, key)
        return self._carry(key, machine, machine.wanted(request, ledger.peer))

    unknown = {Cancel: _cancelled, Request: _requested}  # noqa: RUF012

    def _wait(self, request_id: str) -> tuple[int, PrefillHandoff]:
        """Return a new handoff, whose other half has not come."""
        machine, key = PrefillHandoff(request_id, self.timing), next(self._keys)
        self.machines[key] = self._waiting.setdefault(request_id, {})[key] = machine
        return key, machine

    def _take(
        self, waiting: dict[int, PrefillHandoff], request_id: str, key: int
    ) -> PrefillHandoff:
        """Take one off those that wait for the other half of this request."""
        machine = waiting.pop(key)
        if not waiting:
            del self._waiting[request_id]
        return machine

    def _refuse(self, ledger: Ledger, request: Request, error: HandoffError) -> Steps:
        answer = Failed(
            request.session,
            request.handoff,
            self.side,
            type(error).__name__,
            error.message,
            error.retryable,
        )
        ledger.settle(request.handoff.serial, answer)
        return [(0, Send(answer))]

    def _carry(self, key: int, machine: Machine, actions: list[Action]) -> Steps:
        """Also takes a handoff that is over off the waiting lists."""
        if machine.finished:
            request_id = machine.handoff.request_id
            waiting = self._waiting.get(request_id, {})
            if key in waiting:
                self._num_wanted -= self._take(waiting, request_id, key).request is not None
        return super()._carry(key, machine, actions)
