"""Converts a chunk of a transfer on a GPU, between a cache there and staging beside it.

Two kernels do it (`kernels/rows.py`), on a stream of the workspace's own; what they walk is a table
of addresses that the host makes, uploaded before each launch. The staging is GPU memory: what the
transport does with it is what it does with any cache.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ...kernels.errors import ShapeError
from ...kernels.rows import NARROW_WORDS, WIDE_WORDS, find_maxima, move_rows, row_types
from ..errors import DeviceError, PlanError
from ..memory.cuda_driver import driver
from ..memory.cuda_events import Event, pool_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from ..layout.dtypes import ElementType

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]

# As for what is staged (`gpu_mover.py`): PCIe comes next and is slower, and a model wants the rest.
MAX_PROGRAMS = 32
_FEWEST_NBYTES = 1 << 20  # of tables: 50,000 rows, and a chunk of 4 MiB has 32,768 of 128 bytes
_ALIGNED_NBYTES = 256


class Gpu(Protocol):
    """What a workspace needs of a device: memory, one stream, and copies between host and device."""

    def allocate(self, nbytes: int) -> int:
        """Device memory of an allocation of its own; its address. Raises DeviceError."""

    def free(self, address: int) -> None:
        """Free it."""

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Host memory that kernels write at its own address."""

    def upload(self, there: int, here: int, nbytes: int) -> None:
        """Copy pinned memory to the device, in the order of the stream."""

    def launching(self) -> contextlib.AbstractContextManager[None]:
        """Kernels that are launched inside run in the order of the stream."""

    def synchronize(self) -> None:
        """Return when the stream has nothing left to do. Raises DeviceError."""

    def close(self) -> None:
        """End the stream."""


class CudaStream:
    """A stream of its own on one GPU."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._raw = driver().new_stream(device)
        self._stream: Any = torch.cuda.ExternalStream(self._raw, device=device)  # type: ignore[no-untyped-call]
        self._event = Event(pool_of(device))

    def allocate(self, nbytes: int) -> int:
        """Not torch's: its allocator may give what another stream still uses."""
        return driver().allocate(self._device, nbytes, zeros=False)

    def free(self, address: int) -> None:
        """Wait for the device, as CUDA does."""
        driver().free(self._device, address)

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Kept by the array."""
        with driver().beside_captures():
            memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        array: npt.NDArray[np.uint8] = memory.numpy()
        return array

    def upload(self, there: int, here: int, nbytes: int) -> None:
        """On the stream."""
        driver().copy(self._device, there, here, nbytes, self._raw)

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Make the stream, and its device, the current ones of this thread; kernels may be loaded."""
        with driver().beside_captures(), torch.cuda.stream(self._stream):
            yield

    def synchronize(self) -> None:
        """Spin in native code, without the interpreter lock."""
        cuda = driver()
        with cuda.current(self._device):
            cuda.record(self._event.handle, self._raw)
        cuda.synchronize_event(self._event.handle)

    def close(self) -> None:
        """The stream is idle."""
        driver().destroy_stream(self._device, self._raw)


