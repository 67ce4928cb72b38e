"""What other engines' users reported of KV transfer, and that it does not happen here.

| reported | here |
|---|---|
| blocks stranded for minutes after an abort (vLLM PR 25897, 38027; SGLang 9266) | this file; `test_agent_faults.py`, `test_kills.py` |
| a lease ends while decode still reads: wrong tokens, HTTP 200 (vLLM 21570) | this file |
| memory pinned by a peer that restarted (vLLM 58063, NIXL 795) | `test_a_restarted_peer_takes_its_name_again` in `test_agent_faults.py` |
| decode counts toward a number never reached (vLLM PR 50754) | this file; `tests/control/handoff/test_handoff.py` |
| late writes after free (NIXL 2067) | this file; canaries in `test_kills.py` |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.errors import ControlError, HandoffError
from tests.support.agent_process import SENTINEL, WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.agents import Local, Remote

SRC = [9, 2, 11, 40, 3]
DST = [1, 0, 7, 30, 12]
MODES = pytest.mark.parametrize("mode", ["push", "pull"])


@MODES
def test_aborts_strand_no_block(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote], mode: Any
) -> None:
    """Aborted at whatever point they are; the deadlines are far away, and are not what frees."""
    decode, prefill = new_agent("decode-0", "decode"), start_agent("prefill-0", "prefill")
    decode.agent.connect(prefill.address)
    for attempt in range(20):
        request = f"r{attempt}"
        sending = prefill.call("send", request, SRC) if attempt % 2 else None
        handoff = decode.agent.receive(request, "prefill-0", DST, mode=mode, timeout_s=3600.0)
        handoff.cancel("the client hung up")
        handoff.blocks_free.wait(WAIT_S)
        if sending is not None:
            prefill.call("cancel", sending)
            prefill.call("wait_for_blocks", sending)
    prefill.call("fill", SRC, 1)
    prefill.call("send", "last", SRC)
    decode.agent.receive("last", "prefill-0", DST, mode=mode).wait(WAIT_S)
    assert decode.cache.holds(DST, 1)


def test_a_source_is_kept_for_as_long_as_it_is_read(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote]
) -> None:
    """The deadlines of both sides pass while decode reads; the source is not reused under it."""
    prefill, decode = new_agent("prefill-0", "prefill"), start_agent("decode-0", "decode")
    decode.call("connect", prefill.agent.address)
    prefill.cache.fill(SRC, 1)
    prefill.cache.fill([20], 2)
    decode.call("close_gate")
    sending = prefill.agent.send("r", SRC)
    receiving = decode.call("receive", "r", "prefill-0", DST, mode="pull", timeout_s=0.5)
    other = prefill.agent.send("other", [20])
    if prefill.agent.engine.transports == ("cma",):
        assert decode.call("reach_gate")
        late = decode.call("receive", "nobody sends this", "prefill-0", [50], timeout_s=0.5)
        with pytest.raises(ControlError):
            decode.call("wait", late)  # its deadline was later than that of the handoff
        assert not sending.blocks_free.done()
    decode.call("open_gate")
    try:
        decode.call("wait", receiving)
    except HandoffError:
        sending.blocks_free.wait(WAIT_S)
    else:
        sending.wait(WAIT_S)
        assert decode.call("holds", DST, 1)
    other.cancel()
    other.blocks_free.wait(WAIT_S)
    # Whatever prefill puts there now, decode does not see it.
    before = decode.call("holds", DST, 1)
    prefill.cache.fill(SRC, 3)
    assert decode.call("holds", DST, 1) == before
    assert not decode.call("holds", DST, 3)


def test_a_handoff_that_can_never_be_complete_ends(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote]
) -> None:
    """Prefill has fewer blocks than decode waits for, finds out late, or never sends."""
    decode, prefill = new_agent("decode-0", "decode"), start_agent("prefill-0", "prefill")
    decode.agent.connect(prefill.address)
    prefill.call("send", "fewer", SRC[:3])
    fewer = decode.agent.receive("fewer", "prefill-0", DST, timeout_s=3600.0)
    with pytest.raises(HandoffError):
        fewer.wait(WAIT_S)  # by what prefill says, not by the deadline
    fewer.blocks_free.wait(WAIT_S)
    never = decode.agent.receive("never", "prefill-0", DST, timeout_s=0.2)
    with pytest.raises(HandoffError):
        never.wait(WAIT_S)
    never.blocks_free.wait(WAIT_S)
    assert decode.cache.touched() == []


def test_no_write_comes_after_the_blocks_are_free(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote]
) -> None:
    """Bytes held just before they move, through an abort; then the blocks are somebody else's."""
    decode, prefill = new_agent("decode-0", "decode"), start_agent("prefill-0", "prefill")
    decode.agent.connect(prefill.address)
    prefill.call("fill", SRC, 1)
    prefill.call("close_gate")
    sending = prefill.call("send", "r", SRC)
    handoff = decode.agent.receive("r", "prefill-0", DST, mode="push")
    assert prefill.call("reach_gate")
    handoff.cancel()
    assert not handoff.blocks_free.done()
    prefill.call("open_gate")
    handoff.blocks_free.wait(WAIT_S)
    for layer in decode.cache.layers:
        layer[:] = SENTINEL
    prefill.call("wait_for_blocks", sending)
    prefill.call("fill", [5], 4)
    prefill.call("send", "later", [5])
    decode.agent.receive("later", "prefill-0", [50]).wait(WAIT_S)  # over the same link, after all
    assert decode.cache.touched() == [50]
