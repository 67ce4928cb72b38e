"""Hold staged transfers back until the compute before them is done, without a thread that burns a core.

A staged transfer is gathered by the host's order, so the host must know when a CUDA event has
passed. Waking a sleeping thread by CUDA costs hundreds of microseconds on some machines and a
spinning wait a core, for as long as a forward pass takes. So one thread asks every event now and
then, and sleeps while there is none. Events of different streams never wait for each other.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

from ..errors import DeviceError, EngineError
from ..memory.cuda_events import mark

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ..memory.cuda_events import Event as CudaEvent
    from .transfer import Transfer

# An event behind nothing passes some microseconds after it was recorded: it is looked for so often,
# about 30 us, since waking the gate's thread costs ten times that.
LOOKS = 16
POLL_S = 50e-6  # a fifth of the time that 8 MiB take over PCIe


class Event(Protocol):
    """A CUDA event, as far as the gate knows it."""

    def query(self) -> bool:
        """Return whether it has passed; raise DeviceError if the GPU failed."""


class StreamGate:
    """One engine's gate. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Condition()
        self._held: list[tuple[Event, Callable[[], None], Callable[[EngineError], None]]] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def when(
        self, event: Event, then: Callable[[], None], failed: Callable[[EngineError], None]
    ) -> None:
        """Call `then` once the event has passed: at once if it has, else on the gate's thread."""
        for _ in range(LOOKS):
            if self._pass(event, then, failed):
                return
        with self._lock:
            if self._closed:
                return  # its transfer has ended, or is about to
            self._held.append((event, then, failed))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"{self._name}-gate", daemon=True
                )
                self._thread.start()
            self._lock.notify_all()

    def close(self) -> None:
        """Let nothing pass any more, and end the thread."""
        with self._lock:
            self._closed = True
            self._held.clear()
            thread = self._thread
            self._lock.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _pass(
        self, event: Event, then: Callable[[], None], failed: Callable[[EngineError], None]
    ) -> bool:
        try:
            if not event.query():
                return False
        except DeviceError as error:
            why = f"the stream before a transfer failed: {error.message}"
            failed(DeviceError(why, code=error.code, operation="order"))
            return True
        then()
        return True

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._held or self._closed)
                if self._closed:
                    return
                held, self._held = self._held, []
            left = [entry for entry in held if not self._pass(*entry)]
            with self._lock:
                if not self._closed:
                    self._held = left + self._held
            if len(left) == len(held):
                time.sleep(POLL_S)


def note_compute(transfer: Transfer, stream: torch.cuda.Stream | None) -> None:
    """Note what a stream has been given so far, if the transfer's memory is a GPU's.

    Without a stream: what the caller has enqueued, as torch's own operations are ordered. A stream
    that has nothing to wait for, since a CUDA graph is being captured from it, ends the transfer.
    """
    regions = transfer.local_regions
    try:
        transfer.after = compute_event(regions[0].device if regions else -1, stream)
    except EngineError as error:
        transfer.stop(error.again(operation=transfer.ticket.operation, peer=transfer.ticket.peer))


def compute_event(device: int, stream: torch.cuda.Stream | None) -> CudaEvent | None:
    """Return what passes once a stream (the device's current one if None) has done what it has been
    given so far; None for host memory, whose device is -1.

    Raises:
        PlanError: a CUDA graph is being captured from it.
        DeviceError: the GPU has failed.
    """
    return None if device < 0 else mark(device, stream)


def hold_until_computed(
    gate: StreamGate, transfer: Transfer, start: Callable[[Transfer], None]
) -> None:
    """Start a transfer once the compute before it is done. Refuses one on several GPUs."""
    try:
        transfer.device()
    except EngineError as error:
        transfer.stop(error)
        return
    event, transfer.after = transfer.after, None
    if event is None:
        start(transfer)
    else:
        gate.when(event, lambda: start(transfer), transfer.stop)
