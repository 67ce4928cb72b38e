"""Decode ranks that know nothing of each other, and the roll that makes a request end alike on all."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.errors import (
    HandoffCancelled,
    HandoffTimeout,
    LinkLost,
    PeerFailed,
    SendFailed,
)
from kvferry.control.handoff import rank_roll as rank_rolls
from kvferry.control.handoff.events import (
    CancelParts,
    Fail,
    LinkDown,
    PartsEnded,
    Received,
    Send,
    SendRefused,
    Succeed,
    TimerFired,
    UserCancelled,
)
from kvferry.control.handoff.machine import Timing
from kvferry.control.handoff.messages import Part, Verdict
from kvferry.control.handoff.rank_part import RankPart
from kvferry.control.handoff.rank_roll import Rank, RankRolls

if TYPE_CHECKING:
    from kvferry.control.handoff.events import Event

REQUEST = "r"
TIMING = Timing()


class World:
    """Some ranks of one set and the keeper of their roll; messages wait until they are delivered."""

    def __init__(self, num_ranks: int = 3, *, rank_set: str = "decode") -> None:
        self.rolls = RankRolls()
        self.ranks = [Rank(rank_set, n, num_ranks, 100 + n) for n in range(num_ranks)]
        self.parts: dict[int, RankPart] = {}
        self.outcomes: dict[int, Any] = {}
        self.cancelled: set[int] = set()
        self.wire: list[Part | Verdict] = []
        for rank in self.ranks:
            self.rolls.came_up(rank)

    def start(self, *numbers: int, attempt: int = 1) -> None:
        for n in numbers or range(len(self.ranks)):
            session = self.ranks[n].session
            self.parts[n] = RankPart(session, REQUEST, attempt, "prefill-0", TIMING, 30.0)
            self.outcomes.pop(n, None)
            self._carry_out(n, self.parts[n].start())

    def tell(self, number: int, event: Event) -> None:
        self._carry_out(number, self.parts[number].handle(event))

    def deliver(self, index: int = 0, *, keep: bool = False) -> None:
        message = self.wire[index] if keep else self.wire.pop(index)
        rank = next(rank for rank in self.ranks if rank.session == message.session)
        if isinstance(message, Part):
            self.wire += self.rolls.hear(rank, message)
        elif rank.number in self.parts:
            self.tell(rank.number, Received(message))

    def deliver_all(self) -> None:
        while self.wire:
            self.deliver()

    def kill(self, number: int) -> None:
        self.wire += self.rolls.went_down(self.ranks[number], "killed")

    def errors(self) -> dict[int, type[Exception]]:
        return {n: type(end.error) for n, end in self.outcomes.items() if isinstance(end, Fail)}

    def _carry_out(self, number: int, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send):
                assert isinstance(action.message, Part)
                self.wire.append(action.message)
            elif isinstance(action, Succeed | Fail):
                assert number not in self.outcomes, "a second outcome"
                self.outcomes[number] = action
            elif isinstance(action, CancelParts):
                self.cancelled.add(number)


def test_ready_on_all_when_the_last_is() -> None:
    world = World()
    world.start()
    for n in (2, 0):
        world.tell(n, PartsEnded(10 + n))
        world.deliver_all()
        assert not world.outcomes
    world.tell(1, PartsEnded(11))
    world.deliver_all()
    assert world.outcomes == {n: Succeed(10 + n) for n in range(3)}
    assert all(part.finished and not part.timers for part in world.parts.values())
    assert not world.cancelled


@pytest.mark.parametrize("ready_first", [False, True])
def test_one_that_fails_fails_all(ready_first: bool) -> None:
    world = World()
    world.start()
    if ready_first:
        world.tell(0, PartsEnded(10))
    world.deliver_all()
    world.tell(1, PartsEnded(0, LinkLost("its prefill rank is gone")))
    assert world.errors() == {1: LinkLost}
    world.deliver_all()
    assert world.errors() == dict.fromkeys(range(3), LinkLost)
    assert world.cancelled == {0, 1, 2}
    assert all(end.error.retryable for end in world.outcomes.values())
    assert "its prefill rank is gone" in str(world.outcomes[2].error)


@pytest.mark.parametrize("asked", [False, True])
def test_one_that_is_gone_fails_all_whether_it_had_asked_or_not(asked: bool) -> None:
    world = World()
    world.start(0, 1)
    if asked:
        world.start(2)
    world.deliver_all()
    world.tell(0, PartsEnded(1))
    world.kill(2)
    world.deliver_all()
    errors = world.errors()
    assert errors[0] is errors[1] is LinkLost
    assert "rank 2 of decode is gone: killed" in str(world.outcomes[1].error)
    # A request that begins now fails at once, until the rank is back.
    world.start(0, attempt=2)
    world.deliver_all()
    assert "rank 2 of decode is gone" in str(world.outcomes[0].error)
    world.rolls.came_up(world.ranks[2])
    world.start(attempt=3)
    for n in range(3):
        world.tell(n, PartsEnded(n))
    world.deliver_all()
    assert world.outcomes == {n: Succeed(n) for n in range(3)}


def test_a_rank_that_asks_late_hears_of_the_failure_at_once() -> None:
    world = World()
    world.start(0)
    world.tell(0, UserCancelled("no more"))
    world.deliver_all()
    assert world.errors() == {0: HandoffCancelled}
    world.start(1)
    world.deliver_all()
    assert world.errors() == {0: HandoffCancelled, 1: HandoffCancelled}


def test_a_restarted_rank_is_told_which_attempt_can_be_joined() -> None:
    world = World(2)
    world.start(0, 1)
    world.tell(1, PartsEnded(0, LinkLost("gone")))
    world.deliver_all()
    world.start(0, attempt=2)
    world.deliver_all()
    (early,) = world.rolls.hear(world.ranks[1], Part(101, REQUEST, 1, "pending"))
    assert (early.error, early.next_attempt, early.retryable) == ("HandoffCancelled", 2, True)
    world.start(1, attempt=2)
    for n in range(2):
        world.tell(n, PartsEnded(n))
    world.deliver_all()
    assert world.outcomes == {n: Succeed(n) for n in range(2)}
    (over,) = world.rolls.hear(world.ranks[1], Part(101, REQUEST, 2, "pending"))
    assert (over.error, over.next_attempt) == ("", 3)


def test_a_newer_attempt_ends_the_older() -> None:
    world = World(2)
    world.start(0)
    world.deliver_all()
    world.start(1, attempt=2)
    world.deliver_all()
    assert world.errors() == {0: HandoffCancelled}
    assert "attempt 2 has begun" in str(world.outcomes[0].error)


def test_without_the_keeper_of_the_roll_a_part_fails() -> None:
    world = World(2)
    world.start()
    world.tell(0, PartsEnded(1))
    world.tell(0, LinkDown("killed", quiesced=False))
    world.tell(1, SendRefused("4096 messages wait"))
    assert world.errors() == {0: LinkLost, 1: SendFailed}
    assert world.cancelled == {0, 1}
    assert all(part.finished and not part.timers for part in world.parts.values())


def test_a_rank_that_never_asks_costs_the_deadline_and_no_more() -> None:
    world = World(2)
    world.start(0)
    world.tell(0, PartsEnded(1))
    world.deliver_all()
    world.tell(0, TimerFired("deadline"))
    assert world.errors() == {0: HandoffTimeout}
    assert not world.parts[0].finished  # the others are to hear of it
    world.tell(0, TimerFired("deadline"))
    assert world.parts[0].finished
    world.deliver_all()
    world.start(1)
    world.deliver_all()
    assert world.errors()[1] is HandoffTimeout


def test_two_engines_under_one_name_are_refused_by_name() -> None:
    world = World(2)
    world.start()
    world.deliver_all()
    twin = Rank("decode", 1, 2, 999)
    told = world.rolls.hear(twin, Part(999, REQUEST, 1, "pending"))
    assert {verdict.session for verdict in told} == {100, 101, 999}
    assert all("two agents say that they are rank 1 of decode" in v.reason for v in told)
    other = World(2)
    other.start(0)
    other.deliver_all()
    other.wire += other.rolls.hear(Rank("decode", 1, 4, 101), Part(101, REQUEST, 1, "ready"))
    other.deliver_all()
    assert other.errors() == {0: PeerFailed}
    assert "4 ranks, others say 2" in str(other.outcomes[0].error)


def test_engines_do_not_touch_each_other() -> None:
    world, other = World(2, rank_set="a"), World(2, rank_set="b")
    other.rolls = world.rolls
    for each in (world, other):
        each.ranks = [
            rank._replace(session=rank.session + 10 * (each is other)) for rank in each.ranks
        ]
        for rank in each.ranks:
            world.rolls.came_up(rank)
        each.start()
        each.deliver_all()
    world.kill(0)
    world.deliver_all()
    assert world.errors() == dict.fromkeys(range(2), LinkLost)
    for n in range(2):
        other.tell(n, PartsEnded(n))
    other.deliver_all()
    assert other.outcomes == {n: Succeed(n) for n in range(2)}


def test_old_rolls_are_forgotten_and_open_ones_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_rolls, "MAX_ROLLS", 4)
    world = World(2)
    world.start(0)
    world.deliver_all()
    rank = world.ranks[1]
    for n in range(4):
        world.wire += world.rolls.hear(rank, Part(rank.session, f"other{n}", 1, "pending"))
    world.deliver_all()
    assert world.errors() == {0: HandoffTimeout}


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_lost_late_or_doubled_all_end_alike(seed: int) -> None:
    rng = random.Random(seed)
    world = World(4)
    world.start()
    dead: set[int] = set()
    fate = rng.choice(["well", "failed", "killed"])
    victim = rng.randrange(4)
    todo = [n for n in range(4) if fate == "well" or n != victim]
    rng.shuffle(todo)
    for _ in range(300):
        if todo and rng.random() < 0.1:
            n = todo.pop()
            world.tell(n, PartsEnded(n))
        elif fate == "killed" and not dead and rng.random() < 0.05:
            dead.add(victim)
            world.kill(victim)
            world.wire = [m for m in world.wire if m.session != world.ranks[victim].session]
        elif fate == "failed" and victim not in world.outcomes and rng.random() < 0.05:
            world.tell(victim, PartsEnded(0, LinkLost("gone")))
        elif world.wire and rng.random() < 0.8:
            index = rng.randrange(len(world.wire))
            if rng.random() < 0.3:
                world.wire.pop(index)  # lost
            else:
                world.deliver(index, keep=rng.random() < 0.2)
        else:
            world.tell(rng.randrange(4), TimerFired("retry"))
    while len(world.outcomes) < 4 - len(dead):  # whoever has no answer asks again
        for n in world.parts:
            if n not in dead:
                world.tell(n, TimerFired("retry"))
        world.wire = [m for m in world.wire if m.session - 100 not in dead]
        world.deliver_all()
    alive = {n: end for n, end in world.outcomes.items() if n not in dead}
    if fate == "well":
        assert alive == {n: Succeed(n) for n in range(4)}
    else:
        assert all(isinstance(end, Fail) for end in alive.values())
