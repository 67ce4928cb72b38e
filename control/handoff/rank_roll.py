"""The rolls that the first prefill rank keeps: who of a rank set takes a request, and how it ended.

A request is ready when all ranks of the set have said so, and has failed when one has: because it
said so, or because it is gone. The verdict is reached once and told to all, and again to whoever
asks. Ranks that are gone are remembered, so a request fails at once also where a rank died before
it could ask.

Pure: what is to be said comes back as messages, each with its session.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from .machine import MAX_REASON_CHARS
from .messages import Verdict

if TYPE_CHECKING:
    from .messages import Part

MAX_ROLLS = 4096  # the newest; a roll is a few hundred bytes and lives as long as its request
MAX_SETS = 1024


class Rank(NamedTuple):
    """A decode rank, as its agent introduced itself.

    Attributes:
        rank_set: what its engine's ranks are called together.
        number, num_ranks: which of how many it is.
        session: the session that it speaks in.
    """

    rank_set: str
    number: int
    num_ranks: int
    session: int


class Roll:
    """One attempt of a rank set at one request."""

    def __init__(self, attempt: int, num_ranks: int) -> None:
        self.attempt = attempt
        self.num_ranks = num_ranks
        self.sessions: dict[int, int] = {}  # of the ranks that have asked
        self.ready: set[int] = set()
        self.verdict: tuple[str, str, bool] | None = None  # error, reason, retryable


class RankRolls:
    """All rolls of one agent. Not thread-safe: one owner."""

    def __init__(self) -> None:
        self._rolls: OrderedDict[tuple[str, str], Roll] = OrderedDict()
        self._sessions: OrderedDict[str, dict[int, int | None]] = OrderedDict()  # None: gone

    def came_up(self, rank: Rank) -> None:
        """A rank is connected."""
        sessions = self._sessions.setdefault(rank.rank_set, {})
        self._sessions.move_to_end(rank.rank_set)
        sessions[rank.number] = rank.session
        while len(self._sessions) > MAX_SETS:
            self._sessions.popitem(last=False)

    def went_down(self, rank: Rank, reason: str) -> list[Verdict]:
        """A rank's session is over: what its set has not finished has failed."""
        sessions = self._sessions.get(rank.rank_set, {})
        if sessions.get(rank.number) != rank.session:
            return []  # it is back already
        sessions[rank.number] = None
        if all(session is None for session in sessions.values()):
            del self._sessions[rank.rank_set]  # nobody is left to be told
        why = ("LinkLost", _gone(rank.rank_set, rank.number, reason), True)
        return [
            verdict
            for (rank_set, request_id), roll in self._rolls.items()
            if rank_set == rank.rank_set and roll.verdict is None
            for verdict in self._decide(request_id, roll, why)
        ]

    def hear(self, rank: Rank, part: Part) -> list[Verdict]:
        """How it stands with a request on one rank."""
        key = rank.rank_set, part.request_id
        roll = self._rolls.get(key)
        if roll is not None and part.attempt < roll.attempt:
            reason = f"attempt {part.attempt} is over, the ranks are at {roll.attempt}"
            why = ("HandoffCancelled", reason, True)
            return [_verdict(rank.session, part.request_id, part.attempt, roll, why)]
        said: list[Verdict] = []
        if roll is None or part.attempt > roll.attempt:
            if roll is not None and roll.verdict is None:
                why = ("HandoffCancelled", f"attempt {part.attempt} has begun", True)
                said += self._decide(part.request_id, roll, why)
            roll = self._rolls[key] = Roll(part.attempt, rank.num_ranks)
            self._rolls.move_to_end(key)
            said += self._forget_old()
        if roll.verdict is not None:
            return [*said, self._told(rank.session, part.request_id, roll)]
        twin = roll.sessions.setdefault(rank.number, rank.session) != rank.session
        if twin or rank.num_ranks != roll.num_ranks:
            said += self._decide(part.request_id, roll, _contradiction(roll, rank))
            return [*said, self._told(rank.session, part.request_id, roll)] if twin else said
        if part.state == "failed":
            return [*said, *self._decide(part.request_id, roll, _failure(part))]
        if part.state == "ready":
            roll.ready.add(rank.number)
        gone = [n for n, s in self._sessions.get(rank.rank_set, {}).items() if s is None]
        if gone:
            why = ("LinkLost", _gone(rank.rank_set, min(gone), "it has not come back"), True)
            return [*said, *self._decide(part.request_id, roll, why)]
        if len(roll.ready) == roll.num_ranks:
            said += self._decide(part.request_id, roll, ("", "", False))
        return said

    def _decide(self, request_id: str, roll: Roll, why: tuple[str, str, bool]) -> list[Verdict]:
        roll.verdict = why
        return [self._told(session, request_id, roll) for session in roll.sessions.values()]

    def _told(self, session: int, request_id: str, roll: Roll) -> Verdict:
        assert roll.verdict is not None
        return _verdict(session, request_id, roll.attempt, roll, roll.verdict)

    def _forget_old(self) -> list[Verdict]:
        """The oldest roll goes; one that is open until now, which thousands overtook, fails."""
        said: list[Verdict] = []
        while len(self._rolls) > MAX_ROLLS:
            (_, request_id), roll = self._rolls.popitem(last=False)
            if roll.verdict is None:
                why = ("HandoffTimeout", f"{MAX_ROLLS} newer requests are under way", True)
                said += self._decide(request_id, roll, why)
        return said


def _verdict(
    session: int, request_id: str, attempt: int, roll: Roll, why: tuple[str, str, bool]
) -> Verdict:
    """The answer to one rank; an open attempt can still be joined, else the next one is due."""
    error, reason, retryable = why
    following = roll.attempt + (roll.verdict is not None)
    reason = reason[:MAX_REASON_CHARS]
    return Verdict(session, request_id, attempt, following, error, reason, retryable)


def _failure(part: Part) -> tuple[str, str, bool]:
    return part.error or "HandoffError", part.reason, part.retryable


def _contradiction(roll: Roll, rank: Rank) -> tuple[str, str, bool]:
    what = f"rank {rank.number} of {rank.rank_set}"
    if rank.num_ranks != roll.num_ranks:
        what = f"{what} says that there are {rank.num_ranks} ranks, others say {roll.num_ranks}"
    else:
        what = f"two agents say that they are {what}: give each engine a rank_set of its own"
    return "ProtocolError", what, False


def _gone(rank_set: str, number: int, reason: str) -> str:
    return f"rank {number} of {rank_set} is gone: {reason}"
