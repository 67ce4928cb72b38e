"""Whose turn it is: one thing at a time, on whichever thread has it; a stalled copy stalls nobody."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kvferry.adapters.agent.event_loop import CANCELLED_TIMERS, Turns
from kvferry.engine.runtime.copy_threads import STALL_S, Copiers, Errands

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 20.0


class Desk:
    """Turns, and the errands of their thread, whose clock the test keeps."""

    def __init__(self) -> None:
        self.ends = 0
        self.copiers = Copiers("test")
        self.turns = Turns("test", self._end, lambda: False)
        self.errands = Errands(self.copiers, self.turns.replace_thread)
        self.turns.errands = self.errands
        self.turns.start()

    def _end(self) -> bool:
        self.ends += 1
        return False

    def here(self) -> threading.Thread:
        """The thread that makes calls."""
        found: list[threading.Thread] = []
        heard = threading.Event()

        def call() -> None:
            found.append(threading.current_thread())
            heard.set()

        self.turns.call_soon(call)
        assert heard.wait(WAIT_S)
        return found[0]

    def errand(self, task: Callable[[], None]) -> None:
        """Something small that a call on the agent's thread begins."""
        left = threading.Event()

        def call() -> None:
            assert self.copiers.do_here(task)
            left.set()

        self.turns.call_soon(call)
        assert left.wait(WAIT_S)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.turns.stop(lambda: None)
    desk.errands.hand_over()
    desk.copiers.stop()


def test_a_call_is_made_at_once_where_it_can_be(desk: Desk) -> None:
    where: list[threading.Thread] = []
    deadline_s = time.monotonic() + WAIT_S
    while threading.current_thread() not in where:  # the agent's thread may have its turn just now
        assert time.monotonic() < deadline_s
        desk.here()
        desk.turns.call_now(lambda: where.append(threading.current_thread()))
    assert set(where) <= {threading.current_thread(), desk.here()}


def test_calls_keep_their_order_and_never_overlap(desk: Desk) -> None:
    busy = threading.Lock()
    made: list[int] = []
    done = threading.Event()

    def call(number: int) -> None:
        assert busy.acquire(blocking=False), "two calls at a time"
        made.append(number)
        busy.release()
        if number == 999:
            done.set()

    for number in range(1000):
        (desk.turns.call_now if number % 3 else desk.turns.call_soon)(partial(call, number))
    assert done.wait(WAIT_S)
    assert made == list(range(1000))


def test_a_call_within_a_call_comes_after_it(desk: Desk) -> None:
    made: list[str] = []
    done = threading.Event()

    def inner() -> None:
        made.append("inner")
        done.set()

    def outer() -> None:
        desk.turns.call_now(inner)
        made.append("outer")

    desk.turns.call_now(outer)
    assert done.wait(WAIT_S)
    assert made == ["outer", "inner"]


def test_a_timer_that_another_thread_sets_is_kept(desk: Desk) -> None:
    desk.here()
    fired = threading.Event()

    def call() -> None:
        desk.turns.call_later(0.001, fired.set)

    desk.turns.call_now(call)
    assert fired.wait(WAIT_S)


def test_cancelled_timers_are_forgotten_and_others_kept(desk: Desk) -> None:
    fired: list[int] = []
    done = threading.Event()

    def call() -> None:
        for number in range(3):
            desk.turns.call_later(0.0, partial(fired.append, number))
        for _ in range(10_000):
            desk.turns.call_later(30.0, done.set).cancel()
        desk.turns.call_later(0.001, done.set)

    desk.turns.call_soon(call)
    assert done.wait(WAIT_S)
    assert fired == [0, 1, 2]
    assert len(desk.turns._timers) <= 2 * (CANCELLED_TIMERS + 3)


def test_an_errand_is_done_between_turns_on_the_agents_thread(desk: Desk) -> None:
    where: list[threading.Thread] = []
    done = threading.Event()

    def errand() -> None:
        where.append(threading.current_thread())
        done.set()

    desk.errand(errand)
    assert done.wait(WAIT_S)
    assert where == [desk.here()]
    assert not desk.copiers.do_here(lambda: None), "this thread does no errands"


def test_another_thread_goes_on_while_an_errand_stalls(desk: Desk) -> None:
    first, stuck, free = desk.here(), threading.Event(), threading.Event()

    def stall() -> None:
        stuck.set()
        assert free.wait(WAIT_S)

    desk.errand(stall)
    assert stuck.wait(WAIT_S)
    desk.errands.tick(desk.errands._since_s + STALL_S / 2)
    assert desk.turns._thread is first, "it is not late yet"
    desk.errands.tick(desk.errands._since_s + 2 * STALL_S)
    second = desk.here()
    assert second is not first
    desk.errands.tick(desk.errands._since_s + 3 * STALL_S)
    assert desk.here() is second, "it is replaced once"
    done = threading.Event()
    desk.errand(done.set)
    assert done.wait(WAIT_S)
    free.set()
    first.join(WAIT_S)
    assert not first.is_alive()
    assert desk.here() is second


def test_what_is_left_at_the_end_copiers_do(desk: Desk) -> None:
    done = threading.Event()
    desk.errands.waiting.append(done.set)
    desk.errands.hand_over()
    assert done.wait(WAIT_S)


def test_late_callers_are_harmless() -> None:
    turns = Turns("late", lambda: False, lambda: False)
    turns.start()
    closed: list[bool] = []
    turns.stop(lambda: closed.append(True))
    turns.call_now(lambda: closed.append(False))
    turns.call_soon(lambda: closed.append(False))
    assert closed == [True]
