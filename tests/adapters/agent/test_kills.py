"""Prefill, decode, daemons and etcd killed at random points of a running load, again and again.

After every round: each handoff ended, in success with the right bytes or in a named error; every
block came back; and no block that came back was written again (it is filled with a canary when it
is free, and looked at when it is next taken).

What a test did (kills, and how the handoffs ended, by mode) is in artifacts/kills/.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.errors import ControlError
from tests import ROOT
from tests.support.agent_process import SENTINEL, WAIT_S
from tests.support.daemon_process import DaemonProcess
from tests.support.etcd_process import EtcdProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kvferry.adapters.agent.handoff import Handoff
    from tests.support.agents import Local, Remote

NUM_BLOCKS, BLOCKS_A_REQUEST, REQUESTS = 64, 4, 12
HANDOFF_S = 20.0  # a busy machine takes seconds to start a process and to meet it
DOOMED_S = 5.0  # where the peer dies: what it has not asked for by then it never will
# Ten combinations of sides, victims and transports: 30 kills, and 500 of both modes together.
KILLS_BY_DEFAULT, KILLS_OF_A_SOAK = 3, 25
PUSH_AND_PULL = ("push", "pull")
ARTIFACTS = ROOT / "artifacts" / "kills"


class Allocator:
    """Blocks of a local cache, with a canary in every free one."""

    def __init__(self, local: Local) -> None:
        self._layers = local.cache.layers
        self._free = list(range(NUM_BLOCKS))

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> list[int]:
        blocks = [self._free.pop(0) for _ in range(BLOCKS_A_REQUEST)]
        for layer in self._layers:
            assert (layer[:, blocks] == SENTINEL).all(), "a free block was written"
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        for layer in self._layers:
            layer[:, blocks] = SENTINEL
        self._free += blocks


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess()
    yield process
    process.end()


def finish(handoff: Handoff) -> str:
    """The name of the error that it ended with, or ""; its blocks are free either way."""
    try:
        handoff.wait(WAIT_S)
    except ControlError as error:
        handoff.blocks_free.wait(WAIT_S)
        return type(error).__name__
    return ""


class Report:
    """What a test has done so far, in a file: also of a test that fails."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._path = ARTIFACTS / f"{request.node.name}.json"
        self._kills: Counter[str] = Counter()
        self._ended: dict[str, Counter[str]] = {}

    def ended(self, mode: str, error: str) -> None:
        self._ended.setdefault(mode, Counter())[error or "well"] += 1

    def killed(self, victim: str) -> None:
        """At the end of a round."""
        self._kills[victim] += 1
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"kills": self._kills, "handoffs": self._ended}, indent=1))

    @property
    def num_handoffs(self) -> int:
        return sum(count.total() for count in self._ended.values())


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    return Report(request)


def request_all(
    local: Local,
    remote: Remote,
    side: str,
    allocator: Allocator,
    name: str,
    modes: Sequence[str],
    timeout_s: float = HANDOFF_S,
) -> list[tuple[Any, str, list[int], int]]:
    """A load: so many requests, asked for by whichever side is here, in each of `modes` in turn."""
    load = []
    for request in range(REQUESTS):
        blocks = allocator.take()
        request_id, seed = f"{name}.{request}", request
        mode = modes[request % len(modes)]
        options: Any = {"mode": mode, "timeout_s": timeout_s}
        theirs = [request * BLOCKS_A_REQUEST + n for n in range(BLOCKS_A_REQUEST)]
        try:
            if side == "decode":
                remote.call("fill", theirs, seed)
                remote.call("send", request_id, theirs)
                handoff: Any = local.agent.receive(request_id, "there", blocks, **options)
            else:
                local.cache.fill(blocks, seed)
                handoff = local.agent.send(request_id, blocks, timeout_s=timeout_s)
                remote.call("receive", request_id, "here", theirs, **options)
        except ControlError:
            allocator.give_back(blocks)
            raise
        load.append((handoff, mode, blocks, seed))
    return load


how_many = pytest.mark.parametrize(
    ("modes", "kills"),
    [
        pytest.param(PUSH_AND_PULL, KILLS_BY_DEFAULT, marks=pytest.mark.slow, id="both"),
        pytest.param(("push",), KILLS_OF_A_SOAK, marks=pytest.mark.soak, id="push"),
        pytest.param(("pull",), KILLS_OF_A_SOAK, marks=pytest.mark.soak, id="pull"),
    ],
)


