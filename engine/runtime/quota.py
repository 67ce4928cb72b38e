"""What one peer may have this process keep for it at a time."""

from __future__ import annotations

import threading

from ..errors import QuotaExceeded


class Quota:
    """An amount of one thing that one link's peer may cause, until it is given back. Thread-safe.

    Args:
        what: the thing, for the error: `bytes of reads that wait`.
        limit: how much of it at a time.
    """

    def __init__(self, what: str, limit: int) -> None:
        self._what = what
        self._limit = limit
        self._lock = threading.Lock()
        self.used = 0

    def take(self, amount: int = 1) -> None:
        """Charge the peer; `give` ends that.

        Raises:
            QuotaExceeded: it has too much already; nothing is charged.
        """
        with self._lock:
            if self.used + amount > self._limit:
                raise QuotaExceeded(
                    f"the peer asks for more than {self._limit} {self._what} at a time"
                )
            self.used += amount

    def give(self, amount: int = 1) -> None:
        """End a charge."""
        with self._lock:
            self.used -= amount
