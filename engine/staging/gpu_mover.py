"""Gathers pieces of GPU memory straight into pinned host memory, and scatters them from it.

One kernel launch a buffer, on streams of the mover's own: the kernel reads and writes host memory
over PCIe itself, so nothing passes through device memory a second time (decision 0016).
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.pieces import FEWEST_SHORT_ROWS, copy_pieces, make_table
from ..errors import DeviceError
from ..memory.cuda_driver import driver
from ..memory.cuda_events import Event, pool_of
from ..memory.iovec import gpu_bytes_at

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..memory.iovec import Iovec

# PCIe needs few programs, and a model wants the multiprocessors. H200, GB/s of gather and scatter with
# 32 KiB pieces: 8 programs 51 and 49, 32 the same; with 4 KiB pieces: 8 33 and 17, 32 49 and 48.
MAX_PROGRAMS = 32
NUM_STREAMS = 2  # the next table is uploaded while a kernel runs
_FEWEST_WORDS = 1 << 15  # 8,192 pieces and their cuts
_warming = threading.Lock()  # threads that compile one kernel at once would each compile it


class _Table:
    """A table of pieces on its way to the GPU: pinned words here, as many there.

    There in an allocation of its own: what torch's allocator gives may still be in use by the stream
    that freed it, which the mover's stream does not wait for.
    """

    def __init__(self, device: int, num_words: int) -> None:
        self.device = device
        self.num_words = num_words
        with driver().beside_captures():
            self._here = torch.empty(num_words, dtype=torch.int64, pin_memory=True)
        self._address = driver().allocate(device, 8 * num_words, zeros=False)
        self._there = gpu_bytes_at(device, self._address, 8 * num_words).view(torch.int64)
        self._words: npt.NDArray[np.int64] = self._here.numpy()

    def upload(self, columns: npt.NDArray[np.int64], stream: int) -> torch.Tensor:
        """Return the columns on the GPU, on that stream."""
        self._words[: columns.size].reshape(columns.shape)[...] = columns
        # Not torch's copy: its allocators would remember the stream, and ask it when it is gone.
        driver().copy(self.device, self._address, self._here.data_ptr(), columns.nbytes, stream)
        return self._there[: columns.size].view(columns.shape)

    def free(self) -> None:
        driver().free(self.device, self._address)


class _Flight:
    """A launch that was begun, and the table that it reads."""

    def __init__(self, mover: GpuMover, table: _Table, event: Event) -> None:
        self._mover = mover
        self._table = table
        self._event = event

    def done(self) -> bool:
        """Return whether the kernel has ended, or failed."""
        try:
            return self._event.query()
        except DeviceError:
            return True  # `wait` says why

    def wait(self) -> None:
        """Spin in native code, without the interpreter lock, until the kernel has ended."""
        try:
            driver().synchronize_event(self._event.handle)
        except DeviceError as error:
            why = f"GPU {self._mover.device} failed: {error.message}"
            raise DeviceError(why, code=error.code, operation="stage") from error
        self._mover._tables.append(self._table)


class GpuMover:
    """Moves pieces of one GPU's memory. One thread begins; any thread waits."""

    def __init__(self, device: int, max_programs: int | None = None) -> None:
        self.device = device
        self._max_programs = max_programs or MAX_PROGRAMS
        raw = [driver().new_stream(device) for _ in range(NUM_STREAMS)]
        self._streams: list[tuple[int, torch.cuda.Stream]] = [
            (stream, torch.cuda.ExternalStream(stream, device=device))  # type: ignore[no-untyped-call]
            for stream in raw
        ]
        self._turns = itertools.cycle(self._streams)
        self._tables: deque[_Table] = deque()
        self._pool = pool_of(device)

    def gather(self, pieces: Iovec, address: int) -> _Flight:
        """Begin to copy the pieces to `address` in pinned memory."""
        return self._begin(pieces, address, gather=True)

    def scatter(self, address: int, pieces: Iovec) -> _Flight:
        """Begin to copy from `address` in pinned memory into the pieces."""
        return self._begin(pieces, address, gather=False)

    def pin(self, address: int, nbytes: int) -> None:
        """Register host memory with CUDA, for all GPUs of this process."""
        driver().pin(self.device, address, nbytes)

    def unpin(self, address: int) -> None:
        """End a registration."""
        driver().unpin(self.device, address)

    def warm(self, address: int) -> None:
        """Copy a few bytes within pinned memory, so that the kernels are compiled and loaded.

        `address` must have room for 256 bytes.
        """
        with _warming:
            pieces = np.array([[address, 64]], np.uint64)
            self.gather(pieces, address + 128).wait()
            short = np.array([[address, 16]] * FEWEST_SHORT_ROWS, np.uint64)
            self.gather(short, address).wait()  # the kernel for short pieces

    def close(self) -> None:
        """Free the streams and the memory: nothing is in flight."""
        for table in self._tables:
            table.free()
        self._tables.clear()
        for stream, _ in self._streams:
            driver().destroy_stream(self.device, stream)

    def _begin(self, pieces: Iovec, address: int, *, gather: bool) -> _Flight:
        try:
            return self._launch(pieces, address, gather=gather)
        except DeviceError:
            raise
        except Exception as error:  # Triton and torch raise many kinds
            raise DeviceError(
                f"launching on GPU {self.device} failed: {error}", operation="stage"
            ) from error

    def _launch(self, pieces: Iovec, address: int, *, gather: bool) -> _Flight:
        nbytes = pieces[:, 1].astype(np.int64)
        scattered, staged = pieces[:, 0].astype(np.int64), address + np.cumsum(nbytes) - nbytes
        src, dst = (scattered, staged) if gather else (staged, scattered)
        table = make_table(src, dst, nbytes)
        room = self._room(table.columns.size)
        event = Event(self._pool)
        raw_stream, stream = next(self._turns)
        cuda = driver()
        # Kernels may be loaded, and take memory.
        with cuda.beside_captures(), torch.cuda.stream(stream):
            columns = room.upload(table.columns, raw_stream)
            copy_pieces(table, columns, max_programs=self._max_programs)
            with cuda.current(self.device):
                cuda.record(event.handle, raw_stream)
        return _Flight(self, room, event)

    def _room(self, num_words: int) -> _Table:
        while self._tables:
            table = self._tables.pop()
            if table.num_words >= num_words:
                return table
            table.free()
        return _Table(self.device, max(_FEWEST_WORDS, 1 << (num_words - 1).bit_length()))
