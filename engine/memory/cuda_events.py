"""Events of CUDA: what a stream had been given at some moment, for others to wait for or ask about.

They are the driver's, not torch's: a question is put so that no capture of another thread forbids it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ..errors import PlanError
from .cuda_driver import Driver, driver

if TYPE_CHECKING:
    import torch

AHEAD = 64  # events made at once

_pools: dict[int, EventPool] = {}


class EventPool:
    """The idle events of a device. Thread-safe: all that use the device take from it at once."""

    __slots__ = ("_device", "idle")

    def __init__(self, device: int) -> None:
        self._device = device
        self.idle: list[int] = []

    def take(self) -> int:
        """Return an event for the caller to give back (`idle.append`) when nobody knows it any more.

        Raises:
            DeviceError: there is none, and the driver makes none.
        """
        try:
            # A look before would tell nothing: another may take the last one.
            return self.idle.pop()
        except IndexError:
            fresh = [driver().new_event(self._device) for _ in range(AHEAD)]
            handle = fresh.pop()
            self.idle += fresh
            return handle


def pool_of(device: int) -> EventPool:
    """Return a device's pool."""
    return _pools.setdefault(device, EventPool(device))


class Event:
    """A driver's event, given back when nobody knows it any more: who still holds it may wait."""

    __slots__ = ("_idle", "handle")

    def __init__(self, pool: EventPool) -> None:
        self._idle = pool.idle
        self.handle = pool.take()

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None:
            self._idle.append(handle)

    def query(self) -> bool:
        """Return whether it has come.

        Raises:
            DeviceError: the GPU has failed.
        """
        return driver().query_event(self.handle)


class TorchEvent:
    """As `Event`, of one that the caller has recorded."""

    __slots__ = ("_event",)

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    @property
    def handle(self) -> int:
        return int(self._event.cuda_event)

    def query(self) -> bool:
        """As `Event.query`."""
        handle = self.handle
        return not handle or driver().query_event(handle)  # without one it was never recorded


def wait_for(event: torch.cuda.Event) -> None:
    """Wait until an event that the caller has recorded has come.

    Raises:
        DeviceError: the GPU has failed.
    """
    handle = TorchEvent(event).handle
    if handle:
        driver().synchronize_event(handle)


class HeldStreams:
    """How many waits of streams end only when a thread of this process says so. Thread-safe.

    Such a stream fills up. A call that waits for room in it must let go of the interpreter lock, or
    the thread that would end the wait never runs.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """So many more, or less."""
        with self._lock:
            self.count += count


held_streams = HeldStreams()


def enqueuer() -> Driver:
    """Return the driver for what is given to a stream of the caller's, which may be full."""
    cuda = driver()
    return cuda.unlocked if held_streams.count else cuda


def check_not_captured(stream: int, operation: str, peer: str = "") -> None:
    """Refuse a raw stream from which a CUDA graph is being captured.

    Raises:
        PlanError: it is.
    """
    if stream and driver().is_capturing(stream):  # the default stream, 0, cannot be
        raise PlanError(
            "a CUDA graph is being captured from this stream, and a graph repeats no ticket: make a "
            "Link.graph_write before, and launch that",
            operation=operation,
            peer=peer,
        )


def mark(device: int, stream: torch.cuda.Stream | None, operation: str = "order") -> Event:
    """Return what a stream, the device's current one if None, has been given so far.

    Raises:
        PlanError: a graph is being captured from it: the event would never come.
    """
    if stream is None:
        import torch

        raw = torch._C._cuda_getCurrentRawStream(device)
    else:
        raw = stream.cuda_stream
    check_not_captured(raw, operation)
    event = Event(pool_of(device))
    cuda = enqueuer()
    cuda.enter(device)
    try:
        cuda.record(event.handle, raw)
    finally:
        cuda.leave()
    return event
