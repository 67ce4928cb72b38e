"""The workspaces of one link: lent to one chunk at a time, and who is at work in them.

What a chunk's converting touches must not be given back under it, so a link that goes down waits
for those who convert as it does for its transport's threads.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ..errors import LinkClosed
from ..transports.workers import Breakable, Workers
from .workspace import HostWorkspace, Workspace

if TYPE_CHECKING:
    from collections.abc import Callable


class Workspaces:
    """Thread-safe.

    Attributes:
        workers: the threads that convert; none enters once the link goes down.
    """

    def __init__(self, link: Breakable, max_programs: int | None) -> None:
        self.workers = Workers(link, "converting")
        self._max_programs = max_programs
        self._lock = threading.Lock()
        self._idle: dict[int, list[Workspace]] = {}
        self._closed = False
        self._on_gpu = False

    def take(self, device: int) -> Workspace:
        """A workspace in the memory of a GPU, or of the host for -1. `give` it back.

        Raises:
            DeviceError: the GPU's driver refuses. LinkClosed: the link is down.
        """
        with self._lock:
            if self._closed:
                raise LinkClosed("the link is down", operation="convert")
            idle = self._idle.get(device)
            if idle:
                return idle.pop()
        place = new_workspace(device, self._max_programs)
        self._on_gpu |= not isinstance(place, HostWorkspace)
        return place

    def give(self, device: int, place: Workspace) -> None:
        """Nobody touches what is in it any more."""
        with self._lock:
            if not self._closed:
                self._idle.setdefault(device, []).append(place)
                return
        place.close()

    def halt(self, halted: Callable[[], None]) -> None:
        """Calls `halted` once nobody converts any more, and frees what is idle. Never blocks."""
        self.workers.halt(lambda: self._close(halted))

    def _close(self, halted: Callable[[], None]) -> None:
        if self._on_gpu:  # freeing waits for the GPU, which may be waiting for this very thread
            threading.Thread(
                target=self._free, args=(halted,), name="kvferry-free", daemon=True
            ).start()
        else:
            self._free(halted)

    def _free(self, halted: Callable[[], None]) -> None:
        with self._lock:
            self._closed = True
            idle = [place for places in self._idle.values() for place in places]
            self._idle.clear()
        for place in idle:
            place.close()
        halted()


def new_workspace(device: int, max_programs: int | None) -> Workspace:
    """A workspace in the memory of a GPU, or of the host for -1. Raises DeviceError."""
    if device < 0:
        return HostWorkspace()
    from .gpu_workspace import new_gpu_workspace

    return new_gpu_workspace(device, max_programs)
