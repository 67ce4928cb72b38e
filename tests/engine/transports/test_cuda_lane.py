"""How a lane begins transfers, and what it does without what they need, with a driver that does nothing."""

from __future__ import annotations

import collections
import queue
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import DeviceError
from kvferry.engine.memory import cuda_events
from kvferry.engine.memory.cuda_events import EventPool, held_streams
from kvferry.engine.transfer.block_ids import CheckedIds
from kvferry.engine.transfer.moves import NOTHING
from kvferry.engine.transfer.ticket import Ticket
from kvferry.engine.transfer.transfer import Transfer
from kvferry.engine.transports.cuda_ipc import scratch
from kvferry.engine.transports.cuda_ipc.lane import CROWDED, Lane

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = CheckedIds(np.array([1]), np.array([2]), False, 1)


class Driver:
    """Notes which calls keep the interpreter lock."""

    def __init__(self, told: list[str], way: str) -> None:
        self.unlocked = self
        self._told, self._way = told, way
        self.events = iter(range(1, 1 << 30))

    def new_event(self, _device: int) -> int:
        return next(self.events)

    def record(self, _event: int, _stream: int) -> None:
        self._told.append(self._way)

    def wait_event(self, _stream: int, _event: int) -> None:
        self._told.append(self._way)


class Scratch:
    num_words = 1024
    address = 4096

    def __init__(self) -> None:
        self.words = np.zeros(1024, np.int64)

    def upload(self, _num_words: int, _stream: int, cuda: Driver) -> None:
        cuda.record(0, 0)


class Ground:
    """A lane without a thread or a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.driver = Driver(self.told, "locked")
        self.driver.unlocked = Driver(self.told, "unlocked")
        monkeypatch.setattr(cuda_events, "driver", lambda: self.driver)
        self.lane = lane = Lane.__new__(Lane)
        lane.device, lane._raw_stream, lane._state_address = 0, 0x51, 0
        lane._cuda = self.driver  # type: ignore[assignment]
        lane._lock = threading.Lock()
        lane._closed = lane._asleep = False
        lane._in_flight = 0
        lane._flights = collections.deque()
        lane._bell = queue.SimpleQueue()
        lane._events = EventPool(0)
        lane._mark = cuda_events.Event(lane._events)
        lane._free = {1024: [Scratch() for _ in range(200)]}  # type: ignore[misc]
        lane._flags = [SimpleNamespace(address=0) for _ in range(200)]  # type: ignore[misc]
        self.ended_under_lock: list[bool] = []

    def begin(self) -> Ticket:
        ticket = Ticket("write")
        transfer = Transfer(1, NOTHING, write=True, ticket=ticket, on_end=lambda _transfer: None)
        ticket.add_done_callback(
            lambda _ticket: self.ended_under_lock.append(self.lane._lock.locked())
        )
        self.lane.copy_blocks(transfer, (), IDS, 0x99, 0)
        return ticket


@pytest.fixture
def ground(monkeypatch: pytest.MonkeyPatch) -> Ground:
    return Ground(monkeypatch)


def fail(*_: Any) -> Any:
    raise DeviceError("CUDA_ERROR_OUT_OF_MEMORY", code=2)


def no_events(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.lane._events.idle.clear()
    monkeypatch.setattr(ground.driver, "new_event", fail)


def no_flags(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.lane._flags.clear()
    monkeypatch.setattr(scratch.Flag, "several", fail)


def no_scratch(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.lane._free.clear()
    ground.lane.stream = None  # type: ignore[assignment]
    monkeypatch.setattr(scratch.Scratch, "several", fail)


@pytest.mark.parametrize("lacks", [no_events, no_flags, no_scratch])
def test_without_what_it_needs_a_transfer_ends_at_once(
    ground: Ground,
    monkeypatch: pytest.MonkeyPatch,
    lacks: Callable[[Ground, pytest.MonkeyPatch], None],
) -> None:
    lacks(ground, monkeypatch)
    ticket = ground.begin()
    assert ticket.done()
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        ticket.wait()
    assert ground.ended_under_lock == [False]
    assert not ground.lane._in_flight
    monkeypatch.undo()
    monkeypatch.setattr(cuda_events, "driver", lambda: ground.driver)
    if lacks is not no_events:
        return
    assert not ground.begin().done()  # the lane is none the worse
    assert [flight.handle for flight in ground.lane._flights] != []


def test_a_stream_that_may_be_full_is_given_nothing_with_the_lock_kept(ground: Ground) -> None:
    """Its head may wait for what a thread of this process does, and that thread for the lock."""
    begun = [ground.begin() for _ in range(CROWDED)]
    assert set(ground.told) == {"locked"}
    ground.told.clear()
    begun.append(ground.begin())
    assert set(ground.told) == {"unlocked"}
    ground.lane._in_flight = 0
    ground.told.clear()
    held_streams.add(1)
    try:
        begun.append(ground.begin())
    finally:
        held_streams.add(-1)
    assert set(ground.told) == {"unlocked"}
    assert not any(ticket.done() for ticket in begun)
