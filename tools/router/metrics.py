"""What the router tells Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from collections.abc import Callable

# From a small model's first token to a long prompt in a long queue.
SECONDS_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)


class RouterMetrics:
    """The figures of one router. For its event loop.

    Args:
        up: how many servers of a role answer; read at each scrape.
    """

    def __init__(self, up: Callable[[str], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kvferry_router_requests",
            "Requests that ended, by the status that the client got; 499: it went away.",
            ["status"],
            registry=self.registry,
        )
        self.failures = Counter(
            "kvferry_router_attempts_failed",
            "Attempts that failed at a server; most are repeated elsewhere.",
            ["role", "server"],
            registry=self.registry,
        )
        self.ways = Counter(
            "kvferry_router_attempts",
            "Attempts by way: prefill first, both at once, or decode alone.",
            ["way"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "kvferry_router_in_flight", "Requests that are not over.", registry=self.registry
        )
        self.first_byte = Histogram(
            "kvferry_router_first_token_seconds",
            "From a request's arrival until its first token, or its whole answer, is here.",
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.prefill = Histogram(
            "kvferry_router_prefill_seconds",
            "From asking a prefill server until it has computed the prompt.",
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        for role in ("prefill", "decode"):
            gauge = Gauge(f"kvferry_router_{role}_servers", "Up.", registry=self.registry)
            gauge.set_function(lambda role=role: up(role))  # type: ignore[misc]
