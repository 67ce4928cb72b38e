"""What heartbeats carry, added up: lost and repeated beats, restarts of agents and of the daemon."""

from __future__ import annotations

import pytest

from kvferry.control.cluster.messages import MAX_ERROR_KINDS, MAX_MEMBERS, SECONDS_BOUNDS, Activity
from kvferry.control.daemon.figures import NUM_BUCKETS, POINTS, STEP_S, History, percentile


def counts(**at: int) -> tuple[int, ...]:
    """Counts by bucket: `b3=2` are two in the fourth."""
    found = [0] * NUM_BUCKETS
    for name, count in at.items():
        found[int(name[1:])] = count
    return tuple(found)


def test_a_step_tells_what_is_new_in_it() -> None:
    history = History(100.0)
    history.take("a", Activity(age_s=1.0, nbytes=4000, seconds=counts(b3=2)), 101.0)
    history.take("a", Activity(age_s=2.0, nbytes=6000, seconds=counts(b3=2, b9=2)), 102.0)
    history.take("b", Activity(age_s=1.0, errors={"HandoffTimeout": 3}), 102.0)
    history.turn(102.0, 1000.0)
    history.turn(102.5, 1000.5)  # no step yet
    (point,) = history.points
    assert point.nbytes_per_s == 6000 / STEP_S
    assert point.handoffs_per_s == 4 / STEP_S
    assert point.errors_per_s == 3 / STEP_S
    assert point.p50_s == pytest.approx(SECONDS_BOUNDS[3])
    assert point.p99_s is not None
    assert SECONDS_BOUNDS[8] < point.p99_s <= SECONDS_BOUNDS[9]
    assert history.errors == {"HandoffTimeout": 3}
    history.turn(104.0, 1002.0)
    assert history.points[-1].nbytes_per_s == 0
    assert history.points[-1].p50_s is None


def test_an_agent_that_is_older_than_the_daemon_brings_no_past() -> None:
    history = History(100.0)
    history.take("a", Activity(age_s=50.0, nbytes=9000, errors={"E": 5}), 101.0)
    history.take("a", Activity(age_s=51.0, nbytes=9500, errors={"E": 6}), 102.0)
    history.turn(102.0, 0.0)
    assert history.points[-1].nbytes_per_s == 500 / STEP_S
    assert history.errors == {"E": 1}


def test_the_next_life_of_a_name_counts_from_nothing() -> None:
    history = History(100.0)
    history.take("a", Activity(age_s=10.0, nbytes=5000), 110.0)
    history.take("a", Activity(age_s=1.0, nbytes=70), 112.0)
    history.turn(112.0, 0.0)
    assert history.points[-1].nbytes_per_s == 5070 / 12


def test_beats_that_come_late_twice_or_never_count_once() -> None:
    history = History(0.0)
    for age_s, nbytes in ((1.0, 10), (2.0, 30), (2.0, 30), (9.0, 100)):
        history.take("a", Activity(age_s=age_s, nbytes=nbytes), 10.0)
    history.turn(10.0, 0.0)
    assert history.points[-1].nbytes_per_s == 10.0


def test_memory_is_bounded() -> None:
    history = History(0.0)
    for step in range(POINTS + 5):
        history.turn((step + 1) * STEP_S, float(step))
    assert len(history.points) == POINTS
    for number in range(MAX_MEMBERS + 5):
        history.take(f"a{number}", Activity(), 1.0)
    assert len(history.activities) == MAX_MEMBERS


def test_names_of_errors_are_bounded_and_every_failure_counts() -> None:
    history = History(0.0)
    for number in range(MAX_ERROR_KINDS + 5):
        history.take("a", Activity(age_s=number + 1.0, errors={f"e{number}": 1}), 1e6)
    assert len(history.errors) == MAX_ERROR_KINDS
    assert history.errors["other"] == 6
    assert sum(history.errors.values()) == MAX_ERROR_KINDS + 5


def test_percentiles() -> None:
    assert percentile(counts(), 0.5) is None
    assert percentile(counts(b0=4), 0.5) == pytest.approx(SECONDS_BOUNDS[0] / 2)
    longest = f"b{NUM_BUCKETS - 1}"
    assert percentile(counts(**{longest: 1}), 0.5) == SECONDS_BOUNDS[-1]
    spread = counts(b2=50, b20=50)
    assert percentile(spread, 0.5) == pytest.approx(SECONDS_BOUNDS[2])
    assert percentile(spread, 1.0) == pytest.approx(SECONDS_BOUNDS[20])
