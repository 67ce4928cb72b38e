"""Placement as a pure function: what it prefers, what it refuses, and that it changes nothing."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.cluster.messages import Load, Member, Place, Registration, Topology
from kvferry.control.errors import PlacementError
from kvferry.control.placement.fleet import SHORTLIST, Decision, Fleet
from kvferry.control.placement.policy import bandwidth, place

if TYPE_CHECKING:
    from kvferry.control.handoff.messages import Role
    from kvferry.control.placement import policy as placement


def member(name: str, role: Role, state: Any = "serving", **fields: Any) -> Member:
    return Member(Registration(name, role, 1, "tcp://x:1", **fields), 1, state)


def fleet(*members: Member, **loads: Load) -> Fleet:
    return Fleet(members, loads)


def chosen(known: Fleet, tokens: int = 1000, **fields: Any) -> tuple[str, str]:
    decision = place(known, Place(1, tokens, **fields))
    return decision.prefill, decision.decode


def test_the_shortest_queue_is_taken() -> None:
    known = fleet(
        member("p0", "prefill"),
        member("p1", "prefill"),
        member("d0", "decode"),
        member("d1", "decode"),
        p0=Load(queued_tokens=500),
        d0=Load(queued_tokens=500),
    )
    assert chosen(known) == ("p1", "d1")


def test_what_is_cached_need_not_be_computed() -> None:
    known = fleet(
        member("p0", "prefill", tokens_per_s=1000),
        member("p1", "prefill", tokens_per_s=1000),
        member("d0", "decode"),
        p1=Load(queued_tokens=400),
    )
    assert chosen(known) == ("p0", "d0")
    assert chosen(known, cached={"p1": 900}) == ("p1", "d0")


def test_near_is_better_unless_the_pair_measured_otherwise() -> None:
    here, there = Topology(host="a", zone="z"), Topology(host="b", zone="z")
    members = (
        member("p0", "prefill", topology=here),
        member("d0", "decode", topology=there),
        member("d1", "decode", topology=here),
    )
    assert chosen(fleet(*members)) == ("p0", "d1")
    assert chosen(fleet(*members, p0=Load(rates={"d0": 40e9}))) == ("p0", "d0")
    assert chosen(fleet(*members, d0=Load(rates={"p0": 40e9}))) == ("p0", "d0")


def test_neighbours_are_weighed_even_behind_many_strangers() -> None:
    decodes = [member(f"d{number:02}", "decode") for number in range(40)]
    near = member("neighbour", "decode", topology=Topology(host="a"))
    known = fleet(
        member("p0", "prefill", topology=Topology(host="a")),
        *decodes,
        near,
        neighbour=Load(queued_tokens=1),
    )
    assert chosen(known, 100_000) == ("p0", "neighbour")


def test_no_room_no_placement() -> None:
    known = fleet(
        member("p0", "prefill"),
        member("d0", "decode", num_blocks=10, tokens_per_block=16),
        member("d1", "decode", num_blocks=100, tokens_per_block=16),
    )
    assert chosen(known, 1000) == ("p0", "d1")
    known.reserve(Decision("p0", "d1", 0.0, ""), 1000)
    with pytest.raises(PlacementError, match="room for 1000 tokens"):
        chosen(known, 1000)
    known.load("d1", Load(free_blocks=100))
    assert chosen(known, 1000) == ("p0", "d1")


def test_draining_excluded_and_other_models_are_left_out() -> None:
    members = [member("p0", "prefill"), member("d0", "decode"), member("d1", "decode", "draining")]
    assert chosen(fleet(*members)) == ("p0", "d0")
    with pytest.raises(PlacementError, match="no decode agent is serving"):
        chosen(fleet(*members), exclude=("d0",))
    with pytest.raises(PlacementError, match="no prefill agent of model 'x' is serving"):
        chosen(fleet(*members), model="x")


def test_an_agent_of_both_roles_does_not_hand_over_to_itself() -> None:
    assert set(chosen(fleet(member("a", "both"), member("b", "both")))) == {"a", "b"}
    with pytest.raises(PlacementError):
        chosen(fleet(member("a", "both")))


def test_members_come_change_and_go() -> None:
    known = fleet(member("p0", "prefill"), member("d0", "decode"))
    known.put(member("d0", "decode", "draining"))
    with pytest.raises(PlacementError):
        chosen(known)
    known.put(member("d0", "decode"))
    assert chosen(known) == ("p0", "d0")
    known.remove("d0")
    assert len(known) == 1
    with pytest.raises(PlacementError):
        chosen(known)


def test_the_estimate_is_the_least_of_all_pairs() -> None:
    """Against every pair, where the shortlist covers them: it finds the best one."""
    rng = random.Random(3)
    for _ in range(50):
        members, loads = [], {}
        for number in range(SHORTLIST):
            for role, letter in (("prefill", "p"), ("decode", "d")):
                name = f"{letter}{number}"
                at = Topology(host=rng.choice("abc"), zone=rng.choice("xy"))
                members.append(
                    member(name, role, tokens_per_s=rng.choice([1e3, 1e4]), topology=at)  # type: ignore[arg-type]
                )
                loads[name] = Load(queued_tokens=rng.randrange(5000))
        known = Fleet(members, loads)
        request = Place(1, rng.randrange(1, 5000))
        best = min(
            p.wait_s
            + request.tokens * p.seconds_per_token
            + d.wait_s
            + request.tokens * p.token_nbytes / bandwidth(p, d)
            for p in known.prefills("").values()
            for d in known.decodes("").values()
        )
        assert place(known, request).estimate_s == pytest.approx(best)


def test_policies_are_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "first"

        def load(self) -> placement.Policy:
            return lambda known, request: Decision("p0", "d0", 1.0, f"{len(known)} agents")

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Point()])
    known = fleet(member("p0", "prefill"), member("d0", "decode"))
    assert place(known, Place(1, 5, policy="first")).reason == "2 agents"
    with pytest.raises(PlacementError, match="use first or least-time"):
        place(known, Place(1, 5, policy="second"))


def test_models_that_nobody_serves_any_more_are_forgotten() -> None:
    known = fleet(member("p0", "prefill"))
    kept = len(known._prefills) + len(known._decodes)
    for number in range(10):
        known.put(member("b0", "both", model=f"model-{number}"))
    known.remove("b0")
    assert len(known._prefills) + len(known._decodes) == kept
