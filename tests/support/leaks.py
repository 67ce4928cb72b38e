"""Threads and open descriptors of this process, counted round after round: none may be left behind."""

from __future__ import annotations

import os
import threading
import time

PATIENCE_S = 30.0  # reached only when something is left behind


class LeakCheck:
    """Never more than after the first round.

    A thread that says that its work is over has yet to end, so each count is waited for. If the
    first one met such a thread too, what is left by every round shows two rounds later.
    """

    def __init__(self) -> None:
        self._most: tuple[int, int] | None = None

    def take(self) -> None:
        """Counts; fails if there stay more than after the first round."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            now = (threading.active_count(), len(os.listdir("/proc/self/fd")))
            most = self._most = self._most or now
            if now[0] <= most[0] and now[1] <= most[1]:
                return
            assert time.monotonic() < deadline_s, (
                f"{now[0]} threads and {now[1]} descriptors after {most[0]} and {most[1]}: "
                f"{threading.enumerate()}"
            )
            time.sleep(0.01)
