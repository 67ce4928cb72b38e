"""What a daemon can show: what its agents have done lately, and one look at all of it.

Pure: the caller brings the times. `History` takes what heartbeats carry, adds up what is new, and
keeps ten minutes of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING

import msgspec

from ..cluster.messages import (
    MAX_ERROR_KINDS,
    MAX_MEMBERS,
    SECONDS_BOUNDS,
    Activity,
    Load,
    Member,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

STEP_S = 2.0  # every agent beats once or twice in it
POINTS = 300
OTHER_ERRORS = "other"  # agents name errors, so there may be any number of names
NUM_BUCKETS = len(SECONDS_BOUNDS) + 1


class Point(msgspec.Struct, frozen=True, array_like=True):
    """One step: when it ended (Unix seconds), rates in it, and percentiles in seconds, if any."""

    at_s: float
    nbytes_per_s: float
    handoffs_per_s: float
    errors_per_s: float
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None


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


class History:
    """Ten minutes of a cluster. Not thread-safe: one owner.

    Attributes:
        points: one a step, oldest first.
        errors: how many of each since the daemon began.
        activities: what each agent told last.
    """

    def __init__(self, now_s: float) -> None:
        self.points: deque[Point] = deque(maxlen=POINTS)
        self.errors: dict[str, int] = {}
        self.activities: OrderedDict[str, Activity] = OrderedDict()
        self._began_s = self._step_s = now_s
        self._nbytes = self._failed = 0
        self._seconds = [0] * NUM_BUCKETS

    def take(self, name: str, activity: Activity, now_s: float) -> None:
        """A heartbeat."""
        before = self.activities.pop(name, None)
        self.activities[name] = activity
        if len(self.activities) > MAX_MEMBERS:
            self.activities.popitem(last=False)
        if before is None or activity.age_s < before.age_s:  # another life of that name
            if activity.age_s > now_s - self._began_s:
                return  # it is older than this daemon: what it did before is not of now
            before = _NOTHING
        if activity.nbytes > before.nbytes:
            self._nbytes += activity.nbytes - before.nbytes
        if activity.seconds != before.seconds:
            pairs = zip_longest(activity.seconds, before.seconds, fillvalue=0)
            for bucket, (count, old) in enumerate(pairs):
                self._seconds[bucket] += max(0, count - old)
        if activity.errors != before.errors:
            for error, count in activity.errors.items():
                new = max(0, count - before.errors.get(error, 0))
                known = error in self.errors or len(self.errors) < MAX_ERROR_KINDS - 1
                kind = error if known else OTHER_ERRORS
                self.errors[kind] = self.errors.get(kind, 0) + new
                self._failed += new

    def turn(self, now_s: float, unix_s: float) -> None:
        """End a step, if one is over."""
        passed_s = now_s - self._step_s
        if passed_s < STEP_S:
            return
        percentiles = [percentile(self._seconds, share) for share in (0.5, 0.95, 0.99)]
        self.points.append(
            Point(
                round(unix_s, 1),
                self._nbytes / passed_s,
                sum(self._seconds) / passed_s,
                self._failed / passed_s,
                *percentiles,
            )
        )
        self._step_s, self._nbytes, self._failed = now_s, 0, 0
        self._seconds = [0] * NUM_BUCKETS


_NOTHING = Activity()


def percentile(counts: Sequence[int], share: float) -> float | None:
    """Seconds that `share` of the handoffs stay within; None without handoffs.

    Exact to a bucket, half as long again as the one before; within it, handoffs count as spread evenly.
    """
    total = sum(counts)
    if not total:
        return None
    wanted, below = share * total, 0
    for bucket, upto in enumerate(accumulate(counts)):
        if upto >= wanted and counts[bucket]:
            if bucket == len(SECONDS_BOUNDS):
                return SECONDS_BOUNDS[-1]  # or longer
            first = SECONDS_BOUNDS[bucket - 1] if bucket else 0.0
            width = SECONDS_BOUNDS[bucket] - first
            return first + width * (wanted - below) / counts[bucket]
        below = upto
    return SECONDS_BOUNDS[-1]
