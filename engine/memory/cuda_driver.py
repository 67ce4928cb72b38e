"""CUDA's driver through NVIDIA's own Python bindings: the calls that torch does not offer.

Nothing of CUDA is loaded before the first call. The bindings release the interpreter lock in every
call; the few that a transfer makes keep it (`LockKeepingDriver`).

A thread that captures a CUDA graph in the global mode, which is CUDA's default and torch's, forbids
the others of its process whatever might disturb it, such as to allocate memory or to ask for an
event: their calls fail, and so does the capture. What needs it runs in the relaxed mode here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import time
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARY = "libcuda.so.1"
CONTROL_DEVICE = "/dev/nvidiactl"
BINDINGS = "cuda.bindings"
INSTALL = "pip install 'kvferry[cuda]'"
IPC_HANDLE_NBYTES = 64

# Whether the calls of a transfer keep the interpreter lock. Each takes 0.5 to 2 us either way, but a
# thread that lets go of the lock beside one that computes may get it back a switch interval (5 ms)
# later. Six calls beside such a thread on an H200 machine: 20 to 50 us in the median with the lock
# kept, 5 to 31 ms without (decision 0051).
KEEPS_LOCK = True

RELAXED = 2  # the mode of a thread whose calls no capture of another thread forbids
_NOT_READY = 600  # what an event is asked for has not come
# What a thread is told because another one captures a graph: it says nothing of the GPU.
_CAPTURE_CODES = frozenset({900, 901, 902, 903, 904, 905, 906, 908})
# The driver is gone or never was; the context is dead, and every further call says the same.
_FINAL_CODES = frozenset(
    {0, 3, 4, 100, 101, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999}
)
# How long a wait whose call fails otherwise is begun again: no capture of one graph takes longer.
PATIENCE_S = 60.0
ASK_AGAIN_S = 1e-3


def absence() -> str:
    """Say why CUDA cannot be used here, or "". Load and start nothing, so that a fork stays possible."""
    if not os.path.exists(CONTROL_DEVICE):
        return f"no NVIDIA driver: {CONTROL_DEVICE} does not exist"
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        return f"the NVIDIA driver's library cannot be loaded: {error}"
    try:
        bound = importlib.util.find_spec(BINDINGS) is not None
    except ModuleNotFoundError:  # not even the package around it
        bound = False
    if not bound:
        return f"there is an NVIDIA driver, but not its Python bindings, cuda-bindings: {INSTALL}"
    return ""


class Driver:
    """The driver's functions; every failure raises `DeviceError` with CUDA's own name for it.

    Devices are indices; addresses, streams and events are integers, as torch gives them.

    Attributes:
        unlocked: the same driver, every call of which releases the interpreter lock.
    """

    unlocked: Driver

    def __init__(self) -> None:
        self.unlocked = self
        reason = absence()
        if reason:
            raise DeviceError(reason)
        try:
            from cuda.bindings import driver as bindings
        except ImportError as error:
            raise DeviceError(
                f"the Python bindings of the NVIDIA driver cannot be loaded ({error}): {INSTALL}"
            ) from error
        self._cuda: Any = bindings
        self._pointer_attribute = ctypes.CDLL(LIBRARY).cuPointerGetAttribute
        self._pointer_attribute.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)
        self._contexts: dict[int, Any] = {}
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function and return what it gives besides its code: nothing, a value, or several.

        Raises:
            DeviceError: it failed, or the driver does not have it.
        """
        try:
            code, *values = getattr(self._cuda, name)(*arguments)
        except (KeyError, ValueError) as error:  # the driver is newer and its code not in CUresult
            raise self._failure(name, int(str(error).split()[0])) from None
        except RuntimeError as error:  # the driver is older and lacks the function
            raise DeviceError(f"{name} failed: {error}") from error
        if code:
            raise self._failure(name, int(code))
        return values[0] if len(values) == 1 else values

    def enter(self, device: int) -> None:
        """Make the primary context of `device` this thread's current one, until `leave`."""
        self.call("cuCtxPushCurrent", self._context(device))

    def leave(self) -> None:
        """End one `enter`."""
        self._cuda.cuCtxPopCurrent()

    def record(self, event: int, stream: int) -> None:
        """Record an event on a stream, whose device's context is current."""
        self.call("cuEventRecord", event, stream)

    def wait_event(self, stream: int, event: int) -> None:
        """Let a stream wait for what an event stands for now; recording it anew changes nothing."""
        self.call("cuStreamWaitEvent", stream, event, 0)

    def upload(self, address: int, source: int, nbytes: int, stream: int) -> None:
        """Copy pinned memory to the current context's device, in the order of a stream."""
        self.call("cuMemcpyHtoDAsync", address, source, nbytes, stream)

    def is_capturing(self, stream: int) -> bool:
        """Return whether a CUDA graph is being captured from a stream."""
        return bool(self.call("cuStreamIsCapturing", stream))

    def new_event(self, device: int) -> int:
        """Make an event without a time."""
        flags = self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return int(self._on(device, "cuEventCreate", flags))

    def synchronize_event(self, event: int) -> None:
        """Wait, awake and without the interpreter lock, until an event has come.

        Raises:
            DeviceError: the GPU has failed. What fails for another reason is asked again.
        """
        with self.beside_captures():
            self._persist("cuEventSynchronize", event)

    def query_event(self, event: int) -> bool:
        """Return whether an event has come; not yet, where a capture forbids the question."""
        try:
            with self.beside_captures():
                self.call("cuEventQuery", event)
        except DeviceError as error:
            if error.code == _NOT_READY or error.code in _CAPTURE_CODES:
                return False
            raise
        return True

    @contextlib.contextmanager
    def beside_captures(self) -> Iterator[None]:
        """Let this thread allocate, ask and wait whatever graphs other threads capture."""
        mode = self._exchange(RELAXED)
        try:
            yield
        finally:
            self._exchange(mode)

    def stay_out_of_captures(self) -> None:
        """As `beside_captures`, for the rest of a thread of our own."""
        self._exchange(RELAXED)

    def _exchange(self, mode: int) -> int:
        """Set how captures of other threads bind this one; return how they did."""
        wanted = self._cuda.CUstreamCaptureMode(mode)
        return int(self.call("cuThreadExchangeStreamCaptureMode", wanted))

    def synchronize(self, device: int) -> None:
        """Wait for everything that this process has given a device."""
        with self.current(device), self.beside_captures():
            self._persist("cuCtxSynchronize")

    @contextlib.contextmanager
    def current(self, device: int) -> Iterator[None]:
        """Make the primary context of `device` this thread's current one."""
        self.enter(device)
        try:
            yield
        finally:
            self.leave()

    def device_count(self) -> int:
        """Return how many devices this process sees."""
        return int(self.call("cuDeviceGetCount"))

    @functools.cache  # noqa: B019 - there is one Driver a process
    def device_uuid(self, device: int) -> str:
        """Name a device alike in all processes, whatever CUDA_VISIBLE_DEVICES says."""
        # Bindings of CUDA 12 have both: the older one names the whole GPU for each part (MIG) of it.
        name = (
            "cuDeviceGetUuid_v2" if hasattr(self._cuda, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        )
        return bytes(self.call(name, device).bytes).hex()

    @functools.cache  # noqa: B019 - there is one Driver a process
    def pci_address(self, device: int) -> str:
        """Return a device's PCI address as sysfs writes it: `0000:1b:00.0`."""
        text: bytes = self.call("cuDeviceGetPCIBusId", 32, device)
        return text.split(b"\0")[0].decode("ascii").lower()

    def find_device(self, uuid: str) -> int:
        """Return the index of a device in this process, or -1 if it is not visible."""
        for device in range(self.device_count()):
            if self.device_uuid(device) == uuid:
                return device
        return -1

    def can_access(self, device: int, peer: int) -> bool:
        """Return whether kernels on `device` can reach the memory of `peer`."""
        return device == peer or bool(self.call("cuDeviceCanAccessPeer", device, peer))

    @functools.cache  # noqa: B019 - there is one Driver a process
    def adds_at(self, device: int, peer: int) -> bool:
        """Return whether an atomic addition by `device` to memory of `peer` is one: else it is a
        read and a write, between which another may write."""
        if device == peer:
            return True
        asked = self._cuda.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
        return bool(self.call("cuDeviceGetP2PAttribute", asked, device, peer))

    def enable_peer_access(self, device: int, peer: int) -> None:
        """Let kernels of this process on `device` reach its own memory on `peer`."""
        if device == peer:
            return
        try:
            self._on(device, "cuCtxEnablePeerAccess", self._context(peer), 0)
        except DeviceError as error:
            if error.code != self._cuda.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
                raise

    def allocate(self, device: int, nbytes: int, *, zeros: bool = True) -> int:
        """Allocate memory of its own, all zeros on return if wanted; return its address."""
        address = int(self._on(device, "cuMemAlloc", nbytes))
        if zeros:
            # The synchronous call runs behind whatever the default stream has been given, and
            # returns before: the zeros would come over what others have written meanwhile.
            stream = self.new_stream(device)
            with self.current(device), self.beside_captures():
                self.call("cuMemsetD8Async", address, 0, nbytes, stream)
                self.call("cuStreamSynchronize", stream)
            self.destroy_stream(device, stream)
        return address

    def free(self, device: int, address: int) -> None:
        """Free what `allocate` gave."""
        self._on(device, "cuMemFree", address)

    def read_word(self, device: int, address: int) -> int:
        """Read an int64 of device memory; wait for it, but not for what streams have been given."""
        word = ctypes.c_int64()
        # The synchronous call runs behind the default stream's work.
        stream = self.new_stream(device)
        with self.current(device), self.beside_captures():
            self.call("cuMemcpyDtoHAsync", ctypes.addressof(word), address, 8, stream)
            self.call("cuStreamSynchronize", stream)
        self.destroy_stream(device, stream)
        return word.value

    def allocation(self, device: int, address: int) -> tuple[int, int]:
        """Base and size of the allocation that holds an address."""
        base, nbytes = self._on(device, "cuMemGetAddressRange", address)
        return int(base), int(nbytes)

    def export(self, device: int, base: int) -> bytes:
        """Return the IPC handle of a whole allocation."""
        # Its bytes have a name (`reserved`) up to the bindings of CUDA 13.3, and none afterwards.
        handle = self._on(device, "cuIpcGetMemHandle", base)
        return ctypes.string_at(handle.getPtr(), IPC_HANDLE_NBYTES)

    def open(self, device: int, handle: bytes) -> int:
        """Map another process's allocation for kernels on `device`; return its address there."""
        if len(handle) != IPC_HANDLE_NBYTES:
            raise DeviceError(f"an IPC handle has {IPC_HANDLE_NBYTES} bytes, not {len(handle)}")
        raw = self._cuda.CUipcMemHandle()
        ctypes.memmove(raw.getPtr(), handle, IPC_HANDLE_NBYTES)
        flags = self._cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return int(self._on(device, "cuIpcOpenMemHandle", raw, flags))

    def unmap(self, device: int, address: int) -> None:
        """End one `open`."""
        self._on(device, "cuIpcCloseMemHandle", address)

    def chunk(self, device: int, address: int) -> tuple[int, int]:
        """Base and size of the mapping that holds an address of memory mapped in chunks."""
        which = self._cuda.CUpointer_attribute
        with self.current(device):
            base = self._attribute(which.CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, address)
            nbytes = self._attribute(which.CU_POINTER_ATTRIBUTE_MAPPING_SIZE, address)
        return base, nbytes

    def export_chunk(self, device: int, address: int) -> int:
        """Return a file descriptor of the chunk that is mapped at an address: the caller's to
        close."""
        with self.current(device), self.beside_captures():
            handle = self.call("cuMemRetainAllocationHandle", address)
            try:
                return int(self.call("cuMemExportToShareableHandle", handle, self._fd_kind, 0))
            finally:
                self.call("cuMemRelease", handle)

    def reserve(self, device: int, nbytes: int) -> int:
        """Reserve addresses for chunks to be mapped at."""
        return int(self._on(device, "cuMemAddressReserve", nbytes, 0, 0, 0))

    def unreserve(self, device: int, address: int, nbytes: int) -> None:
        """End one `reserve`: nothing is mapped there."""
        self._on(device, "cuMemAddressFree", address, nbytes)

    def map_chunk(self, device: int, address: int, nbytes: int, fd: int) -> None:
        """Map a chunk at reserved addresses; its descriptor may be closed afterwards."""
        with self.current(device), self.beside_captures():
            handle = self.call("cuMemImportFromShareableHandle", fd, self._fd_kind)
            try:
                self.call("cuMemMap", address, nbytes, 0, handle, 0)
            finally:
                self.call("cuMemRelease", handle)

    def allow(self, device: int, address: int, nbytes: int) -> None:
        """Let kernels on a device read and write mapped chunks."""
        access = self._cuda.CUmemAccessDesc()
        access.location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        access.flags = self._cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._on(device, "cuMemSetAccess", address, nbytes, [access], 1)

    def unmap_chunk(self, device: int, address: int, nbytes: int) -> None:
        """End one `map_chunk`."""
        self._on(device, "cuMemUnmap", address, nbytes)

    def exports_dmabuf(self, device: int) -> bool:
        """Return whether memory of a GPU can be exported as a dma-buf."""
        asked = self._cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED
        return bool(self.call("cuDeviceGetAttribute", asked, device))

    @functools.cache  # noqa: B019 - there is one Driver a process
    def flushes(self, device: int) -> bool:
        """Return whether a stream that has waited for a word can flush what came before it."""
        asked = self._cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES
        return bool(self.call("cuDeviceGetAttribute", asked, device))

    def new_stream(self, device: int) -> int:
        """Make a stream of its own: torch's come from a pool, so two users may share one."""
        flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._on(device, "cuStreamCreate", flags))

    def destroy_stream(self, device: int, stream: int) -> None:
        """Destroy what `new_stream` gave."""
        self._on(device, "cuStreamDestroy", stream)

    def wait_value(self, device: int, stream: int, address: int, value: int) -> None:
        """Let a stream wait until the word at `address` is at least `value`.

        What a peer wrote before the word is visible to what comes behind: the writer's release
        orders the two, and where the device may reorder what arrives, it is told to flush.
        """
        which = self._cuda.CUstreamWaitValue_flags
        until = int(which.CU_STREAM_WAIT_VALUE_GEQ)
        if self.flushes(device):
            until |= int(which.CU_STREAM_WAIT_VALUE_FLUSH)
        self._enqueue(device, "cuStreamWaitValue64", stream, address, value, until)

    def write_value(self, device: int, stream: int, address: int, value: int) -> None:
        """Let a stream write a word."""
        self._enqueue(device, "cuStreamWriteValue64", stream, address, value, 0)

    def pin(self, device: int, address: int, nbytes: int) -> None:
        """Register host memory, whole pages: kernels of all devices reach it by its address."""
        flags = self._cuda.CU_MEMHOSTREGISTER_PORTABLE | self._cuda.CU_MEMHOSTREGISTER_DEVICEMAP
        self._on(device, "cuMemHostRegister", address, nbytes, flags)

    def unpin(self, device: int, address: int) -> None:
        """End one `pin`."""
        self._on(device, "cuMemHostUnregister", address)

    def copy(self, device: int, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Copy between device memory and pinned host memory, either way, on a stream."""
        if nbytes:
            self._enqueue(device, "cuMemcpyAsync", dst, src, nbytes, stream)

    def _persist(self, name: str, *arguments: Any) -> None:
        """Call what waits until it has; only what shows that the GPU has failed ends it at once."""
        until_s = 0.0
        while True:
            try:
                self.call(name, *arguments)
            except DeviceError as error:
                now_s = time.monotonic()
                until_s = until_s or now_s + PATIENCE_S
                if error.code in _FINAL_CODES or now_s >= until_s:
                    raise
                time.sleep(ASK_AGAIN_S)
            else:
                return

    def _on(self, device: int, name: str, *arguments: Any) -> Any:
        """Call a function with the context of `device` current, beside what others capture."""
        self.enter(device)
        try:
            mode = self._exchange(RELAXED)
            try:
                return self.call(name, *arguments)
            finally:
                self._exchange(mode)
        finally:
            self.leave()

    def _enqueue(self, device: int, name: str, *arguments: Any) -> None:
        """Give a stream of `device` something to do, which no capture of others forbids."""
        self.enter(device)
        try:
            self.call(name, *arguments)
        finally:
            self.leave()

    def _context(self, device: int) -> Any:
        context = self._contexts.get(device)
        if context is None:
            context = self._contexts[device] = self.call("cuDevicePrimaryCtxRetain", device)
        return context

    def _attribute(self, which: int, address: int) -> int:
        """Ask for a 64-bit attribute of an address, by ctypes: the bindings refuse to ask for these."""
        value = ctypes.c_uint64()
        code = self._pointer_attribute(ctypes.byref(value), which, address)
        if code:
            raise self._failure("cuPointerGetAttribute", code)
        return value.value

    @property
    def _fd_kind(self) -> Any:
        return self._cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _failure(self, name: str, code: int) -> DeviceError:
        try:
            says = self._cuda.CUresult(code).name
        except ValueError:
            says = f"error {code}"
        return DeviceError(f"{name} failed: {says}", code=code)


class LockKeepingDriver(Driver):
    """Makes the calls of a transfer by ctypes, which keeps the interpreter lock: see `KEEPS_LOCK`.

    They only note what is to be done, as long as the stream has room: `unlocked` is for one that may
    be full. Each function is looked up once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unlocked = Driver()
        self.unlocked._contexts = self._contexts
        library = ctypes.PyDLL(LIBRARY)

        def function(name: str, *arguments: Any) -> Any:
            found = library[name]
            found.argtypes, found.restype = arguments, ctypes.c_int
            return found

        handle, pointer = ctypes.c_void_p, ctypes.POINTER
        self._handles: dict[int, ctypes.c_void_p] = {}  # of contexts
        self._push = function("cuCtxPushCurrent_v2", handle)
        self._pop = function("cuCtxPopCurrent_v2", pointer(handle))
        self._record = function("cuEventRecord", handle, handle)
        self._wait_event = function("cuStreamWaitEvent", handle, handle, ctypes.c_uint)
        self._upload = function(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64, handle, ctypes.c_size_t, handle
        )
        self._is_capturing = function("cuStreamIsCapturing", handle, pointer(ctypes.c_int))
        self._query = function("cuEventQuery", handle)
        self._exchange_mode = function("cuThreadExchangeStreamCaptureMode", pointer(ctypes.c_int))

    def enter(self, device: int) -> None:
        """As `Driver.enter`."""
        handle = self._handles.get(device)
        if handle is None:
            handle = self._handles[device] = ctypes.c_void_p(int(self._context(device)))
        code = self._push(handle)
        if code:
            raise self._failure("cuCtxPushCurrent", code)

    def leave(self) -> None:
        """As `Driver.leave`."""
        self._pop(ctypes.byref(ctypes.c_void_p()))

    def record(self, event: int, stream: int) -> None:
        """As `Driver.record`."""
        code = self._record(event, stream)
        if code:
            raise self._failure("cuEventRecord", code)

    def wait_event(self, stream: int, event: int) -> None:
        """As `Driver.wait_event`."""
        code = self._wait_event(stream, event, 0)
        if code:
            raise self._failure("cuStreamWaitEvent", code)

    def upload(self, address: int, source: int, nbytes: int, stream: int) -> None:
        """As `Driver.upload`."""
        code = self._upload(address, source, nbytes, stream)
        if code:
            raise self._failure("cuMemcpyHtoDAsync", code)

    def is_capturing(self, stream: int) -> bool:
        """As `Driver.is_capturing`."""
        status = ctypes.c_int()
        code = self._is_capturing(stream, ctypes.byref(status))
        if code:
            raise self._failure("cuStreamIsCapturing", code)
        return bool(status.value)

    def query_event(self, event: int) -> bool:
        """As `Driver.query_event`."""
        mode = self._exchange(RELAXED)
        code = self._query(event)
        self._exchange(mode)
        if code == _NOT_READY or code in _CAPTURE_CODES:
            return False
        if code:
            raise self._failure("cuEventQuery", code)
        return True

    def _exchange(self, mode: int) -> int:
        word = ctypes.c_int(mode)
        code = self._exchange_mode(ctypes.byref(word))
        if code:
            raise self._failure("cuThreadExchangeStreamCaptureMode", code)
        return word.value


@functools.cache
def driver() -> Driver:
    """Return the process's driver, started with the first call.

    Raises:
        DeviceError: there is none.
    """
    return LockKeepingDriver() if KEEPS_LOCK else Driver()
