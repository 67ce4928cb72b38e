"""What all agents do, from their heartbeats: each link and each handoff once.

Pure. Several daemons of one cluster each hear some of the agents; `merge` puts together what they say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..handoff.messages import LARGEST_NATURAL
from .messages import (
    MAX_ERROR_KINDS,
    MAX_SHOWN_LINKS,
    MAX_SHOWN_ROWS,
    FailureRow,
    HandoffRow,
    LinkRow,
    Shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .messages import Activity, Load, Member


def summarize(
    request: int,
    members: Iterable[Member],
    loads: Mapping[str, Load],
    activities: Mapping[str, Activity],
    errors: Mapping[str, int],
) -> Shown:
    """Return what agents told, by their names; `errors` are counts since the daemon began."""
    failures = [
        FailureRow(failure.handoff, name, failure.peer, failure.error, failure.age_s)
        for name, activity in activities.items()
        for failure in activity.failures
    ]
    found = _links({member.name: member.role for member in members}, loads, activities)
    return _shown(request, found, len(found), _handoffs(activities), failures, errors)


def merge(parts: Sequence[Shown]) -> Shown:
    """Return what several daemons say, as one. All of them know all loads, and each its own agents'
    work."""
    links: dict[tuple[str, str], LinkRow] = {}
    rows: dict[tuple[str, str], HandoffRow] = {}
    errors: dict[str, int] = {}
    for part in parts:
        for link in part.links:
            ends = (link.source, link.target)
            known = links.get(ends, link)
            links[ends] = max(known, link, key=lambda row: (row.transport, *_busy(row)))
        for row in part.live:
            key = (row.handoff, row.prefill)
            if row.decode or key not in rows:
                rows[key] = row
        for error, count in part.errors.items():
            errors[error] = errors.get(error, 0) + count
    failures = [failure for part in parts for failure in part.failures]
    num_links = max([len(links), *(part.num_links for part in parts)])
    return _shown(parts[0].request, links.values(), num_links, rows.values(), failures, errors)


def _shown(
    request: int,
    links: Iterable[LinkRow],
    num_links: int,
    live: Iterable[HandoffRow],
    failures: Iterable[FailureRow],
    errors: Mapping[str, int],
) -> Shown:
    """Return the busiest, the oldest and the last of them."""
    often = sorted(errors.items(), key=lambda error: -error[1])[:MAX_ERROR_KINDS]
    counts = {error: min(count, LARGEST_NATURAL) for error, count in often}
    return Shown(
        request,
        tuple(sorted(links, key=_busy, reverse=True)[:MAX_SHOWN_LINKS]),
        num_links,
        tuple(sorted(live, key=lambda row: row.age_s, reverse=True)[:MAX_SHOWN_ROWS]),
        tuple(sorted(failures, key=lambda row: row.age_s)[:MAX_SHOWN_ROWS]),
        counts,
    )


def _links(
    roles: Mapping[str, str], loads: Mapping[str, Load], activities: Mapping[str, Activity]
) -> list[LinkRow]:
    """Each pair once: decode tells what flows, either side what it has measured."""
    flows: dict[tuple[str, str], tuple[str, float]] = {}
    for name, activity in activities.items():
        if name in roles:
            for link in activity.links:
                if link.peer in roles:
                    flows[link.peer, name] = (link.transport, link.nbytes_per_s)
    measured: dict[tuple[str, str], float] = {}
    for name, load in loads.items():
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


def _handoffs(activities: Mapping[str, Activity]) -> list[HandoffRow]:
    """Those under way, each once: decode's word, or prefill's while nobody has asked."""
    rows: dict[tuple[str, str], HandoffRow] = {}
    for name, activity in sorted(activities.items()):
        for live in activity.live:
            decodes = live.side == "decode"
            ends = (live.peer, name) if decodes else (name, live.peer)
            row = HandoffRow(live.handoff, *ends, live.nbytes, live.age_s)
            key = (live.handoff, row.prefill)
            if decodes or key not in rows:
                rows[key] = row
    return list(rows.values())
