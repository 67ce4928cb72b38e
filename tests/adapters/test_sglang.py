"""SGLang's real disaggregation classes with kvferry under them, a prefill and a decode process.

Needs SGLang's wheel, which `tools/sglang_wheel/environment.py` unpacks into a cache. Its server needs
GPUs and is not started: `sglang_ranks/sglang_imports.py` says what is real and what is not, and
`sglang_ranks/rank_process.py` does what its scheduler does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvferry.tools.pinned import CannotInstall
from kvferry.tools.sglang_wheel.environment import ensure

from .sglang_ranks.servers import SENTINEL, Pair, Ranks, Servers, check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.needs import lack
else:
    from needs import lack  # in the folder above: `pythonpath` in pyproject.toml

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def packages() -> str:
    """The folder that SGLang is unpacked in."""
    try:
        return str(ensure())
    except CannotInstall as error:
        lack(f"needs SGLang's wheel, which cannot be had here: {error}")


@pytest.fixture(scope="module")
def processes(packages: str) -> Iterator[Servers]:
    made = Servers(packages)
    yield made
    made.end()


@pytest.fixture
def transport() -> str:
    """What tests use that do not say."""
    return "cma"


@pytest.fixture
def servers(processes: Servers, transport: str) -> Iterator[Servers]:
    processes.begin(transport)
    yield processes
    processes.stop_ranks()


over_both = pytest.mark.parametrize("transport", ["cma", "tcp"])


@over_both
def test_pages_go_chunk_by_chunk_with_metadata_last(servers: Servers) -> None:
    pair = Pair(servers)
    src, dst = [7, 3, 4, 5, 20, 30], [1, 9, 8, 10, 11, 2]
    room = pair.meet(src, dst)
    for chunk in (src[:2], src[2:5], src[5:]):
        servers.prefill.call("send", pair.source, room, chunk)
    assert pair.ends(room) == ("success", "success")
    assert servers.decode.call("transports", pair.target) == [servers.transport]
    kv, _, aux = servers.prefill.call("read", pair.source)
    theirs, _, their_aux = servers.decode.call("read", pair.target)
    check(kv, theirs, dict(zip(src, dst, strict=True)))
    check(aux, their_aux, {1: 2})
    pair.clear(room)
    pair.nothing_left()


def test_a_prefix_that_decode_has_is_not_sent(servers: Servers) -> None:
    pair = Pair(servers, page_size=1)
    room = pair.meet([5, 6], [30, 31], prefix=7)
    assert servers.prefill.call("prefix_len", pair.source, room) == 7
    servers.prefill.call("send", pair.source, room, [5, 6])
    assert pair.ends(room) == ("success", "success")
    pair.clear(room)
    whole = pair.meet([], [], (3, 4), prefix=9)  # all of it is there: metadata alone
    servers.prefill.call("send", pair.source, whole, [])
    assert pair.ends(whole) == ("success", "success")
    kv, _, aux = servers.prefill.call("read", pair.source)
    theirs, _, their_aux = servers.decode.call("read", pair.target)
    check(kv, theirs, {5: 30, 6: 31})
    check(aux, their_aux, {1: 2, 3: 4})


@over_both
def test_states_move_with_the_last_chunk(servers: Servers) -> None:
    pair = Pair(servers, states=["swa", "mamba", "dsa"])
    room = pair.meet([1, 2], [3, 4], states=[[6, 7], [9], None])
    servers.prefill.call("send", pair.source, room, [1])
    servers.prefill.call("send", pair.source, room, [2], [[1, 11], [5], None])
    assert pair.ends(room) == ("success", "success")
    _, states, _ = servers.prefill.call("read", pair.source)
    _, theirs, _ = servers.decode.call("read", pair.target)
    for component, moved in enumerate(({1: 6, 11: 7}, {5: 9}, {})):
        check(states[component], theirs[component], moved)


def test_states_of_unequal_length_fail_by_name(servers: Servers) -> None:
    pair = Pair(servers, states=["swa"])
    room = pair.meet([1], [3], states=[[6, 7]])
    servers.prefill.call("send", pair.source, room, [1], [[1]])
    assert pair.ends(room) == ("failed", "failed")
    ours, theirs = pair.failures(room)
    for reason in (ours, theirs):
        assert "state component 0 has 1 indices at prefill and 2 at decode" in reason
    pair.nothing_left()


def test_more_pages_than_decode_has_published_fail_by_name(servers: Servers) -> None:
    pair = Pair(servers)
    room = pair.meet([1, 2, 3], [3, 4])
    servers.prefill.call("send", pair.source, room, [1, 2, 3])
    assert pair.ends(room) == ("failed", "failed")
    assert "prefill sends 3 pages" in pair.failures(room)[1]


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2), (1, 4), (4, 2)])
def test_heads_go_to_the_ranks_that_hold_them(servers: Servers, sizes: tuple[int, int]) -> None:
    ranks = Ranks(servers, sizes, total_heads=4)
    assert ranks.move([4, 9, 10], [8, 1, 2]) == ["success"] * sum(sizes)
    check(*ranks.pools(), {4: 8, 9: 1, 10: 2})


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_heads_that_ranks_share_arrive_on_all_of_them(
    servers: Servers, sizes: tuple[int, int]
) -> None:
    ranks = Ranks(servers, sizes, total_heads=1)
    assert ranks.move([4, 9], [8, 1]) == ["success"] * sum(sizes)
    source = servers.prefill.call("read", ranks.sources[0])[
        0
    ]  # where all hold one head, the first sends
    for target in ranks.targets:
        check(source, servers.decode.call("read", target)[0], {4: 8, 9: 1})


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_mla_goes_from_one_rank_to_all(servers: Servers, sizes: tuple[int, int]) -> None:
    ranks = Ranks(servers, sizes, total_heads=1, mla=True)
    assert ranks.move([4, 9], [8, 1]) == ["success"] * sum(sizes)
    source = servers.prefill.call("read", ranks.sources[0])[0]
    for target in ranks.targets:
        check(source, servers.decode.call("read", target)[0], {4: 8, 9: 1})


def test_what_cannot_go_between_two_ranks_is_refused_when_they_meet(servers: Servers) -> None:
    ranks = Ranks(servers, (1, 2), total_heads=4, states=["mamba"])
    (reason,) = ranks.move([1], [1])
    assert (
        "TP size, with state of type 'mamba', which differs: prefill has 1, decode has 2" in reason
    )


def test_other_pages_are_refused_when_they_meet(servers: Servers) -> None:
    servers.rank("prefill", dim=8)
    target, room = servers.rank("decode", dim=16), servers.room()
    servers.decode.call("new_receiver", target, room, servers.port)
    assert servers.decode.call("wait", target, room, "waiting") == "failed"
    reason = servers.decode.call("failure", target, room)
    assert "bytes of an item of 'kv' differs: prefill has 64, decode has 128" in reason


def test_a_state_type_that_is_not_moved_is_refused_at_the_start(servers: Servers) -> None:
    with pytest.raises(Exception, match="does not move SGLang's state of type 'dsa_tail'"):
        servers.rank("decode", states=["dsa_tail"])


@over_both
def test_decode_gives_up_and_gets_its_pages_back_when_nobody_writes(servers: Servers) -> None:
    pair = Pair(servers)
    room = pair.meet([1, 2, 3], [4, 5, 6])
    servers.prefill.call("hold")
    servers.prefill.call("send", pair.source, room, [1, 2])
    assert servers.prefill.call("held")
    servers.decode.call("abort", pair.target, room)
    for _ in range(20):  # its pages are not its own yet
        assert servers.decode.call("poll", pair.target, room) == "transferring"
    servers.prefill.call("release")
    assert pair.ends(room) == ("failed", "failed")
    servers.decode.call("erase", pair.target)
    ours, theirs = pair.failures(room)
    assert "Aborted by AbortReq" in theirs
    assert "decode gave this request up" in ours
    pair.nothing_left()
    again = pair.meet([3], [4])
    servers.prefill.call("send", pair.source, again, [3])
    assert pair.ends(again) == ("success", "success")
    source, target = (
        servers.prefill.call("read", pair.source),
        servers.decode.call("read", pair.target),
    )
    check(source[0], target[0], {3: 4})


@over_both
@pytest.mark.parametrize("how", ["abort", "failure"])
def test_prefill_gives_up_and_returns_when_nobody_reads(servers: Servers, how: str) -> None:
    """`failure` is what SGLang calls when another rank of the same server has failed."""
    pair = Pair(servers)
    room = pair.meet([1, 2], [4, 5])
    servers.prefill.call("hold")
    servers.prefill.call("send", pair.source, room, [1])
    assert servers.prefill.call("held")
    servers.prefill.call("release_later")
    servers.prefill.call(how, pair.source, room)
    assert servers.prefill.call("released"), "it returned while a transfer was held"
    assert servers.decode.call("wait", pair.target, room) == "failed"
    assert "prefill" in servers.decode.call("failure", pair.target, room)


def test_decode_fails_on_another_rank_and_returns_when_nobody_writes(servers: Servers) -> None:
    pair = Pair(servers)
    room = pair.meet([1, 2], [4, 5])
    servers.prefill.call("hold")
    servers.prefill.call("send", pair.source, room, [1])
    assert servers.prefill.call("held")
    servers.decode.pipe.send(("failure", (pair.target, room), {}))
    assert not servers.decode.pipe.poll(0.3), "it returned while a transfer was held"
    servers.prefill.call("release")
    servers.decode.answer("failure")
    assert servers.prefill.call("wait", pair.source, room) == "failed"
    servers.decode.call("erase", pair.target)
    assert all((array == SENTINEL).all() for array in servers.decode.call("read", pair.target)[0])


def test_a_request_that_decode_waits_for_too_long_fails_on_both_sides(servers: Servers) -> None:
    pair = Pair(servers)
    room = pair.meet([1], [4])
    servers.decode.call("set_timeout", pair.target, "waiting_timeout", 0.0)
    assert servers.decode.call("wait", pair.target, room) == "failed"
    assert servers.prefill.call("wait", pair.source, room) == "failed"
    assert "timed out" in pair.failures(room)[1]
    pair.nothing_left()


def test_a_request_that_nobody_asks_for_fails_at_prefill(servers: Servers) -> None:
    pair = Pair(servers)
    servers.prefill.call("set_timeout", pair.source, "bootstrap_timeout", 0.0)
    room = servers.room()
    servers.prefill.call("new_sender", pair.source, room, 1, 0)
    assert servers.prefill.call("wait", pair.source, room) == "failed"


def test_a_request_that_never_comes_to_prefill_leaves_nothing_there(servers: Servers) -> None:
    pair = Pair(servers)
    room = servers.room()
    servers.decode.call("new_receiver", pair.target, room, servers.port)
    assert servers.decode.call("wait", pair.target, room, "waiting") == "waiting"
    servers.decode.call("publish", pair.target, room, [4], 2)
    servers.decode.call("abort", pair.target, room)
    assert servers.decode.call("wait", pair.target, room) == "failed"
    assert servers.decode.call("failure", pair.target, room)
    left = servers.prefill.call("left_over", pair.source)
    assert (left["rooms"], left["infos"]) == (0, 0)
    servers.prefill.call("new_sender", pair.source, room, 1, 1)  # it comes after all
    assert servers.prefill.call("wait", pair.source, room) == "failed"
    assert "decode gave this request up" in servers.prefill.call("failure", pair.source, room)
    pair.nothing_left()


def test_a_lost_link_fails_its_requests_and_the_next_one_opens_another(servers: Servers) -> None:
    pair = Pair(servers)
    room = pair.meet([1], [4])
    servers.prefill.call("drop_links", pair.source)
    assert pair.ends(room) == ("failed", "failed")
    for reason in pair.failures(room):
        assert "lost" in reason
    again = pair.meet([1], [5])
    servers.prefill.call("send", pair.source, again, [1])
    assert pair.ends(again) == ("success", "success")


def test_a_room_can_be_used_again(servers: Servers) -> None:
    pair = Pair(servers)
    first = pair.meet([1], [4])
    servers.decode.call("abort", pair.target, first)
    assert pair.ends(first) == ("failed", "failed")
    pair.failures(first)
    servers.room = lambda: first  # type: ignore[method-assign]
    again = pair.meet([2], [5])
    del servers.room
    servers.prefill.call("send", pair.source, again, [2])
    assert pair.ends(again) == ("success", "success")


def test_sglang_finds_the_backend_by_its_name(servers: Servers) -> None:
    found = servers.prefill.call("plug_in")
    assert found["choices"] == 1
    assert found["members"] == ["mooncake", "mori", "nixl", "ascend", "fake", "kvferry"]
    assert found["classes"] == {
        "kvargs": "KVArgs",
        "manager": "KVFerryKVManager",
        "sender": "KVFerryKVSender",
        "receiver": "KVFerryKVReceiver",
        "bootstrap_server": "KVFerryKVBootstrapServer",
    }
    assert found["fake"] == "FakeKVSender"


def freeze_prefill_in_mid_transfer(pair: Pair) -> tuple[int, int]:
    """A room that waits, and one that moves and that decode gives up."""
    servers = pair.servers
    waiting, moving = pair.meet([1, 2], [4, 5]), pair.meet([3, 6], [7, 8])
    servers.prefill.call("hold")
    servers.prefill.call("send", pair.source, moving, [3])
    assert servers.prefill.call("held")
    servers.prefill.freeze()
    servers.decode.call("abort", pair.target, moving)
    return waiting, moving


@pytest.mark.parametrize("transport", ["tcp"])
def test_prefill_that_is_frozen_is_cut_off(servers: Servers) -> None:
    """Over tcp it cannot write any more."""
    servers.decode.call("cut_off_after", 0.5)
    pair = Pair(servers)
    rooms = freeze_prefill_in_mid_transfer(pair)
    for room in rooms:
        assert servers.decode.call("wait", pair.target, room) == "failed"
        assert servers.decode.call("failure", pair.target, room)
    servers.prefill.thaw()
    servers.prefill.call("release")
    for room in rooms:
        assert servers.prefill.call("wait", pair.source, room) == "failed"
        assert servers.prefill.call("failure", pair.source, room)
    pair.nothing_left()
    again = pair.meet([1], [5])
    servers.prefill.call("send", pair.source, again, [1])
    assert pair.ends(again) == ("success", "success")


def test_prefill_that_is_frozen_keeps_the_pages_until_it_is_gone(servers: Servers) -> None:
    """Over cma its process could wake and write."""
    pair = Pair(servers)
    rooms = freeze_prefill_in_mid_transfer(pair)
    for room in rooms:
        assert servers.decode.call("wait", pair.target, room, patience_s=0.5) == ""
    servers.prefill.kill()
    for room in rooms:
        assert servers.decode.call("wait", pair.target, room) == "failed"
    assert "lost" in servers.decode.call("failure", pair.target, rooms[0])
    assert servers.decode.call("failure", pair.target, rooms[1])
    assert set(servers.decode.call("left_over", pair.target).values()) == {0}


@pytest.mark.parametrize("transport", ["tcp"])
def test_killed_decode_fails_what_goes_there(servers: Servers) -> None:
    pair = Pair(servers)
    waiting, moving = pair.meet([1, 2], [4, 5]), pair.meet([3, 6], [7, 8])
    servers.prefill.call("hold")
    servers.prefill.call("send", pair.source, moving, [3])
    assert servers.prefill.call("held")
    servers.decode.kill()
    servers.prefill.call("release")
    for room in (waiting, moving):
        assert servers.prefill.call("wait", pair.source, room) == "failed"
    assert "the link to decode is lost" in servers.prefill.call("failure", pair.source, waiting)
    assert servers.prefill.call("failure", pair.source, moving)
    assert set(servers.prefill.call("left_over", pair.source).values()) == {0}
