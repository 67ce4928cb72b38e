"""Agents towards one daemon, many at once: events on a simulated clock, no sockets."""

from __future__ import annotations

import heapq
import random
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.cluster.membership import Membership
from kvferry.control.cluster.messages import Look, Registered, Registration, Snapshot
from kvferry.control.cluster.presence import PRESENT, Presence, ToDaemon, Wake

if TYPE_CHECKING:
    from collections.abc import Callable

REQUEST_S = 60e-6  # of the daemon's time, measured; a snapshot costs it by the member
MEMBER_S = 1.3e-6
LEASE_S = 3.0
END_S = 60.0
PUBLISHER = "tcp://*:1"


class World:
    """Agents whose requests wait in one queue for one daemon, which serves one at a time."""

    def __init__(self, agents: int, spread_s: float, *, cached: bool) -> None:
        self.now_s = 0.0
        self.asked = 0
        self._cached = cached
        self._pictured = -1
        self._membership = Membership(epoch=7, first_generation=1, publisher=PUBLISHER)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._queue: deque[tuple[Presence, Any]] = deque()
        self._busy = False
        self._agents = []
        chance = random.Random(1)
        for n in range(agents):
            agent = Presence(Registration(f"e{n}", "decode", n + 1, f"tcp://10.0.0.1:{n}"), LEASE_S)
            self._agents.append(agent)
            self._at(chance.random() * spread_s, partial(self._start, agent))

    def settles(self) -> bool:
        """Run until all agents are registered and have a picture, and the daemon has nothing to
        do; False if that is not so in the end."""
        while self._events and self.now_s < END_S:
            self.now_s, _, event = heapq.heappop(self._events)
            self._membership.expire(self.now_s)
            event()
            if not self._busy and all(
                agent.state == PRESENT and not agent.view.stale for agent in self._agents
            ):
                return True
        return False

    def _at(self, when_s: float, event: Callable[[], None]) -> None:
        self.asked += 1
        heapq.heappush(self._events, (when_s, self.asked, event))

    def _do(self, agent: Presence, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, ToDaemon):
                self._queue.append((agent, action.ask))
                self._serve()
            elif isinstance(action, Wake):
                due_s = self.now_s + action.seconds
                self._at(due_s, partial(self._fire, agent, action.number))

    def _start(self, agent: Presence) -> None:
        self._do(agent, agent.start())

    def _fire(self, agent: Presence, number: int) -> None:
        self._do(agent, agent.fire(number))

    def _serve(self) -> None:
        if self._busy or not self._queue:
            return
        self._busy = True
        agent, ask = self._queue.popleft()
        answer: Any
        cost_s = REQUEST_S
        if isinstance(ask, Look):
            self._membership.flush()
            sequence = self._membership.sequence
            if not self._cached or sequence != self._pictured:
                cost_s += len(self._membership) * MEMBER_S
            self._pictured = sequence
            answer = Snapshot(ask.request, 7, sequence, PUBLISHER, ())
        else:
            answer = self._membership.answer(ask, self.now_s)
        self._at(self.now_s + cost_s, lambda: self._served(agent, answer))

    def _served(self, agent: Presence, answer: Any) -> None:
        self._busy = False
        self._do(agent, agent.hear(answer))
        self._serve()


@pytest.mark.parametrize(
    ("agents", "spread_s", "cached"), [(2000, 1.0, False), (2000, 0.1, True), (4000, 1.0, True)]
)
def test_a_daemon_that_restarts_under_many_agents_gets_them_all_back(
    agents: int, spread_s: float, cached: bool
) -> None:
    assert World(agents, spread_s, cached=cached).settles()


def test_an_answer_that_was_overtaken_by_the_next_request_counts() -> None:
    agent = Presence(Registration("d0", "decode", 1, "tcp://127.0.0.1:1"), LEASE_S)
    (first, wake) = agent.start()
    agent.fire(wake.number)  # type: ignore[attr-defined]
    number = first.ask.request  # type: ignore[attr-defined]
    (*_, asked, _) = agent.hear(Registered(number, 5, LEASE_S, PUBLISHER, 7))
    assert (agent.state, agent.generation) == (PRESENT, 5)
    for _ in range(20):  # beats, and Looks among them
        agent.fire(agent._wake)
    assert agent.view.stale
    agent.hear(Snapshot(asked.ask.request, 7, 1, PUBLISHER, ()))  # type: ignore[attr-defined]
    assert not agent.view.stale


def test_an_answer_from_before_the_agent_became_another_does_not_count() -> None:
    agent = Presence(Registration("d0", "decode", 1, "tcp://127.0.0.1:1"), LEASE_S)
    first = agent.start()[0]
    agent.change(Registration("d0", "prefill", 1, "tcp://127.0.0.1:1"))
    agent.hear(Registered(first.ask.request, 5, LEASE_S, PUBLISHER, 7))  # type: ignore[attr-defined]
    assert agent.state != PRESENT
