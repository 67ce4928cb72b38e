"""Handoffs that end badly: cancelled, late, cut off, with a dead or frozen peer.

Every one ends in a named error, and blocks come back when nobody can touch them, not before. A gate
before the bytes holds a transfer in flight for as long as a test needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.errors import (
    AgentClosed,
    ControlError,
    HandoffCancelled,
    HandoffError,
    HandoffTimeout,
    LinkLost,
    SendFailed,
)
from kvferry.control.handoff.machine import Timing
from tests.support.agent_process import SENTINEL, WAIT_S
from tests.support.leaks import LeakCheck

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.agent_process import Gate
    from tests.support.agents import Local, Remote

MODES = pytest.mark.parametrize("mode", ["push", "pull"])
SRC = [9, 2, 11, 40, 3]
DST = [1, 0, 7, 30, 12]


@pytest.fixture
def decode(new_agent: Callable[..., Local]) -> Local:
    return new_agent("decode-0", "decode")


@pytest.fixture
def prefill(start_agent: Callable[..., Remote], decode: Local) -> Remote:
    """A prefill agent in another process, connected, with a request to hand over."""
    remote = start_agent("prefill-0", "prefill")
    decode.agent.connect(remote.address)
    remote.call("fill", SRC, 1)
    return remote


def begin(decode: Local, prefill: Remote, gate: Gate, mode: Any, **options: Any) -> tuple[Any, int]:
    """A handoff whose bytes are held just before they move, by whoever moves or sends them."""
    here = mode == "pull" and decode.agent.engine.transports == ("cma",)
    if here:
        gate.close()
    else:
        prefill.call("close_gate")
    sending = prefill.call("send", "r", SRC)
    handoff = decode.agent.receive("r", "prefill-0", DST, mode=mode, **options)
    assert gate.reached.wait(WAIT_S) if here else prefill.call("reach_gate")
    return handoff, sending


def let_go(decode: Local, prefill: Remote, gate: Gate) -> None:
    """Lets the bytes move, once both agents have taken what they were told so far."""
    decode.agent.connect(prefill.address)
    # Of no blocks: its request comes behind all that prefill was told, on the same way.
    prefill.call("send", "behind", [])
    decode.agent.receive("behind", "prefill-0", []).wait(WAIT_S)
    prefill.call("settle")
    gate.open()
    prefill.call("open_gate")


@MODES
def test_cancel_before_there_is_a_source(decode: Local, prefill: Remote, mode: Any) -> None:
    handoff = decode.agent.receive("r", "prefill-0", DST, mode=mode)
    handoff.cancel("the client hung up")
    with pytest.raises(HandoffCancelled, match="the client hung up") as caught:
        handoff.wait(WAIT_S)
    assert caught.value.handoff == "r#1"
    handoff.blocks_free.wait(WAIT_S)
    # What was said before this handoff is heard before it: prefill knows of the end.
    prefill.call("send", "other", [5])
    decode.agent.receive("other", "prefill-0", [5], mode=mode).wait(WAIT_S)
    # The source that comes later goes to the next attempt.
    again = decode.agent.receive("r", "prefill-0", DST, mode=mode)
    prefill.call("send", "r", SRC)
    again.wait(WAIT_S)
    assert decode.cache.holds(DST, 1)


@MODES
def test_cancel_by_decode_while_bytes_move(
    decode: Local, prefill: Remote, gate: Gate, mode: Any
) -> None:
    handoff, sending = begin(decode, prefill, gate, mode)
    handoff.cancel()
    if mode == "push":
        with pytest.raises(HandoffCancelled):
            handoff.wait(WAIT_S)
    assert not handoff.blocks_free.done()  # somebody still has a hand on them
    assert not prefill.call("done", sending)
    let_go(decode, prefill, gate)
    handoff.blocks_free.wait(WAIT_S)
    with pytest.raises(HandoffCancelled):
        handoff.wait(WAIT_S)
    for layer in decode.cache.layers:
        layer[:] = SENTINEL  # the blocks are ours again
    with pytest.raises(HandoffCancelled) as caught:
        prefill.call("wait", sending)
    assert caught.value.peer == "decode-0"
    prefill.call("wait_for_blocks", sending)
    assert decode.cache.touched() == []


@MODES
def test_cancel_by_prefill_while_bytes_move(
    decode: Local, prefill: Remote, gate: Gate, mode: Any
) -> None:
    handoff, sending = begin(decode, prefill, gate, mode)
    prefill.call("cancel", sending)
    assert not handoff.blocks_free.done()
    let_go(decode, prefill, gate)
    # The bytes that were held may have been the last ones: then decode has them all.
    try:
        handoff.wait(WAIT_S)
    except HandoffError as error:
        assert error.retryable or isinstance(error, HandoffCancelled)  # noqa: PT017
    else:
        assert decode.cache.holds(DST, 1)
    handoff.blocks_free.wait(WAIT_S)
    with pytest.raises(HandoffCancelled):
        prefill.call("wait", sending)
    prefill.call("wait_for_blocks", sending)


@MODES
def test_cancel_after_the_end_changes_nothing(decode: Local, prefill: Remote, mode: Any) -> None:
    sending = prefill.call("send", "r", SRC)
    handoff = decode.agent.receive("r", "prefill-0", DST, mode=mode)
    handoff.wait(WAIT_S)
    handoff.cancel()
    prefill.call("wait", sending)
    prefill.call("cancel", sending)
    assert handoff.error is None
    assert handoff.blocks_free.done()
    prefill.call("wait", sending)
    assert decode.cache.holds(DST, 1)


@MODES
def test_a_deadline_passes_while_bytes_move(
    decode: Local, prefill: Remote, gate: Gate, mode: Any
) -> None:
    handoff, sending = begin(decode, prefill, gate, mode, timeout_s=0.5)
    with pytest.raises(HandoffTimeout):  # one that begins later and has as long ends later
        decode.agent.receive("other", "prefill-0", [5], timeout_s=0.5).wait(WAIT_S)
    assert not handoff.blocks_free.done()
    let_go(decode, prefill, gate)
    handoff.blocks_free.wait(WAIT_S)
    with pytest.raises(HandoffTimeout):
        handoff.wait(WAIT_S)
    with pytest.raises(HandoffError):
        prefill.call("wait", sending)


@MODES
def test_prefill_killed_while_bytes_move(
    decode: Local, prefill: Remote, gate: Gate, mode: Any
) -> None:
    handoff, _ = begin(decode, prefill, gate, mode)
    prefill.kill()
    gate.open()
    with pytest.raises(HandoffError) as caught:
        handoff.wait(WAIT_S)
    assert caught.value.retryable
    assert caught.value.peer == "prefill-0"
    handoff.blocks_free.wait(WAIT_S)
    with pytest.raises(ControlError):
        decode.agent.receive("r", "prefill-0", DST).wait(WAIT_S)


@MODES
def test_decode_killed_while_bytes_move(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote], gate: Gate, mode: Any
) -> None:
    prefill = new_agent("prefill-0", "prefill")
    decode = start_agent("decode-0", "decode")
    decode.call("connect", prefill.agent.address)
    if mode == "push":
        gate.close()
    else:
        decode.call("close_gate")
    handoff = prefill.agent.send("r", SRC)
    decode.call("receive", "r", "prefill-0", DST, mode=mode)
    assert gate.reached.wait(WAIT_S) if mode == "push" else decode.call("reach_gate")
    decode.kill()
    gate.open()
    with pytest.raises(HandoffError):
        handoff.wait(WAIT_S)
    handoff.blocks_free.wait(WAIT_S)
    # Prefill is as good as new.
    prefill.cache.fill(SRC, 2)
    other = start_agent("decode-0", "decode")
    other.call("connect", prefill.agent.address)
    receiving = other.call("receive", "r", "prefill-0", DST, mode=mode)
    prefill.agent.send("r", SRC).wait(WAIT_S)
    other.call("wait", receiving)
    assert other.call("holds", DST, 2)


def test_blocks_of_a_frozen_writer_stay_until_it_cannot_write(
    decode: Local, prefill: Remote, gate: Gate, transport: str
) -> None:
    handoff, _ = begin(decode, prefill, gate, "push")
    prefill.freeze()
    with pytest.raises(LinkLost):
        handoff.wait(WAIT_S)
    if transport == "cma":
        # A frozen process may wake up in the middle of its write.
        assert not handoff.blocks_free.done()
        prefill.kill()
    handoff.blocks_free.wait(WAIT_S)


def test_a_writer_that_wakes_up_gives_the_blocks_back(
    decode: Local, prefill: Remote, gate: Gate
) -> None:
    handoff, _ = begin(decode, prefill, gate, "push")
    prefill.freeze()
    with pytest.raises(LinkLost):
        handoff.wait(WAIT_S)
    prefill.thaw()
    prefill.call("open_gate")
    handoff.blocks_free.wait(WAIT_S)
    for layer in decode.cache.layers:
        layer[:] = SENTINEL
    assert decode.agent.connect(prefill.address) == "prefill-0"  # and all is well again
    prefill.call("send", "again", SRC)
    decode.agent.receive("again", "prefill-0", DST).wait(WAIT_S)
    assert decode.cache.holds(DST, 1)
    assert decode.cache.touched() == sorted(DST)


def test_a_source_that_a_frozen_reader_may_read_is_not_reused(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote], transport: str
) -> None:
    prefill = new_agent("prefill-0", "prefill")
    decode = start_agent("decode-0", "decode")
    decode.call("connect", prefill.agent.address)
    decode.call("close_gate")
    handoff = prefill.agent.send("r", SRC)
    decode.call("receive", "r", "prefill-0", DST, mode="pull")
    assert decode.call("reach_gate")
    decode.freeze()
    with pytest.raises(LinkLost):
        handoff.wait(WAIT_S)
    if transport == "cma":
        assert not handoff.blocks_free.done()
    decode.kill()
    handoff.blocks_free.wait(WAIT_S)


@MODES
def test_the_dead_leave_nothing_behind(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote], mode: Any
) -> None:
    """No thread, no descriptor, and no socket that dials a dead peer for ever."""
    decode = new_agent("decode-0", "decode", options={"timing": Timing(remember_s=0.05)})
    leaks = LeakCheck()
    for number in range(4):
        prefill = start_agent(f"prefill-{number}", "prefill")
        name = decode.agent.connect(prefill.address)
        waiting = decode.agent.receive("r", name, DST, mode=mode)
        prefill.kill()
        with pytest.raises(LinkLost):
            waiting.wait(WAIT_S)
        waiting.blocks_free.wait(WAIT_S)
        prefill.pipe.close()
        leaks.take()


@MODES
def test_a_restarted_peer_takes_its_name_again(
    decode: Local, prefill: Remote, start_agent: Callable[..., Remote], mode: Any
) -> None:
    waiting = decode.agent.receive("r", "prefill-0", DST, mode=mode)
    reborn = start_agent("prefill-0", "prefill")
    assert decode.agent.connect(reborn.address) == "prefill-0"
    with pytest.raises(LinkLost, match="restarted"):
        waiting.wait(WAIT_S)
    waiting.blocks_free.wait(WAIT_S)
    reborn.call("fill", SRC, 3)
    reborn.call("send", "r", SRC)
    decode.agent.receive("r", "prefill-0", DST, mode=mode).wait(WAIT_S)
    assert decode.cache.holds(DST, 3)


@MODES
def test_closing_an_agent_ends_its_handoffs_on_both_sides(
    decode: Local, prefill: Remote, mode: Any
) -> None:
    handoff = decode.agent.receive("r", "prefill-0", DST, mode=mode)
    other = prefill.call("send", "not asked for", SRC)
    decode.agent.close()
    with pytest.raises(AgentClosed):
        handoff.wait(0)
    handoff.blocks_free.wait(0)  # closing waits for the peer's goodbye
    assert not prefill.call("done", other)
    prefill.call("close")
    with pytest.raises(AgentClosed):
        prefill.call("wait", other)
    prefill.call("wait_for_blocks", other)


@MODES
def test_the_last_done_is_heard_before_the_goodbye(
    decode: Local, prefill: Remote, mode: Any
) -> None:
    sending = prefill.call("send", "r", SRC)
    decode.agent.receive("r", "prefill-0", DST, mode=mode).wait(WAIT_S)
    decode.agent.close()
    prefill.call("wait", sending)


def test_closing_beside_a_frozen_writer_keeps_its_blocks(
    decode: Local, prefill: Remote, gate: Gate, transport: str
) -> None:
    handoff, _ = begin(decode, prefill, gate, "push")
    prefill.freeze()
    decode.agent.close()
    with pytest.raises(AgentClosed):
        handoff.wait(0)
    if transport == "cma":
        with pytest.raises(AgentClosed, match="as long as this process lives"):
            handoff.blocks_free.wait(0)
    else:
        handoff.blocks_free.wait(0)


def test_a_full_queue_is_an_error_not_a_drop(
    decode: Local, prefill: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    messaging = decode.agent._core.messaging
    full = "4096 messages wait already: the peer does not read"
    with monkeypatch.context() as patched:
        patched.setattr(messaging, "_hand_over", lambda route, frames: full)
        handoff = decode.agent.receive("r", "prefill-0", DST)
        with pytest.raises(SendFailed, match="4096 messages wait"):
            handoff.wait(WAIT_S)
        assert decode.agent.messages_refused
    handoff.blocks_free.wait(WAIT_S)
