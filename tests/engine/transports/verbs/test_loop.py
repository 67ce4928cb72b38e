"""The thread of a verbs link, without devices: what it counts when the peer says goodbye."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.engine.transports.verbs import queue_pair as verbs_qp
from kvferry.engine.transports.verbs.loop import Events, Loop
from kvferry.engine.transports.verbs.rail import POLL_AT_ONCE, Rail
from kvferry.engine.transports.verbs.slots import Slots


class CompletionQueue:
    """As many receives as have completed, each of one byte."""

    def __init__(self, count: int) -> None:
        one = SimpleNamespace(status=0, wr_id=verbs_qp.RECEIVE_ID, byte_len=1, qp_num=3, imm_data=0)
        self.left = deque([one] * count)

    def poll(self, most: int) -> tuple[int, list[Any]]:
        some = [self.left.popleft() for _ in range(min(most, len(self.left)))]
        return len(some), some


@pytest.mark.parametrize("count", [0, 1, POLL_AT_ONCE, 5 * POLL_AT_ONCE + 1])
def test_all_that_has_arrived_is_counted_at_a_goodbye(count: int) -> None:
    counted: list[int] = []
    core = SimpleNamespace(identity=SimpleNamespace(name="here"))
    link: Any = SimpleNamespace(core=core, count=lambda imm, nbytes, writes: counted.append(nbytes))
    device: Any = SimpleNamespace(name="rdma0", library=SimpleNamespace(error=OSError))
    rail = Rail(0, 0, device, Slots(), 1)
    rail._completions = CompletionQueue(count)
    seen: list[Any] = []
    events = Events(
        completed=lambda rail, completions: seen.extend(completions),
        broke=lambda *_: pytest.fail("nothing broke"),
        look_around=lambda: None,
        patience_s=lambda: 1.0,
        busy=lambda: False,
        halted=lambda: None,
    )
    loop = Loop(link, [rail], events)
    loop.drain()
    assert sum(counted) == rail.received_nbytes == count
    while loop._inbox:
        loop._inbox.popleft()()
    assert len(seen) == count  # and dealt with, on the link's thread
    loop.halt(lambda: None)
