"""Staging: contiguous host memory between scattered pieces and a wire, and who copies to and fro.

A *mover* gathers pieces into staging and scatters them from it: the GPU's does it with a kernel,
straight into pinned memory (`gpu_mover.py`); the one here serves host memory. A transport that cannot
move the pieces themselves takes a buffer of a `Ring`, gathers, sends the buffer, and lets the next
gather run meanwhile; its peer receives into a buffer and scatters. Nothing on the wire shows whether
an end stages.

Host memory. The kernel's scatter-gather costs 300 to 500 ns a piece at either end of a socket; NumPy
copies a tiny piece in 80. Whole writes over loopback, GB/s without and with staging, one run on a
2.5 GHz Xeon of two cores: 64 B 0.19 : 0.22, 128 B 0.31 : 0.39, 256 B 0.55 : 0.43, 512 B 0.88 : 0.63.
Pieces of many sizes gain nothing at any size.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import DeviceError, RegionGone
from ..memory import iovec
from .thresholds import NEVER_DIRECT

if TYPE_CHECKING:
    import numpy.typing as npt

FEWEST_PIECES = 32  # fewer tiny ones are not worth the set-up
GRID_BELOW_NBYTES = 4096  # larger pieces: the system call copies them at 3 to 5 GB/s


class StagingMeter:
    """How much memory the staging of one engine takes. Any thread."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So much more, or less."""
        with self._lock:
            self.nbytes += nbytes


class Moved(Protocol):
    """A gather or scatter that was begun."""

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""

    def wait(self) -> None:
        """Returns when its bytes are visible.

        Raises:
            DeviceError: the GPU failed.
        """


class Mover(Protocol):
    """Copies between pieces of one device's memory and staging. One thread begins, any may wait."""

    def gather(self, pieces: iovec.Iovec, address: int) -> Moved:
        """Copies the pieces to `address`, one after the other. Raises DeviceError."""

    def scatter(self, address: int, pieces: iovec.Iovec) -> Moved:
        """Copies what lies at `address` into the pieces. Raises DeviceError."""

    def pin(self, address: int, nbytes: int) -> None:
        """Makes staging reachable for this mover. Raises DeviceError."""

    def unpin(self, address: int) -> None:
        """Ends one `pin`."""

    def warm(self, address: int) -> None:
        """Does beforehand what the first copy would have to do, with 256 bytes of staging."""

    def close(self) -> None:
        """Frees what it holds: nothing is in flight any more."""


class _Done:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


_DONE = _Done()


