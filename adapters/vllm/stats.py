"""What the vLLM connector tells vLLM's own log and its `/metrics`: loads, sends, and how they ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Histogram

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from ..agent.metrics import SECONDS_BUCKETS
from .orders import Figures

if TYPE_CHECKING:
    from collections.abc import Iterable

NBYTES_BUCKETS = tuple(2.0**power for power in range(14, 36, 2))  # a block to 16 GiB
OBSERVED = {
    "load_seconds": (
        "vllm:kvferry_load_seconds",
        "From the order to load a request's KV until it is all here.",
        SECONDS_BUCKETS,
    ),
    "load_nbytes": (
        "vllm:kvferry_load_bytes",
        "Bytes of a request's KV that were loaded, by each rank.",
        NBYTES_BUCKETS,
    ),
    "sent_nbytes": (
        "vllm:kvferry_sent_bytes",
        "Bytes of a request's KV that were handed over, by each rank.",
        NBYTES_BUCKETS,
    ),
}
COUNTED = {
    "loads_failed": "Requests whose KV could not be loaded.",
    "sends_failed": "Requests whose KV was not handed over: nobody asked, or it broke.",
}


class KVFerryStats(KVConnectorStats):  # type: ignore[misc]
    """One interval's handoffs. Plain lists and numbers: vLLM carries them between processes."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = Figures().take()

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Take in what another rank, or a later step, has."""
        for name, value in other.data.items():
            self.data[name] = self.data[name] + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For one line of vLLM's log."""
        seconds, nbytes = sorted(self.data["load_seconds"]), self.data["load_nbytes"]
        found: dict[str, int | float] = {"Loads": len(seconds)}
        if seconds:
            found["Median load time (ms)"] = round(1e3 * seconds[len(seconds) // 2], 3)
            found["Slowest load (ms)"] = round(1e3 * seconds[-1], 3)
            found["Loaded (MB)"] = round(sum(nbytes) / 1e6, 3)
        found["Sends"] = len(self.data["sent_nbytes"])
        found["Sent (MB)"] = round(sum(self.data["sent_nbytes"]) / 1e6, 3)
        return found | {
            "Failed loads": self.data["loads_failed"],
            "Failed sends": self.data["sends_failed"],
        }


class KVFerryPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The same for Prometheus, beside vLLM's own figures."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        histogram, counter = metric_types[Histogram], metric_types[Counter]
        self._observed = {
            name: self._by_engine(
                histogram(name=full, documentation=text, buckets=buckets, labelnames=labelnames)
            )
            for name, (full, text, buckets) in OBSERVED.items()
        }
        self._counted = {
            name: self._by_engine(
                counter(name=f"vllm:kvferry_{name}", documentation=text, labelnames=labelnames)
            )
            for name, text in COUNTED.items()
        }

    def _by_engine(self, metric: Any) -> dict[int, Any]:
        return {
            index: metric.labels(*values) for index, values in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, metrics in self._observed.items():
            values: Iterable[float] = transfer_stats_data[name]
            for value in values:
                metrics[engine_idx].observe(value)
        for name, metrics in self._counted.items():
            metrics[engine_idx].inc(transfer_stats_data[name])
