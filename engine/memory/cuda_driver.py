"""The few CUDA driver calls that torch does not offer, by ctypes.

No dependency beyond the driver itself, and ctypes releases the interpreter lock while a call waits.
Nothing of CUDA is loaded before the first call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARY = "libcuda.so.1"
CONTROL_DEVICE = "/dev/nvidiactl"
IPC_HANDLE_NBYTES = 64
UUID_NBYTES = 16

_LAZY_ENABLE_PEER_ACCESS = 1
_STREAM_NON_BLOCKING = 1
_WAIT_GREATER_OR_EQUAL = 0
_EVENT_DISABLE_TIMING = 2
_CAPTURE_MODE_RELAXED = 2
_PEER_ACCESS_ALREADY_ENABLED = 704
_PORTABLE_AND_MAPPED = 1 | 2  # for every device of the process, and at the host's own address
_ATTRIBUTE_DMABUF_SUPPORTED = 124
_MAPPING_NBYTES, _MAPPING_BASE = 18, 19  # CUpointer_attribute, of one mapped chunk
_HANDLE_TYPE_FD = 1
_LOCATION_DEVICE = 1
_ACCESS_READ_WRITE = 3

_pointer = ctypes.POINTER
_u64 = ctypes.c_uint64
_handle = ctypes.c_void_p


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_ubyte * IPC_HANDLE_NBYTES),)


class Uuid(ctypes.Structure):
    """CUuuid."""

    _fields_ = (("data", ctypes.c_ubyte * UUID_NBYTES),)


class Access(ctypes.Structure):
    """CUmemAccessDesc: a location, and what kernels there may do."""

    _fields_ = (("kind", ctypes.c_int), ("device", ctypes.c_int), ("flags", ctypes.c_int))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetCount": (_pointer(ctypes.c_int),),
    "cuDeviceGetUuid_v2": (_pointer(Uuid), ctypes.c_int),
    "cuDeviceGetPCIBusId": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDeviceCanAccessPeer": (_pointer(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_pointer(_handle), ctypes.c_int),
    "cuCtxPushCurrent_v2": (_handle,),
    "cuCtxPopCurrent_v2": (_pointer(_handle),),
    "cuCtxEnablePeerAccess": (_handle, ctypes.c_uint),
    "cuMemAlloc_v2": (_pointer(_u64), ctypes.c_size_t),
    "cuMemFree_v2": (_u64,),
    "cuMemsetD8Async": (_u64, ctypes.c_ubyte, ctypes.c_size_t, _handle),
    "cuMemcpyDtoH_v2": (ctypes.c_void_p, _u64, ctypes.c_size_t),
    "cuDeviceGetAttribute": (_pointer(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuMemGetAddressRange_v2": (_pointer(_u64), _pointer(ctypes.c_size_t), _u64),
    "cuIpcGetMemHandle": (_pointer(IpcHandle), _u64),
    "cuIpcOpenMemHandle_v2": (_pointer(_u64), IpcHandle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_u64,),
    "cuPointerGetAttribute": (ctypes.c_void_p, ctypes.c_int, _u64),
    "cuMemRetainAllocationHandle": (_pointer(_u64), ctypes.c_void_p),
    "cuMemExportToShareableHandle": (ctypes.c_void_p, _u64, ctypes.c_int, ctypes.c_ulonglong),
    "cuMemImportFromShareableHandle": (_pointer(_u64), ctypes.c_void_p, ctypes.c_int),
    "cuMemAddressReserve": (
        _pointer(_u64),
        ctypes.c_size_t,
        ctypes.c_size_t,
        _u64,
        ctypes.c_ulonglong,
    ),
    "cuMemAddressFree": (_u64, ctypes.c_size_t),
    "cuMemMap": (_u64, ctypes.c_size_t, ctypes.c_size_t, _u64, ctypes.c_ulonglong),
    "cuMemUnmap": (_u64, ctypes.c_size_t),
    "cuMemSetAccess": (_u64, ctypes.c_size_t, _pointer(Access), ctypes.c_size_t),
    "cuMemRelease": (_u64,),
    "cuStreamCreate": (_pointer(_handle), ctypes.c_uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamSynchronize": (_handle,),
    "cuMemHostRegister_v2": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
    "cuMemcpyAsync": (_u64, _u64, ctypes.c_size_t, _handle),
    "cuStreamWaitEvent": (_handle, _handle, ctypes.c_uint),
    "cuStreamIsCapturing": (_handle, _pointer(ctypes.c_int)),
    "cuEventCreate": (_pointer(_handle), ctypes.c_uint),
    "cuEventRecord": (_handle, _handle),
    "cuEventSynchronize": (_handle,),
    "cuMemcpyHtoDAsync_v2": (_u64, ctypes.c_void_p, ctypes.c_size_t, _handle),
    "cuCtxSynchronize": (),
    "cuThreadExchangeStreamCaptureMode": (_pointer(ctypes.c_int),),
    "cuStreamWaitValue64_v2": (_handle, _u64, _u64, ctypes.c_uint),
    "cuStreamWriteValue64_v2": (_handle, _u64, _u64, ctypes.c_uint),
}


def absence() -> str:
    """Why there is no CUDA here, or "". Loads nothing and starts nothing: a fork stays possible."""
    if not os.path.exists(CONTROL_DEVICE):
        return f"no NVIDIA driver: {CONTROL_DEVICE} does not exist"
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        return f"the NVIDIA driver's library cannot be loaded: {error}"
    return ""


class Driver:
    """The driver's functions; every failure raises `DeviceError` with CUDA's own name for it."""

    def __init__(self) -> None:
        reason = absence()
        if reason:
            raise DeviceError(reason, operation="cuda")
        self._library = ctypes.CDLL(LIBRARY)
        self._keeps_lock = ctypes.PyDLL(LIBRARY)
        self._contexts: dict[int, ctypes.c_void_p] = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int
        # Called with every transfer: looked up once, without the detour over `call`, and with the
        # interpreter lock in hand: they only note what is to be done.
        self._push = self._quick("cuCtxPushCurrent_v2")
        self._pop = self._quick("cuCtxPopCurrent_v2")
        self._record = self._quick("cuEventRecord")
        self._wait_event = self._quick("cuStreamWaitEvent")
        self._upload = self._quick("cuMemcpyHtoDAsync_v2")
        self._is_capturing = self._quick("cuStreamIsCapturing")
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls one function.

        Raises:
            DeviceError: it failed.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            raise self._failure(name, code)

    def enter(self, device: int) -> None:
        """Makes the primary context of `device` this thread's current one, until `leave`."""
        context = self._contexts.get(device) or self._context(device)
        code = self._push(context)
        if code:
            raise self._failure("cuCtxPushCurrent", code)

    def leave(self) -> None:
        """Ends one `enter`."""
        self._pop(ctypes.byref(_handle()))

    def record(self, event: int, stream: int) -> None:
        """Records an event on a stream, whose device's context is current."""
        code = self._record(event, stream)
        if code:
            raise self._failure("cuEventRecord", code)

    def wait_event(self, stream: int, event: int) -> None:
        """Lets a stream wait for what an event stands for now; recording it anew changes nothing."""
        code = self._wait_event(stream, event, 0)
        if code:
            raise self._failure("cuStreamWaitEvent", code)

    def upload(self, address: int, source: int, nbytes: int, stream: int) -> None:
        """Copies pinned memory to the current context's device, in the order of a stream."""
        code = self._upload(address, source, nbytes, stream)
        if code:
            raise self._failure("cuMemcpyHtoDAsync", code)

    def is_capturing(self, stream: int) -> bool:
        """Whether a CUDA graph is being captured from a stream."""
        status = ctypes.c_int()
        code = self._is_capturing(stream, ctypes.byref(status))
        if code:
            raise self._failure("cuStreamIsCapturing", code)
        return bool(status.value)

    def new_event(self, device: int) -> int:
        """An event without a time."""
        event = _handle()
        with self.current(device):
            self.call("cuEventCreate", ctypes.byref(event), _EVENT_DISABLE_TIMING)
        return int(event.value or 0)

    def synchronize_event(self, event: int) -> None:
        """Waits, awake and without the interpreter lock, until an event has come."""
        self.call("cuEventSynchronize", event)

    def stay_out_of_captures(self) -> None:
        """What this thread waits for must not break a capture that is made on another."""
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def synchronize(self, device: int) -> None:
        """Waits for everything that this process has given a device."""
        with self.current(device):
            self.call("cuCtxSynchronize")

    @contextlib.contextmanager
    def current(self, device: int) -> Iterator[None]:
        """Makes the primary context of `device` this thread's current one."""
        self.call("cuCtxPushCurrent_v2", self._context(device))
        try:
            yield
        finally:
            popped = _handle()
            self.call("cuCtxPopCurrent_v2", ctypes.byref(popped))

    def device_count(self) -> int:
        """How many devices this process sees."""
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    @functools.cache  # noqa: B019 - there is one Driver a process
    def device_uuid(self, device: int) -> str:
        """Names a device alike in all processes, whatever CUDA_VISIBLE_DEVICES says."""
        uuid = Uuid()
        self.call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
        return bytes(uuid.data).hex()

    @functools.cache  # noqa: B019 - there is one Driver a process
    def pci_address(self, device: int) -> str:
        """A device's PCI address as sysfs writes it: `0000:1b:00.0`."""
        text = ctypes.create_string_buffer(32)
        self.call("cuDeviceGetPCIBusId", text, len(text), device)
        return text.value.decode("ascii").lower()

    def find_device(self, uuid: str) -> int:
        """The index of a device in this process, or -1 if it is not visible."""
        for device in range(self.device_count()):
            if self.device_uuid(device) == uuid:
                return device
        return -1

    def can_access(self, device: int, peer: int) -> bool:
        """Whether kernels on `device` can reach the memory of `peer`."""
        if device == peer:
            return True
        yes = ctypes.c_int()
        self.call("cuDeviceCanAccessPeer", ctypes.byref(yes), device, peer)
        return bool(yes.value)

    def enable_peer_access(self, device: int, peer: int) -> None:
        """Lets kernels of this process on `device` reach its own memory on `peer`."""
        if device == peer:
            return
        with self.current(device):
            try:
                self.call("cuCtxEnablePeerAccess", self._context(peer), 0)
            except DeviceError as error:
                if error.code != _PEER_ACCESS_ALREADY_ENABLED:
                    raise

    def allocate(self, device: int, nbytes: int, *, zeros: bool = True) -> int:
        """Memory of its own allocation, all zeros on return if wanted; its address."""
        address = _u64()
        with self.current(device):
            self.call("cuMemAlloc_v2", ctypes.byref(address), nbytes)
        if zeros:
            # The synchronous call runs behind whatever the default stream has been given, and
            # returns before: the zeros would come over what others have written meanwhile.
            stream = self.new_stream(device)
            with self.current(device):
                self.call("cuMemsetD8Async", address, 0, nbytes, stream)
                self.call("cuStreamSynchronize", stream)
            self.destroy_stream(device, stream)
        return address.value

    def free(self, device: int, address: int) -> None:
        """Frees what `allocate` gave."""
        with self.current(device):
            self.call("cuMemFree_v2", address)

    def read_word(self, device: int, address: int) -> int:
        """An int64 of device memory; waits for it."""
        word = ctypes.c_int64()
        with self.current(device):
            self.call("cuMemcpyDtoH_v2", ctypes.byref(word), address, 8)
        return word.value

    def allocation(self, device: int, address: int) -> tuple[int, int]:
        """Base and size of the allocation that holds an address."""
        base, nbytes = _u64(), ctypes.c_size_t()
        with self.current(device):
            self.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(nbytes), address)
        return base.value, nbytes.value

    def export(self, device: int, base: int) -> bytes:
        """The IPC handle of a whole allocation."""
        handle = IpcHandle()
        with self.current(device):
            self.call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle.reserved)

    def open(self, device: int, handle: bytes) -> int:
        """Maps another process's allocation for kernels on `device`; its address there."""
        raw = IpcHandle((ctypes.c_ubyte * IPC_HANDLE_NBYTES).from_buffer_copy(handle))
        address = _u64()
        with self.current(device):
            self.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), raw, _LAZY_ENABLE_PEER_ACCESS)
        return address.value

    def unmap(self, device: int, address: int) -> None:
        """Ends one `open`."""
        with self.current(device):
            self.call("cuIpcCloseMemHandle", address)

    def chunk(self, device: int, address: int) -> tuple[int, int]:
        """Base and size of the mapping that holds an address of memory mapped in chunks."""
        base, nbytes = _u64(), ctypes.c_size_t()
        with self.current(device):
            self.call("cuPointerGetAttribute", ctypes.byref(base), _MAPPING_BASE, address)
            self.call("cuPointerGetAttribute", ctypes.byref(nbytes), _MAPPING_NBYTES, address)
        return base.value, nbytes.value

    def export_chunk(self, device: int, address: int) -> int:
        """A file descriptor of the chunk that is mapped at an address: the caller's to close."""
        handle, fd = _u64(), ctypes.c_int()
        with self.current(device):
            self.call("cuMemRetainAllocationHandle", ctypes.byref(handle), address)
            try:
                self.call(
                    "cuMemExportToShareableHandle", ctypes.byref(fd), handle, _HANDLE_TYPE_FD, 0
                )
            finally:
                self.call("cuMemRelease", handle)
        return fd.value

    def reserve(self, device: int, nbytes: int) -> int:
        """Addresses for chunks to be mapped at."""
        address = _u64()
        with self.current(device):
            self.call("cuMemAddressReserve", ctypes.byref(address), nbytes, 0, 0, 0)
        return address.value

    def unreserve(self, device: int, address: int, nbytes: int) -> None:
        """Ends one `reserve`: nothing is mapped there."""
        with self.current(device):
            self.call("cuMemAddressFree", address, nbytes)

    def map_chunk(self, device: int, address: int, nbytes: int, fd: int) -> None:
        """Maps a chunk at reserved addresses; its descriptor may be closed afterwards."""
        handle = _u64()
        with self.current(device):
            self.call("cuMemImportFromShareableHandle", ctypes.byref(handle), fd, _HANDLE_TYPE_FD)
            try:
                self.call("cuMemMap", address, nbytes, 0, handle, 0)
            finally:
                self.call("cuMemRelease", handle)

    def allow(self, device: int, address: int, nbytes: int) -> None:
        """Lets kernels on a device read and write mapped chunks."""
        access = Access(_LOCATION_DEVICE, device, _ACCESS_READ_WRITE)
        with self.current(device):
            self.call("cuMemSetAccess", address, nbytes, ctypes.byref(access), 1)

    def unmap_chunk(self, device: int, address: int, nbytes: int) -> None:
        """Ends one `map_chunk`."""
        with self.current(device):
            self.call("cuMemUnmap", address, nbytes)

    def exports_dmabuf(self, device: int) -> bool:
        """Whether memory of a GPU can be exported as a dma-buf."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), _ATTRIBUTE_DMABUF_SUPPORTED, device)
        return bool(value.value)

    def new_stream(self, device: int) -> int:
        """A stream of its own: torch's come from a pool, so two users may share one."""
        stream = _handle()
        with self.current(device):
            self.call("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        return int(stream.value or 0)

    def destroy_stream(self, device: int, stream: int) -> None:
        """Destroys what `new_stream` gave."""
        with self.current(device):
            self.call("cuStreamDestroy_v2", stream)

    def wait_value(self, device: int, stream: int, address: int, value: int) -> None:
        """Lets a stream wait until the word at `address` is at least `value`."""
        with self.current(device):
            self.call("cuStreamWaitValue64_v2", stream, address, value, _WAIT_GREATER_OR_EQUAL)

    def write_value(self, device: int, stream: int, address: int, value: int) -> None:
        """Lets a stream write a word."""
        with self.current(device):
            self.call("cuStreamWriteValue64_v2", stream, address, value, 0)

    def pin(self, device: int, address: int, nbytes: int) -> None:
        """Registers host memory, whole pages: kernels of all devices reach it by its address."""
        with self.current(device):
            self.call("cuMemHostRegister_v2", address, nbytes, _PORTABLE_AND_MAPPED)

    def unpin(self, device: int, address: int) -> None:
        """Ends one `pin`."""
        with self.current(device):
            self.call("cuMemHostUnregister", address)

    def copy(self, device: int, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Copies between device memory and pinned host memory, either way, on a stream."""
        if nbytes:
            with self.current(device):
                self.call("cuMemcpyAsync", dst, src, nbytes, stream)

    def _quick(self, name: str) -> Any:
        function = self._keeps_lock[name]
        function.argtypes = _SIGNATURES[name]
        function.restype = ctypes.c_int
        return function

    def _context(self, device: int) -> ctypes.c_void_p:
        context = self._contexts.get(device)
        if context is None:
            context = _handle()
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[device] = context
        return context

    def _failure(self, name: str, code: int) -> DeviceError:
        return DeviceError(f"{name} failed: {self._describe(code)}", operation="cuda", code=code)

    def _describe(self, code: int) -> str:
        name = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(name))
        return name.value.decode() if name.value else f"error {code}"


@functools.cache
def driver() -> Driver:
    """The process's driver, started with the first call.

    Raises:
        DeviceError: there is none.
    """
    return Driver()
