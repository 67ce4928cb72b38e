"""A lane: the stream on which one link's transfers of one GPU run, and who waits for it.

Waking a sleeping thread when a GPU gets somewhere costs hundreds of microseconds on some machines,
a spinning synchronize about five. So the lane's thread sleeps while nothing is in flight, and spins
in native code, without the interpreter lock, while something is.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..cuda import driver
from ..errors import BlockOutOfRange, DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from ..tickets import Ticket
    from .base import Transfer

log = logging.getLogger(__name__)

_FEWEST_WORDS = 1 << 10
_AHEAD = 64  # scratches made at once: allocating waits for the GPU, which may be waiting for us

# Streams are used again, never destroyed: torch's allocators remember which streams used a tensor,
# and end the process when they ask one that is gone.
_idle_streams: dict[int, list[int]] = {}


class Scratch:
    """Pinned words here and as many on the GPU: how ids and tables get there without a wait.

    The host half belongs to its user until the transfer that took it has ended.
    """

    def __init__(self, pinned: torch.Tensor, device: torch.Tensor) -> None:
        self.num_words = pinned.numel()
        self._pinned = pinned
        self._words: npt.NDArray[np.int64] = pinned.numpy()
        self._device = device

    @classmethod
    def several(cls, device: int, count: int, num_words: int) -> list[Scratch]:
        """Several of one size, out of one allocation on each side."""
        pinned = torch.empty((count, num_words), dtype=torch.int64, pin_memory=True)
        there = torch.empty((count, num_words), dtype=torch.int64, device=device)
        return [cls(*halves) for halves in zip(pinned, there, strict=True)]

    def upload(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """The rows `[n, m]` on the GPU, on the current stream."""
        size = rows.size
        self._words[:size].reshape(rows.shape)[...] = rows
        there = self._device[:size]
        there.copy_(self._pinned[:size], non_blocking=True)
        return there.view(rows.shape)


class Launched(NamedTuple):
    """What must live until the kernels end, and the word in which they flag a bad block id."""

    keep: tuple[Any, ...]
    bad_ids: torch.Tensor | None = None


@dataclasses.dataclass(eq=False)
class _Flight:
    event: torch.cuda.Event
    transfer: Transfer
    nbytes: int
    scratch: Scratch | None
    launched: Launched
    awaited: bool = False  # a caller waits for it, awake, and will end it
    landed: bool = False


class Lane:
    """One stream with a thread that ends transfers. Thread-safe.

    Attributes:
        device: index of the GPU that runs the kernels.
        stream: a stream of its own: nobody else's work delays it.
        state: the launch state of `kernels.signal`, one for the stream.
    """

    def __init__(self, device: int, name: str) -> None:
        self.device = device
        self._raw_stream = _take_stream(device)
        self.stream: torch.cuda.Stream = torch.cuda.ExternalStream(  # type: ignore[no-untyped-call]
            self._raw_stream, device=device
        )
        with torch.cuda.stream(self.stream):
            self.state = torch.zeros(2, dtype=torch.int32, device=device)
        self._lock = threading.Condition()
        self._in_flight = 0
        self._flights: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._free = {_FEWEST_WORDS: Scratch.several(device, _AHEAD, _FEWEST_WORDS)}
        self._events: list[torch.cuda.Event] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"{name}-gpu{device}", daemon=True)
        self._thread.start()

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """What a stream has been given so far, as an event for `Transfer.after`."""
        with self._lock:
            event = self._event()
        event.record(stream)
        return event

    def warm(self) -> None:
        """Copies once to and fro, so that what the driver loads for that is there."""
        with self._lock, torch.cuda.stream(self.stream):
            scratch = self._take(_FEWEST_WORDS)
            scratch.upload(np.zeros((2, 8), np.int64))
            self.stream.synchronize()
            self._free[scratch.num_words].append(scratch)

    def launch(
        self,
        transfer: Transfer,
        nbytes: int,
        rows: npt.NDArray[np.int64] | None,
        kernels: Callable[[torch.Tensor | None], Launched],
    ) -> None:
        """Enqueues a transfer's kernels; the lane's thread ends the transfer once they are done.

        Args:
            nbytes: that the kernels move.
            rows: ids or a table that they need on the GPU, `[n, m]`; they get it there.
            kernels: launches them on the current stream.
        """
        with self._lock:
            if self._closed or not transfer.begin():
                return
            scratch = uploaded = None
            launched = Launched(())
            done = self._event()
            try:
                with torch.cuda.stream(self.stream):
                    # The rows depend on nothing, so they go ahead of what must be waited for.
                    if rows is not None:
                        scratch = self._take(rows.size)
                        uploaded = scratch.upload(rows)
                    self._wait_for(transfer)
                    launched = kernels(uploaded)
            except Exception as error:  # Triton and torch raise many kinds
                transfer.stop(
                    DeviceError(
                        f"launching on GPU {self.device} failed: {error}",
                        operation=transfer.ticket.operation,
                        peer=transfer.ticket.peer,
                        imm=transfer.imm,
                    )
                )
                nbytes = 0  # what was launched before the failure is waited for all the same
            done.record(self.stream)
            flight = _Flight(done, transfer, nbytes, scratch, launched)
            ticket = transfer.ticket
            ticket._spin = functools.partial(self._await, flight)
            self._in_flight += 1
            ticket._stream_wait = functools.partial(_wait_for_event, done)
            self._flights.put(flight)

    def close(self) -> None:
        """Waits until nothing is in flight and ends the thread. Not on the lane's own thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._flights.put(None)
        self._thread.join()
        with self._lock:
            self._lock.wait_for(lambda: not self._in_flight)
        _idle_streams.setdefault(self.device, []).append(self._raw_stream)

    def _wait_for(self, transfer: Transfer) -> None:
        if transfer.after is not None:
            self.stream.wait_event(transfer.after)
            self._events.append(transfer.after)
            transfer.after = None

    def _take(self, num_words: int) -> Scratch:
        size = max(_FEWEST_WORDS, 1 << (num_words - 1).bit_length())
        free = self._free.setdefault(size, [])
        if not free:
            free += Scratch.several(self.device, max(1, _AHEAD * _FEWEST_WORDS // size), size)
        return free.pop()

    def _event(self) -> torch.cuda.Event:
        if self._events:
            return self._events.pop()
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def _work(self) -> None:
        torch.cuda.set_device(self.device)
        while True:
            flight = self._flights.get()
            if flight is None:
                return
            if flight.awaited:
                continue  # two threads that wake at once would fight for the interpreter lock
            try:
                self._land(flight)
            except Exception:
                log.exception("kvferry: ending a GPU transfer failed; please report this")

    def _await(self, flight: _Flight) -> None:
        """On a caller's thread."""
        flight.awaited = True
        self._land(flight)

    def _land(self, flight: _Flight) -> None:
        """Waits for a transfer's kernels and ends it, on whichever thread is the first to see it:
        a caller that waits need not be woken by the lane's thread."""
        transfer, moved = flight.transfer, flight.nbytes
        ticket = transfer.ticket
        failure = None
        try:
            flight.event.synchronize()
        except RuntimeError as error:
            failure = error
        with self._lock:
            if flight.landed:
                return
            flight.landed = True
        try:
            if failure is not None:
                raise failure
            bad_ids = flight.launched.bad_ids
            if bad_ids is not None and int(bad_ids):
                moved = 0
                transfer.stop(
                    BlockOutOfRange(
                        "a block id on the GPU is outside the cache: its block was not moved, and "
                        "nothing was counted",
                        operation=ticket.operation,
                        peer=ticket.peer,
                        imm=transfer.imm,
                    )
                )
        except RuntimeError as error:
            moved = 0
            transfer.stop(
                DeviceError(
                    f"GPU {self.device} failed: {error}",
                    operation=ticket.operation,
                    peer=ticket.peer,
                    imm=transfer.imm,
                )
            )
        try:
            transfer.end(moved)
        finally:
            with self._lock:
                if flight.scratch is not None:
                    self._free[flight.scratch.num_words].append(flight.scratch)
                self._in_flight -= 1
                self._lock.notify_all()


def _wait_for_event(event: torch.cuda.Event, _ticket: Ticket, stream: torch.cuda.Stream) -> bool:
    stream.wait_event(event)
    return True


def _take_stream(device: int) -> int:
    idle = _idle_streams.get(device)
    return idle.pop() if idle else driver().new_stream(device)
