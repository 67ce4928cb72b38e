"""Membership and its watchers: leases, generations, changes without gaps. No sockets, no clock."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.control.cluster.membership import MAX_LEASE_S, Membership
from kvferry.control.cluster.messages import (
    MAX_REQUEST_NBYTES,
    Beat,
    Denied,
    Deregister,
    Done,
    Drain,
    Flip,
    Heartbeat,
    Load,
    Register,
    Registered,
    Registration,
    Restore,
)
from kvferry.control.cluster.view import View


def new_membership(first: int = 100, epoch: int = 1) -> Membership:
    return Membership(epoch=epoch, first_generation=first, publisher="tcp://127.0.0.1:1")


def registration(name: str = "p0", life: int = 1, **fields: Any) -> Registration:
    return Registration(name, fields.pop("role", "prefill"), life, "tcp://127.0.0.1:2", **fields)


def register(
    members: Membership, name: str = "p0", life: int = 1, now_s: float = 0.0, **fields: Any
) -> Any:
    previous = fields.pop("previous", 0)
    lease_s = fields.pop("lease_s", 3.0)
    key = fields.pop("key", b"")
    ask = Register(7, 1, registration(name, life, **fields), lease_s, previous)
    return members.answer(ask, now_s, key)


def names(members: Membership) -> set[str]:
    return {member.name for member in members.members}


def test_a_lease_ends_unless_it_is_renewed() -> None:
    members = new_membership()
    generation = register(members).generation
    assert members.answer(Heartbeat(1, "p0", generation), 2.9) == Beat(1, "serving")
    assert members.expire(3.1) == pytest.approx(2.8)
    assert names(members) == {"p0"}
    members.expire(5.91)
    assert names(members) == set()
    late = members.answer(Heartbeat(2, "p0", generation), 6.0)
    assert isinstance(late, Denied)
    assert late.reason == "unknown"


def test_a_daemon_that_slept_forgives() -> None:
    members = new_membership()
    generation = register(members).generation
    members.forgive(60.0)
    members.expire(62.0)
    assert members.answer(Heartbeat(1, "p0", generation), 62.5) == Beat(1, "serving")


def test_a_lease_is_never_longer_than_the_longest() -> None:
    assert register(new_membership(), lease_s=3000.0).lease_s == MAX_LEASE_S


def test_generations_grow_over_names_and_over_lives_of_the_daemon() -> None:
    members = new_membership(first=100)
    first = register(members, "p0").generation
    second = register(members, "p1", life=2).generation
    assert 100 < first < second
    reborn = new_membership(first=50)  # its clock was set back
    assert register(reborn, "p1", life=2, previous=second).generation > second


def test_an_old_generation_changes_nothing() -> None:
    members = new_membership()
    old = register(members, life=1).generation
    new = register(members, life=2).generation
    assert new > old
    before = members.members
    for ask in (Heartbeat(1, "p0", old), Deregister(1, "p0", old), Drain(1, "p0", old)):
        answer = members.answer(ask, 1.0)
        assert isinstance(answer, Denied)
        assert answer.reason == "generation"
    assert members.members == before


def test_registering_twice_in_one_life_is_answered_alike() -> None:
    members = new_membership()
    assert register(members) == register(members, now_s=1.0)
    members.flush()
    register(members, now_s=2.0)
    assert members.flush() is None


def test_the_newest_life_has_the_name_until_it_ends() -> None:
    members = new_membership()
    old = register(members, life=1)
    new = register(members, life=2)
    for previous in (0, old.generation):  # a replayed message, and the old life itself
        again = register(members, life=1, previous=previous, now_s=1.0)
        assert isinstance(again, Denied)
        assert again.reason == "superseded"
    assert members.answer(Heartbeat(1, "p0", new.generation), 2.0) == Beat(1, "serving")
    members.expire(6.0)
    back = register(members, life=1, previous=old.generation, now_s=6.0)
    assert isinstance(back, Registered)
    assert back.generation > new.generation


def test_only_the_key_that_registered_speaks_for_a_member() -> None:
    members = new_membership()
    key, other = b"k" * 32, b"o" * 32
    denied = register(members, public_key=key, key=other)
    assert isinstance(denied, Denied)
    assert denied.reason == "key"
    generation = register(members, public_key=key, key=key).generation
    for ask in (Heartbeat(1, "p0", generation), Deregister(1, "p0", generation)):
        answer = members.answer(ask, 1.0, other)
        assert isinstance(answer, Denied)
        assert answer.reason == "key"
    assert names(members) == {"p0"}


def test_drain_restore_and_flip_reach_the_agent_with_its_heartbeat() -> None:
    members = new_membership()
    generation = register(members).generation
    beat = Heartbeat(9, "p0", generation)
    assert members.answer(Drain(1, "p0"), 0.0) == Done(1)
    assert members.answer(beat, 0.1) == Beat(9, "draining")
    assert members.answer(Restore(1, "p0"), 0.2) == Done(1)
    assert members.answer(beat, 0.3) == Beat(9, "serving")
    assert members.answer(Flip(1, "p0", "decode"), 0.4) == Done(1)
    assert members.answer(beat, 0.5) == Beat(9, "draining", "decode")
    flipped = register(members, role="decode", previous=generation, now_s=0.6)
    assert flipped.generation > generation
    assert members.members[0].role == "decode"
    assert members.answer(Flip(1, "p0", "decode"), 0.7) == Done(1)  # it is that already
    assert members.members[0].state == "serving"
    assert isinstance(members.answer(Drain(1, "nobody"), 0.8), Denied)


def test_another_version_is_denied_by_name() -> None:
    answer = new_membership().answer(Register(3, 99, registration()), 0.0)
    assert isinstance(answer, Denied)
    assert answer.reason == "version"
    assert "p0 99" in answer.detail


# Random histories: whatever is lost, a watcher that follows ends with the same picture.


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["register", "leave", "beat", "drain", "wait", "flush", "restart"]),
            st.integers(0, 3),
            st.integers(1, 3),
        ),
        max_size=60,
    ),
    lost=st.sets(st.integers(0, 80)),
    asked_late=st.booleans(),
)
def test_watchers_end_with_the_daemons_picture(
    steps: list[tuple[str, int, int]], lost: set[int], asked_late: bool
) -> None:
    members, view, now_s, published = new_membership(), View(), 0.0, 0
    given_out: dict[str, int] = {}

    def publish() -> None:
        nonlocal published
        changes = members.flush()
        if changes is not None:
            published += 1
            if published not in lost:
                view.hear(
                    msgspec.msgpack.decode(msgspec.msgpack.encode(changes), type=type(changes))
                )

    for kind, who, life in steps:
        name = f"a{who}"
        generation = given_out.get(name, 0)
        if kind == "register":
            answer = register(members, name, life, now_s)
            if isinstance(answer, Registered):
                assert answer.generation >= generation
                given_out[name] = answer.generation
        elif kind == "leave":
            members.answer(Deregister(1, name, generation), now_s)
        elif kind == "beat":
            members.answer(Heartbeat(1, name, generation, Load(queued_tokens=life)), now_s)
        elif kind == "drain":
            members.answer(Drain(1, name), now_s)
        elif kind == "wait":
            now_s += life
            members.expire(now_s)
        elif kind == "restart":
            members = new_membership(first=members._generation, epoch=members.epoch + 1)
        elif not asked_late and view.stale:
            publish()
            view.hear(members.snapshot(1, loads=False))
        else:
            publish()
    publish()
    view.hear(members.tick())
    if view.stale:
        view.hear(members.snapshot(2, loads=False))
    assert not view.stale
    assert view.members == {member.name: member for member in members.members}


def test_an_answer_that_was_overtaken_changes_nothing() -> None:
    members, view = new_membership(), View()
    members.flush()
    old = members.snapshot(1, loads=False)
    view.hear(old)
    register(members)
    changes = members.flush()
    assert changes is not None
    assert view.hear(changes)
    assert not view.hear(old)
    assert set(view.members) == {"p0"}


def test_changes_before_the_snapshot_are_kept_for_it() -> None:
    members, view = new_membership(), View()
    members.flush()
    snapshot = members.snapshot(1, loads=False)
    register(members)
    changes = members.flush()
    assert changes is not None
    assert not view.hear(changes)
    assert view.hear(snapshot)
    assert set(view.members) == {"p0"}


def test_a_registration_fits_its_frame() -> None:
    ask = Register(1, 1, registration("n" * 256, model="m" * 256), 3.0)
    assert len(msgspec.msgpack.encode(ask)) < MAX_REQUEST_NBYTES
