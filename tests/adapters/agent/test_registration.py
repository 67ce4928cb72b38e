"""Agents and a real daemon: they find each other through it, and go on without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.errors import DaemonTimeout, LinkLost, NotConnected
from tests.support.agent_process import WAIT_S, Cache
from tests.support.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.agents import Local, Remote

SRC, DST = [9, 2, 11, 40, 3], [1, 0, 7, 30, 12]


@pytest.fixture
def transport() -> str:
    """One is enough: what is tested here is who meets whom."""
    return "tcp"


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess()
    yield process
    process.end()


@pytest.fixture
def make(daemon: DaemonProcess, new_agent: Callable[..., Local]) -> Callable[..., Local]:
    """Makes agents that know the daemon, with short leases."""

    def make(name: str, role: str, **options: Any) -> Local:
        given = {"daemon": daemon.address, "lease_s": 0.6} | options
        return new_agent(name, role, options=given)

    return make


def hand_over(prefill: Local, decode: Local, request: str, **options: Any) -> None:
    prefill.cache.fill(SRC, 1)
    sending = prefill.agent.send(request, SRC)
    decode.agent.receive(request, prefill.agent.name, DST, **options).wait(WAIT_S)
    sending.wait(WAIT_S)
    assert decode.cache.holds(DST, 1)


def wait_until(local: Local, condition: Callable[[], bool]) -> None:
    assert local.agent._registrar is not None
    assert local.agent._registrar.wait(condition, WAIT_S)


def test_agents_find_each_other_by_name(make: Callable[..., Local]) -> None:
    prefill, decode = make("prefill-0", "prefill"), make("decode-0", "decode")
    member = decode.agent.wait_for_member("prefill-0", WAIT_S)
    assert member.registration.address == prefill.agent.address
    assert member.registration.num_blocks == 64
    assert member.registration.token_nbytes * 4 == prefill.cache.block_nbytes
    hand_over(prefill, decode, "r")  # connects on the way
    assert decode.agent.connect("prefill-0") == "prefill-0"
    with pytest.raises(NotConnected, match="daemon knows none"):
        decode.agent.receive("r", "nobody", [1])
    with pytest.raises(DaemonTimeout, match="nobody"):
        decode.agent.wait_for_member("nobody", 0.01)


def test_an_agent_that_goes_is_gone_at_once(make: Callable[..., Local]) -> None:
    prefill, decode = make("prefill-0", "prefill", lease_s=60.0), make("decode-0", "decode")
    decode.agent.wait_for_member("prefill-0", WAIT_S)
    wait_until(prefill, lambda: prefill.agent.registered)  # it knows itself which one it is
    prefill.agent.close()
    wait_until(decode, lambda: "prefill-0" not in decode.agent.members)


def test_without_a_daemon_an_agent_works(daemon: DaemonProcess, make: Callable[..., Local]) -> None:
    daemon.kill()
    prefill, decode = make("prefill-0", "prefill"), make("decode-0", "decode")
    decode.agent.connect(prefill.agent.address)
    hand_over(prefill, decode, "r")
    assert not decode.agent.registered


def test_a_daemons_death_harms_nobody(daemon: DaemonProcess, make: Callable[..., Local]) -> None:
    prefill, decode = make("prefill-0", "prefill"), make("decode-0", "decode")
    decode.agent.wait_for_member("prefill-0", WAIT_S)
    in_flight = decode.agent.receive("before", "prefill-0", DST)
    daemon.kill()
    prefill.cache.fill(SRC, 1)
    prefill.agent.send("before", SRC)
    in_flight.wait(WAIT_S)
    hand_over(prefill, decode, "after")
    first = decode.agent._registrar._presence.generation  # type: ignore[union-attr]
    daemon.start()
    with DaemonClient(daemon.address) as client, client.watch() as watch:
        while set(watch.view.members) != {"prefill-0", "decode-0"}:  # complete again
            watch.poll(WAIT_S)
    wait_until(decode, lambda: decode.agent._registrar._presence.generation > first)  # type: ignore[union-attr]
    hand_over(prefill, decode, "later")


def test_a_frozen_agent_comes_back_with_a_new_generation(
    daemon: DaemonProcess, make: Callable[..., Local], start_agent: Callable[..., Remote]
) -> None:
    decode = make("decode-0", "decode")
    remote = start_agent("prefill-0", "prefill", daemon=daemon.address, lease_s=0.5)
    old = decode.agent.wait_for_member("prefill-0", WAIT_S)
    remote.freeze()
    wait_until(decode, lambda: "prefill-0" not in decode.agent.members)
    remote.thaw()
    new = decode.agent.wait_for_member("prefill-0", WAIT_S)
    assert new.generation > old.generation
    assert new.registration.life == old.registration.life
    remote.call("fill", SRC, 1)
    remote.call("send", "r", SRC)
    decode.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    assert decode.cache.holds(DST, 1)


def test_a_frozen_agent_whose_name_was_taken_comes_second(
    daemon: DaemonProcess, make: Callable[..., Local], start_agent: Callable[..., Remote]
) -> None:
    """What it begins when it wakes reaches nobody; it has its name back when the other has gone."""
    decode = make("decode-0", "decode")
    frozen = start_agent("prefill-0", "prefill", daemon=daemon.address, lease_s=0.5)
    old = decode.agent.wait_for_member("prefill-0", WAIT_S)
    decode.agent.connect("prefill-0")
    interrupted = decode.agent.receive("before", "prefill-0", DST)
    frozen.freeze()
    wait_until(decode, lambda: "prefill-0" not in decode.agent.members)
    newer = make("prefill-0", "prefill")
    member = decode.agent.wait_for_member("prefill-0", WAIT_S)
    assert member.registration.life != old.registration.life
    assert member.generation > old.generation
    hand_over(newer, decode, "meanwhile")
    frozen.thaw()
    frozen.call("fill", SRC, 2)
    frozen.call("send", "before", SRC)
    with pytest.raises(LinkLost):
        interrupted.wait(WAIT_S)
    interrupted.blocks_free.wait(WAIT_S)
    decode.cache.fill(DST, 7)
    hand_over(newer, decode, "after")
    assert decode.agent.members["prefill-0"].registration.life == member.registration.life
    newer.agent.close()

    def is_back() -> bool:
        now = decode.agent.members.get("prefill-0")
        return now is not None and now.registration.life == old.registration.life

    wait_until(decode, is_back)


def test_of_two_agents_of_one_name_the_newer_one_has_it(make: Callable[..., Local]) -> None:
    older, decode = make("prefill-0", "prefill"), make("decode-0", "decode")
    first = decode.agent.wait_for_member("prefill-0", WAIT_S)
    newer = make("prefill-0", "prefill")
    wait_until(newer, lambda: newer.agent.registered)
    wait_until(older, lambda: not older.agent.registered)
    wait_until(decode, lambda: decode.agent.members["prefill-0"].generation > first.generation)
    hand_over(newer, decode, "r")
    newer.agent.close()
    wait_until(older, lambda: older.agent.registered)  # it is the only one again


def test_drain_leaves_what_is_under_way_alone(
    daemon: DaemonProcess, make: Callable[..., Local]
) -> None:
    prefill, decode = make("prefill-0", "prefill"), make("decode-0", "decode")
    decode.agent.wait_for_member("prefill-0", WAIT_S)
    handoff = decode.agent.receive("r", "prefill-0", DST)
    with DaemonClient(daemon.address) as client:
        client.drain("prefill-0")
        wait_until(prefill, lambda: prefill.agent.draining)
        prefill.cache.fill(SRC, 1)
        prefill.agent.send("r", SRC)
        handoff.wait(WAIT_S)
        client.restore("prefill-0")
        wait_until(prefill, lambda: not prefill.agent.draining)


def test_a_flipped_agent_finishes_and_takes_its_new_role(
    daemon: DaemonProcess, make: Callable[..., Local]
) -> None:
    one, two = make("one", "prefill"), make("two", "decode")
    two.agent.wait_for_member("one", WAIT_S)
    handoff = two.agent.receive("r", "one", DST)
    with DaemonClient(daemon.address) as client:
        client.flip("two", "prefill")
        wait_until(two, lambda: two.agent.draining)
        one.cache.fill(SRC, 1)
        one.agent.send("r", SRC).wait(WAIT_S)
        handoff.wait(WAIT_S)  # nothing that was under way is lost
        assert two.cache.holds(DST, 1)
        client.flip("one", "decode")
        wait_until(one, lambda: one.agent.role == "decode")
        wait_until(two, lambda: two.agent.role == "prefill")
        wait_until(
            one, lambda: "two" in one.agent.members and one.agent.members["two"].role == "prefill"
        )
    with pytest.raises(ValueError, match="one is decode"):
        one.agent.send("s", SRC)
    hand_over(two, one, "s")


def test_another_life_at_the_address_is_refused(
    daemon: DaemonProcess, make: Callable[..., Local], new_agent: Callable[..., Local]
) -> None:
    """The daemon's picture is old: someone else answers where the member was."""
    impostor = new_agent("prefill-0", "prefill")
    decode = make("decode-0", "decode")
    from kvferry.control.cluster.messages import Register, Registration

    there = Registration("prefill-0", "prefill", 123, impostor.agent.address)
    with DaemonClient(daemon.address) as client:
        client.ask(Register(1, 1, there, 60.0), WAIT_S)
    decode.agent.wait_for_member("prefill-0", WAIT_S)
    handoff = decode.agent.receive("r", "prefill-0", DST)
    with pytest.raises(LinkLost, match="another life"):
        handoff.wait(WAIT_S)
    handoff.blocks_free.wait(WAIT_S)


def test_a_cache_is_described_in_numbers() -> None:
    from kvferry.adapters.agent.registration import describe_cache

    cache = Cache(8)
    numbers = describe_cache(cache.layout)
    assert numbers["tokens_per_block"] * numbers["token_nbytes"] == cache.block_nbytes
