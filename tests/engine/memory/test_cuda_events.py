"""Events, and streams that may be full, with a driver that writes down what it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.engine.errors import DeviceError, PlanError
from kvferry.engine.memory import cuda_events
from kvferry.engine.memory.cuda_events import Event, EventPool, TorchEvent, held_streams, mark

CAPTURED = 0x52


class Driver:
    """Notes what it records, and whether the interpreter lock is kept."""

    def __init__(self) -> None:
        self.made = 0
        self.told: list[tuple[str, int, int]] = []
        self.unlocked = SimpleNamespace(
            enter=lambda _device: None,
            leave=lambda: None,
            record=lambda event, stream: self.told.append(("unlocked", event, stream)),
        )

    def new_event(self, _device: int) -> int:
        self.made += 1
        return 1000 + self.made

    def is_capturing(self, stream: int) -> bool:
        return stream == CAPTURED

    def enter(self, device: int) -> None: ...

    def leave(self) -> None: ...

    def record(self, event: int, stream: int) -> None:
        self.told.append(("locked", event, stream))

    def query_event(self, event: int) -> bool:
        if event == 13:
            raise DeviceError("CUDA_ERROR_ILLEGAL_ADDRESS", code=700)
        return event != 12


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(cuda_events, "driver", lambda: fake)
    monkeypatch.setattr(cuda_events, "_pools", {})
    return fake


def stream(raw: int) -> Any:
    return SimpleNamespace(cuda_stream=raw)


class Raced(list[int]):
    """A list that looked as if it had an event, until another thread took it."""

    def __len__(self) -> int:
        return 1

    def __bool__(self) -> bool:
        return True


def test_the_last_event_may_be_anothers(driver: Driver) -> None:
    pool = EventPool(0)
    pool.idle = Raced()
    assert pool.take() > 1000
    assert driver.made == cuda_events.AHEAD


def test_an_event_is_given_back_when_nobody_knows_it(driver: Driver) -> None:
    pool = EventPool(0)
    event = Event(pool)
    handle = event.handle
    assert handle not in pool.idle
    del event
    assert handle in pool.idle
    assert driver.made == cuda_events.AHEAD


def test_without_an_event_nothing_is_given_back(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_device: int) -> int:
        raise DeviceError("cuEventCreate failed: CUDA_ERROR_OUT_OF_MEMORY", code=2)

    monkeypatch.setattr(driver, "new_event", fail)
    pool = EventPool(0)
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        Event(pool)
    assert pool.idle == []


def test_a_stream_that_a_graph_is_captured_from_is_refused(driver: Driver) -> None:
    with pytest.raises(PlanError, match=r"Link\.graph_write"):
        mark(0, stream(CAPTURED), "write")
    assert driver.told == []


def test_the_lock_is_let_go_of_while_streams_wait_for_threads_of_this_process(
    driver: Driver,
) -> None:
    one = mark(0, stream(7))
    held_streams.add(1)
    try:
        other = mark(0, stream(7))
    finally:
        held_streams.add(-1)
    third = mark(0, stream(7))
    assert driver.told == [
        ("locked", one.handle, 7),
        ("unlocked", other.handle, 7),
        ("locked", third.handle, 7),
    ]


def test_an_event_of_torch_is_asked_for_by_the_driver(driver: Driver) -> None:
    seen = [
        TorchEvent(SimpleNamespace(cuda_event=handle)).query()  # type: ignore[arg-type]
        for handle in (0, 11, 12)
    ]
    assert seen == [True, True, False]
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        TorchEvent(SimpleNamespace(cuda_event=13)).query()  # type: ignore[arg-type]