@pytest.mark.parametrize("side", ["decode", "prefill"])
@pytest.mark.parametrize("victim", ["peer", "daemon"])
@how_many
def test_kills(
    daemon: DaemonProcess,
    new_agent: Callable[..., Local],
    start_agent: Callable[..., Remote],
    report: Report,
    side: str,
    victim: str,
    modes: tuple[str, ...],
    kills: int,
) -> None:
    rng = random.Random(f"{side} {victim}")
    # A new life takes its name at once; with a lease of half a second, a machine that is busy for
    # as long throws living agents out.
    options = {"daemon": daemon.address, "lease_s": 10.0}
    local = new_agent("here", side, NUM_BLOCKS, options=options)
    allocator = Allocator(local)
    role = "prefill" if side == "decode" else "decode"

    def start() -> Remote:
        known = local.agent.members.get("there")
        remote = start_agent("there", role, **options)
        registrar = local.agent._registrar
        assert registrar is not None

        def is_new() -> bool:
            member = registrar.members.get("there")
            return member is not None and (
                known is None or member.registration.life != known.registration.life
            )

        assert registrar.wait(is_new, WAIT_S)
        if side == "prefill":
            remote.call("wait_for_member", "here")
        return remote

    remote = start()
    for kill in range(kills):
        timeout_s = DOOMED_S if victim == "peer" else HANDOFF_S
        load = request_all(local, remote, side, allocator, f"{kill}", modes, timeout_s)
        time.sleep(rng.random() * 0.02)  # somewhere in the middle of it
        (remote if victim == "peer" else daemon).kill()
        for handoff, mode, blocks, seed in load:
            error = finish(handoff)
            report.ended(mode, error)
            assert not error or victim == "peer", "a daemon's death must not touch a handoff"
            if not error and side == "decode":
                assert local.cache.holds(blocks, seed)
            allocator.give_back(blocks)
        assert len(allocator) == NUM_BLOCKS
        report.killed(role if victim == "peer" else victim)
        if victim == "peer":
            remote = start()
        else:
            daemon.start()
    # As good as new: nothing is left of what was killed.
    for handoff, _, blocks, seed in request_all(local, remote, side, allocator, "last", modes):
        assert not finish(handoff)
        assert side == "prefill" or local.cache.holds(blocks, seed)
        allocator.give_back(blocks)
    for _ in range(NUM_BLOCKS // BLOCKS_A_REQUEST):
        allocator.take()
    assert report.num_handoffs == kills * REQUESTS


@how_many
def test_kills_of_what_keeps_the_cluster(
    tmp_path: Path,
    new_agent: Callable[..., Local],
    start_agent: Callable[..., Remote],
    report: Report,
    modes: tuple[str, ...],
    kills: int,
) -> None:
    """Two daemons and their etcd: no handoff may notice, and the picture is whole again after."""
    rng = random.Random("cluster")
    etcd = EtcdProcess(tmp_path)
    daemons: list[DaemonProcess] = []
    try:
        daemons += [DaemonProcess("--store", etcd.url) for _ in range(2)]
        addresses = ",".join(daemon.address for daemon in daemons)
        options = {"daemon": addresses, "lease_s": 5.0}
        local = new_agent("here", "decode", NUM_BLOCKS, options=options)
        allocator = Allocator(local)
        remote = start_agent("there", "prefill", **options)
        local.agent.wait_for_member("there", WAIT_S)
        for kill in range(kills):
            load = request_all(local, remote, "decode", allocator, f"{kill}", modes)
            time.sleep(rng.random() * 0.02)  # somewhere in the middle of it
            victims: list[DaemonProcess | EtcdProcess] = [*daemons, etcd]
            victim = rng.choice(victims)
            victim.kill()
            for handoff, mode, blocks, seed in load:
                error = finish(handoff)
                report.ended(mode, error)
                assert not error, "the death of a daemon or of etcd must not touch a handoff"
                assert local.cache.holds(blocks, seed)
                allocator.give_back(blocks)
            report.killed("etcd" if victim is etcd else "daemon")
            victim.start()
        for daemon in daemons:
            with DaemonClient(daemon.address) as client, client.watch() as watch:
                while set(watch.view.members) != {"here", "there"}:
                    watch.poll(WAIT_S)
        for _ in range(NUM_BLOCKS // BLOCKS_A_REQUEST):
            allocator.take()
    finally:
        for daemon in daemons:
            daemon.end()
        etcd.end()
