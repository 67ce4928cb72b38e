"""Registered memory: regions, what a peer needs to reach them, and the checks on the way in.

A region keeps its memory alive until it is deregistered, so freeing the tensor that was registered
cannot pull memory away under a transfer. Memory that is released in spite of that (a storage that
is resized) is noticed before this process moves any byte of it. Not so what a peer's kernels, or a
CUDA graph, then do to GPU memory by themselves, nor pages that are taken from under an address that
stays (vLLM's sleep mode): deregister such memory first.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import secrets
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import (
    DeadlineExceeded,
    DeviceError,
    LayoutError,
    NotRegistered,
    OutOfRange,
    RegionGone,
)
from ..layout.kv_layout import KVLayout
from ..runtime import fork
from .cuda_driver import driver
from .cuda_export import export_tensor
from .descriptors import KEY_NBYTES, CacheDescriptor, RegionDescriptor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from .cuda_export import ExportedChunks
    from .descriptors import CudaMemory


class _Used:
    """Memory that transfers use, until it is being deregistered. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._uses = 0
        self._closing = False

    def release(self) -> None:
        """End one use."""
        with self._lock:
            self._uses -= 1
            if not self._uses and self._closing:  # nobody waits before
                self._idle.notify_all()

    @property
    def closing(self) -> bool:
        """Whether it is being deregistered."""
        return self._closing

    def close(self) -> None:
        """Begin no further use: a region is being deregistered."""
        self._closing = True

    def drained(self, deadline: float) -> bool:
        """Wait until there is no use; False if the deadline came first."""
        with self._idle:
            return self._idle.wait_for(
                lambda: not self._uses, max(0.0, deadline - time.monotonic())
            )


class MemoryRegion(_Used):
    """One stretch of this process's memory that transfers may touch.

    Holds its memory until `deregister()`. Usable as a context manager. Thread-safe.

    Attributes:
        region_id: its number in this engine.
        address, nbytes: where it is and how large.
        kind: `host` or `cuda`.
        device: index of its GPU in this process; -1 for host memory.
        movable: whether its owner could free or resize it while it is registered.
    """

    def __init__(
        self,
        engine_id: str,
        region_id: int,
        memory: _Memory,
        *,
        revoke: Callable[[int, float], None],
        forget: Callable[[int], None],
    ) -> None:
        """Describe memory as a region.

        Args:
            revoke: `revoke(region_id, deadline)` returns once no peer uses it any more.
            forget: `forget(region_id)` is told that nobody uses it at all.
        """
        super().__init__()
        self._generation = fork.generation
        self._revoke = revoke
        self._forget = forget
        self._memory: _Memory | None = memory
        self.region_id = region_id
        self.kind = "host" if memory.device < 0 else "cuda"
        self.address = memory.address
        self.nbytes = memory.nbytes
        self.descriptor = RegionDescriptor(
            engine_id=engine_id,
            region_id=region_id,
            key=secrets.token_bytes(KEY_NBYTES),
            address=memory.address,
            nbytes=memory.nbytes,
            kind=self.kind,
            cuda=memory.cuda,
        )
        self.device = memory.device
        self.movable = memory.storage is not None  # NumPy frees nothing that is held
        self.caches: list[RegisteredCache] = []

    def __repr__(self) -> str:
        return f"<MemoryRegion {self.descriptor.region_id} {self.nbytes} bytes>"

    def __enter__(self) -> MemoryRegion:
        return self

    def __exit__(self, *_: object) -> None:
        self.deregister()

    def acquire(self) -> None:
        """Begin one use of the memory; `release` ends it.

        Raises:
            RegionGone: it was deregistered, or its memory was freed or resized.
        """
        with self._lock:
            if self._closing:
                raise RegionGone(
                    f"region {self.region_id} is deregistered: register its memory again"
                )
            self.check_intact()
            self._uses += 1

    def check_intact(self) -> None:
        """Check that the memory is where it was.

        Raises:
            RegionGone: it was freed or resized.
        """
        memory = self._memory
        if memory is not None and not memory.intact():
            raise RegionGone(
                f"the memory of region {self.region_id} was freed or resized while "
                "registered: deregister it first"
            )

    def deregister(self, timeout_s: float = 10.0) -> None:
        """End the registration: no transfer starts any more, running ones are waited for.

        Peers that could reach the memory by themselves are told, and their answer is awaited.
        Safe to call again. In a child of fork() it does nothing.

        Raises:
            DeadlineExceeded: a transfer or a peer still uses it; the memory is kept until not.
        """
        if fork.generation != self._generation:
            return
        deadline = time.monotonic() + timeout_s
        self.close()
        for cache in self.caches:
            cache.close()
        self._revoke(self.region_id, deadline)
        for cache in self.caches:
            if not cache.drained(deadline):
                raise DeadlineExceeded(
                    f"the cache of region {self.region_id} is still used after {timeout_s} s",
                    operation="deregister",
                )
        if not self.drained(deadline):
            raise DeadlineExceeded(
                f"region {self.region_id} is still used by {self._uses} transfers after "
                f"{timeout_s} s",
                operation="deregister",
            )
        with self._lock:
            memory, self._memory = self._memory, None
        self._forget(self.region_id)
        if memory is not None and memory.exported is not None:
            memory.exported.close()


