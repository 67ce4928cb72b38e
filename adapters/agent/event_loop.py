"""Whose turn it is: everything of an agent happens on one thread at a time, but not on one thread.

Calls, timers and ready descriptors are worked off by the agent's thread. A call that is short, and
calls nobody's code, may instead be made at once by the thread that has it (`call_now`), if it is
nobody's turn and nothing waits: waking the agent's thread for it takes longer than the call.

Between its turns the agent's thread makes inline copies, which are small. If one of them stalls
(a peer's memory that is swapped out, say), another thread takes its place: decision 0046.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import os
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from ...engine.runtime import fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...engine.runtime.copy_threads import InlineCopies

# That are kept until they are due, or more than half of all: 2,000 handoffs a second leave 60,000 in
# 30 s otherwise, which Python's collector goes through again and again.
CANCELLED_TIMERS = 64
CALLS = 4096  # in one turn, before descriptors are looked at again

log = logging.getLogger("kvferry.agent")


class Timer:
    """A call that is due later; `cancel` before that."""

    __slots__ = ("_loop", "call")

    def __init__(self, call: Callable[[], None], loop: EventLoop) -> None:
        self.call: Callable[[], None] | None = call
        self._loop = loop

    def cancel(self) -> None:
        """Stop it."""
        if self.call is not None:
            self.call = None
            self._loop._num_cancelled += 1


class Timers(dict[str, Timer]):
    """The timers of one machine, by what each is for."""

    __slots__ = ()

    def start(self, kind: str, timer: Timer) -> None:
        """Keep a timer, instead of one of its kind that may still run."""
        earlier = self.get(kind)
        if earlier is not None:
            earlier.cancel()
        self[kind] = timer

    def stop(self, kind: str) -> None:
        """Stop the timer of this kind, if there is one."""
        timer = self.pop(kind, None)
        if timer is not None:
            timer.cancel()

    def stop_all(self) -> None:
        """Stop all of them."""
        for timer in self.values():
            timer.cancel()
        self.clear()


class EventLoop:
    """Calls, timers and descriptors, one at a time.

    Args:
        name: of the thread.
        end_turn: called last in each turn of the agent's thread; True if it has more to do.
        end_call: called after a call that was made at once by another thread; likewise.

    Attributes:
        inline_copies: what the agent's thread does between its turns.
        at_once: whether this turn is one call of another thread's, which says little.

    `call_soon` and `call_now` are safe from any thread; `stop` once, from any but the agent's own;
    everything else is for whoever has the turn.
    """

    def __init__(
        self, name: str, end_turn: Callable[[], bool], end_call: Callable[[], bool]
    ) -> None:
        self.inline_copies: InlineCopies | None = None
        self.at_once = False
        self._name = name
        self._end_turn = end_turn
        self._end_call = end_call
        self._turn = threading.Lock()
        self._holder = 0  # whose turn it is: a thread's number
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._num_cancelled = 0  # of the timers
        self._sleeps_until_s = 0.0
        self._watched: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()  # of the descriptor's end
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._woken = False  # the agent's thread has been woken, and has not looked yet
        self._stopping = False
        self._away = False  # the agent's thread does its inline copies
        self._thread = self._new_thread()
        fork.disown_in_child(self)

    @property
    def mine(self) -> bool:
        """Whether it is the calling thread's turn."""
        return self._holder == threading.get_ident()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call_soon(self, call: Callable[[], None]) -> None:
        """Make `call` on the agent's thread, after those that came before. Any thread."""
        self._calls.append(call)
        here = threading.get_ident()
        if here not in (self._holder, self._thread.ident):  # else it looks before it sleeps
            self._wake()

    def call_now(self, call: Callable[[], None]) -> None:
        """Make `call` on this thread if it can be made at once, else as `call_soon`. Any thread.

        It must be short and call no code of the agent's user who holds a lock meanwhile.
        """
        if self._calls or not self._turn.acquire(blocking=False):
            self.call_soon(call)
            return
        try:
            if self._stopping or self._calls:
                self._calls.append(call)
                more = True
            else:
                self._holder, self.at_once = threading.get_ident(), True
                self._guarded(call)
                more = self._end_call() or bool(self._calls)
                more = more or bool(self._timers and self._timers[0][0] < self._sleeps_until_s)
        finally:
            self._holder, self.at_once = 0, False
            self._turn.release()
        if more:
            self._wake()

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Make `call` in a while."""
        timer = Timer(call, self)
        if self._num_cancelled > max(CANCELLED_TIMERS, len(self._timers) // 2):
            self._timers = [entry for entry in self._timers if entry[2].call is not None]
            heapq.heapify(self._timers)
            self._num_cancelled = 0
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), timer))
        return timer

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """Call `ready` whenever there is something to read."""
        self._watched[fd] = ready
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Stop watching; call it before closing `fd`."""
        del self._watched[fd]
        self._epoll.unregister(fd)

    def stop(self, then: Callable[[], None]) -> None:
        """End the thread, after the calls that came before; then calls `then`: no turn comes after.

        Not from the thread itself, nor from a call that is made at once.
        """
        stopped = threading.Event()

        def stop() -> None:
            self._stopping = True
            stopped.set()

        self.call_soon(stop)
        stopped.wait()
        self._thread.join()
        with self._turn:
            then()
        with self._wake_lock:  # engine threads may still report something
            fd, self._wake_fd = self._wake_fd, -1
        self._epoll.close()
        os.close(fd)

    def replace_thread(self) -> None:
        """The agent's thread is stuck in an inline copy: another one goes on. Never blocks; any other
        thread, which asks again while the inline copy does not end."""
        if not self._away or not self._turn.acquire(blocking=False):
            return
        try:
            if self._away and not self._stopping:
                log.info("%s: a small copy stalls: another thread goes on", self._name)
                self._away = False
                self._thread = self._new_thread()
                self._thread.start()
        finally:
            self._turn.release()

    def forked(self) -> list[int]:
        """Return what a child shares with this process."""
        return [] if self._epoll.closed else [self._epoll.fileno(), self._wake_fd]

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name=f"kvferry-{self._name}", daemon=True)

    def _wake(self) -> None:
        if self._woken:
            return
        self._woken = True
        with self._wake_lock, contextlib.suppress(BlockingIOError):
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    # The agent's thread.

    def _run(self) -> None:
        me = threading.current_thread()
        ready: list[tuple[int, int]] = []
        with (
            self.inline_copies.of_this_thread() if self.inline_copies else contextlib.nullcontext()
        ):
            while True:
                with self._turn:
                    if me is not self._thread:
                        return  # it was away for too long
                    self._holder, self._away = threading.get_ident(), False
                    more = self._take_turn(ready)
                    self._holder = 0
                    if self._stopping:
                        return
                    away = self._away = self.inline_copies is not None and bool(
                        self.inline_copies.waiting
                    )
                    sleep_s = 0.0 if more or self._calls else self._sleep_s()
                if away and self.inline_copies is not None:
                    self.inline_copies.do()
                    ready = self._epoll.poll(0) if self.inline_copies.waiting else []
                else:
                    ready = self._epoll.poll(sleep_s)

    def _take_turn(self, ready: list[tuple[int, int]]) -> bool:
        for fd, _ in ready:
            if fd == self._wake_fd:
                os.eventfd_read(fd)
            elif fd in self._watched:
                self._guarded(self._watched[fd])
        self._woken = False
        for _ in range(CALLS):
            if not self._calls:
                break
            self._guarded(self._calls.popleft())
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.call is None:
                self._num_cancelled -= 1
                continue
            call, timer.call = timer.call, None
            self._guarded(call)
        try:
            return self._end_turn()
        except Exception:
            log.exception("the end of an agent's turn failed; please report this")
            return False

    def _sleep_s(self) -> float | None:
        self._sleeps_until_s = self._timers[0][0] if self._timers else math.inf
        if not self._timers:
            return None
        return max(0.0, self._sleeps_until_s - time.monotonic())

    def _guarded(self, call: Callable[[], None]) -> None:
        """One failing call must not end the conversation with every other peer."""
        try:
            call()
        except Exception:
            log.exception("a call of the agent failed; please report this")
