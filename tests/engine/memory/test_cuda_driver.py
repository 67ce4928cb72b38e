"""CUDA's driver without a GPU: what reaches a driver that only writes down, and why there may be none."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvferry.engine.errors import DeviceError
from kvferry.engine.memory import cuda_driver as cuda
from kvferry.engine.transports.cuda_ipc import path as cuda_ipc
from tests import ROOT
from tests.support.requirements import need

FAKE = Path(__file__).with_name("fake_cuda")
PUSH, POP = "cuCtxPushCurrent_v2 c1", "cuCtxPopCurrent_v2"
RELAX, RESTORE = (f"cuThreadExchangeStreamCaptureMode {mode}" for mode in (2, 0))
ADDRESS = 0x7F0000001000
HANDLE = "f7" * cuda.IPC_HANDLE_NBYTES

# For each method what it gives, and the calls that it makes with the context of its device current,
# as the driver of `libcuda.c` writes them down: addresses and handles in hexadecimal. Captures of other
# threads bind none of these.
INSIDE: dict[str, tuple[Any, list[str]]] = {
    "new_event": (0xE1, ["cuEventCreate 2"]),
    "synchronize": (None, ["cuCtxSynchronize"]),
    "allocate, not zeroed": (ADDRESS, ["cuMemAlloc_v2 4096"]),
    "free": (None, ["cuMemFree_v2 7f0000001000"]),
    "allocation": ([0x7F0000000000, 1 << 21], ["cuMemGetAddressRange_v2 7f0000001009"]),
    "export": (HANDLE, ["cuIpcGetMemHandle 7f0000001000"]),
    "open": (0x7E0000000000, ["cuIpcOpenMemHandle_v2 1..64 1"]),
    "unmap": (None, ["cuIpcCloseMemHandle 7f0000001000"]),
    "reserve": (0x7C0000000000, ["cuMemAddressReserve 4194304 0 0 0"]),
    "unreserve": (None, ["cuMemAddressFree 7f0000001000 4194304"]),
    "allow": (None, ["cuMemSetAccess 7f0000001000 2097152 kind=1 device=1 flags=3 1"]),
    "unmap_chunk": (None, ["cuMemUnmap 7f0000001000 2097152"]),
    "new_stream": (0x51, ["cuStreamCreate 1"]),
    "destroy_stream": (None, ["cuStreamDestroy_v2 51"]),
    "pin": (None, ["cuMemHostRegister_v2 10000 4096 3"]),
    "unpin": (None, ["cuMemHostUnregister 10000"]),
}
# As these, and what only enqueues, or is no matter of a capture.
ENQUEUED: dict[str, tuple[Any, list[str]]] = {
    "chunk": (
        [0x7D0000000000, 2 << 20],
        ["cuPointerGetAttribute 19 7f0000001000", "cuPointerGetAttribute 18 7f0000001000"],
    ),
    "wait_value": (None, ["cuStreamWaitValue64_v2 51 7f0000001000 1099511627776 1073741824"]),
    "write_value": (None, ["cuStreamWriteValue64_v2 51 7f0000001000 9223372036854775809 0"]),
    "copy": (None, ["cuMemcpyAsync 7f0000001000 10000 4096 51"]),
}
CHUNKS: dict[str, tuple[Any, list[str]]] = {
    "export_chunk": (
        17,
        [
            "cuMemRetainAllocationHandle 7f0000001000",
            "cuMemExportToShareableHandle abc 1 0",
            "cuMemRelease abc",
        ],
    ),
    "map_chunk": (
        None,
        [
            "cuMemImportFromShareableHandle 17 1",
            "cuMemMap 7f0000001000 2097152 0 def 0",
            "cuMemRelease def",
        ],
    ),
}
# And those that need no context, or make it current several times.
AS_IT_IS: dict[str, tuple[Any, list[str]]] = {
    "first enter": (None, ["cuDevicePrimaryCtxRetain 1", PUSH]),
    "enter": (None, [PUSH]),
    "leave": (None, [POP]),
    "record": (None, ["cuEventRecord e1 51"]),
    "wait_event": (None, ["cuStreamWaitEvent 51 e1 0"]),
    "upload": (None, ["cuMemcpyHtoDAsync_v2 7f0000001000 1000 24 51"]),
    "is_capturing": ([False, True], ["cuStreamIsCapturing 51", "cuStreamIsCapturing 52"]),
    "synchronize_event": (None, [RELAX, "cuEventSynchronize e1", RESTORE]),
    "query_event": (True, [RELAX, "cuEventQuery e1", RESTORE]),
    "stay_out_of_captures": (None, [RELAX]),
    "again as all": (2, [RESTORE]),
    "device_count": (2, ["cuDeviceGetCount"]),
    "device_uuid": ("a1" * 16, ["cuDeviceGetUuid_v2 1"]),
    "pci_address": ("0000:1b:00.1", ["cuDeviceGetPCIBusId 32 1"]),
    "find_device": (
        [0, 1, -1],
        ["cuDeviceGetCount", "cuDeviceGetUuid_v2 0", "cuDeviceGetCount", "cuDeviceGetCount"],
    ),
    "can_access": ([True, True], ["cuDeviceCanAccessPeer 1 0"]),
    "enable_peer_access": (
        None,
        ["cuDevicePrimaryCtxRetain 0", PUSH, RELAX, "cuCtxEnablePeerAccess c0 0", RESTORE, POP],
    ),
    "adds_at": (
        [True, True, False],
        ["cuDeviceGetP2PAttribute 3 1 0", "cuDeviceGetP2PAttribute 3 0 1"],
    ),
    "allocate": (
        ADDRESS,
        [
            *(PUSH, RELAX, "cuMemAlloc_v2 4096", RESTORE, POP),
            *(PUSH, RELAX, "cuStreamCreate 1", RESTORE, POP),
            *(PUSH, RELAX, "cuMemsetD8Async 7f0000001000 0 4096 51", "cuStreamSynchronize 51"),
            *(RESTORE, POP),
            *(PUSH, RELAX, "cuStreamDestroy_v2 51", RESTORE, POP),
        ],
    ),
    "read_word": (
        -5,
        [
            *(PUSH, RELAX, "cuStreamCreate 1", RESTORE, POP),
            *(PUSH, RELAX, "cuMemcpyDtoHAsync_v2 7f0000001000 8 51", "cuStreamSynchronize 51"),
            *(RESTORE, POP),
            *(PUSH, RELAX, "cuStreamDestroy_v2 51", RESTORE, POP),
        ],
    ),
    "exports_dmabuf": (True, ["cuDeviceGetAttribute 124 1"]),
    "flushes": (True, ["cuDeviceGetAttribute 98 1"]),
    "copy nothing": (None, []),
    "launch": (  # a compiled kernel's
        None,
        [
            "cuLaunchKernelEx f1 grid=3x2x1 block=128x1x1 shared=1024 stream=51 attributes=0 "
            "1099511627776 -7 0 0 extra=0"
        ],
    ),
}
EXPECTED = AS_IT_IS | {
    name: (given, [PUSH, RELAX, *calls, RESTORE, POP])
    for name, (given, calls) in (INSIDE | CHUNKS).items()
}
EXPECTED |= {name: (given, [PUSH, *calls, POP]) for name, (given, calls) in ENQUEUED.items()}


def bindings() -> Any:
    return pytest.importorskip(
        "cuda.bindings.driver", reason=f"needs NVIDIA's cuda-bindings: {cuda.INSTALL}"
    )


@pytest.fixture(scope="module", params=["keeps the lock", "lets go of it"])
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `fake_cuda/calls.py` prints, for each of the two ways of the calls of a transfer."""
    bindings()
    folder = tmp_path_factory.mktemp("cuda")
    source, library = str(FAKE / "libcuda.c"), str(folder / cuda.LIBRARY)
    compiler = need("gcc")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)]),
    }
    ran = subprocess.run(
        [sys.executable, str(FAKE / "calls.py"), request.param],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not ran.returncode, ran.stderr
    return json.loads(ran.stdout)


def test_every_method_is_called() -> None:
    methods = {name for name, _ in inspect.getmembers(cuda.Driver, inspect.isfunction)}
    methods |= {"device_uuid", "pci_address"}  # cached, so no functions
    methods |= {"adds_at", "flushes"}  # likewise
    public = {name for name in methods if not name.startswith("_")} - {"call", "current"}
    public -= {"beside_captures"}
    assert public == {name.partition(",")[0] for name in EXPECTED} - {
        "first enter",
        "copy nothing",
        "launch",
        "again as all",
    }


def test_what_reaches_the_driver(observed: Any) -> None:
    assert observed["seen"] == {name: [given, calls] for name, (given, calls) in EXPECTED.items()}


def test_a_failure_has_cudas_name_the_call_and_the_code(observed: Any) -> None:
    failures = observed["failures"]
    lacking, _ = failures.pop("lacks")
    assert lacking.startswith("cuMemcpy failed: ")
    assert "not found" in lacking
    assert failures == {
        "allocate": ["cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY", 2],
        "record": ["cuEventRecord failed: CUDA_ERROR_INVALID_HANDLE", 400],
        "enter": ["cuCtxPushCurrent failed: CUDA_ERROR_INVALID_CONTEXT", 201],
        "chunk": ["cuPointerGetAttribute failed: CUDA_ERROR_INVALID_VALUE", 1],
        "launch": ["cuLaunchKernelEx failed: CUDA_ERROR_INVALID_HANDLE", 400],
        "newer": ["cuMemFree failed: error 12345", 12345],
        "newer, quick": ["cuEventRecord failed: error 12345", 12345],
        "enabled": ["nothing", 0],
        "not enabled": [
            "cuCtxEnablePeerAccess failed: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
            217,
        ],
        "handle": ["an IPC handle has 64 bytes, not 5", 0],
    }


@pytest.mark.parametrize("name", ["cuEventSynchronize", "cuCtxSynchronize"])
def test_a_wait_ends_early_only_where_the_gpu_has_failed(observed: Any, name: str) -> None:
    """What another thread's capture forbids says nothing of what is waited for."""
    for code in (*range(900, 909), 400, 600):
        assert observed["asked"][f"{name} {code}"] == [0, None, 4, "20"], code
    for code in (700, 719):
        assert observed["asked"][f"{name} {code}"] == [code, 1, "20"]


def test_an_event_that_may_not_be_asked_for_has_not_come(observed: Any) -> None:
    asked = observed["asked"]
    for code in (600, *(set(range(900, 909)) - {907})):
        assert asked[f"cuEventQuery {code}"] == [0, False, 1, "20"], code
    for code in (400, 700, 719, 907):  # 907: one that was recorded in a capture never comes
        assert asked[f"cuEventQuery {code}"] == [code, 1, "20"]


def test_the_bindings_have_every_name() -> None:
    """Functions, constants, enumerations and their members, as the driver's source names them."""
    binding = bindings()
    source = inspect.getsource(cuda.Driver)
    names = set(re.findall(r'"(cu[A-Z]\w+)"', source)) - {
        "cuDeviceGetUuid_v2"
    }  # where there are two
    names |= set(re.findall(r"self\._cuda\.(\w+(?:\.CU\w+)?)", source))
    names |= {f"CUpointer_attribute.{name}" for name in re.findall(r"which\.(CU_P\w+)", source)}
    names |= {f"CUstreamWaitValue_flags.{name}" for name in re.findall(r"which\.(CU_S\w+)", source)}
    assert len(names) > 50
    missing = []
    for name in sorted(names):
        found = binding
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            missing.append(name)
    assert not missing


class TestAbsence:
    """One sentence says what is missing; `cuda_ipc` is refused by it, and the driver not started."""

    def says(self, sentence: str) -> None:
        assert sentence in cuda.absence()
        for ok, reason in (cuda_ipc.available(), cuda_ipc.probe()):
            assert not ok
            assert sentence in reason
        with pytest.raises(DeviceError) as raised:
            cuda.Driver()
        assert sentence in raised.value.message

    @pytest.fixture(autouse=True)
    def _a_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "CONTROL_DEVICE", "/dev/null")
        monkeypatch.setattr(cuda, "LIBRARY", "libc.so.6")  # one that can be loaded

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "CONTROL_DEVICE", "/dev/nvidiactl-none")
        self.says("no NVIDIA driver: /dev/nvidiactl-none does not exist")

    def test_no_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "LIBRARY", "libcuda-none.so.1")
        self.says("the NVIDIA driver's library cannot be loaded: libcuda-none.so.1")

    @pytest.mark.parametrize("name", ["no_such_package.bindings", "json.bindings", "os.bindings"])
    def test_no_bindings(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """Neither they nor their package; another package of that name; a module of that name."""
        monkeypatch.setattr(cuda, "BINDINGS", name)
        self.says(
            "there is an NVIDIA driver, but not its Python bindings, cuda-bindings: "
            "pip install 'kvferry[cuda]'"
        )

    def test_bindings_that_do_not_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "BINDINGS", "json")  # something that is there
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        assert cuda.absence() == ""
        with pytest.raises(
            DeviceError, match=r"cannot be loaded .*: pip install 'kvferry\[cuda\]'"
        ):
            cuda.Driver()
