"""Works that are begun as they come and finished in the order in which they began."""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Item = TypeVar("Item")
Begun = TypeVar("Begun")


def work_off(
    items: queue.SimpleQueue[Any],
    begin: Callable[[Item], Begun | None],
    finish: Callable[[Begun], None],
    ahead: Callable[[Begun, int], bool],
    drop: Callable[[Begun], None],
    done: Callable[[Begun], bool] = lambda _: False,
) -> None:
    """Take items until a None comes. While something is begun, it never sleeps on the queue.

    Args:
        begin: starts a work; None if there is nothing to finish.
        finish: waits for a work and goes on with what it gave.
        ahead: whether another may begin, given the latest of so many that are begun.
        drop: waits for a work that is not to be finished: an error ended the loop.
        done: whether `finish` would not wait: then it is called before another work begins. For
            works whose end somebody waits for; by default they are finished late, so that another
            runs meanwhile.
    """
    begun: deque[Begun] = deque()
    try:
        while True:
            if begun and (done(begun[0]) or not ahead(begun[-1], len(begun))):
                finish(begun.popleft())
                continue
            try:
                item = items.get(block=not begun)
            except queue.Empty:
                finish(begun.popleft())
                continue
            if item is None:
                while begun:
                    finish(begun.popleft())
                return
            work = begin(item)
            if work is not None:
                begun.append(work)
    finally:
        for work in begun:
            drop(work)


class Finisher:
    """A thread that waits for works which others began, in order. It starts with the first one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._works: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, finish: Callable[[], None]) -> None:
        """Call `finish`, which waits, after those that came before. It must not raise."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self._works.put(finish)

    def close(self, then: Callable[[], None]) -> None:
        """Call `then` once everything is finished; nothing may be put any more. Never blocks."""
        with self._lock:
            started = self._thread is not None
        if started:
            self._works.put(then)
            self._works.put(None)
        else:
            then()

    def _run(self) -> None:
        while True:
            finish = self._works.get()
            if finish is None:
                return
            finish()
