"""SGLang's real disaggregation classes with kvferry under them, a prefill and a decode process.

Needs SGLang's wheel, which `tools/sglang_wheel/environment.py` unpacks into a cache. Its server needs
GPUs and is not started: `sglang_ranks/sglang_imports.py` says what is real and what is not, and
`sglang_ranks/rank_process.py` does what its scheduler does.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.tools.pinned import CannotInstall
from kvferry.tools.sglang_wheel.environment import ensure

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from tests.child import Child
    from tests.needs import lack

    Pages = list[int]
else:
    from child import Child  # in the folder above: `pythonpath` in pyproject.toml
    from needs import lack

SCRIPT = Path(__file__).parent / "sglang_ranks" / "rank_process.py"
ANSWER_S = 90.0  # reached only when something hangs
SENTINEL = 0xA5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def packages() -> str:
    """The folder that SGLang is unpacked in."""
    try:
        return str(ensure())
    except CannotInstall as error:
        lack(f"SGLang's wheel cannot be had here: {error}")


class Servers:
    """A prefill and a decode process; ranks and rooms of theirs are numbered anew for each test."""

    def __init__(self, packages: str) -> None:
        self._packages = packages
        self.transport = ""
        self.prefill, self.decode = self._process(), self._process()
        self.port = 0
        self._numbers = itertools.count(1)
        self._ranks: list[tuple[Child, str]] = []

    def _process(self) -> Child:
        return Child(SCRIPT, self._packages, answer_s=ANSWER_S)

    def begin(self, transport: str) -> None:
        """For one test: what the one before has killed starts again, with a new bootstrap server."""
        self.transport = transport
        if self.prefill.process.poll() is not None:
            self.prefill = self._process()
        if self.decode.process.poll() is not None:
            self.decode = self._process()
        self.port = self.prefill.call("bootstrap")

    def rank(self, mode: str, **options: Any) -> str:
        process = self.prefill if mode == "prefill" else self.decode
        name = f"{mode}-{next(self._numbers)}"
        process.call("start", name, mode, transports=self.transport, **options)
        self._ranks.append((process, name))
        return name

    def room(self) -> int:
        return next(self._numbers)

    def stop_ranks(self) -> None:
        ranks, self._ranks = self._ranks, []
        for process, name in reversed(ranks):
            if process.process.poll() is None:
                process.call("stop", name)

    def end(self) -> None:
        self.prefill.end()
        self.decode.end()


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


class Pair:
    """One prefill and one decode rank, and requests between them."""

    def __init__(self, servers: Servers, **options: Any) -> None:
        self.servers = servers
        self.source = servers.rank("prefill", fill=servers.room(), **options)
        self.target = servers.rank("decode", **options)

    def meet(self, src: Pages, dst: Pages, aux: tuple[int, int] = (1, 2), **publish: Any) -> int:
        """A request whose pages decode has published, and prefill knows."""
        room = self.servers.room()
        self.servers.prefill.call("new_sender", self.source, room, len(src), aux[0])
        self.servers.decode.call("new_receiver", self.target, room, self.servers.port)
        assert self.servers.decode.call("wait", self.target, room, "waiting") == "waiting"
        self.servers.decode.call("publish", self.target, room, dst, aux[1], **publish)
        assert self.servers.prefill.call("wait", self.source, room, "waiting") == "waiting"
        return room

    def ends(self, room: int) -> tuple[str, str]:
        return (
            self.servers.prefill.call("wait", self.source, room),
            self.servers.decode.call("wait", self.target, room),
        )

    def clear(self, room: int) -> None:
        self.servers.prefill.call("clear", self.source, room)
        self.servers.decode.call("clear", self.target, room)

    def failures(self, room: int) -> tuple[str, str]:
        return (
            self.servers.prefill.call("failure", self.source, room),
            self.servers.decode.call("failure", self.target, room),
        )

    def nothing_left(self) -> None:
        assert set(self.servers.prefill.call("left_over", self.source).values()) == {0}
        assert set(self.servers.decode.call("left_over", self.target).values()) == {0}


def check(
    source: list[npt.NDArray[np.uint8]],
    target: list[npt.NDArray[np.uint8]],
    moved: dict[int, int],
) -> None:
    """Items have moved, from the first to the second number, and nothing else was written."""
    assert len(source) == len(target)
    for here, there in zip(source, target, strict=True):
        expected = np.full_like(there, SENTINEL)
        for src, dst in moved.items():
            expected[dst] = here[src]
        assert np.array_equal(there, expected)


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


class Ranks:
    """Servers of several ranks: one room on all of them."""

    def __init__(self, servers: Servers, sizes: tuple[int, int], **options: Any) -> None:
        self.servers = servers
        heads = options.get("total_heads", 4)
        self.sources, self.targets = (
            [
                servers.rank(
                    mode,
                    fill=100 + rank if mode == "prefill" else None,
                    tp_size=size,
                    tp_rank=rank,
                    heads=max(1, heads // size),
                    **options,
                )
                for rank in range(size)
            ]
            for mode, size in zip(("prefill", "decode"), sizes, strict=True)
        )

    def move(self, src: Pages, dst: Pages, states: Any = (None, None)) -> list[str]:
        """How the room ended on every rank."""
        prefill, decode, room = self.servers.prefill, self.servers.decode, self.servers.room()
        for source in self.sources:
            prefill.call("new_sender", source, room, len(src), 1)
        for target in self.targets:
            decode.call("new_receiver", target, room, self.servers.port)
        for target in self.targets:
            if decode.call("wait", target, room, "waiting") != "waiting":
                return [decode.call("failure", target, room)]
        for target in self.targets:
            decode.call("publish", target, room, dst, 2, states[1])
        for source in self.sources:
            assert prefill.call("wait", source, room, "waiting") == "waiting"
            prefill.call("send", source, room, src, states[0])
        ended = [prefill.call("wait", source, room) for source in self.sources]
        return ended + [decode.call("wait", target, room) for target in self.targets]

    def pools(self) -> tuple[list[npt.NDArray[np.uint8]], list[npt.NDArray[np.uint8]]]:
        """Of each side: all ranks' heads side by side, for each layer's K and V."""
        whole = []
        for process, names in (
            (self.servers.prefill, self.sources),
            (self.servers.decode, self.targets),
        ):
            ranks = [process.call("read", name)[0] for name in names]
            whole.append([np.concatenate(parts, axis=2) for parts in zip(*ranks, strict=True)])
        return whole[0], whole[1]


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
