"""GPU memory that a peer's kernels may reach: exported here, mapped there.

What is exported is always a whole allocation, so a tensor of a caching allocator is an offset in
one. A peer maps each allocation once, for its own device, and keeps the mapping while any region
in it is in use.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import msgspec

from .cuda import driver
from .errors import DeviceError, NotRegistered, TransportUnavailable

if TYPE_CHECKING:
    from .memory import RegionDescriptor


class CudaMemory(msgspec.Struct, frozen=True, array_like=True):
    """Where a region of GPU memory lies, for a process that wants to map it.

    Attributes:
        handle: CUDA IPC handle of the allocation that holds it.
        offset: bytes from that allocation's start to the region's.
        device_uuid: the GPU, named alike in all processes.
        counters: IPC handle of the owning engine's counters on that GPU.
        counters_address: where they lie in the owning process.
    """

    handle: bytes
    offset: int
    device_uuid: str
    counters: bytes
    counters_address: int


def export_tensor(
    device: int, address: int, counters: bytes = b"", counters_address: int = 0
) -> CudaMemory:
    """Exports the allocation that holds `address`, and says where its engine counts on that GPU.

    Raises:
        NotRegistered: it cannot be exported; says which setting to change.
    """
    cuda = driver()
    try:
        base, _ = cuda.allocation(device, address)
        handle = cuda.export(device, base)
    except DeviceError as error:
        raise NotRegistered(
            f"this GPU memory cannot be shared with another process ({error.message}): memory of "
            "torch's expandable segments and other virtual memory management has no IPC handle; "
            "unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF",
            operation="register",
        ) from error
    return CudaMemory(handle, address - base, cuda.device_uuid(device), counters, counters_address)


class _Mapping:
    """One allocation of a peer, mapped for one device of ours."""

    def __init__(self, device: int, base: int) -> None:
        self.device = device
        self.base = base
        self.users: set[int] = set()  # region ids; 0 for the counters, which stay


class PeerMappings:
    """The allocations of one peer that are mapped here. Thread-safe."""

    def __init__(self, peer: str, pid: int) -> None:
        self._peer = peer
        # As the kernel gave it: what a peer says of itself must not aim our kernels at our memory.
        self._same_process = pid == os.getpid()
        self._lock = threading.Lock()
        self._mappings: dict[tuple[int, bytes], _Mapping] = {}
        self._closed = False

    def address(self, device: int, region: RegionDescriptor) -> int:
        """Where kernels on `device` find the start of a peer's region; maps it if need be.

        Raises:
            TransportUnavailable: they cannot reach it, and why.
        """
        memory = region.cuda
        if memory is None:
            raise NotRegistered(
                f"region {region.region_id} is no GPU memory", operation="map", peer=self._peer
            )
        if not self._foreign(device, memory):
            return region.address
        return self._map(device, memory, memory.handle, region.region_id) + memory.offset

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
        if not self._same_process:
            return True
        cuda.enable_peer_access(device, peer_device)
        return False

    def _map(self, device: int, memory: CudaMemory, handle: bytes, user: int) -> int:
        cuda = driver()
        key = (device, handle)
        with self._lock:
            mapping = self._mappings.get(key)
            if mapping is None:
                if self._closed:
                    raise self._unreachable("the link is down")
                try:
                    base = cuda.open(device, handle)
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
                mapping = self._mappings[key] = _Mapping(device, base)
            mapping.users.add(user)
            return mapping.base

    def forget(self, region_id: int) -> None:
        """The peer takes a region back, and nothing here uses it any more."""
        with self._lock:
            for key, mapping in list(self._mappings.items()):
                mapping.users.discard(region_id)
                if not mapping.users:
                    del self._mappings[key]
                    driver().unmap(mapping.device, mapping.base)

    def close(self) -> None:
        """Unmaps everything: no kernel uses it any more."""
        with self._lock:
            self._closed = True
            mappings, self._mappings = self._mappings, {}
        for mapping in mappings.values():
            driver().unmap(mapping.device, mapping.base)

    def _unreachable(self, reason: str) -> TransportUnavailable:
        return TransportUnavailable(
            f"the peer's GPU memory cannot be mapped: {reason}", operation="map", peer=self._peer
        )
