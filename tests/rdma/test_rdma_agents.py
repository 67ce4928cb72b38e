"""Agents of two processes over RDMA: handoffs, a rail that breaks in the middle of one, and the retry."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.errors import HandoffError
from tests.adapters.agent_process import Cache
from tests.adapters.agents import Local, Remote

from .conftest import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SRC = [*range(2, 40)]
DST = [*range(41, 3, -1)]
# 32 KiB a plane, block and layer: written straight into the blocks, 7 MiB in all.
WIDE = {"dim": 4096}


@pytest.fixture
def decode() -> Iterator[Local]:
    local = Local("decode-0", "decode", "verbs", Cache(44, **WIDE))
    yield local
    local.agent.close()


@pytest.fixture
def prefill(decode: Local) -> Iterator[Remote]:
    remote = Remote()
    remote.begin(name="prefill-0", role="prefill", transport="verbs", num_blocks=44, **WIDE)
    decode.agent.connect(remote.address, PATIENCE_S)
    yield remote
    remote.end()


def until(happens: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def hand_over(decode: Local, prefill: Remote, mode: Any, seed: int) -> None:
    """One handoff, from its begin to its end; the bytes of every block here are looked at."""
    prefill.call("fill", SRC, seed)
    sending = prefill.call("send", "r", SRC, timeout_s=PATIENCE_S)
    handoff = decode.agent.receive("r", "prefill-0", DST, mode=mode, timeout_s=PATIENCE_S)
    assert handoff.wait(PATIENCE_S) == len(SRC) * decode.cache.block_nbytes
    assert prefill.call("wait", sending, PATIENCE_S) == handoff.nbytes
    prefill.call("wait_for_blocks", sending, PATIENCE_S)
    assert decode.cache.holds(DST, seed)
    assert decode.cache.touched() == sorted(DST)


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_a_handoff_goes_over_devices(decode: Local, prefill: Remote, mode: Any) -> None:
    hand_over(decode, prefill, mode, 1)
    (link,) = decode.agent.engine.links
    assert link.transport == "verbs"
    assert mode == "pull" or link.rails[0].received_nbytes >= len(SRC) * decode.cache.block_nbytes


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_a_rail_that_breaks_fails_its_handoff_and_the_retry_arrives(
    decode: Local, prefill: Remote, wire: Any, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """The queue pair of the direct writes goes to error at one end: what a device does that refuses."""
    imms: list[int] = []
    engine = decode.agent.engine
    expect = engine.expect

    def note(imm: int, **options: Any) -> Any:
        imms.append(imm)
        return expect(imm, **options)

    monkeypatch.setattr(engine, "expect", note)
    prefill.call("fill", SRC, 1)
    (link,) = engine.links
    path: Any = link._path
    rail = path.rails[0]
    epoch, queue = rail.epoch, rail.direct[0]
    wire.spoil("rate", "8mbit")  # 1 MB/s: it is under way for seconds
    sending = prefill.call("send", "r", SRC, timeout_s=PATIENCE_S)
    handoff = decode.agent.receive("r", "prefill-0", DST, mode=mode, timeout_s=PATIENCE_S)
    until(lambda: rail.received_nbytes if mode == "push" else queue.flying)
    path.loop.soon(queue.stop)
    with pytest.raises(HandoffError, match="rail") as caught:
        handoff.wait(PATIENCE_S)
    assert caught.value.retryable
    with pytest.raises(HandoffError, match="rail"):
        prefill.call("wait", sending, PATIENCE_S)
    handoff.blocks_free.wait(PATIENCE_S)
    prefill.call("wait_for_blocks", sending, PATIENCE_S)
    wire.mend()
    assert set(decode.cache.touched()) <= set(DST)
    until(lambda: rail.up and rail.epoch > epoch)
    hand_over(decode, prefill, mode, 2)
    assert engine.links == (link,)
    if mode == "push":
        assert len(imms) == len(set(imms)) == 2
