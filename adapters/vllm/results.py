"""What a worker of the vLLM connector has to report: what ended in a step, and figures about it."""

from __future__ import annotations

from typing import Any


class Results:
    """What a step reports: requests by how they ended."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[str] = set()


class Figures:
    """Handoffs since the last `take`, as `vllm_stats.KVFerryStats` has them. Not thread-safe."""

    def __init__(self) -> None:
        self._data = _nothing()

    def __bool__(self) -> bool:
        return any(self._data.values())

    def take(self) -> dict[str, Any]:
        """All of them, once."""
        data, self._data = self._data, _nothing()
        return data

    def sent(self, nbytes: int) -> None:
        """A send was handed over."""
        self._data["sent_nbytes"].append(nbytes)

    def send_failed(self) -> None:
        """A send was not."""
        self._data["sends_failed"] += 1

    def loaded(self, seconds: float, nbytes: int) -> None:
        """A load is here."""
        self._data["load_seconds"].append(seconds)
        self._data["load_nbytes"].append(nbytes)

    def load_failed(self) -> None:
        """A load is not."""
        self._data["loads_failed"] += 1


def _nothing() -> dict[str, Any]:
    return {
        "load_seconds": [],
        "load_nbytes": [],
        "sent_nbytes": [],
        "loads_failed": 0,
        "sends_failed": 0,
    }
