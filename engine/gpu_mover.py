"""Gathers pieces of GPU memory straight into pinned host memory, and scatters them from it.

One kernel launch a buffer, on a stream of the mover's own: the kernel reads and writes host memory
over PCIe itself, so nothing passes through device memory a second time.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..kernels.pieces import copy_pieces, make_table
from .cuda import driver
from .errors import DeviceError

if TYPE_CHECKING:
    import numpy.typing as npt

    from .iovec import Iovec

# PCIe needs few programs, and a model wants the multiprocessors.
MAX_PROGRAMS = 32
_FEWEST_WORDS = 1 << 15  # 8,192 pieces and their cuts
_warming = threading.Lock()  # threads that compile one kernel at once would each compile it


class _Table:
    """A table of pieces on its way to the GPU: pinned words here, as many there."""

    def __init__(self, device: int, num_words: int) -> None:
        self.device = device
        self.num_words = num_words
        self._here = torch.empty(num_words, dtype=torch.int64, pin_memory=True)
        self._there = torch.empty(num_words, dtype=torch.int64, device=device)
        self._words: npt.NDArray[np.int64] = self._here.numpy()

    def upload(self, columns: npt.NDArray[np.int64], stream: int) -> torch.Tensor:
        """The columns on the GPU, on that stream."""
        self._words[: columns.size].reshape(columns.shape)[...] = columns
        # Not torch's copy: its allocators would remember the stream, and ask it when it is gone.
        driver().upload(
            self.device, self._there.data_ptr(), self._here.data_ptr(), columns.nbytes, stream
        )
        return self._there[: columns.size].view(columns.shape)


class _Flight:
    """A launch that was begun, and the table that it reads."""

    def __init__(self, mover: GpuMover, table: _Table, event: torch.cuda.Event) -> None:
        self._mover = mover
        self._table = table
        self._event = event

    def wait(self) -> None:
        """Spins in native code, without the interpreter lock, until the kernel has ended."""
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise DeviceError(
                f"GPU {self._mover.device} failed: {error}", operation="stage"
            ) from error
        self._mover._back(self._table, self._event)


class GpuMover:
    """Moves pieces of one GPU's memory. One thread begins; any thread waits."""

    def __init__(self, device: int, max_programs: int | None = None) -> None:
        self.device = device
        self._max_programs = max_programs or MAX_PROGRAMS
        self._raw_stream = driver().new_stream(device)
        self._stream: torch.cuda.Stream = torch.cuda.ExternalStream(  # type: ignore[no-untyped-call]
            self._raw_stream, device=device
        )
        self._tables: deque[_Table] = deque()
        self._events: deque[torch.cuda.Event] = deque()

    def gather(self, pieces: Iovec, address: int) -> _Flight:
        """Begins to copy the pieces to `address` in pinned memory."""
        scattered, staged, nbytes = _addresses(pieces, address)
        return self._launch(scattered, staged, nbytes)

    def scatter(self, address: int, pieces: Iovec) -> _Flight:
        """Begins to copy from `address` in pinned memory into the pieces."""
        scattered, staged, nbytes = _addresses(pieces, address)
        return self._launch(staged, scattered, nbytes)

    def pin(self, address: int, nbytes: int) -> None:
        """Registers host memory with CUDA, for all GPUs of this process."""
        driver().pin(self.device, address, nbytes)

    def unpin(self, address: int) -> None:
        """Ends a registration."""
        driver().unpin(self.device, address)

    def warm(self, address: int) -> None:
        """Copies a few bytes within pinned memory, so that the kernel is compiled and loaded.

        `address` must have room for 256 bytes.
        """
        with _warming:
            pieces = np.array([[address, 64]], np.uint64)
            self.gather(pieces, address + 128).wait()

    def close(self) -> None:
        """Destroys the stream: nothing is in flight."""
        driver().destroy_stream(self.device, self._raw_stream)

    def _launch(
        self,
        src: npt.NDArray[np.int64],
        dst: npt.NDArray[np.int64],
        nbytes: npt.NDArray[np.int64],
    ) -> _Flight:
        table = make_table(src, dst, nbytes)
        try:
            room = self._room(table.columns.size)
            event = self._events.pop() if self._events else torch.cuda.Event()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                columns = room.upload(table.columns, self._raw_stream)
                copy_pieces(table, columns, max_programs=self._max_programs)
                event.record(self._stream)
        except DeviceError:
            raise
        except Exception as error:  # Triton and torch raise many kinds
            raise DeviceError(
                f"launching on GPU {self.device} failed: {error}", operation="stage"
            ) from error
        return _Flight(self, room, event)

    def _room(self, num_words: int) -> _Table:
        while self._tables:
            table = self._tables.pop()
            if table.num_words >= num_words:
                return table
        return _Table(self.device, max(_FEWEST_WORDS, 1 << (num_words - 1).bit_length()))

    def _back(self, table: _Table, event: torch.cuda.Event) -> None:
        self._tables.append(table)
        self._events.append(event)


def _addresses(
    pieces: Iovec, address: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the pieces lie, where each is staged, and their sizes."""
    nbytes = pieces[:, 1].astype(np.int64)
    return pieces[:, 0].astype(np.int64), address + np.cumsum(nbytes) - nbytes, nbytes
