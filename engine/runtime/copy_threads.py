"""Threads that copy between processes: system calls that run without the interpreter lock.

Small copies, called inline copies, are done by a thread that has other work too, between that work.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import queue
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# One thread of a 2.5 GHz Xeon copies 3.7 GB/s with process_vm_writev, two 5.6: memory is the limit
# from there on.
MAX_COPIERS = 2

# For copiers that the kernel keeps: a peer's memory may answer late, or never. So many at most.
MAX_STAND_INS = 6
# How long they have all been at one task, while others wait, before another thread starts; a task copies
# 4 MiB, a millisecond.
STUCK_S = 1.0

# Of one inline copy, which takes 20 microseconds, unless the host is too busy to run it.
STALL_S = 0.2
AT_A_TIME = 64  # 2 ms of copies, then its thread looks after the rest of its work

log = logging.getLogger(__name__)


class Copiers:
    """A few threads, started with the first task, asleep while there is none.

    Attributes:
        count: how many.
        inline_copies: by thread, inline copies of threads that are no copiers.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopped = False
        self._since_s: dict[int, float] = {}  # by thread, when the task that it does began
        self.inline_copies: dict[int, InlineCopies] = {}
        self.count = min(MAX_COPIERS, len(os.sched_getaffinity(0)))

    def do_here(self, task: Callable[[], None]) -> bool:
        """Leave a small task to the calling thread, if that makes inline copies."""
        inline_copies = self.inline_copies.get(threading.get_ident())
        if inline_copies is not None:
            inline_copies.waiting.append(task)
        return inline_copies is not None

    def run(self, task: Callable[[], None]) -> None:
        """Run `task` on one of the threads. A task must not raise."""
        if not self._threads:
            self._start()
        self._tasks.put(task)

    def tick(self, now: float) -> None:
        """Start another thread if all are stuck and tasks wait; on the progress thread."""
        if self._tasks.empty():
            return
        since_s = list(self._since_s.values())
        with self._lock:
            count = len(self._threads)
            stuck = count and len(since_s) == count and now - max(since_s) > STUCK_S
            if stuck and not self._stopped and count < self.count + MAX_STAND_INS:
                log.warning("kvferry: %d copies do not end: a peer's memory does not answer", count)
                self._add()

    def stop(self, timeout_s: float) -> None:
        """Finish the tasks that were given and end the threads. One that the kernel does not give back
        in time is left: it ends with its task."""
        with self._lock:
            self._stopped = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._tasks.put(None)
        deadline_s = time.monotonic() + timeout_s
        for thread in threads:
            if thread is not threading.current_thread():  # a ticket's callback closes the engine
                thread.join(max(0.0, deadline_s - time.monotonic()))

    def _start(self) -> None:
        with self._lock:
            if self._threads or self._stopped:
                return
            for _ in range(self.count):
                self._add()

    def _add(self) -> None:
        name = f"{self._name}-copy{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        me = threading.get_ident()
        while True:
            task = self._tasks.get()
            if task is None:
                return
            self._since_s[me] = time.monotonic()
            try:
                task()
            except Exception:
                log.exception("kvferry: a copy task failed; please report this")
            del self._since_s[me]


class Batch:
    """The tasks of one transfer: copiers work them off, and so does a thread that waits for it.

    A waiting thread is awake already, and a copier takes 50 microseconds to wake up. Transfers take
    turns: a copier goes to the end of the queue after each task, so that a small transfer does not
    stand behind the whole of a large one.

    Args:
        tasks: of the transfer.
        guarded: does a task on a copier; must not raise.
        lend_hand: does work on a thread that waits, and raises what that does.
    """

    def __init__(
        self,
        copiers: Copiers,
        tasks: Iterable[Callable[[], None]],
        guarded: Callable[[Callable[[], None]], None],
        lend_hand: Callable[[Callable[[], None]], None],
    ) -> None:
        self._copiers = copiers
        self._tasks = collections.deque(tasks)
        self._guarded = guarded
        self._lend_hand = lend_hand
        self._workers = 1
        self._copying = 0  # copiers at a task
        self._left: Callable[[], None] | None = None
        self._lock = threading.Lock()
        copiers.run(self._turn)

    def help(self) -> None:
        """Work off tasks on the calling thread; return when there are no more to begin.

        Raises what a task does, and what a signal's handler does meanwhile: in a main thread that may
        be anywhere, so that nobody knows how far the task has come. Then call `give_up`.
        """
        with self._lock:
            self._workers += 1
        self._lend_hand(self._work_off)
        with self._lock:
            self._workers -= 1

    def give_up(self, left: Callable[[], None]) -> None:
        """Begin no more tasks; call `left` once no copier is at one: now, or from its thread."""
        self._tasks.clear()
        with self._lock:
            copying = self._copying > 0
            if copying:
                self._left = left
        if not copying:
            left()

    def _work_off(self) -> None:
        while True:
            try:
                task = self._tasks.popleft()
            except IndexError:
                return
            task()

    def _turn(self) -> None:
        with self._lock:
            more = self._workers < self._copiers.count and len(self._tasks) > 1
            self._workers += more
            self._copying += 1
        if more:
            self._copiers.run(self._turn)
        try:
            task = self._tasks.popleft()
        except IndexError:
            pass  # another thread took the last one
        else:
            self._guarded(task)
        with self._lock:
            self._copying -= 1
            on = len(self._tasks) > 0
            self._workers -= not on
            left = None if self._copying else self._left
        if on:
            self._copiers.run(self._turn)
        elif left is not None:
            left()


class InlineCopies:
    """What one thread does between its other work.

    Handing a copy of a few kilobytes to a copier takes longer than the copy. But no copy is certain
    to end soon: the kernel may have to wait for the peer's memory. So whoever runs inline copies is
    watched, and told of by name when one stalls, so that somebody else does the rest of its work.

    Args:
        copiers: know whose inline copies are whose, and do what is left at the end.
        stalled: called on the progress thread, again and again, while an inline copy does not end.

    Attributes:
        waiting: tasks that have not begun, in their order. They must not raise.
    """

    def __init__(self, copiers: Copiers, stalled: Callable[[], None]) -> None:
        self.waiting: collections.deque[Callable[[], None]] = collections.deque()
        self._copiers = copiers
        self._stalled = stalled
        self._since_s = 0.0  # when the one that is being done began; 0 if there is none
        self._doing: object = None

    @contextlib.contextmanager
    def of_this_thread(self) -> Iterator[None]:
        """Return what this thread begins becomes its inline copies, as far as it is small."""
        here = threading.get_ident()
        self._copiers.inline_copies[here] = self
        try:
            yield
        finally:
            del self._copiers.inline_copies[here]

    def do(self) -> None:
        """Do some of what waits, until another thread does."""
        me = self._doing = object()
        for _ in range(AT_A_TIME):
            if not self.waiting or self._doing is not me:
                break
            try:
                task = self.waiting.popleft()
            except IndexError:  # a thread that had stalled took the last one
                break
            self._since_s = time.monotonic()
            task()
            if self._doing is me:
                self._since_s = 0.0

    def hand_over(self) -> None:
        """No thread makes inline copies any more: copiers do the rest."""
        while self.waiting:
            self._copiers.run(self.waiting.popleft())

    def tick(self, now: float) -> None:
        """Look whether an inline copy stalls; on the progress thread."""
        since_s = self._since_s
        if since_s and now - since_s > STALL_S:
            self._stalled()
