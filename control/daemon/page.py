"""The daemon's web page: its files, and the picture of the cluster that they draw.

The files in `web/` ask for `/api/state` every second or two. All that is in it comes from the
figures that the daemon's loop leaves behind: no visitor costs the loop anything.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..cluster.messages import Load
from ..cluster.summary import summarize

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cluster.messages import Member
    from ..http import Page
    from .figures import DaemonFigures

WEB = Path(__file__).resolve().parent / "web"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
JSON = "application/json"


def picture(now: DaemonFigures) -> dict[str, Any]:
    """Return what `/api/state` answers: the figures as the page wants them."""
    shown = summarize(0, now.members, now.loads, now.activities, now.errors)
    return {
        "epoch": str(now.epoch),  # more digits than JavaScript's numbers have
        "sequence": now.sequence,
        "draining": now.draining,
        "secured": now.secured,
        "served": now.served,
        "denied": now.denied,
        "agents": [_agent(member, now.loads.get(member.name, Load())) for member in now.members],
        "links": shown.links,
        "num_links": shown.num_links,
        "live": shown.live,
        "failures": shown.failures,
        "errors": shown.errors,
        "points": now.points,
    }


def _agent(member: Member, load: Load) -> dict[str, Any]:
    """Return an agent as the page shows it."""
    there = member.registration
    return {
        "name": member.name,
        "role": member.role,
        "state": member.state,
        "wanted_role": member.wanted_role,
        "host": there.topology.host,
        "zone": there.topology.zone,
        "model": there.model,
        "transports": there.transports,
        "generation": member.generation,
        "num_blocks": there.num_blocks,
        "free_blocks": load.free_blocks,
        "queued_tokens": load.queued_tokens,
        "handoffs": load.handoffs,
        "inflight_nbytes": load.inflight_nbytes,
    }


class StatePage:
    """`/api/state`, encoded once for each look. Any thread."""

    def __init__(self, look: Callable[[], DaemonFigures]) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._shown: DaemonFigures | None = None
        self._body = b""

    def __call__(self) -> tuple[int, str, bytes]:
        now = self._look()
        with self._lock:
            if now is not self._shown:
                self._body, self._shown = msgspec.json.encode(picture(now)), now
            return 200, JSON, self._body


def page_files(look: Callable[[], DaemonFigures]) -> dict[str, Page]:
    """Return the page, by path."""
    pages: dict[str, Page] = {"/api/state": StatePage(look)}
    for path in sorted(WEB.iterdir()):
        kind = KINDS.get(path.suffix)
        if kind is not None:
            pages["/" if path.name == "index.html" else f"/{path.name}"] = _file(path, kind)
    return pages


def _file(path: Path, kind: str) -> Page:
    body = path.read_bytes()
    return lambda: (200, kind, body)
