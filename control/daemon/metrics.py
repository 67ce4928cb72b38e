"""What the daemon tells Prometheus: figures that its loop leaves behind, read at each scrape."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..http import HttpServer, health, metrics_page
from .page import page_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    from .figures import DaemonFigures

STUCK_S = 5.0  # without a turn of the loop


class _Figures(Collector):
    def __init__(self, look: Callable[[], DaemonFigures]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        now = self._look()
        members = GaugeMetricFamily(
            "kvferry_members", "Registered agents.", labels=["role", "state"]
        )
        for (role, state), count in Counter((m.role, m.state) for m in now.members).items():
            members.add_metric([role, state], count)
        yield members
        for name, text, attribute in (
            ("kvferry_member_free_blocks", "Free blocks of an agent's cache.", "free_blocks"),
            ("kvferry_member_queued_tokens", "Tokens that wait at an agent.", "queued_tokens"),
            ("kvferry_member_handoffs", "Handoffs of an agent that are under way.", "handoffs"),
            ("kvferry_member_inflight_bytes", "Bytes of its handoffs.", "inflight_nbytes"),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["agent"])
            for agent, load in now.loads.items():
                gauge.add_metric([agent], getattr(load, attribute))
            yield gauge
        for name, text, value in (
            ("kvferry_daemon_requests", "Requests answered.", now.served),
            ("kvferry_daemon_denials", "Requests denied.", now.denied),
            ("kvferry_daemon_changes", "Changes published.", now.sequence),
        ):
            yield CounterMetricFamily(name, text, value=value)


def serve_daemon(address: str, look: Callable[[], DaemonFigures]) -> HttpServer:
    """Serve a daemon's page, figures and health.

    Raises:
        ConfigError: it cannot listen there.
    """
    registry = CollectorRegistry()
    registry.register(_Figures(look))

    def stuck() -> str:
        late_s = time.monotonic() - look().at_s
        return f"no turn of the loop for {late_s:.0f} s" if late_s > STUCK_S else ""

    return HttpServer(
        address,
        {
            **page_files(look),
            "/metrics": metrics_page(registry),
            "/healthz": health(stuck),
            "/readyz": health(lambda: "draining" if look().draining else stuck()),
        },
    )
