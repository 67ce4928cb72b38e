"""A GPU's workplace over host memory, its kernels in Triton's interpreter: all but the GPU itself."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import TYPE_CHECKING

import numpy as np

from kvferry.engine import workplaces
from kvferry.engine.gpu_workplace import GpuWorkplace
from kvferry.kernels import rows
from tests.kernels.conftest import interpret_kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    import pytest

_launching = threading.RLock()  # the interpreter has one grid for the whole process
_POISON = 0xCC


class InterpretedGpu:
    """Memory that must be freed, uploads that are seen by what is launched after them."""

    def __init__(self) -> None:
        self.memory: dict[int, npt.NDArray[np.uint8]] = {}
        self.closed = False

    def allocate(self, nbytes: int) -> int:
        raw = np.full(nbytes + 256, _POISON, np.uint8)
        address = -(-int(raw.ctypes.data) // 256) * 256
        self.memory[address] = raw
        return address

    def free(self, address: int) -> None:
        self.memory.pop(address)[...] = _POISON

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        address = self.allocate(nbytes)
        raw = self.memory.pop(address)
        start = address - int(raw.ctypes.data)
        return raw[start : start + nbytes]

    def upload(self, there: int, here: int, nbytes: int) -> None:
        ctypes.memmove(there, here, nbytes)

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        with _launching:
            yield

    def synchronize(self) -> None:
        assert not self.closed

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def convert_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[InterpretedGpu]:
    """From here on links convert host memory as if it were a GPU's; the GPUs that they use."""
    interpret_kernels(monkeypatch)
    # The interpreter goes number by number where it reduces.
    for name, words in (("TILE_WORDS", 64), ("WIDE_WORDS", 64), ("NARROW_WORDS", 16)):
        monkeypatch.setattr(rows, name, words)
    gpus: list[InterpretedGpu] = []

    def new(device: int, max_programs: int | None) -> GpuWorkplace:
        assert device == -1
        gpus.append(InterpretedGpu())
        return GpuWorkplace(gpus[-1], max_programs)

    monkeypatch.setattr(workplaces, "new_workplace", new)
    return gpus
