"""What an agent tells of itself with each heartbeat, for people who look at the cluster.

Bounded, and off every handoff's path but for one call when it ends.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from heapq import nlargest
from typing import TYPE_CHECKING

from ...control.cluster.messages import (
    MAX_ERRORS,
    MAX_FAILURES,
    MAX_LINKS,
    SECONDS_BOUNDS,
    Activity,
    Failure,
    LinkActivity,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...control.cluster.messages import LiveHandoff
    from ...control.handoff.messages import Side

MAX_ID_CHARS = 64  # of a request's id, which is shown and not used


class ActivityLog:
    """One agent's log. For whoever has the agent's turn."""

    def __init__(self) -> None:
        self._began_s = self._reported_s = time.monotonic()
        self._nbytes = 0
        self._seconds = [0] * (len(SECONDS_BOUNDS) + 1)
        self._handoffs = 0
        self._errors: dict[str, int] = {}
        self._failures: deque[tuple[float, str, str, str]] = deque(maxlen=MAX_FAILURES)
        self._came: dict[str, int] = {}  # bytes by peer since the last report

    def ended(
        self,
        side: Side,
        handoff: str,
        peer: str,
        seconds: float,
        nbytes: int,
        error: Exception | None,
    ) -> None:
        """A handoff ended."""
        if error is not None:
            name = type(error).__name__
            if name in self._errors or len(self._errors) < MAX_ERRORS:
                self._errors[name] = self._errors.get(name, 0) + 1
            self._failures.append((time.monotonic(), short(handoff), name, peer))
        elif side == "decode":
            self._handoffs += 1
            self._nbytes += nbytes
            self._seconds[bisect_left(SECONDS_BOUNDS, seconds)] += 1
            self._came[peer] = self._came.get(peer, 0) + nbytes

    def report(
        self, now_s: float, senders: Mapping[str, str], live: tuple[LiveHandoff, ...]
    ) -> Activity:
        """What is to be told now; `senders` are the peers that are linked, with the transport."""
        came, self._came = self._came, {}
        passed_s, self._reported_s = max(1e-3, now_s - self._reported_s), now_s
        flows = {peer: came.get(peer, 0) / passed_s for peer in {**senders, **came}}
        links = tuple(
            LinkActivity(peer, senders.get(peer, ""), flows[peer])
            for peer in nlargest(MAX_LINKS, flows, key=lambda peer: (flows[peer], peer))
        )
        failures = tuple(
            Failure(handoff, error, peer, max(0.0, now_s - at_s))
            for at_s, handoff, error, peer in self._failures
        )
        return Activity(
            age_s=now_s - self._began_s,
            nbytes=self._nbytes,
            seconds=tuple(self._seconds) if self._handoffs else (),
            errors=dict(self._errors),
            links=links,
            live=live,
            failures=failures,
        )


def short(handoff: str) -> str:
    """A request's id as it is shown."""
    return handoff if len(handoff) <= MAX_ID_CHARS else handoff[: MAX_ID_CHARS - 1] + "…"
