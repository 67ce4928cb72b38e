"""An engine's process forks: the child can do nothing with its agent, and nothing to it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.errors import ForkedProcess as ForkedControl
from kvferry.engine.errors import ForkedProcess
from tests.support.agent_process import WAIT_S
from tests.support.forks import in_child, outcomes

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.adapters.agent.agent import Agent
    from tests.support.agents import Local, Remote


def leave_the_block(agent: Agent) -> None:
    with agent:
        raise SystemExit(3)


def close_all(agent: Agent) -> int:
    agent.close()
    agent.engine.close()
    return 3


def collect(agent: Agent) -> int:
    vars(agent).clear()
    gc.collect()
    return 3


@pytest.mark.parametrize("end", [leave_the_block, close_all, collect])
def test_a_childs_end_is_nothing_to_its_parent(
    new_agent: Callable[..., Local],
    start_agent: Callable[..., Remote],
    end: Callable[[Agent], int | None],
) -> None:
    here, there = new_agent("decode-0", "decode"), start_agent("prefill-0", "prefill")
    agent = here.agent
    agent.connect(there.address)
    before = agent.receive("before", "prefill-0", [1, 2])
    assert in_child(lambda: end(agent)) == 3
    for request in ("before", "after"):
        there.call("fill", [5, 6], 9)
        there.call("send", request, [5, 6])
        handoff = before if request == "before" else agent.receive(request, "prefill-0", [1, 2])
        assert handoff.wait(WAIT_S) == 2 * here.cache.block_nbytes
        assert here.cache.holds([1, 2], 9)


def test_what_a_child_has_inherited_refuses_by_name(
    new_agent: Callable[..., Local], start_agent: Callable[..., Remote]
) -> None:
    here, there = new_agent("decode-0", "decode"), start_agent("prefill-0", "prefill")
    agent = here.agent
    agent.connect(there.address)
    pending = agent.receive("never", "prefill-0", [1, 2])
    calls: dict[str, Callable[[], Any]] = {
        "receive": lambda: agent.receive("r", "prefill-0", [3]),
        "send": lambda: agent.send("r", [3]),
        "connect": lambda: agent.connect(there.address),
        "address": lambda: agent.address,
        "descriptor_of": lambda: agent.descriptor_of("prefill-0"),
        "wait": pending.wait,
        "cancel": pending.cancel,
        "done": pending.done,
        "blocks_free": pending.blocks_free.wait,
    }
    assert in_child(lambda: outcomes(calls)) == dict.fromkeys(calls, ForkedProcess.__name__)
    assert "decode-0" in in_child(lambda: repr(agent))
    pending.cancel()


def test_a_client_of_the_daemon_is_its_makers() -> None:
    with DaemonClient("tcp://127.0.0.1:1") as client:
        calls: dict[str, Callable[[], Any]] = {
            "look": client.look,
            "show": client.show,
            "place": lambda: client.place(10),
            "drain": lambda: client.drain("a"),
            "watch": client.watch,
        }
        assert in_child(lambda: outcomes(calls)) == dict.fromkeys(calls, ForkedControl.__name__)
        assert in_child(client.close) is None
