"""The daemon's web page: its files, and the picture of the cluster that they draw.

The files in `web/` ask for `/api/state` every second or two. All that is in it comes from the
figures that the daemon's loop leaves behind: no visitor costs the loop anything.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .daemon_messages import Load

if TYPE_CHECKING:
    from collections.abc import Callable

    from .daemon_messages import Member
    from .figures import DaemonFigures
    from .history import Point
    from .http import Page

WEB = Path(__file__).resolve().parent / "web"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
JSON = "application/json"
MAX_LINKS = 600  # that are told: the busiest; more lines than that nobody can tell apart
MAX_ROWS = 50  # of handoffs and failures


class Agent(msgspec.Struct, frozen=True):
    """An agent as the page shows it."""

    name: str
    role: str
    state: str
    wanted_role: str
    host: str
    zone: str
    model: str
    transports: tuple[str, ...]
    generation: int
    num_blocks: int
    free_blocks: int
    queued_tokens: int
    handoffs: int
    inflight_nbytes: int


class LinkRow(msgspec.Struct, frozen=True):
    """Bytes go from `source` to `target`: so many a second now, and when they were measured."""

    source: str
    target: str
    transport: str
    nbytes_per_s: float
    measured_nbytes_per_s: float


class HandoffRow(msgspec.Struct, frozen=True):
    """A handoff that is under way."""

    handoff: str
    prefill: str
    decode: str
    nbytes: int
    age_s: float


class FailureRow(msgspec.Struct, frozen=True):
    """A handoff that failed, as `agent` tells."""

    handoff: str
    agent: str
    peer: str
    error: str
    age_s: float


class Picture(msgspec.Struct, frozen=True):
    """What `/api/state` answers."""

    epoch: str
    sequence: int
    draining: bool
    secured: bool
    served: int
    denied: int
    agents: list[Agent]
    links: list[LinkRow]
    num_links: int
    live: list[HandoffRow]
    failures: list[FailureRow]
    errors: dict[str, int]
    points: tuple[Point, ...]


def picture(now: DaemonFigures) -> Picture:
    """The figures as the page wants them."""
    links = _links(now)
    handoffs = _handoffs(now)
    failures = [
        FailureRow(failure.handoff, name, failure.peer, failure.error, failure.age_s)
        for name, activity in now.activities.items()
        for failure in activity.failures
    ]
    return Picture(
        epoch=str(now.epoch),  # more digits than JavaScript's numbers have
        sequence=now.sequence,
        draining=now.draining,
        secured=now.secured,
        served=now.served,
        denied=now.denied,
        agents=[_agent(member, now.loads.get(member.name, Load())) for member in now.members],
        links=sorted(links, key=_busy, reverse=True)[:MAX_LINKS],
        num_links=len(links),
        live=sorted(handoffs, key=lambda row: row.age_s, reverse=True)[:MAX_ROWS],
        failures=sorted(failures, key=lambda row: row.age_s)[:MAX_ROWS],
        errors=now.errors,
        points=now.points,
    )


def _agent(member: Member, load: Load) -> Agent:
    there = member.registration
    return Agent(
        name=member.name,
        role=member.role,
        state=member.state,
        wanted_role=member.wanted_role,
        host=there.topology.host,
        zone=there.topology.zone,
        model=there.model,
        transports=there.transports,
        generation=member.generation,
        num_blocks=there.num_blocks,
        free_blocks=load.free_blocks,
        queued_tokens=load.queued_tokens,
        handoffs=load.handoffs,
        inflight_nbytes=load.inflight_nbytes,
    )


def _links(now: DaemonFigures) -> list[LinkRow]:
    """Each pair once: decode tells what flows, either side what it has measured."""
    roles = {member.name: member.role for member in now.members}
    flows: dict[tuple[str, str], tuple[str, float]] = {}
    for name, activity in now.activities.items():
        if name in roles:
            for link in activity.links:
                if link.peer in roles:
                    flows[link.peer, name] = (link.transport, link.nbytes_per_s)
    measured: dict[tuple[str, str], float] = {}
    for name, load in now.loads.items():
        for peer, rate in load.rates.items():
            if name in roles and peer in roles:
                ends = (peer, name) if roles[name] == "decode" else (name, peer)
                measured[ends] = max(rate, measured.get(ends, 0.0))
    return [
        LinkRow(*ends, *flows.get(ends, ("", 0.0)), measured.get(ends, 0.0))
        for ends in {**flows, **measured}
    ]


def _busy(link: LinkRow) -> tuple[float, float, str, str]:
    return (link.nbytes_per_s, link.measured_nbytes_per_s, link.source, link.target)


def _handoffs(now: DaemonFigures) -> list[HandoffRow]:
    """Those under way, each once: decode's word, or prefill's while nobody has asked."""
    rows: dict[tuple[str, str], HandoffRow] = {}
    for name, activity in sorted(now.activities.items()):
        for live in activity.live:
            decodes = live.side == "decode"
            ends = (live.peer, name) if decodes else (name, live.peer)
            row = HandoffRow(live.handoff, *ends, live.nbytes, live.age_s)
            key = (live.handoff, row.prefill)
            if decodes or key not in rows:
                rows[key] = row
    return list(rows.values())


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
    """The page, by path."""
    pages: dict[str, Page] = {"/api/state": StatePage(look)}
    for path in sorted(WEB.iterdir()):
        kind = KINDS.get(path.suffix)
        if kind is not None:
            pages["/" if path.name == "index.html" else f"/{path.name}"] = _file(path, kind)
    return pages


def _file(path: Path, kind: str) -> Page:
    body = path.read_bytes()
    return lambda: (200, kind, body)
