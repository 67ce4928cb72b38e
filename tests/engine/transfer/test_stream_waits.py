"""Streams that wait for words, of the host and of a GPU, with a driver that does nothing."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.engine.errors import DeadlineExceeded
from kvferry.engine.memory.cuda_events import held_streams
from kvferry.engine.transfer import device_counters, stream_wait
from kvferry.engine.transfer.device_counters import DeviceCounters
from kvferry.engine.transfer.stream_wait import wait_for_host
from kvferry.engine.transfer.ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STREAM: Any = SimpleNamespace(device_index=0, cuda_stream=0x51)
PATIENCE_S = 20.0


class Driver:
    """Notes waits and writes; `meanwhile` is called while a stream is given a wait."""

    def __init__(self) -> None:
        self.waits: list[tuple[int, int]] = []
        self.writes: list[int] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def wait_value(self, _device: int, _stream: int, address: int, value: int) -> None:
        self.waits.append((address, value))
        self.meanwhile()

    def write_value(self, _device: int, _stream: int, _address: int, value: int) -> None:
        self.writes.append(value)

    def new_stream(self, _device: int) -> int:
        return 0x52

    def allocate(self, _device: int, _nbytes: int) -> int:
        return 1 << 40

    def export(self, _device: int, _address: int) -> bytes:
        return b"handle"

    @contextlib.contextmanager
    def beside_captures(self) -> Iterator[None]:
        yield


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    zeros = torch.zeros
    for module in (stream_wait, device_counters):
        monkeypatch.setattr(module, "driver", lambda: fake)
    monkeypatch.setattr(stream_wait, "_free", [])
    monkeypatch.setattr(stream_wait, "_pages", [])

    def pinned(*size: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        return zeros(*size, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", pinned)
    return fake


def on_a_thread(function: Callable[[], object]) -> bool:
    """Run it on another thread; False if it is held up."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def test_a_word_is_written_while_cuda_is_asked_for_more(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA may give memory only when streams have got somewhere: those that wait for the words."""
    monkeypatch.setattr(stream_wait, "_PAGE_WORDS", 2)
    writes = [wait_for_host(STREAM) for _ in range(2)]
    pinned = torch.zeros
    written: list[bool] = []

    def slow(*size: Any, **options: Any) -> torch.Tensor:
        written.append(on_a_thread(writes.pop()))
        return pinned(*size, **options)

    monkeypatch.setattr(torch, "zeros", slow)
    writes.append(wait_for_host(STREAM))
    assert written == [True]
    addresses = [address for address, _ in driver.waits]
    assert len(set(addresses)) == 3
    for write in writes:
        write()
    for address, value in driver.waits:
        assert ctypes.c_int64.from_address(address).value >= value


def test_waits_are_counted_until_they_are_written(driver: Driver) -> None:
    before = held_streams.count
    writes = [wait_for_host(STREAM) for _ in range(3)]
    assert held_streams.count == before + 3

    def fail() -> None:
        raise RuntimeError("no room")

    driver.meanwhile = fail
    with pytest.raises(RuntimeError):
        wait_for_host(STREAM)
    assert held_streams.count == before + 3
    for write in writes:
        write()
    assert held_streams.count == before


def counting(driver: Driver) -> tuple[DeviceCounters, Ticket]:
    """An engine's counters on one GPU, and an expect of 100 bytes."""
    counters = DeviceCounters()
    counters.array(0)
    ticket = Ticket("expect", imm=7)
    counters.claim(ticket, 100)
    return counters, ticket


@pytest.mark.parametrize("ends", ["counted there", "counted by hosts", "failed"])
def test_a_stream_goes_on_however_the_bytes_were_counted(driver: Driver, ends: str) -> None:
    """Where a peer's kernels may not add, and where nobody comes, the host writes the word."""
    before = held_streams.count
    counters, ticket = counting(driver)
    assert counters.wait(ticket, STREAM)
    assert counters.wait(ticket, STREAM)
    assert [value for _, value in driver.waits] == [100, 100]
    assert held_streams.count == before + 2
    if ends == "counted there":
        counters.added(7, 100)
    if ends == "failed":
        ticket._fail(DeadlineExceeded("late"))
    else:
        ticket._finish(100)
    assert driver.writes == ([] if ends == "counted there" else [100])
    assert held_streams.count == before
    assert not counters.wait(ticket, STREAM)


def test_a_ticket_ends_while_a_stream_has_no_room_for_its_wait(driver: Driver) -> None:
    """What gives it room is what the ending thread writes."""
    counters, ticket = counting(driver)
    ended: list[bool] = []
    driver.meanwhile = lambda: ended.append(
        on_a_thread(lambda: ticket._fail(DeadlineExceeded("late")))
    )
    assert counters.wait(ticket, STREAM)
    assert ended == [True]
    assert driver.writes == [100]
