"""Several sessions of two agents: each has a link of its own, and outlives the others."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvferry.engine.errors import LinkError
from tests.support.agent_process import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.agents import Local


def test_the_end_of_the_newer_session_leaves_the_older_one_in_use(
    new_agent: Callable[..., Local],
) -> None:
    here, there = new_agent("a", "both"), new_agent("b", "both")
    here.agent.connect(there.agent.address)
    older = here.agent._core.sessions.by_name("b")
    there.agent.connect(here.agent.address)
    newer = here.agent._core.sessions.by_name("b")
    assert newer is not None
    assert newer is not older
    assert newer.link is not None
    turn = threading.Event()  # behind what the agent does at the end of the link
    newer.link.down.add_done_callback(lambda _: here.agent._soon(turn.set))
    newer.link.fail(LinkError("a wire broke", operation="test"))
    assert turn.wait(WAIT_S)
    assert here.agent._core.sessions.by_name("b") is older
    there.cache.fill([1, 2], 7)
    there.agent.send("r", [1, 2])
    here.agent.receive("r", "b", [3, 4]).wait(WAIT_S)
    assert here.cache.holds([3, 4], 7)