class RegisteredCache(_Used):
    """A whole paged cache, registered: one region for each region of its layout.

    A transfer of blocks uses the cache as one: what it costs does not grow with the layers.
    """

    def __init__(self, layout: KVLayout, regions: tuple[MemoryRegion, ...]) -> None:
        super().__init__()
        self.layout = layout
        self.regions = regions
        self.descriptor = CacheDescriptor(layout, tuple(r.descriptor for r in regions))
        self.kind = "/".join(sorted({region.kind for region in regions}))
        self.device = regions[0].device if len({r.device for r in regions}) == 1 else -1
        self._movable = [region for region in regions if region.movable]
        for region in regions:
            region.caches.append(self)

    def acquire(self) -> None:
        """Begin one use of all regions; `release` ends it.

        Raises:
            RegionGone: one of them was deregistered.
        """
        with self._lock:
            if self._closing:
                raise RegionGone("a region of this cache is deregistered: register the cache again")
            self._uses += 1

    def check_intact(self) -> None:
        """Check that the memory of every region is where it was.

        Raises:
            RegionGone: a tensor was freed or resized.
        """
        for region in self._movable:
            region.check_intact()

    def watch(self, numbers: Iterable[int]) -> Callable[[], None]:
        """Return a quick check of these regions alone, for what is moved again and again.

        It asks each storage for its address, which changes when it is freed or resized, and takes
        0.1 us a storage; the size as well would take twice that, and tells more only of one that was
        freed and then came back smaller at its old place. Raises RegionGone.
        """
        found = [self.regions[number]._memory for number in numbers]
        storages = {
            memory.storage_address: memory.alias
            for memory in found
            if memory is not None and memory.alias is not None
        }
        ask = [alias.data_ptr for alias in storages.values()]
        before = [address() for address in ask]
        self.check_intact()

        def check() -> None:
            if [address() for address in ask] != before:
                self.check_intact()

        return check

    def deregister(self, timeout_s: float = 10.0) -> None:
        """Deregister every region."""
        for region in self.regions:
            region.deregister(timeout_s)