class GpuWorkspace:
    """Converts in one GPU's memory. Not thread-safe."""

    def __init__(self, gpu: Gpu, max_programs: int | None = None) -> None:
        self.address = 0
        self._gpu = gpu
        self._max_programs = max_programs or MAX_PROGRAMS
        self._nbytes = 0
        # Tables: pinned here, and as many bytes there. What is begun reads both.
        self._here: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._there = 0
        self._used_nbytes = 0

    def reserve(self, nbytes: int) -> None:
        """Allocate GPU memory, if there is too little."""
        if nbytes <= self._nbytes:
            return
        with _failing("allocating"):
            self._free_staging()
            self.address = self._gpu.allocate(nbytes)
            self._nbytes = nbytes

    def floats(self, addresses: Ids) -> Floats:
        """Return a kernel writes them into pinned memory."""
        with _failing("reading scales"):
            out, start = self._pinned_floats(len(addresses), 8 + 8)
            self._copy(addresses, _row_addresses(out), start)
            self.finish()
            found: Floats = out.copy()
        return found

    def put_floats(self, addresses: Ids, values: Floats) -> None:
        """A kernel reads them from pinned memory."""
        with _failing("writing scales"):
            out, start = self._pinned_floats(len(addresses), 8 + 8)
            out[...] = values
            self._copy(_row_addresses(out), addresses, start)

    def maxima(self, addresses: Ids, elements: int, of: ElementType, factor: Floats) -> Floats:
        """Return a kernel writes them into pinned memory."""
        with _failing("looking for scales"):
            out, start = self._pinned_floats(len(addresses), 8 + 8 + 4)
            dtype = _dtype(of)
            types = row_types(addresses, addresses, elements, dtype, dtype)
            table, factors = self._upload(start, addresses, _row_addresses(out), factor)
            with self._gpu.launching():
                find_maxima(
                    types, table, factors, len(out), elements, max_programs=self._max_programs
                )
            self.finish()
            found: Floats = out.copy()
        return found

    def convert(
        self,
        src: Ids,
        dst: Ids,
        elements: int,
        types: tuple[ElementType, ElementType],
        factor: Floats | None,
    ) -> None:
        """Enqueue one launch."""
        with _failing("converting"):
            start = self._room(len(src) * (8 + 8 + 4))
            if factor is None:
                nbytes = elements * types[0].nbytes
                every = np.bitwise_or.reduce(src | dst) | nbytes if len(src) else nbytes
                word = min(8, int(every & -every))
                dtypes = [_BITS[word]] * 2
                elements = nbytes // word
            else:
                dtypes = [_dtype(one) for one in types]
            rows = row_types(src, dst, elements, *dtypes)
            table, factors = self._upload(start, src, dst, factor)
            with self._gpu.launching():
                move_rows(
                    rows,
                    table,
                    None if factor is None else factors,
                    len(src),
                    elements,
                    max_programs=self._max_programs,
                )

    def finish(self) -> None:
        """Wait for the stream."""
        with _failing("converting"):
            self._gpu.synchronize()
            self._used_nbytes = 0

    def try_out(
        self, types: tuple[ElementType, ElementType], *, converts: bool, scaled: bool
    ) -> None:
        """Load the kernels, for short rows and for long ones, by moving what is in the staging."""
        src, dst = np.array([self.address]), np.array([self.address + 8 * WIDE_WORDS])
        one = np.ones(1, np.float32)
        for elements in (NARROW_WORDS, WIDE_WORDS):
            self.convert(src, dst, elements, types, one if converts else None)
            if scaled and converts:
                self.maxima(src, elements, types[0], one)
        if scaled:
            self.put_floats(src, self.floats(src))
        self.finish()

    def close(self) -> None:
        """Free the GPU's memory and the stream."""
        self._free_staging()
        if self._there:
            self._gpu.free(self._there)
            self._there = 0
        self._gpu.close()

    def _free_staging(self) -> None:
        if self.address:
            self._gpu.free(self.address)
            self.address = self._nbytes = 0

    def _room(self, nbytes: int) -> int:
        """Return where in the tables so many bytes, in up to four columns, are free."""
        nbytes += 4 * _ALIGNED_NBYTES
        if self._used_nbytes + nbytes > len(self._here):
            self.finish()  # nothing reads them any more
        if nbytes > len(self._here):
            if self._there:
                self._gpu.free(self._there)
                self._there = 0
            whole = max(_FEWEST_NBYTES, 1 << (nbytes - 1).bit_length())
            self._here = self._gpu.pinned(whole)
            self._there = self._gpu.allocate(whole)
        start = self._used_nbytes
        self._used_nbytes = start + _aligned(nbytes)
        return start

    def _pinned_floats(self, count: int, row_nbytes: int) -> tuple[Floats, int]:
        """float32 that kernels read and write, and where a table of as many rows begins after them."""
        start = self._room(count * (4 + row_nbytes))
        floats: Floats = self._here[start : start + 4 * count].view(np.float32)
        return floats, start + _aligned(floats.nbytes)

    def _copy(self, src: Ids, dst: Ids, start: int) -> None:
        """float32 from place to place."""
        types = row_types(src, dst, 1, torch.int32, torch.int32)
        table, _ = self._upload(start, src, dst, None)
        with self._gpu.launching():
            move_rows(types, table, None, len(src), 1, max_programs=self._max_programs)

    def _upload(self, start: int, src: Ids, dst: Ids, factor: Floats | None) -> tuple[int, int]:
        """Return a launch's table, from byte `start` of the tables on: where it and its factors
        are."""
        count = len(src)
        rows = self._here[start : start + 16 * count].view(np.int64)
        rows[:count], rows[count:] = src, dst
        nbytes = rows.nbytes
        if factor is not None:
            self._here[start + nbytes : start + nbytes + 4 * count].view(np.float32)[...] = factor
            nbytes += 4 * count
        there = self._there + start
        self._gpu.upload(there, int(self._here.ctypes.data) + start, nbytes)
        return there, there + rows.nbytes


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def _dtype(of: ElementType) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, of.dtype)
    return dtype


def _row_addresses(values: npt.NDArray[Any]) -> Ids:
    addresses: Ids = int(values.ctypes.data) + values.itemsize * np.arange(len(values))
    return addresses


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED_NBYTES) * _ALIGNED_NBYTES


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Name what goes wrong on the GPU: Triton and torch raise many kinds."""
    try:
        yield
    except (DeviceError, PlanError):
        raise
    except ShapeError as error:
        raise PlanError(str(error), operation="convert") from error
    except Exception as error:
        raise DeviceError(f"{what} on a GPU failed: {error}", operation="convert") from error


def new_gpu_workspace(device: int, max_programs: int | None) -> GpuWorkspace:
    """Return a workspace in a GPU's memory. Raises DeviceError."""
    with _failing("starting"):
        return GpuWorkspace(CudaStream(device), max_programs)