class HostMover:
    """Moves pieces of host memory; done on return."""

    def gather(self, pieces: iovec.Iovec, address: int) -> Moved:
        """Copies the pieces to `address`."""
        if _on_a_grid(pieces):
            rows, index, nbytes = _rows(pieces)
            buffer = iovec.bytes_at(address, len(pieces) * nbytes)
            # Other modes than "clip" make NumPy copy into a temporary first; the rows are in range.
            np.take(rows, index, axis=0, out=buffer.reshape(-1, nbytes), mode="clip")
        else:
            _copy(pieces.copy(), _whole(address, pieces))
        return _DONE

    def scatter(self, address: int, pieces: iovec.Iovec) -> Moved:
        """Copies from `address` into the pieces."""
        if _on_a_grid(pieces):
            rows, index, nbytes = _rows(pieces)
            item = f"V{nbytes}"
            buffer = iovec.bytes_at(address, len(pieces) * nbytes)
            rows.reshape(-1).view(item)[index] = buffer.view(item)
        else:
            _copy(_whole(address, pieces), pieces.copy())
        return _DONE

    def pin(self, address: int, nbytes: int) -> None:
        """Nothing: host memory reaches host memory."""

    def unpin(self, address: int) -> None:
        """Nothing."""

    def warm(self, address: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def suits(pieces: iovec.Iovec, direct_from_nbytes: int) -> bool:
    """Whether pieces of host memory go faster through staging: many, tiny, equal, on one grid."""
    if direct_from_nbytes >= NEVER_DIRECT:
        return len(pieces) > 0
    return _on_a_grid(pieces) and int(pieces[0, 1]) < direct_from_nbytes


class Buffer:
    """Host memory of its own mapping, pinned for one mover."""

    def __init__(self, nbytes: int, mover: Mover) -> None:
        self.nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        self._mover = mover
        mover.pin(self.address, self.nbytes)

    def part(self, nbytes: int) -> iovec.Iovec:
        """Its first bytes, as an iovec of one piece."""
        return iovec.one(self.address, nbytes)

    def close(self) -> None:
        """Gives the memory back."""
        self._mover.unpin(self.address)
        self._map.close()


class Ring:
    """A few buffers of one mover. `take` and `give` from any thread."""

    def __init__(self, mover: Mover, count: int, nbytes: int, meter: StagingMeter) -> None:
        self.mover = mover
        self._meter = meter
        self._count = count
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._nbytes = nbytes
        for _ in range(count):
            self._free.put(None)  # made when it is first taken

    def take(self, nbytes: int) -> Buffer:
        """A free buffer of at least `nbytes`; waits for one."""
        buffer = self._free.get()
        try:
            if buffer is not None and buffer.nbytes < nbytes:
                self._close(buffer)
                buffer = None
            if buffer is None:
                buffer = Buffer(max(nbytes, self._nbytes), self.mover)
                self._meter.add(buffer.nbytes)
        except BaseException:
            self._free.put(None)
            raise
        return buffer

    def _close(self, buffer: Buffer) -> None:
        self._meter.add(-buffer.nbytes)
        buffer.close()

    def give(self, buffer: Buffer) -> None:
        """Gives a buffer back: nobody touches it any more."""
        self._free.put(buffer)

    def fill(self) -> None:
        """Makes all buffers now, and warms the mover. Raises DeviceError."""
        buffers: list[Buffer] = []
        try:
            buffers.extend(self.take(1) for _ in range(self._count))
            self.mover.warm(buffers[0].address)
        finally:
            for buffer in buffers:
                self.give(buffer)

    def close(self) -> None:
        """Waits until every buffer is back, and frees them and the mover."""
        for _ in range(self._count):
            buffer = self._free.get()
            if buffer is not None:
                self._close(buffer)
        self.mover.close()


def new_mover(device: int, max_programs: int | None = None) -> Mover:
    """A mover for the memory of a GPU, or of the host for -1."""
    if device < 0:
        return HostMover()
    from .gpu_mover import GpuMover

    return GpuMover(device, max_programs)


def _copy(src: iovec.Iovec, dst: iovec.Iovec) -> None:
    """Copies within this process, by the system call that walks two lists. Consumes both.

    Raises:
        RegionGone, DeviceError: the memory is gone; or the kernel refuses.
    """
    nbytes = int(dst[:, 1].sum())
    if not nbytes:
        return  # the call's answer to nothing is that of a failure
    try:
        iovec.process_vm(os.getpid(), dst, src, nbytes, write=False)
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise RegionGone(
                f"memory of a region is not mapped any more ({error.strerror}): it was freed "
                "while registered",
                operation="stage",
            ) from error
        raise DeviceError(
            f"the kernel could not copy: {error.strerror}", operation="stage"
        ) from error


def _on_a_grid(pieces: iovec.Iovec) -> bool:
    """Whether they are many, small, equal, and lie whole multiples of their size apart."""
    if len(pieces) < FEWEST_PIECES:
        return False
    nbytes = int(pieces[0, 1])
    if not 0 < nbytes < GRID_BELOW_NBYTES or bool((pieces[:, 1] != nbytes).any()):
        return False
    return not bool(((pieces[:, 0] - pieces[:, 0].min()) % np.uint64(nbytes)).any())


def _rows(
    pieces: iovec.Iovec,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], int]:
    """The memory that the pieces span as rows of one piece each, and the pieces' row numbers."""
    nbytes = int(pieces[0, 1])
    first, last = int(pieces[:, 0].min()), int(pieces[:, 0].max())
    rows = iovec.bytes_at(first, last - first + nbytes).reshape(-1, nbytes)
    index = ((pieces[:, 0] - np.uint64(first)) // np.uint64(nbytes)).astype(np.int64)
    return rows, index, nbytes


def _whole(address: int, pieces: iovec.Iovec) -> iovec.Iovec:
    return iovec.one(address, int(pieces[:, 1].sum()))
