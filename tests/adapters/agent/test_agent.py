"""Handoffs between agents of two processes: the bytes, the order of events, and who owns what."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.errors import (
    AgentClosed,
    BlocksMismatch,
    HandoffTimeout,
    LayoutMismatch,
    NotConnected,
    RoleMismatch,
)
from kvferry.engine.errors import BlockOutOfRange, OverlappingBlocks, PlanError
from tests.support.agent_process import NUM_LAYERS, WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.agents import Local, Remote

MODES = pytest.mark.parametrize("mode", ["push", "pull"])
SRC = [9, 2, 11, 40, 3]
DST = [1, 0, 7, 30, 12]


class Pair:
    """A decode agent here and a prefill agent there, connected."""

    def __init__(self, new_agent: Callable[..., Local], start: Callable[..., Remote]) -> None:
        self.here = new_agent("decode-0", "decode")
        self.there = start("prefill-0", "prefill")
        assert self.here.agent.connect(self.there.address) == "prefill-0"


@pytest.fixture
def pair(new_agent: Callable[..., Local], start_agent: Callable[..., Remote]) -> Pair:
    return Pair(new_agent, start_agent)


@MODES
@pytest.mark.parametrize("first", ["source", "request"])
def test_a_handoff_moves_exactly_its_blocks(pair: Pair, mode: Any, first: str) -> None:
    pair.there.call("fill", range(64), 1)
    pair.there.call("fill", SRC, 2)
    if first == "source":
        sending = pair.there.call("send", "r", SRC)
    handoff = pair.here.agent.receive("r", "prefill-0", DST, mode=mode)
    if first == "request":
        sending = pair.there.call("send", "r", SRC)
    nbytes = len(SRC) * pair.here.cache.block_nbytes
    assert handoff.wait(WAIT_S) == nbytes
    assert handoff.blocks_free.done()
    assert pair.here.cache.holds(DST, 2)
    assert pair.here.cache.touched() == sorted(DST)
    assert pair.there.call("wait", sending) == nbytes
    pair.there.call("wait_for_blocks", sending)
    assert handoff.started_s <= handoff.finished_s
    assert handoff.nbytes == nbytes
    assert handoff.error is None


@MODES
def test_layers_go_out_as_they_are_computed(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote], mode: Any
) -> None:
    here = new_agent("prefill-0", "prefill")
    there = start_agent("decode-0", "decode")
    assert there.call("connect", here.agent.address) == "prefill-0"
    receiving = there.call("receive", "r", "prefill-0", DST, mode=mode)
    sending = here.agent.open_send("r", SRC)
    for layer in range(NUM_LAYERS):
        here.cache.fill(SRC, 3, range(layer, layer + 1))
        assert not there.call("done", receiving)
        if layer < NUM_LAYERS - 1:
            sending.write_layers(range(layer, layer + 1))
    sending.finish()
    assert sending.wait(WAIT_S) == len(SRC) * here.cache.block_nbytes
    assert there.call("wait", receiving) == sending.nbytes
    assert there.call("holds", DST, 3)
    assert there.call("touched") == sorted(DST)


@MODES
def test_many_at_once(pair: Pair, mode: Any) -> None:
    handoffs = []
    for request in range(32):
        pair.there.call("fill", [2 * request, 2 * request + 1], request)
        pair.there.call("send", f"r{request}", [2 * request, 2 * request + 1])
    for request in reversed(range(32)):
        ids = [63 - 2 * request, 62 - 2 * request]
        handoffs.append(
            (request, ids, pair.here.agent.receive(f"r{request}", "prefill-0", ids, mode=mode))
        )
    for request, ids, handoff in handoffs:
        handoff.wait(WAIT_S)
        assert pair.here.cache.holds(ids, request)


@MODES
def test_handoffs_can_be_awaited(pair: Pair, mode: Any) -> None:
    pair.there.call("fill", SRC, 4)

    async def take() -> int:
        handoff = pair.here.agent.receive("r", "prefill-0", DST, mode=mode)
        pair.there.call("send", "r", SRC)
        nbytes = await handoff
        await handoff.blocks_free
        return nbytes

    assert asyncio.run(take()) == len(SRC) * pair.here.cache.block_nbytes
    assert pair.here.cache.holds(DST, 4)


@MODES
def test_a_handoff_of_no_blocks_still_frees_the_source(pair: Pair, mode: Any) -> None:
    sending = pair.there.call("send", "r", [])
    assert pair.here.agent.receive("r", "prefill-0", [], mode=mode).wait(WAIT_S) == 0
    assert pair.there.call("wait", sending) == 0
    assert pair.here.cache.touched() == []


@MODES
def test_one_agent_can_do_both(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote], mode: Any
) -> None:
    here, there = new_agent("a", "both"), start_agent("b", "both")
    assert here.agent.connect(there.address) == "b"
    assert there.call("connect", here.agent.address) == "a"  # both may dial
    here.cache.fill(SRC, 5)
    receiving = there.call("receive", "r", "a", DST, mode=mode)
    here.agent.send("r", SRC).wait(WAIT_S)
    there.call("wait", receiving)
    assert there.call("holds", DST, 5)
    there.call("send", "back", DST)
    here.agent.receive("back", "b", [60, 61, 62, 63, 59], mode=mode).wait(WAIT_S)
    assert here.cache.holds([60, 61, 62, 63, 59], 5)


def test_an_imm_is_never_used_twice(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pair.here.agent.engine
    taken: list[int] = []
    expect = engine.expect

    def note(imm: int, **options: Any) -> Any:
        taken.append(imm)
        return expect(imm, **options)

    monkeypatch.setattr(engine, "expect", note)
    for attempt in range(30):
        handoff = pair.here.agent.receive("r", "prefill-0", DST)
        if attempt % 2:
            handoff.cancel()
        else:
            pair.there.call("send", "r", SRC)
            handoff.wait(WAIT_S)
        handoff.blocks_free.wait(WAIT_S)
    assert len(taken) == 30
    assert len(set(taken)) == 30


@MODES
def test_different_numbers_of_blocks_fail_on_both_sides(pair: Pair, mode: Any) -> None:
    sending = pair.there.call("send", "r", SRC[:-1])
    handoff = pair.here.agent.receive("r", "prefill-0", DST, mode=mode)
    with pytest.raises(BlocksMismatch, match="asks for 5, prefill has 4"):
        handoff.wait(WAIT_S)
    handoff.blocks_free.wait(WAIT_S)
    with pytest.raises(BlocksMismatch):
        pair.there.call("wait", sending)
    assert pair.here.cache.touched() == []


@MODES
def test_a_request_that_nobody_sends_times_out(pair: Pair, mode: Any) -> None:
    handoff = pair.here.agent.receive("r", "prefill-0", DST, mode=mode, timeout_s=0.2)
    with pytest.raises(HandoffTimeout) as caught:
        handoff.wait(WAIT_S)
    assert caught.value.retryable
    assert (caught.value.handoff, caught.value.peer) == ("r#1", "prefill-0")
    handoff.blocks_free.wait(WAIT_S)


def test_a_wait_of_its_own_ends_without_the_handoff(pair: Pair) -> None:
    handoff = pair.here.agent.receive("r", "prefill-0", DST)
    with pytest.raises(TimeoutError):
        handoff.wait(0.01)
    assert not handoff.done()
    handoff.cancel()


def test_bad_ids_and_names_are_refused_before_any_byte(pair: Pair) -> None:
    receive = pair.here.agent.receive
    with pytest.raises(OverlappingBlocks):
        receive("r", "prefill-0", [1, 2, 1])
    with pytest.raises(BlockOutOfRange, match="64"):
        receive("r", "prefill-0", [1, 64])
    with pytest.raises(BlockOutOfRange):
        receive("r", "prefill-0", [-1])
    with pytest.raises(PlanError):
        receive("r", "prefill-0", [[1, 2]])  # type: ignore[list-item]
    with pytest.raises(NotConnected, match="nobody"):
        receive("r", "nobody", [1])
    with pytest.raises(BlockOutOfRange):
        pair.there.call("send", "r", [64])
    assert pair.here.cache.touched() == []


def test_mismatching_layouts_are_refused_by_name(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote]
) -> None:
    here = new_agent("decode-0", "decode")
    there = start_agent("prefill-0", "prefill", dim=8)
    with pytest.raises(LayoutMismatch, match="'dim' differs: source has 8") as caught:
        here.agent.connect(there.address)
    assert caught.value.peer == "prefill-0"
    with pytest.raises(NotConnected):
        here.agent.receive("r", "prefill-0", DST)
    other = new_agent("prefill-1", "prefill")
    with pytest.raises(LayoutMismatch, match="'dim' differs"):
        new_agent("decode-1", "decode", dim=8).agent.connect(other.agent.address)


@pytest.mark.parametrize("dials", ["prefill", "decode"])
def test_a_destination_that_holds_more_than_the_source_is_refused(
    new_agent: Callable[..., Local], dials: str
) -> None:
    agents = {
        "prefill": new_agent("prefill-0", "prefill", heads=2).agent,
        "decode": new_agent("decode-0", "decode", heads=4).agent,
    }
    there = agents["decode" if dials == "prefill" else "prefill"]
    with pytest.raises(LayoutMismatch, match=r"source has \[0, 2\), the destination \[0, 4\)"):
        agents[dials].connect(there.address)
    less = new_agent("decode-1", "decode", heads=1).agent
    assert less.connect(agents["prefill"].address) == "prefill-0"


def test_two_of_one_role_are_refused_by_name(new_agent: Callable[..., Local]) -> None:
    one, two = new_agent("decode-0", "decode"), new_agent("decode-1", "decode")
    with pytest.raises(RoleMismatch, match="both are decode"):
        one.agent.connect(two.agent.address)


def test_an_agent_that_nobody_is_cannot_be_connected_to(new_agent: Callable[..., Local]) -> None:
    here = new_agent("decode-0", "decode")
    with pytest.raises(TimeoutError):
        here.agent.connect("tcp://127.0.0.1:1", timeout_s=0.2)


def test_connecting_twice_is_harmless(pair: Pair) -> None:
    assert pair.here.agent.connect(pair.there.address) == "prefill-0"
    pair.there.call("fill", SRC, 6)
    pair.there.call("send", "r", SRC)
    pair.here.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    assert pair.here.cache.holds(DST, 6)


def test_a_closed_agent_says_so(new_agent: Callable[..., Local]) -> None:
    here = new_agent("decode-0", "decode")
    here.agent.close()
    here.agent.close()
    with pytest.raises(AgentClosed):
        here.agent.receive("r", "prefill-0", [1])
    with pytest.raises(AgentClosed):
        here.agent.connect("tcp://127.0.0.1:1")


def test_a_callback_cannot_close_its_agent(pair: Pair) -> None:
    agent, caught = pair.here.agent, []
    told = threading.Event()

    def close(_: object) -> None:
        try:
            agent.close()
        except RuntimeError as error:
            caught.append(str(error))
        told.set()

    handoff = agent.receive("r", "prefill-0", DST)
    handoff.add_done_callback(close)
    pair.there.call("send", "r", SRC)
    handoff.wait(WAIT_S)
    assert told.wait(WAIT_S)
    assert caught == [
        "decode-0 cannot be closed by a callback that it makes: close it from a thread"
    ]
