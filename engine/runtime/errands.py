"""Errands: small copies that a thread of this process does itself, between its other work.

Handing a copy of a few kilobytes to a copier takes longer than the copy. But no copy is certain to
end soon: the kernel may have to wait for the peer's memory. So whoever runs errands is watched, and
told of by name when one stalls, so that somebody else does the rest of its work.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .copy_threads import Copiers

# Of one errand, which takes 20 microseconds, unless the host is too busy to run it.
STALL_S = 0.2
AT_A_TIME = 64  # 2 ms of copies, then its thread looks after the rest of its work


class Errands:
    """What one thread does between its other work.

    Args:
        threads: who has errands, of all threads of an engine.
        copiers: who does what is left at the end.
        stalled: called on the progress thread, again and again, while an errand does not end.

    Attributes:
        waiting: tasks that have not begun, in their order. They must not raise.
    """

    def __init__(
        self, threads: dict[int, Errands], copiers: Copiers, stalled: Callable[[], None]
    ) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self._threads = threads
        self._copiers = copiers
        self._stalled = stalled
        self._since_s = 0.0  # when the one that is being done began; 0 if there is none
        self._doing: object = None

    @contextlib.contextmanager
    def of_this_thread(self) -> Iterator[None]:
        """What this thread begins becomes its errands, as far as it is small."""
        here = threading.get_ident()
        self._threads[here] = self
        try:
            yield
        finally:
            del self._threads[here]

    def do(self) -> None:
        """Does some of what waits, until another thread does."""
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
        """No thread does errands any more: copiers do the rest."""
        while self.waiting:
            self._copiers.run(self.waiting.popleft())

    def tick(self, now: float) -> None:
        """Looks whether an errand stalls; on the progress thread."""
        since_s = self._since_s
        if since_s and now - since_s > STALL_S:
            self._stalled()
