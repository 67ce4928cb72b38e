"""Tells what a GPU has computed, in the order in which it was asked, and no sooner."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ...engine.errors import EngineError
    from ...engine.transfer_engine import TransferEngine


@dataclass
class _Step:
    tell: Callable[[], None]
    computed: bool = False


class ComputeOrder:
    """One handoff's steps, each told once the stream behind it has got there. Thread-safe.

    The host waits for nothing: the engine watches the events.
    """

    def __init__(
        self, engine: TransferEngine, device: int, failed: Callable[[EngineError], None]
    ) -> None:
        """`device` is the GPU of the cache, or -1: then every step is told at once."""
        self._engine = engine
        self._device = device
        self._failed = failed
        self._lock = threading.Lock()
        self._steps: deque[_Step] = deque()

    def after(self, stream: torch.cuda.Stream | None, tell: Callable[[], None]) -> None:
        """Calls `tell` after what `stream` has been given so far; the device's current one if None."""
        if self._device < 0:
            tell()
            return
        import torch

        step = _Step(tell)
        with self._lock:
            self._steps.append(step)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream or torch.cuda.current_stream(self._device))
        self._engine.when_computed(event, partial(self._computed, step), self._failed)

    def _computed(self, step: _Step) -> None:
        with self._lock:
            step.computed = True
            while self._steps and self._steps[0].computed:
                self._steps.popleft().tell()


def idle_stream(device: int) -> torch.cuda.Stream | None:
    """A stream for which transfers need not wait: what they move was computed before the machines
    heard of it. The current stream of the agent's thread may hold the work of a whole model."""
    if device < 0:
        return None
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
