"""Time a CUDA driver call by each way into the driver, and see which of them let other threads run.

`python -m kvferry.tools.bench.driver_calls`, on a machine with a GPU and NVIDIA's `cuda-python`. The
ways: ctypes that keeps the interpreter lock (`PyDLL`), ctypes that lets go of it (`CDLL`), and
`cuda.bindings`. A call on a transfer's way is made three to eight times a transfer.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import statistics
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CALLS = 2_000
ROUNDS = 15
SLEEP_CYCLES = 200_000_000


def median_us(call: Callable[[], Any], settle: Callable[[], Any], calls: int = CALLS) -> float:
    """Time one call, in microseconds: the median of several rounds of many."""
    found = []
    for _ in range(ROUNDS):
        settle()
        begun_s = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - begun_s) / calls * 1e6)
    return statistics.median(found)


@contextlib.contextmanager
def busy() -> Iterator[list[int]]:
    """Run a thread that computes and never waits; yields the number of its steps."""
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


def others_run(call: Callable[[], Any]) -> float:
    """Count what another thread does while a call waits for the GPU, in million steps a second."""
    with busy() as steps:
        before, begun_s = steps[0], time.perf_counter()
        call()
        return (steps[0] - before) / (time.perf_counter() - begun_s) / 1e6


def main() -> None:
    from cuda.bindings import driver as binding  # type: ignore[import-not-found,unused-ignore]

    torch.zeros(1, device="cuda")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    raw, mark = stream.cuda_stream, event.cuda_event
    there = torch.zeros(1024, dtype=torch.int64, device="cuda")
    here = torch.zeros(1024, dtype=torch.int64, pin_memory=True)
    address, source = there.data_ptr(), here.data_ptr()
    ways: dict[str, dict[str, Callable[[], Any]]] = {}
    signatures = {
        "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
        "cuStreamWaitEvent": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
        "cuMemcpyHtoDAsync_v2": (
            ctypes.c_uint64,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_void_p,
        ),
        "cuEventSynchronize": (ctypes.c_void_p,),
        "cuStreamWaitValue64_v2": (
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_uint,
        ),
    }
    arguments: dict[str, tuple[Any, ...]] = {
        "cuEventRecord": (mark, raw),
        "cuStreamWaitEvent": (raw, mark, 0),
        "cuMemcpyHtoDAsync_v2": (address, source, 256, raw),
        "cuEventSynchronize": (mark,),
        "cuStreamWaitValue64_v2": (raw, address, 0, 0),
    }
    for name, library in (("PyDLL", ctypes.PyDLL), ("CDLL", ctypes.CDLL)):
        loaded = library("libcuda.so.1")
        for call, signature in signatures.items():
            function = loaded[call]
            function.argtypes, function.restype = signature, ctypes.c_int
            ways.setdefault(call, {})[name] = functools.partial(function, *arguments[call])
    bound_stream, bound_event = binding.CUstream(raw), binding.CUevent(mark)
    ways["cuEventRecord"]["cuda.bindings"] = lambda: binding.cuEventRecord(
        bound_event, bound_stream
    )
    ways["cuStreamWaitEvent"]["cuda.bindings"] = lambda: binding.cuStreamWaitEvent(
        bound_stream, bound_event, 0
    )
    ways["cuMemcpyHtoDAsync_v2"]["cuda.bindings"] = lambda: binding.cuMemcpyHtoDAsync(
        address, source, 256, bound_stream
    )
    ways["cuEventSynchronize"]["cuda.bindings"] = lambda: binding.cuEventSynchronize(bound_event)
    ways["cuStreamWaitValue64_v2"]["cuda.bindings"] = lambda: binding.cuStreamWaitValue64(
        bound_stream, address, 0, 0
    )
    print(f"{torch.cuda.get_device_name()}, Python {sys.version.split()[0]}")
    print(f"{'us a call':28}" + "".join(f"{way:>16}" for way in ways["cuEventRecord"]))
    for call, found in ways.items():
        times = [median_us(found[way], torch.cuda.synchronize) for way in found]
        print(f"{call:28}" + "".join(f"{one:16.2f}" for one in times), flush=True)
    print("beside a thread that computes:")
    with busy():
        for call, found in ways.items():
            times = [median_us(found[way], torch.cuda.synchronize, 40) for way in found]
            print(f"{call:28}" + "".join(f"{one:16.2f}" for one in times), flush=True)
    rates = []
    for way in ways["cuEventSynchronize"].values():
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        event.record()  # of the default stream, behind the sleep
        rates.append(others_run(way))
    print(f"{'another thread, Msteps/s':28}" + "".join(f"{rate:16.2f}" for rate in rates))


if __name__ == "__main__":
    main()
