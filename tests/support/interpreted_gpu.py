"""A GPU whose memory is the host's and whose kernels run in Triton's interpreter: all but the GPU itself.

`convert_as_on_a_gpu` lets links convert host memory as if it were a GPU's; `StandIn` makes memory that is
registered from then on a GPU's for the whole engine, so that transports stage it.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.engine.convert import conversion, gpu_workspace, workspace
from kvferry.engine.convert.gpu_workspace import GpuWorkspace
from kvferry.engine.errors import DeviceError
from kvferry.engine.memory import regions as memory
from kvferry.engine.staging import gpu_mover
from kvferry.engine.transfer import compute_gate
from kvferry.engine.transfer.device_counters import DeviceCounters
from kvferry.kernels import rows
from kvferry.kernels.pieces import copy_pieces, make_table
from tests.kernels.conftest import interpret_kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    import pytest

    from kvferry.engine.memory.iovec import Iovec

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
    _interpret(monkeypatch)
    gpus: list[InterpretedGpu] = []

    def new(device: int, max_programs: int | None) -> GpuWorkspace:
        assert device == -1
        gpus.append(InterpretedGpu())
        return GpuWorkspace(gpus[-1], max_programs)

    monkeypatch.setattr(workspace, "new_workspace", new)
    return gpus


def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_kernels(monkeypatch)
    # The interpreter goes number by number where it reduces.
    for name, words in (("TILE_WORDS", 64), ("WIDE_WORDS", 64), ("NARROW_WORDS", 16)):
        monkeypatch.setattr(rows, name, words)


class Compute:
    """A stream: what is enqueued behind it waits for `done`."""

    def __init__(self) -> None:
        self.done = False
        self.asked = threading.Event()

    def query(self) -> bool:
        self.asked.set()
        return self.done


class StandIn:
    """GPU 0 of this process, until `monkeypatch` is undone.

    Attributes:
        registers: whether memory that is registered now is this GPU's; the host's if not.
        broken: its kernels fail.
        pinned: by address, how many bytes of staging it reaches.
        movers: how many have been made and not closed.
        moved: pieces that its kernels have copied to and from staging.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registers = True
        self.broken = False
        self.pinned: dict[int, int] = {}
        self.movers = 0
        self.moved = 0
        self._lock = threading.Lock()
        _interpret(monkeypatch)
        gpu = self

        class OnGpu(memory._Memory):
            def __init__(self, what: Any) -> None:
                super().__init__(what)
                self.device = 0 if gpu.registers else -1

        def new_mover(device: int, max_programs: int | None = None) -> Mover:
            assert device == 0
            return Mover(gpu)

        def new_workspace(device: int, max_programs: int | None) -> GpuWorkspace:
            assert device == 0
            return GpuWorkspace(InterpretedGpu(), max_programs)

        def event(device: int, stream: Compute | None) -> Compute | None:
            return stream if device >= 0 else None

        monkeypatch.setattr(memory, "_Memory", OnGpu)
        monkeypatch.setattr(memory, "export_tensor", lambda *_: (None, None))
        monkeypatch.setattr(DeviceCounters, "array", lambda *_: (b"", 0))
        monkeypatch.setattr(gpu_mover, "GpuMover", new_mover)
        monkeypatch.setattr(gpu_workspace, "new_gpu_workspace", new_workspace)
        for module in (compute_gate, conversion):
            monkeypatch.setattr(module, "compute_event", event)

    def count(self, movers: int = 0, moved: int = 0) -> None:
        with self._lock:
            self.movers += movers
            self.moved += moved


class Mover:
    """As `GpuMover`, its kernels launched and waited for at once; reaches pinned staging alone."""

    def __init__(self, gpu: StandIn) -> None:
        self._gpu = gpu
        self._closed = False
        self._beginning = threading.Lock()
        gpu.count(movers=1)

    def gather(self, pieces: Iovec, address: int) -> Mover:
        return self._move(pieces, address, gather=True)

    def scatter(self, address: int, pieces: Iovec) -> Mover:
        return self._move(pieces, address, gather=False)

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        """Nothing: it is done."""

    def pin(self, address: int, nbytes: int) -> None:
        assert address not in self._gpu.pinned
        self._gpu.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        del self._gpu.pinned[address]

    def warm(self, address: int) -> None:
        self._reach(address, 256)

    def close(self) -> None:
        assert not self._closed
        self._closed = True
        self._gpu.count(movers=-1)

    def _move(self, pieces: Iovec, address: int, *, gather: bool) -> Mover:
        assert not self._closed
        # A GPU's mover is begun by one thread at a time.
        assert self._beginning.acquire(blocking=False), "two threads begin at once"
        try:
            if self._gpu.broken:
                raise DeviceError("GPU 0 failed: it is broken", operation="stage")
            nbytes = pieces[:, 1].astype(np.int64)
            self._reach(address, int(nbytes.sum()))
            scattered, together = (
                pieces[:, 0].astype(np.int64),
                address + np.cumsum(nbytes) - nbytes,
            )
            src, dst = (scattered, together) if gather else (together, scattered)
            table = make_table(src, dst, nbytes)
            with _launching:
                copy_pieces(table, torch.from_numpy(table.columns), max_programs=4)
            self._gpu.count(moved=len(pieces))
        finally:
            self._beginning.release()
        return self

    def _reach(self, address: int, nbytes: int) -> None:
        inside = [a <= address and address + nbytes <= a + n for a, n in self._gpu.pinned.items()]
        assert any(inside), "staging that is not pinned"
