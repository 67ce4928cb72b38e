"""GPU memory that a peer's kernels may reach: exported here, mapped there.

What is exported is always a whole allocation, so a tensor of a caching allocator is an offset in
one; or, where memory was mapped in chunks, the chunks that hold a region. A peer maps each of these
once, for its own device, and keeps the mapping while any region in it is in use.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING

from ..errors import DeviceError, NotRegistered, RegionGone, TransportUnavailable
from .cuda_driver import driver
from .cuda_vmm import ExportedChunks, MappedChunks
from .descriptors import CudaMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .descriptors import RegionDescriptor


def export_tensor(
    device: int, address: int, nbytes: int, counters: bytes = b"", counters_address: int = 0
) -> tuple[CudaMemory, ExportedChunks | None]:
    """Exports what holds a tensor, and says where its engine counts on that GPU.

    Returns what a peer needs, and what must be kept, and closed when the memory is taken back.

    Raises:
        NotRegistered: it cannot be exported; says which setting to change.
    """
    cuda = driver()
    handle, exported = b"", None
    try:
        base, _ = cuda.allocation(device, address)
        handle = cuda.export(device, base)
    except DeviceError as error:
        try:
            exported = ExportedChunks(device, address, nbytes)
        except DeviceError as other:
            raise NotRegistered(
                f"this GPU memory cannot be shared with another process: neither as an allocation "
                f"({error.message}) nor as chunks ({other.message}); use torch's own allocator "
                "(backend:native in PYTORCH_CUDA_ALLOC_CONF), and with its expandable_segments a "
                "file descriptor for every 20 MiB (ulimit -n)",
                operation="register",
            ) from other
        base = exported.base
    uuid = cuda.device_uuid(device)
    chunks = exported.chunks if exported else ()
    memory = CudaMemory(handle, address - base, uuid, counters, counters_address, chunks)
    return memory, exported


class _Mapping:
    """One allocation of a peer, or the chunks of a region, mapped for one device of ours."""

    def __init__(self, base: int, close: Callable[[], None]) -> None:
        self.base = base
        self.close = close
        self.users: set[int] = set()  # region ids; 0 for the counters, which stay


class PeerMappings:
    """The allocations of one peer that are mapped here. Thread-safe."""

    def __init__(self, peer: str, pid: int) -> None:
        self._peer = peer
        # As the kernel gave it: what a peer says of itself must not aim our kernels at our memory.
        self._pid = pid
        self._same_process = pid == os.getpid()
        self._lock = threading.Lock()
        self._mappings: dict[tuple[int, bytes], _Mapping] = {}
        self._forgotten: set[int] = set()  # the peer gives a region's number to no other
        self._closed = False

    def address(self, device: int, region: RegionDescriptor) -> int:
        """Where kernels on `device` find the start of a peer's region; maps it if need be.

        Raises:
            TransportUnavailable: they cannot reach it, and why.
            RegionGone: the peer has taken it back.
        """
        memory = region.cuda
        if memory is None:
            raise NotRegistered(
                f"region {region.region_id} is no GPU memory", operation="map", peer=self._peer
            )
        if not self._foreign(device, memory):
            return region.address
        if memory.chunks and memory.offset + region.nbytes > sum(n for _, n in memory.chunks):
            raise self._unreachable("the region is larger than its chunks")
        name = memory.handle or region.key
        return self._map(device, memory, name, region.region_id, memory.chunks) + memory.offset

    def counters(self, device: int, region: RegionDescriptor) -> int:
        """Where kernels on `device` find the device counters of the engine that owns a region.

        Raises:
            TransportUnavailable: as for `address`.
        """
        memory = region.cuda
        assert memory is not None
        if not self._foreign(device, memory):
            return memory.counters_address
        return self._map(device, memory, memory.counters, 0)

    def obstacle(self, device: int, region: RegionDescriptor) -> str:
        """Why kernels on `device` cannot reach a peer's region, as far as can be told without
        mapping it; or ""."""
        if region.cuda is None:
            return "it is not exported"
        cuda = driver()
        peer_device = cuda.find_device(region.cuda.device_uuid)
        if peer_device >= 0 and not cuda.can_access(device, peer_device):
            return f"GPU {device} has no peer access to GPU {peer_device}"
        return ""

    def _foreign(self, device: int, memory: CudaMemory) -> bool:
        """Whether it is another process's, after a check that kernels on `device` can reach it."""
        cuda = driver()
        peer_device = cuda.find_device(memory.device_uuid)
        if peer_device >= 0 and not cuda.can_access(device, peer_device):
            raise TransportUnavailable(
                f"GPU {device} has no peer access to GPU {peer_device}",
                operation="map",
                peer=self._peer,
            )
        if not self._same_process or (memory.chunks and device != peer_device):
            return True  # to chunks in this process, access is given with a mapping of their own
        cuda.enable_peer_access(device, peer_device)
        return False

    def _map(
        self,
        device: int,
        memory: CudaMemory,
        name: bytes,
        user: int,
        chunks: Sequence[tuple[int, int]] = (),
    ) -> int:
        """Maps an allocation by its handle, or chunks, which `name` then only tells from others."""
        cuda = driver()
        key = (device, name)
        with self._lock:
            if user in self._forgotten:  # a mapping for it would outlive the memory
                raise RegionGone(
                    f"the peer has taken region {user} back", operation="map", peer=self._peer
                )
            mapping = self._mappings.get(key)
            if mapping is None:
                if self._closed:
                    raise self._unreachable("the link is down")
                try:
                    mapping = self._open(device, name, chunks)
                except DeviceError as error:
                    visible = cuda.find_device(memory.device_uuid) >= 0
                    unseen = (
                        ""
                        if visible
                        else (
                            "; its GPU is not visible in this process: add it to CUDA_VISIBLE_DEVICES"
                        )
                    )
                    raise self._unreachable(error.message + unseen) from error
                self._mappings[key] = mapping
            mapping.users.add(user)
            return mapping.base

    def _open(self, device: int, handle: bytes, chunks: Sequence[tuple[int, int]]) -> _Mapping:
        if chunks:
            mapped = MappedChunks(device, self._pid, chunks)
            return _Mapping(mapped.base, mapped.close)
        cuda = driver()
        base = cuda.open(device, handle)
        return _Mapping(base, functools.partial(cuda.unmap, device, base))

    def forget(self, region_id: int) -> None:
        """The peer takes a region back, and nothing here uses it any more."""
        with self._lock:
            self._forgotten.add(region_id)
            for key, mapping in list(self._mappings.items()):
                mapping.users.discard(region_id)
                if not mapping.users:
                    del self._mappings[key]
                    mapping.close()

    def close(self) -> None:
        """Unmaps everything: no kernel uses it any more."""
        with self._lock:
            self._closed = True
            mappings, self._mappings = self._mappings, {}
        for mapping in mappings.values():
            mapping.close()

    def _unreachable(self, reason: str) -> TransportUnavailable:
        return TransportUnavailable(
            f"the peer's GPU memory cannot be mapped: {reason}", operation="map", peer=self._peer
        )
