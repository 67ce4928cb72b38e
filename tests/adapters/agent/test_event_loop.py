"""Whose turn it is: one thing at a time, on whichever thread has it; a stalled copy stalls nobody."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kvferry.adapters.agent.event_loop import CANCELLED_TIMERS, EventLoop
from kvferry.engine.runtime.copy_threads import STALL_S, Copiers, InlineCopies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 20.0


class Handoffs:
    """An event loop, and the inline copies of its thread, whose clock the test keeps."""

    def __init__(self) -> None:
        self.ends = 0
        self.copiers = Copiers("test")
        self.loop = EventLoop("test", self._end, lambda: False)
        self.inline_copies = InlineCopies(self.copiers, self.loop.replace_thread)
        self.loop.inline_copies = self.inline_copies
        self.loop.start()

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

        self.loop.call_soon(call)
        assert heard.wait(WAIT_S)
        return found[0]

    def inline(self, task: Callable[[], None]) -> None:
        """Something small that a call on the agent's thread begins."""
        left = threading.Event()

        def call() -> None:
            assert self.copiers.do_here(task)
            left.set()

        self.loop.call_soon(call)
        assert left.wait(WAIT_S)


@pytest.fixture
def worker() -> Iterator[Handoffs]:
    worker = Handoffs()
    yield worker
    worker.loop.stop(lambda: None)
    worker.inline_copies.hand_over()
    worker.copiers.stop(15.0)


def test_a_call_is_made_at_once_where_it_can_be(worker: Handoffs) -> None:
    where: list[threading.Thread] = []
    deadline_s = time.monotonic() + WAIT_S
    while threading.current_thread() not in where:  # the agent's thread may have its turn just now
        assert time.monotonic() < deadline_s
        worker.here()
        worker.loop.call_now(lambda: where.append(threading.current_thread()))
    assert set(where) <= {threading.current_thread(), worker.here()}


def test_calls_keep_their_order_and_never_overlap(worker: Handoffs) -> None:
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
        (worker.loop.call_now if number % 3 else worker.loop.call_soon)(partial(call, number))
    assert done.wait(WAIT_S)
    assert made == list(range(1000))


def test_a_call_within_a_call_comes_after_it(worker: Handoffs) -> None:
    made: list[str] = []
    done = threading.Event()

    def inner() -> None:
        made.append("inner")
        done.set()

    def outer() -> None:
        worker.loop.call_now(inner)
        made.append("outer")

    worker.loop.call_now(outer)
    assert done.wait(WAIT_S)
    assert made == ["outer", "inner"]


def test_a_timer_that_another_thread_sets_is_kept(worker: Handoffs) -> None:
    worker.here()
    fired = threading.Event()

    def call() -> None:
        worker.loop.call_later(0.001, fired.set)

    worker.loop.call_now(call)
    assert fired.wait(WAIT_S)


def test_cancelled_timers_are_forgotten_and_others_kept(worker: Handoffs) -> None:
    fired: list[int] = []
    done = threading.Event()

    def call() -> None:
        for number in range(3):
            worker.loop.call_later(0.0, partial(fired.append, number))
        for _ in range(10_000):
            worker.loop.call_later(30.0, done.set).cancel()
        worker.loop.call_later(0.001, done.set)

    worker.loop.call_soon(call)
    assert done.wait(WAIT_S)
    assert fired == [0, 1, 2]
    assert len(worker.loop._timers) <= 2 * (CANCELLED_TIMERS + 3)


def test_an_errand_is_done_between_turns_on_the_agents_thread(worker: Handoffs) -> None:
    where: list[threading.Thread] = []
    done = threading.Event()

    def inline() -> None:
        where.append(threading.current_thread())
        done.set()

    worker.inline(inline)
    assert done.wait(WAIT_S)
    assert where == [worker.here()]
    assert not worker.copiers.do_here(lambda: None), "this thread does no inline_copies"


def test_another_thread_goes_on_while_an_errand_stalls(worker: Handoffs) -> None:
    first, stuck, free = worker.here(), threading.Event(), threading.Event()

    def stall() -> None:
        stuck.set()
        assert free.wait(WAIT_S)

    worker.inline(stall)
    assert stuck.wait(WAIT_S)
    worker.inline_copies.tick(worker.inline_copies._since_s + STALL_S / 2)
    assert worker.loop._thread is first, "it is not late yet"
    worker.inline_copies.tick(worker.inline_copies._since_s + 2 * STALL_S)
    second = worker.here()
    assert second is not first
    worker.inline_copies.tick(worker.inline_copies._since_s + 3 * STALL_S)
    assert worker.here() is second, "it is replaced once"
    done = threading.Event()
    worker.inline(done.set)
    assert done.wait(WAIT_S)
    free.set()
    first.join(WAIT_S)
    assert not first.is_alive()
    assert worker.here() is second


def test_what_is_left_at_the_end_copiers_do(worker: Handoffs) -> None:
    done = threading.Event()
    worker.inline_copies.waiting.append(done.set)
    worker.inline_copies.hand_over()
    assert done.wait(WAIT_S)


def test_late_callers_are_harmless() -> None:
    loop = EventLoop("late", lambda: False, lambda: False)
    loop.start()
    closed: list[bool] = []
    loop.stop(lambda: closed.append(True))
    loop.call_now(lambda: closed.append(False))
    loop.call_soon(lambda: closed.append(False))
    assert closed == [True]
