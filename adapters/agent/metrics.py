"""What an agent tells Prometheus, and whether it is well."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ...control.http import HttpServer, health, metrics_page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    from ...control.handoff.timeline import Recorder
    from ...engine.transfer_engine import TransferEngine
    from .executor import HandoffEnded
    from .messaging import Messaging

# From a block between two processes of one host to a long prompt between hosts.
SECONDS_BUCKETS = (
    *(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
TRACE = "application/octet-stream"
ANSWER_S = 1.0  # that the agent's thread may take to say that it lives


class AgentMetrics:
    """The figures of one agent. `note` is for its turns; the rest is read at each scrape.

    Args:
        count_handoffs: says how many are not over.
    """

    def __init__(
        self,
        engine: TransferEngine,
        messaging: Messaging,
        recorder: Recorder,
        count_handoffs: Callable[[], int],
    ) -> None:
        self.registry = CollectorRegistry()
        self._messaging = messaging
        self._recorder = recorder
        self._seconds = Histogram(
            "kvferry_handoff_seconds",
            "From the call of receive or send until the handoff ended well.",
            ["side"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._nbytes = Counter(
            "kvferry_transfer_bytes",
            "Bytes of handoffs that ended well; path: direct, staged at this end, or served to a "
            "peer that read them.",
            ["transport", "path", "direction"],
            registry=self.registry,
        )
        self._errors = Counter(
            "kvferry_errors", "Handoffs that failed, by error.", ["error"], registry=self.registry
        )
        self.registry.register(_Now(engine, messaging, count_handoffs))

    def note(self, ended: HandoffEnded) -> None:
        """Count one more handoff."""
        if ended.error is not None:
            self._errors.labels(type(ended.error).__name__).inc()
            return
        self._seconds.labels(ended.side).observe(ended.seconds)
        transport = ended.transport or "none"
        direction = "in" if ended.side == "decode" else "out"
        path = "served" if ended.served else "direct"
        self._nbytes.labels(transport, path, direction).inc(ended.nbytes - ended.staged_nbytes)
        if ended.staged_nbytes:
            self._nbytes.labels(transport, "staged", direction).inc(ended.staged_nbytes)

    def serve(self, address: str, unready: Callable[[], str]) -> HttpServer:
        """Serve the figures, health, and the last handoffs' timelines for `kvferry trace`.

        Raises:
            ConfigError: it cannot listen there.
        """
        return HttpServer(
            address,
            {
                "/metrics": metrics_page(self.registry),
                "/trace": lambda: (200, TRACE, self._recorder.encode()[0]),
                "/healthz": health(self._stuck),
                "/readyz": health(lambda: self._stuck() or unready()),
            },
        )

    def _stuck(self) -> str:
        alive = threading.Event()
        self._messaging.call_soon(alive.set)
        return "" if alive.wait(ANSWER_S) else f"the agent's thread is busy for over {ANSWER_S} s"


class _Now(Collector):
    """Figures that are there already."""

    def __init__(
        self, engine: TransferEngine, messaging: Messaging, count_handoffs: Callable[[], int]
    ) -> None:
        self._engine = engine
        self._messaging = messaging
        self._count_handoffs = count_handoffs

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        links = GaugeMetricFamily("kvferry_links", "Links that are up.", labels=["transport"])
        transports = [link.transport for link in engine.links if not link.closed]
        for transport in sorted(set(transports)):
            links.add_metric([transport], transports.count(transport))
        yield links
        for name, text, gauge in (
            ("kvferry_handoffs", "Handoffs that are not over.", self._count_handoffs()),
            (
                "kvferry_counter_pending",
                "Counters that somebody waits for.",
                engine.counters_pending,
            ),
            ("kvferry_staging_bytes", "Memory that staging takes.", engine.staging_nbytes),
        ):
            yield GaugeMetricFamily(name, text, value=gauge)
        for name, text, count in (
            ("kvferry_messages_refused", "Messages not queued.", self._messaging.messages_refused),
            ("kvferry_frames_refused", "Frames that were refused.", self._messaging.frames_refused),
            ("kvferry_late_writes", "Writes to an imm given up.", engine.late_writes),
            ("kvferry_foreign_writes", "Writes to another's imm.", engine.foreign_writes),
        ):
            yield CounterMetricFamily(name, text, value=count)