class RegionTable:
    """The regions of one engine."""

    def __init__(self, engine_id: str) -> None:
        self.engine_id = engine_id
        self._lock = threading.Lock()
        self._regions: dict[int, MemoryRegion] = {}
        self._ids = itertools.count(1)
        self._revokers: list[Callable[[int, float], None]] = []
        self._forgetters: list[Callable[[int], None]] = []
        self.shares_gpu = True  # whether peers may map GPU memory: it is exported for them
        # Handle and address of the engine's counters on a GPU.
        self.counters_on: Callable[[int], tuple[bytes, int]] = lambda _: (b"", 0)

    def register(self, memory: Any) -> MemoryRegion:
        """Register a CPU or CUDA tensor, a NumPy array or a writable buffer.

        Raises:
            NotRegistered: it is not memory that this engine can register; says why.
        """
        described = _Memory(memory)
        if described.device >= 0 and self.shares_gpu:
            counters = self.counters_on(described.device)
            described.cuda, described.exported = export_tensor(
                described.device, described.address, described.nbytes, *counters
            )
        with self._lock:
            region = MemoryRegion(
                self.engine_id,
                next(self._ids),
                described,
                revoke=self._revoke,
                forget=self._forget,
            )
            self._regions[region.region_id] = region
        return region

    def register_cache(self, layout: KVLayout, tensors: Any) -> RegisteredCache:
        """Register the tensors that `layout` describes, in its regions' order.

        Raises:
            LayoutError: a tensor is not the one that its region describes: elements or extent of
                another size. Tensors of bytes may be larger than their regions.
        """
        if not isinstance(layout, KVLayout):
            raise LayoutError(
                f"register_cache takes a KVLayout, then its tensors: the first is a "
                f"{type(layout).__name__}",
                operation="register",
            )
        parts: Sequence[Any] = [tensors] if hasattr(tensors, "shape") else list(tensors)
        if len(parts) != len(layout.regions):
            raise LayoutError(
                f"the layout has {len(layout.regions)} regions but {len(parts)} tensors were given",
                operation="register",
            )
        described = [_Memory(part) for part in parts]
        for number, (memory, shape) in enumerate(zip(described, layout.regions, strict=True)):
            if memory.nbytes < shape.nbytes:
                raise LayoutError(
                    f"tensor {number} spans {memory.nbytes} bytes but its region of the layout "
                    f"needs {shape.nbytes}",
                    operation="register",
                )
            size = _element_nbytes(parts[number])
            if size > 1 and (size != shape.elem_bytes or memory.nbytes != shape.nbytes):
                raise LayoutError(
                    f"tensor {number} spans {memory.nbytes} bytes of elements of {size}, its region "
                    f"of the layout {shape.nbytes} of elements of {shape.elem_bytes}: make the layout "
                    "from this tensor, or give its memory as bytes",
                    operation="register",
                )
        return RegisteredCache(layout, tuple(self.register(part) for part in parts))

    def get(self, region_id: int) -> MemoryRegion | None:
        """Return the region of this number, if it is registered."""
        return self._regions.get(region_id)

    def admit(self, region_id: int, key: bytes) -> MemoryRegion:
        """Return the region that a peer named, after checking its key.

        Raises:
            NotRegistered: no such region, or the key is wrong (the peer cannot tell which).
        """
        region = self._regions.get(region_id)
        if region is None or not hmac.compare_digest(region.descriptor.key, key):
            raise NotRegistered(
                f"region {region_id} is not registered here under that key", operation="access"
            )
        return region

    def on_revoke(self, revoker: Callable[[int, float], None]) -> None:
        """`revoker(region_id, deadline)` returns once no peer uses the region any more."""
        self._revokers.append(revoker)

    def on_forget(self, forgetter: Callable[[int], None]) -> None:
        """`forgetter(region_id)` is called when nobody uses a deregistered region any more."""
        self._forgetters.append(forgetter)

    def _revoke(self, region_id: int, deadline: float) -> None:
        """Ask every peer to stop using a region."""
        for revoker in self._revokers:
            revoker(region_id, deadline)

    def _forget(self, region_id: int) -> None:
        """Take a deregistered region out of the table."""
        for forgetter in self._forgetters:
            forgetter(region_id)
        with self._lock:
            self._regions.pop(region_id, None)

    def all(self) -> list[MemoryRegion]:
        """Return the regions registered now."""
        with self._lock:
            return list(self._regions.values())

    def gpus(self) -> set[int]:
        """Indices, in this process, of the GPUs that regions lie on."""
        return {region.device for region in self.all()} - {-1}

    def gpu_addresses(self) -> set[str]:
        """PCI addresses of these GPUs, of those that the driver knows."""
        found = set()
        for device in self.gpus():
            with contextlib.suppress(DeviceError):
                found.add(driver().pci_address(device))
        return found


