"""Time the CUDA driver's calls by ctypes and by NVIDIA's bindings, alone and beside a thread that computes.

`python -m kvferry.tools.bench.driver_calls`, on a machine with a GPU and `cuda-bindings`. By ctypes are the
calls of a transfer as `LockKeepingDriver` makes them, with the interpreter lock in hand, and a launch that
releases it; the bindings release it in every call. Whoever releases it beside a thread that computes may
get it back a switch interval (5 ms) later: so of six calls at a time the mean and the longest are told, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import statistics
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from kvferry.engine.memory.cuda_driver import LIBRARY, Driver, LockKeepingDriver
from kvferry.kernels.launch import LoadedKernel
from kvferry.kernels.runtime import jit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CALLS, ROUNDS = 1_000, 15
AT_ONCE, TIMES, REST_S = 6, 400, 0.0005  # a transfer's calls, and as if transfers came one by one
SLEEP_CYCLES = 200_000_000


@jit()
def nothing(_here, _there):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Do nothing: a launch is timed."""


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_nbytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class LaunchByCtypes:
    """Launch what a `LoadedKernel` launches, with the same arguments, by ctypes."""

    def __init__(self, kernel: LoadedKernel, compiled: Any) -> None:
        self._config = _Config((1, 1, 1), (32 * compiled.metadata.num_warps, 1, 1))
        self._grid = self._config.grid
        self._arguments = (
            ctypes.byref(self._config),
            ctypes.c_void_p(compiled.function),
            ctypes.c_void_p(kernel._parameters),
            None,
        )
        self._launch = ctypes.CDLL(LIBRARY).cuLaunchKernelEx
        self._launch.argtypes = (ctypes.POINTER(_Config), *(ctypes.c_void_p,) * 3)

    def launch(self, stream: int, x: int, y: int) -> None:
        self._grid[0] = x
        self._grid[1] = y
        self._config.stream = stream
        code = self._launch(*self._arguments)
        if code:
            raise RuntimeError(f"cuLaunchKernelEx failed: error {code}")


def rounds_us(call: Callable[[], object], rounds: int, calls: int, rest_s: float) -> list[float]:
    """Time rounds of so many calls each, in microseconds, with a rest before each."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        time.sleep(rest_s)
        begun_s = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - begun_s) * 1e6)
    return found


def median_us(call: Callable[[], object]) -> float:
    """Time one call: the median of several rounds of many."""
    return statistics.median(rounds_us(call, ROUNDS, CALLS, 0.0)) / CALLS


def several_us(call: Callable[[], object]) -> str:
    """Time six calls after a rest, many times: median, mean and longest in microseconds."""
    found = rounds_us(call, TIMES, AT_ONCE, REST_S)
    return f"{statistics.median(found):8.1f} {statistics.mean(found):8.1f} {max(found):8.0f}"


@contextlib.contextmanager
def busy() -> Iterator[list[int]]:
    """Run a thread that computes and never waits; yield the number of its steps."""
    steps, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            steps[0] += 1

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield steps
    finally:
        stop.set()
        thread.join()


def calls(
    cuda: Driver, launcher: LoadedKernel | LaunchByCtypes, stream: int, there: int, here: int
) -> dict[str, Callable[[], object]]:
    """Return the calls, in one way, of 256 bytes between two addresses."""
    event = cuda.new_event(0)

    def enter_and_leave() -> None:
        cuda.enter(0)
        cuda.leave()

    return {
        "enter, leave": enter_and_leave,
        "cuEventRecord": lambda: cuda.record(event, stream),
        "cuStreamWaitEvent": lambda: cuda.wait_event(stream, event),
        "cuMemcpyHtoDAsync": lambda: cuda.upload(there, here, 256, stream),
        "cuStreamIsCapturing": lambda: cuda.is_capturing(stream),
        "cuLaunchKernelEx": lambda: launcher.launch(stream, 1, 1),
    }


def main() -> None:
    there = torch.zeros(256, dtype=torch.uint8, device="cuda")
    here = torch.zeros(256, dtype=torch.uint8, pin_memory=True)
    print(
        f"{torch.cuda.get_device_name()}, Python {sys.version.split()[0]}, "
        f"cuda-bindings {importlib.metadata.version('cuda-bindings')}"
    )
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    places = stream.cuda_stream, there.data_ptr(), here.data_ptr()
    compiled = nothing.warmup(torch.int64, torch.int64, grid=(1,), num_warps=1)
    kernel = LoadedKernel(compiled)
    by_ctypes = calls(LockKeepingDriver(), LaunchByCtypes(kernel, compiled), *places)
    bound = calls(Driver(), kernel, *places)
    timed = {name: (by_ctypes[name], bound[name]) for name in bound}
    print(f"{'us a call':24}{'ctypes':>27}{'cuda.bindings':>27}")
    for name, ways in timed.items():
        print(f"{name:24}" + "".join(f"{median_us(way):27.2f}" for way in ways), flush=True)
    for beside in (False, True):
        print(
            f"us for six calls{', beside a thread that computes' * beside}: median, mean, longest"
        )
        with busy() if beside else contextlib.nullcontext():
            for name, ways in timed.items():
                print(f"{name:24}" + "".join(f" {several_us(way)}" for way in ways), flush=True)
    cuda = Driver()
    event = cuda.new_event(0)
    with busy() as steps:
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        cuda.record(event, 0)  # on the default stream, behind the sleep
        before, begun_s = steps[0], time.perf_counter()
        cuda.synchronize_event(event)
        rate = (steps[0] - before) / (time.perf_counter() - begun_s) / 1e6
    print(f"another thread while cuEventSynchronize waits: {rate:.2f} million steps a second")


if __name__ == "__main__":
    main()
