"""Threads that copy between processes: system calls that run without the interpreter lock."""

from __future__ import annotations

import collections
import logging
import os
import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .errands import Errands

# One thread of a 2.5 GHz Xeon copies 3.7 GB/s with process_vm_writev, two 5.6: memory is the limit
# from there on.
MAX_COPIERS = 2

log = logging.getLogger(__name__)


class Copiers:
    """A few threads, started with the first task, asleep while there is none.

    Attributes:
        count: how many.
        errands: by thread, what threads that are no copiers do themselves.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopped = False
        self.errands: dict[int, Errands] = {}
        self.count = min(MAX_COPIERS, len(os.sched_getaffinity(0)))

    def do_here(self, task: Callable[[], None]) -> bool:
        """Leaves a small task to the calling thread, if that does errands."""
        errands = self.errands.get(threading.get_ident())
        if errands is not None:
            errands.waiting.append(task)
        return errands is not None

    def run(self, task: Callable[[], None]) -> None:
        """Runs `task` on one of the threads. A task must not raise."""
        if not self._threads:
            self._start()
        self._tasks.put(task)

    def stop(self) -> None:
        """Finishes the tasks that were given and ends the threads."""
        with self._lock:
            self._stopped = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            if thread is not threading.current_thread():  # a ticket's callback closes the engine
                thread.join()

    def _start(self) -> None:
        with self._lock:
            if self._threads or self._stopped:
                return
            self._threads = [
                threading.Thread(target=self._work, name=f"{self._name}-copy{i}", daemon=True)
                for i in range(self.count)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            try:
                task()
            except Exception:
                log.exception("kvferry: a copy task failed; please report this")


class Batch:
    """The tasks of one transfer: copiers work them off, and so does a thread that waits for it.

    A waiting thread is awake already, and a copier takes 50 microseconds to wake up. Transfers take
    turns: a copier goes to the end of the queue after each task, so that a small transfer does not
    stand behind the whole of a large one.

    Args:
        tasks: must not raise.
    """

    def __init__(self, copiers: Copiers, tasks: Iterable[Callable[[], None]]) -> None:
        self._copiers = copiers
        self._tasks = collections.deque(tasks)
        self._workers = 1
        self._lock = threading.Lock()
        copiers.run(self._turn)

    def help(self) -> None:
        """Works off tasks on the calling thread; returns when there are no more to begin."""
        with self._lock:
            self._workers += 1
        while self._tasks:
            self._one()
        with self._lock:
            self._workers -= 1

    def _turn(self) -> None:
        with self._lock:
            more = self._workers < self._copiers.count and len(self._tasks) > 1
            self._workers += more
        if more:
            self._copiers.run(self._turn)
        self._one()
        if self._tasks:
            self._copiers.run(self._turn)
        else:
            with self._lock:
                self._workers -= 1

    def _one(self) -> None:
        try:
            task = self._tasks.popleft()
        except IndexError:
            return  # another thread took the last one
        task()