_quarantined: list[_Memory] = []


def quarantine(regions: Sequence[MemoryRegion]) -> None:
    """Keep the regions' memory until this process ends: somebody may still write into it."""
    _quarantined.extend(region._memory for region in regions if region._memory is not None)


def check_ranges(
    offsets: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    limits: npt.NDArray[np.int64] | int,
    what: str,
) -> None:
    """Check that every range `[offset, offset + nbytes)` lies inside `[0, limit)`.

    Raises:
        OutOfRange: naming the first range that does not.
    """
    # `offset > limit - nbytes` instead of `offset + nbytes > limit`: the sum could overflow.
    bad = (offsets < 0) | (nbytes < 0) | (nbytes > limits) | (offsets > limits - nbytes)
    if bool(bad.any()):
        first = int(np.argmax(bad))
        limit = limits if isinstance(limits, int) else int(limits[first])
        raise OutOfRange(
            f"{what} range [{int(offsets[first])}, +{int(nbytes[first])}) leaves a region of "
            f"{limit} bytes"
        )


def _element_nbytes(memory: Any) -> int:
    """Bytes of one element of a tensor, an array or a buffer."""
    size: int = getattr(memory, "itemsize", 0) or 1
    return size


class _Memory:
    """Address, size and owner of a tensor, array or buffer."""

    def __init__(self, memory: Any) -> None:
        torch = sys.modules.get("torch")
        self.device = -1
        self.cuda: CudaMemory | None = None
        self.exported: ExportedChunks | None = None
        self.storage: Any = None
        self.alias: Any = None  # a tensor of the same storage that nobody else has
        if torch is not None and isinstance(memory, torch.Tensor):
            self._from_tensor(memory)
        else:
            self._from_buffer(memory)
        if self.nbytes < 1:
            raise NotRegistered("an empty tensor cannot be registered")

    def _from_tensor(self, tensor: Any) -> None:
        if tensor.device.type not in ("cpu", "cuda"):
            raise NotRegistered(
                f"a tensor on {tensor.device} cannot be registered: the transports of this engine "
                "move host memory and CUDA memory"
            )
        if tensor.device.type == "cuda":
            self.device = int(tensor.device.index)
        if tensor.layout is not sys.modules["torch"].strided:
            raise NotRegistered(f"a {tensor.layout} tensor cannot be registered: make it dense")
        self.storage = tensor.untyped_storage()
        self.alias = tensor.detach()
        self.storage_address = self.storage.data_ptr()
        self._storage_nbytes = self.storage.nbytes()
        self.address = int(tensor.data_ptr())
        spans = ((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))  # noqa: B905
        self.nbytes = (sum(spans) + 1) * tensor.element_size() if tensor.numel() else 0

    def _from_buffer(self, memory: Any) -> None:
        try:
            array = memory if isinstance(memory, np.ndarray) else np.frombuffer(memory, np.uint8)
        except (TypeError, ValueError, BufferError) as error:
            raise NotRegistered(
                f"a {type(memory).__name__} cannot be registered: give a tensor, a NumPy array "
                "or a writable buffer"
            ) from error
        if not array.flags.writeable:
            raise NotRegistered(
                "read-only memory cannot be registered: peers may write to a region"
            )
        if array.dtype.hasobject:
            raise NotRegistered(
                "an array of Python objects cannot be registered: its bytes are pointers"
            )
        if any(step < 0 for step in array.strides):
            raise NotRegistered(
                "an array with negative strides cannot be registered: pass its base"
            )
        self._owner = array
        self.address = int(array.ctypes.data)
        steps = zip(array.shape, array.strides, strict=True)
        self.nbytes = sum((n - 1) * step for n, step in steps) + array.itemsize if array.size else 0

    def intact(self) -> bool:
        """Return whether the memory is still where it was."""
        return self.storage is None or (
            self.storage.data_ptr() == self.storage_address
            and self.storage.nbytes() >= self._storage_nbytes
        )
