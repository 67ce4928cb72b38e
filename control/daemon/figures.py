"""One look at a daemon, for whoever shows it to people."""

from __future__ import annotations

import msgspec

from ..cluster.messages import Activity, Load, Member  # noqa: TC001 - msgspec reads them
from .history import Point  # noqa: TC001


class DaemonFigures(msgspec.Struct, frozen=True):
    """One look at a daemon, by its own loop: replaced as a whole, so any thread may read it."""

    at_s: float
    members: tuple[Member, ...]
    loads: dict[str, Load]
    served: int
    denied: int
    sequence: int
    draining: bool
    epoch: int = 0
    secured: bool = False
    activities: dict[str, Activity] = {}
    points: tuple[Point, ...] = ()
    errors: dict[str, int] = {}
