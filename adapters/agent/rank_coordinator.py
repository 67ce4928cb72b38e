"""Requests that several ranks take, carried between the pure machines and the agents' messages.

On a decode rank each has a `RankPart`; the first prefill rank keeps the rolls. Lives on the agent's
thread.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING

from ...control.errors import AgentClosed, LinkLost
from ...control.handoff import events
from ...control.handoff.messages import Part, Verdict
from ...control.handoff.rank_part import RankPart
from ...control.handoff.rank_roll import Rank, RankRolls

if TYPE_CHECKING:
    from ...control.handoff.events import Action, Event
    from ...control.handoff.machine import Timing
    from ...control.handoff.messages import RankMessage
    from .acquaintance import Acquaintance
    from .core import AgentCore
    from .event_loop import Timer
    from .ranks import RankHandoff

ATTEMPTS_REMEMBERED = 4096  # requests whose next attempt gets the next number


class _Work:
    """A decode rank's part of a request: its user's end, its machine and its timers."""

    def __init__(self, whole: RankHandoff, part: RankPart) -> None:
        self.whole = whole
        self.part = part
        self.timers: dict[str, Timer] = {}


class RankSets:
    """One agent's share in requests of rank sets, as decode rank and as keeper of the roll."""

    def __init__(self, core: AgentCore, timing: Timing) -> None:
        self._core = core
        self._timing = timing
        self._rolls = RankRolls()
        self._work: dict[RankHandoff, _Work] = {}
        self._named: dict[tuple[int, str, int], _Work] = {}
        self._attempts: OrderedDict[str, int] = OrderedDict()

    # A decode rank

    def begin(self, whole: RankHandoff, first: str, request_id: str, timeout_s: float) -> None:
        """This rank takes its part; `first` is the agent that keeps the roll."""
        attempt = self._attempts.get(request_id, 0) + 1
        self._note_attempt(request_id, attempt)
        peer = self._core.acquaintances.by_name(first)
        if peer is None:
            lost = LinkLost(
                f"{first}, the first prefill rank, which all ranks ask, is not connected: connect "
                "again",
                handoff=f"{request_id}#{attempt}",
                peer=first,
                operation="receive",
            )
            whole._outcome._fail(lost)
            _cancel_parts(whole, lost.message)
            return
        part = RankPart(peer.session.number, request_id, attempt, first, self._timing, timeout_s)
        work = self._work[whole] = self._named[_name(part)] = _Work(whole, part)
        self._carry_out(work, part.start())

    def tell(self, whole: RankHandoff, event: Event) -> None:
        """Something happened to this rank's part; one that is over ignores it."""
        work = self._work.get(whole)
        if work is not None:
            self._carry_out(work, work.part.handle(event))

    def _note_attempt(self, request_id: str, attempt: int) -> None:
        self._attempts[request_id] = attempt
        self._attempts.move_to_end(request_id)
        while len(self._attempts) > ATTEMPTS_REMEMBERED:
            self._attempts.popitem(last=False)

    def _carry_out(self, work: _Work, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case events.Send(message=message):
                    peer = self._core.acquaintances.get(message.session)
                    if peer is not None:
                        self._core.send(peer.route, message, partial(self._refused, work))
                case events.SetTimer(kind=kind, seconds=seconds):
                    self._clear_timer(work, kind)
                    work.timers[kind] = self._core.mailbox.call_later(
                        seconds, partial(self.tell, work.whole, events.TimerFired(kind))
                    )
                case events.ClearTimer(kind=kind):
                    self._clear_timer(work, kind)
                case events.CancelParts(reason=reason):
                    _cancel_parts(work.whole, reason)
                case events.Succeed(nbytes=nbytes):
                    work.whole._outcome._finish(nbytes)
                case events.Fail(error=error):
                    work.whole._outcome._fail(error)
        if work.part.finished:
            self._work.pop(work.whole, None)
            self._named.pop(_name(work.part), None)

    def _clear_timer(self, work: _Work, kind: str) -> None:
        timer = work.timers.pop(kind, None)
        if timer is not None:
            timer.cancel()

    def _refused(self, work: _Work, reason: str) -> None:
        self.tell(work.whole, events.SendRefused(reason))

    # Both

    def hear(self, peer: Acquaintance, message: RankMessage) -> None:
        """A message of a peer that is known."""
        if isinstance(message, Verdict):
            known = self._attempts.get(message.request_id, 0)
            self._note_attempt(message.request_id, max(known, message.next_attempt - 1))
            named = self._named.get((message.session, message.request_id, message.attempt))
            if named is not None:
                self._carry_out(named, named.part.handle(events.Received(message)))
            return
        rank = _rank_of(peer)
        if rank is None or not isinstance(message, Part):
            detail = "your agent is not one of several ranks: it takes requests alone"
            self._core.refuse(peer.route, 0, "protocol", detail)
        else:
            self._tell_ranks(self._rolls.hear(rank, message))

    def came_up(self, peer: Acquaintance) -> None:
        """A session is up."""
        rank = _rank_of(peer)
        if rank is not None:
            self._rolls.came_up(rank)

    def went_down(self, peer: Acquaintance, reason: str) -> None:
        """The link of a session is down."""
        for work in list(self._work.values()):
            if work.part.session == peer.session.number:
                down = events.LinkDown(reason, quiesced=False)
                self._carry_out(work, work.part.handle(down))
        rank = _rank_of(peer)
        if rank is not None:
            self._tell_ranks(self._rolls.went_down(rank, reason))

    def begin_close(self) -> None:
        """Ends this rank's part of everything; its peers see the link go down."""
        for work in list(self._work.values()):
            handoff = str(work.part.handoff)
            work.whole._outcome._fail(
                AgentClosed("the agent was closed", handoff=handoff, operation="close")
            )
            cancelled = events.UserCancelled("the agent was closed")
            self._carry_out(work, work.part.handle(cancelled))

    def _tell_ranks(self, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            peer = self._core.acquaintances.get(verdict.session)
            if peer is not None and peer.up:
                self._core.send(peer.route, verdict)


def _name(part: RankPart) -> tuple[int, str, int]:
    return part.session, part.handoff.request_id, part.handoff.attempt


def _cancel_parts(whole: RankHandoff, reason: str) -> None:
    for part in whole.parts:
        if not part.done():
            part.cancel(reason)


def _rank_of(peer: Acquaintance) -> Rank | None:
    """Which of a set's ranks a peer is; None if it is alone."""
    cache = peer.peer_cache
    if cache is None or len(cache.ranks) < 2:
        return None
    return Rank(cache.rank_set, cache.rank, len(cache.ranks), peer.session.number)
