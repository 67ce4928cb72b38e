"""Where the chunks of a link's transfers are converted: staging, and what walks between it and the cache.

A workspace serves one chunk at a time and keeps its staging for the next one. The host's is here;
a GPU's is in `gpu_workspace.py`, and its staging is GPU memory, which then moves like a cache's.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import LinkClosed
from ..layout.block_scales import SCALE_NBYTES
from ..layout.dtypes import convert_bytes, real_maxima
from ..staging.mover import put_rows, rows_at
from ..transports.workers import Breakable, Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from ..layout.dtypes import ElementType

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]


class Workspace(Protocol):
    """Converts rows of numbers in the memory of one device. Not thread-safe.

    Rows are named by their addresses, int64; all of a call have `elements` numbers.
    """

    address: int
    """Of its staging, at a multiple of 16."""

    def reserve(self, nbytes: int) -> None:
        """Make the staging at least so large; what it held is lost. Raises DeviceError."""

    def floats(self, addresses: Ids) -> Floats:
        """float32 that lie there. Raises DeviceError."""

    def put_floats(self, addresses: Ids, values: Floats) -> None:
        """Write float32 there. Raises DeviceError."""

    def maxima(self, addresses: Ids, elements: int, of: ElementType, factor: Floats) -> Floats:
        """Return the largest magnitude of each row, times the row's factor. Raises DeviceError."""

    def convert(
        self,
        src: Ids,
        dst: Ids,
        elements: int,
        types: tuple[ElementType, ElementType],
        factor: Floats | None,
    ) -> None:
        """Begin to write rows as numbers of another type; bits, if there is no factor.

        Raises:
            DeviceError, PlanError: the GPU failed; or a number lies where none could be read.
        """

    def finish(self) -> None:
        """Return when everything that was begun is visible. Raises DeviceError."""

    def try_out(
        self, types: tuple[ElementType, ElementType], *, converts: bool, scaled: bool
    ) -> None:
        """Do beforehand what the first rows of these types would have to do, in 16 KiB of staging.

        Raises:
            DeviceError: the GPU failed.
        """

    def close(self) -> None:
        """Free what it holds: nothing is in flight."""


class HostWorkspace:
    """Converts in host memory, by NumPy and PyTorch; done on return."""

    def __init__(self) -> None:
        self.address = 0
        self._staging: Bytes = np.zeros(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        """Allocate, if what is there is too small."""
        if len(self._staging) < nbytes + 16:
            self._staging = np.empty(nbytes + 16, np.uint8)
        self.address = -(-int(self._staging.ctypes.data) // 16) * 16

    def floats(self, addresses: Ids) -> Floats:
        """Return a copy."""
        values: Floats = rows_at(addresses, SCALE_NBYTES).view(np.float32)[:, 0].copy()
        return values

    def put_floats(self, addresses: Ids, values: Floats) -> None:
        """Write them."""
        put_rows(addresses, SCALE_NBYTES, data=np.ascontiguousarray(values).view(np.uint8))

    def maxima(self, addresses: Ids, elements: int, of: ElementType, factor: Floats) -> Floats:
        """By PyTorch."""
        return real_maxima(rows_at(addresses, elements * of.nbytes), factor, of.dtype)

    def convert(
        self,
        src: Ids,
        dst: Ids,
        elements: int,
        types: tuple[ElementType, ElementType],
        factor: Floats | None,
    ) -> None:
        """By PyTorch's own cast."""
        here, there = types
        data = rows_at(src, elements * here.nbytes)
        if factor is not None:
            data = convert_bytes(data, factor, here.dtype, there.dtype)
        put_rows(dst, data.shape[1], data=data.reshape(-1))

    def finish(self) -> None:
        """Nothing: all is done."""

    def try_out(
        self, types: tuple[ElementType, ElementType], *, converts: bool, scaled: bool
    ) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing: the memory is Python's."""


class Workspaces:
    """The workspaces of one link, each lent to one chunk at a time. Thread-safe.

    What a chunk's converting touches must not be given back under it, so a link that goes down waits
    for those who convert as it does for its transport's threads.

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
        """Return a workspace in the memory of a GPU, or of the host for -1. `give` it back.

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
        """Call `halted` once nobody converts any more, and free what is idle. Never blocks."""
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
    """Return a workspace in the memory of a GPU, or of the host for -1. Raises DeviceError."""
    if device < 0:
        return HostWorkspace()
    from .gpu_workspace import new_gpu_workspace

    return new_gpu_workspace(device, max_programs)
