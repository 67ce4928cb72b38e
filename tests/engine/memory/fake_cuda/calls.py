"""Calls every method of the CUDA driver, in a process whose driver is `libcuda.c`; prints what happened.

As JSON: for each method what it gave, and the calls that reached the driver; what some failures say.
"""

from __future__ import annotations

import ctypes
import json
import sys
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvferry.engine.errors import DeviceError
from kvferry.engine.memory import cuda_driver

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.kernels.launch import LoadedKernel

LIBRARY = ctypes.CDLL(cuda_driver.LIBRARY)
LIBRARY.fake_told.restype = ctypes.c_char_p


def observe(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call gives, and what reaches the driver, but for entering and leaving device 1."""
    LIBRARY.fake_forget()
    given = call()
    told = LIBRARY.fake_told().decode().splitlines()
    return given.hex() if isinstance(given, bytes) else given, [line.strip() for line in told]


def failure(
    driver: cuda_driver.Driver, name: str, code: int, call: Callable[[], Any], times: int = 1 << 30
) -> list[Any]:
    """What is raised where the driver answers `name` with a code, so many times."""
    from kvferry.kernels.errors import LaunchError

    LIBRARY.fake_fail(name.encode(), code, times)
    try:
        call()
    except (DeviceError, LaunchError) as error:
        return [getattr(error, "message", str(error)), error.code]
    finally:
        LIBRARY.fake_fail(b"", 0, 0)
    return ["nothing", 0]


def loaded_kernel() -> LoadedKernel:
    """A kernel of two arguments and a constant, as Triton compiles it: two words of its own behind."""
    from kvferry.kernels.launch import LoadedKernel  # late: with torch, which imports the bindings

    compiled = SimpleNamespace(
        function=0xF1,
        metadata=SimpleNamespace(num_warps=4, shared=1024),
        src=SimpleNamespace(signature={"here": "*i64", "count": "i64", "width": "constexpr"}),
        _init_handles=lambda: None,
    )
    kernel = LoadedKernel(compiled)
    kernel.words[0], kernel.words[1] = 1 << 40, -7
    return kernel


def main() -> None:
    cuda_driver.CONTROL_DEVICE = "/dev/null"
    assert not [name for name in sys.modules if name.startswith("cuda")]
    assert cuda_driver.absence() == ""
    assert not [name for name in sys.modules if name.startswith("cuda.")], "more than is needed"
    cuda_driver.KEEPS_LOCK = sys.argv[1] == "keeps the lock"
    driver = cuda_driver.driver()
    address, stream, event = 0x7F0000001000, 0x51, 0xE1
    calls: dict[str, Callable[[], Any]] = {
        "first enter": lambda: driver.enter(1),  # finds the context
        "enter": lambda: driver.enter(1),
        "leave": driver.leave,
        "record": lambda: driver.record(event, stream),
        "wait_event": lambda: driver.wait_event(stream, event),
        "upload": lambda: driver.upload(address, 0x1000, 24, stream),
        "is_capturing": lambda: [driver.is_capturing(stream), driver.is_capturing(0x52)],
        "new_event": lambda: driver.new_event(1),
        "synchronize_event": lambda: driver.synchronize_event(event),
        "query_event": lambda: driver.query_event(event),
        "stay_out_of_captures": driver.stay_out_of_captures,
        "again as all": lambda: driver._exchange(0),
        "synchronize": lambda: driver.synchronize(1),
        "device_count": driver.device_count,
        "device_uuid": lambda: driver.device_uuid(1),
        "pci_address": lambda: driver.pci_address(1),
        "find_device": lambda: [driver.find_device(16 * one) for one in ("a0", "a1", "a2")],
        "can_access": lambda: [driver.can_access(1, 1), driver.can_access(1, 0)],
        "adds_at": lambda: [driver.adds_at(*pair) for pair in ((1, 1), (1, 0), (0, 1))],
        "enable_peer_access": lambda: driver.enable_peer_access(1, 0),
        "allocate": lambda: driver.allocate(1, 4096),
        "allocate, not zeroed": lambda: driver.allocate(1, 4096, zeros=False),
        "free": lambda: driver.free(1, address),
        "read_word": lambda: driver.read_word(1, address),
        "allocation": lambda: driver.allocation(1, address + 9),
        "export": lambda: driver.export(1, address),
        "open": lambda: driver.open(1, bytes(range(1, 65))),
        "unmap": lambda: driver.unmap(1, address),
        "chunk": lambda: driver.chunk(1, address),
        "export_chunk": lambda: driver.export_chunk(1, address),
        "reserve": lambda: driver.reserve(1, 4 << 20),
        "unreserve": lambda: driver.unreserve(1, address, 4 << 20),
        "map_chunk": lambda: driver.map_chunk(1, address, 2 << 20, 17),
        "allow": lambda: driver.allow(1, address, 2 << 20),
        "unmap_chunk": lambda: driver.unmap_chunk(1, address, 2 << 20),
        "exports_dmabuf": lambda: driver.exports_dmabuf(1),
        "flushes": lambda: driver.flushes(1),
        "new_stream": lambda: driver.new_stream(1),
        "destroy_stream": lambda: driver.destroy_stream(1, stream),
        "wait_value": lambda: driver.wait_value(1, stream, address, 1 << 40),
        "write_value": lambda: driver.write_value(1, stream, address, (1 << 63) + 1),
        "pin": lambda: driver.pin(1, 0x10000, 4096),
        "unpin": lambda: driver.unpin(1, 0x10000),
        "copy": lambda: driver.copy(1, address, 0x10000, 4096, stream),
        "copy nothing": lambda: driver.copy(1, address, 0x10000, 0, stream),
    }
    for name in ("record", "wait_event", "upload"):  # as the class does that keeps no lock
        assert getattr(type(driver.unlocked), name) is getattr(cuda_driver.Driver, name)
    kernel = loaded_kernel()
    calls["launch"] = lambda: kernel.launch(stream, 3, 2)
    seen = {name: observe(call) for name, call in calls.items()}
    failures = {
        "allocate": failure(driver, "cuMemAlloc_v2", 2, lambda: driver.allocate(1, 1)),
        "record": failure(driver, "cuEventRecord", 400, lambda: driver.record(event, stream)),
        "enter": failure(driver, "cuCtxPushCurrent_v2", 201, lambda: driver.enter(1)),
        "chunk": failure(driver, "cuPointerGetAttribute", 1, lambda: driver.chunk(1, address)),
        "newer": failure(driver, "cuMemFree_v2", 12345, lambda: driver.free(1, address)),
        "newer, quick": failure(driver, "cuEventRecord", 12345, lambda: driver.record(1, 2)),
        "launch": failure(driver, "cuLaunchKernelEx", 400, lambda: kernel.launch(stream, 1, 1)),
        "lacks": failure(driver, "", 0, lambda: driver.call("cuMemcpy", 1, 2, 3)),
        "enabled": failure(
            driver, "cuCtxEnablePeerAccess", 704, lambda: driver.enable_peer_access(0, 1)
        ),
        "not enabled": failure(
            driver, "cuCtxEnablePeerAccess", 217, lambda: driver.enable_peer_access(0, 1)
        ),
        "handle": failure(driver, "", 0, lambda: driver.open(1, b"short")),
    }
    print(json.dumps({"seen": seen, "failures": failures, "asked": asked(driver)}))


def asked(driver: cuda_driver.Driver) -> dict[str, list[Any]]:
    """For some codes, what becomes of a question that is answered three times by each, and how often
    it was put: a wait, a wait for all of a GPU, a look."""
    calls: dict[str, Callable[[], Any]] = {
        "cuEventSynchronize": lambda: driver.synchronize_event(0xE1),
        "cuCtxSynchronize": lambda: driver.synchronize(1),
        "cuEventQuery": lambda: driver.query_event(0xE1),
    }
    found: dict[str, list[Any]] = {}
    for name, call in calls.items():
        for code in (*range(900, 909), 400, 600, 700, 719):
            LIBRARY.fake_forget()
            given: list[Any] = []
            said = failure(driver, name, code, partial(_put, call, given), 3)
            lines = LIBRARY.fake_told().decode().splitlines()
            times = sum(line.split()[0] == name for line in lines)
            modes = [line.split()[1] for line in lines if "CaptureMode" in line]
            found[f"{name} {code}"] = [said[1], *given, times, "".join(modes)]
    return found


def _put(call: Callable[[], Any], given: list[Any]) -> None:
    given.append(call())


if __name__ == "__main__":
    main()
