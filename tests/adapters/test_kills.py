"""Prefill, decode, daemons and etcd killed at random points of a running load, again and again.

After every round: each handoff ended, in success with the right bytes or in a named error; every
block came back; and no block that came back was written again (it is filled with a canary when it
is free, and looked at when it is next taken).
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.client import DaemonClient
from kvferry.control.errors import ControlError
from tests.daemon_process import DaemonProcess
from tests.etcd_process import EtcdProcess

from .agent_process import SENTINEL, WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvferry.adapters.handoffs import Handoff

    from .conftest import Local, Remote

NUM_BLOCKS, BLOCKS_A_REQUEST, REQUESTS = 64, 4, 12
HANDOFF_S = 20.0  # a busy machine takes seconds to start a process and to meet it
DOOMED_S = 5.0  # where the peer dies: what it has not asked for by then it never will
KILLS_BY_DEFAULT, KILLS_OF_A_SOAK = 3, 50  # ten combinations: 30 and 500 kills


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


def finish(handoff: Handoff) -> bool:
    """Whether it succeeded; its blocks are free either way."""
    try:
        handoff.wait(WAIT_S)
    except ControlError:
        handoff.blocks_free.wait(WAIT_S)
        return False
    return True


def request_all(
    local: Local,
    remote: Remote,
    side: str,
    allocator: Allocator,
    name: str,
    timeout_s: float = HANDOFF_S,
) -> list[tuple[Any, list[int], int]]:
    """A load: so many requests, asked for by whichever side is here."""
    load = []
    for request in range(REQUESTS):
        blocks = allocator.take()
        request_id, seed = f"{name}.{request}", request
        theirs = [request * BLOCKS_A_REQUEST + n for n in range(BLOCKS_A_REQUEST)]
        try:
            if side == "decode":
                remote.call("fill", theirs, seed)
                remote.call("send", request_id, theirs)
                handoff: Any = local.agent.receive(request_id, "there", blocks, timeout_s=timeout_s)
            else:
                local.cache.fill(blocks, seed)
                handoff = local.agent.send(request_id, blocks, timeout_s=timeout_s)
                remote.call("receive", request_id, "here", theirs, timeout_s=timeout_s)
        except ControlError:
            allocator.give_back(blocks)
            raise
        load.append((handoff, blocks, seed))
    return load


how_many = pytest.mark.parametrize(
    "kills",
    [
        pytest.param(KILLS_BY_DEFAULT, marks=pytest.mark.slow),
        pytest.param(KILLS_OF_A_SOAK, marks=pytest.mark.soak),
    ],
)


@pytest.mark.parametrize("side", ["decode", "prefill"])
@pytest.mark.parametrize("victim", ["peer", "daemon"])
@how_many
def test_kills(
    daemon: DaemonProcess,
    new_agent: Callable[..., Local],
    start_agent: Callable[..., Remote],
    side: str,
    victim: str,
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
        enrolment = local.agent._enrolment
        assert enrolment is not None

        def is_new() -> bool:
            member = enrolment.members.get("there")
            return member is not None and (
                known is None or member.registration.life != known.registration.life
            )

        assert enrolment.wait(is_new, WAIT_S)
        if side == "prefill":
            remote.call("wait_for_member", "here")
        return remote

    remote = start()
    outcomes = {True: 0, False: 0}
    for kill in range(kills):
        timeout_s = DOOMED_S if victim == "peer" else HANDOFF_S
        load = request_all(local, remote, side, allocator, f"{kill}", timeout_s)
        time.sleep(rng.random() * 0.02)  # somewhere in the middle of it
        (remote if victim == "peer" else daemon).kill()
        for handoff, blocks, seed in load:
            succeeded = finish(handoff)
            outcomes[succeeded] += 1
            assert succeeded or victim == "peer", "a daemon's death must not touch a handoff"
            if succeeded and side == "decode":
                assert local.cache.holds(blocks, seed)
            allocator.give_back(blocks)
        assert len(allocator) == NUM_BLOCKS
        if victim == "peer":
            remote = start()
        else:
            daemon.start()
    # As good as new: nothing is left of what was killed.
    for handoff, blocks, seed in request_all(local, remote, side, allocator, "last"):
        assert finish(handoff)
        assert side == "prefill" or local.cache.holds(blocks, seed)
        allocator.give_back(blocks)
    for _ in range(NUM_BLOCKS // BLOCKS_A_REQUEST):
        allocator.take()
    assert outcomes[True] + outcomes[False] == kills * REQUESTS


@how_many
def test_kills_of_what_keeps_the_cluster(
    tmp_path: Path,
    new_agent: Callable[..., Local],
    start_agent: Callable[..., Remote],
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
            load = request_all(local, remote, "decode", allocator, f"{kill}")
            time.sleep(rng.random() * 0.02)  # somewhere in the middle of it
            victims: list[DaemonProcess | EtcdProcess] = [*daemons, etcd]
            victim = rng.choice(victims)
            victim.kill()
            for handoff, blocks, seed in load:
                assert finish(handoff), "the death of a daemon or of etcd must not touch a handoff"
                assert local.cache.holds(blocks, seed)
                allocator.give_back(blocks)
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
