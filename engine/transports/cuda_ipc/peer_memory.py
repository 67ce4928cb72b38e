"""GPU memory of a peer: mapped here, and whether the kernels of this side reach it.

An allocation is mapped once for each device, and stays mapped while any region in it is in use. Of
memory in chunks a copy of each file descriptor is taken (`pidfd_getfd`, which the kernel allows to whom
it allows `process_vm_writev`), and the chunks are mapped one behind the other.

Whether two GPUs reach each other can be asked of the driver, if both are visible here. A GPU that
CUDA_VISIBLE_DEVICES hides, as that of an engine's neighbour mostly is, cannot be asked about: its
memory is mapped or not. What is not mapped is staged, as where there is no peer access.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import threading
from typing import TYPE_CHECKING

from ...errors import (
    DeviceError,
    EngineError,
    NotRegistered,
    OutOfRange,
    RegionGone,
    TransportUnavailable,
)
from ...memory.cuda_driver import driver
from ...transfer.device_counters import COUNTERS_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ...memory.descriptors import CudaMemory, RegionDescriptor
    from ...memory.regions import MemoryRegion, RegisteredCache
    from ..base import PathHost

log = logging.getLogger(__name__)

_MOST_REMEMBERED = 4096
_PIDFD_GETFD = 438  # the same number on every architecture


class PeerReach:
    """What is known of one link's peer. Thread-safe."""

    def __init__(self, link: PathHost, mappings: PeerMappings) -> None:
        self._link = link
        self._mappings = mappings
        self._known: dict[tuple[int, int], tuple[object, str]] = {}
        self._warned = False

    def obstacle(
        self,
        local: tuple[MemoryRegion | RegisteredCache, ...],
        remote: tuple[RegionDescriptor, ...],
    ) -> str:
        """Return why kernels of this side, beside `local`, do not reach these regions; or "".

        Once the peer has granted them, they are mapped to find out; until then, as far as can be
        told. What has stood in the way once does so as long as the link lives.
        """
        if not local or not remote or local[0].device < 0:
            return "it is host memory"
        device = local[0].device
        anchor = remote[0] if len(remote) == 1 else remote  # lives as long as its user's descriptor
        known = self._known.get((device, id(anchor)))
        if known is not None and known[0] is anchor:
            return known[1]
        granted = self._link.has_access(remote)
        reason = ""
        if any(region.device != device for region in local):
            reason = "the local regions are on several GPUs"
        for region in () if reason else remote:
            reason = self._mappings.obstacle(device, region)
            if granted and not reason:
                reason = self._map(device, region)
            if reason:
                break
        if (granted or reason) and not self._link.closed and len(self._known) < _MOST_REMEMBERED:
            self._known[device, id(anchor)] = (anchor, reason)
        return reason

    def _map(self, device: int, region: RegionDescriptor) -> str:
        try:
            self._mappings.address(device, region)
            self._mappings.counters(device, region)
        except TransportUnavailable as error:
            if not self._warned and not self._link.closed:
                self._warned = True
                log.warning("kvferry: %s; its bytes go through pinned host memory", error)
            return error.message
        except EngineError:
            return ""  # no obstacle: what would use it meets the same, and says so
        return ""


class _Mapping:
    """One allocation of a peer, or the chunks of a region, mapped for one device of ours."""

    def __init__(self, base: int, nbytes: int, close: Callable[[], None]) -> None:
        self.base = base
        self.nbytes = nbytes  # of the mapping, as the driver knows it
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
        self._counted: dict[tuple[int, str], bool] = {}  # by device here and GPU there
        self._sinks: dict[int, int] = {}  # device: counters that nobody reads
        self._closed = False

    def address(self, device: int, region: RegionDescriptor) -> int:
        """Return where kernels on `device` find the start of a peer's region; maps it if need be.

        Raises:
            TransportUnavailable: they cannot reach it, and why.
            RegionGone: the peer has taken it back.
            OutOfRange: it leaves the allocation that the peer says holds it.
        """
        memory = region.cuda
        if memory is None:
            raise NotRegistered(
                f"region {region.region_id} is no GPU memory", operation="map", peer=self._peer
            )
        if not self._foreign(device, memory):
            return region.address
        name = memory.handle or region.key
        mapping = self._map(device, memory, name, region.region_id, memory.chunks)
        # Nothing that the peer says of itself may aim our kernels beyond what it has exported.
        if not 0 <= memory.offset <= mapping.nbytes - region.nbytes:
            raise self._leaves(
                f"region {region.region_id} of {region.nbytes} bytes at offset {memory.offset}",
                mapping,
            )
        return mapping.base + memory.offset

    def counted(self, device: int, region: RegionDescriptor) -> bool:
        """Return whether kernels on `device` may add to the counters beside a region.

        Two GPUs without native atomics between them, as behind some PCIe switches, would read and
        write a word in two steps, and lose what another adds between them: there, only hosts count.
        A GPU that is not visible here cannot be asked about, and is taken for one that is connected
        as NVLink connects them.
        """
        memory = region.cuda
        if memory is None:
            return False  # it is not exported, nor are its counters: what maps it says so
        key = (device, memory.device_uuid)
        known = self._counted.get(key)
        if known is None:
            there = driver().find_device(memory.device_uuid)
            known = self._counted[key] = there < 0 or driver().adds_at(device, there)
        return known

    def counters(self, device: int, region: RegionDescriptor) -> int:
        """Return where kernels on `device` find the device counters of the engine that owns a
        region; or, where they may not add to those (`counted`), as many words that nobody reads.

        Raises:
            TransportUnavailable, OutOfRange: as for `address`.
        """
        memory = region.cuda
        assert memory is not None
        if not self.counted(device, region):
            return self._sink(device)
        if not self._foreign(device, memory):
            return memory.counters_address
        mapping = self._map(device, memory, memory.counters, 0)
        if mapping.nbytes < COUNTERS_NBYTES:
            raise self._leaves(f"an array of counters of {COUNTERS_NBYTES} bytes", mapping)
        return mapping.base

    def _sink(self, device: int) -> int:
        with self._lock:
            address = self._sinks.get(device)
            if address is None:
                if self._closed:
                    raise self._unreachable("the link is down")
                address = self._sinks[device] = driver().allocate(device, COUNTERS_NBYTES)
            return address

    def obstacle(self, device: int, region: RegionDescriptor) -> str:
        """Return why kernels on `device` cannot reach a peer's region, as far as can be told
        without mapping it; or ""."""
        if region.cuda is None:
            return "it is not exported"
        cuda = driver()
        peer_device = cuda.find_device(region.cuda.device_uuid)
        if peer_device >= 0 and not cuda.can_access(device, peer_device):
            return f"GPU {device} has no peer access to GPU {peer_device}"
        return ""

    def _foreign(self, device: int, memory: CudaMemory) -> bool:
        """Return whether it is another process's, after a check that kernels on `device` can reach
        it."""
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
    ) -> _Mapping:
        """Map an allocation by its handle, or chunks, which `name` then only tells from others."""
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
                    why = error.message
                    if cuda.find_device(memory.device_uuid) < 0:
                        why += "; its GPU is not visible in this process: add it to CUDA_VISIBLE_DEVICES"
                    raise self._unreachable(why) from error
                self._mappings[key] = mapping
            mapping.users.add(user)
            return mapping

    def _open(self, device: int, handle: bytes, chunks: Sequence[tuple[int, int]]) -> _Mapping:
        if chunks:
            mapped = MappedChunks(device, self._pid, chunks)
            return _Mapping(mapped.base, mapped.nbytes, mapped.close)
        cuda = driver()
        base = cuda.open(device, handle)
        unmap = functools.partial(cuda.unmap, device, base)
        try:
            start, nbytes = cuda.allocation(device, base)
        except DeviceError:
            unmap()
            raise
        return _Mapping(base, start + nbytes - base, unmap)

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
        """Unmap everything: no kernel uses it any more."""
        with self._lock:
            self._closed = True
            mappings, self._mappings = self._mappings, {}
            sinks, self._sinks = self._sinks, {}
        for mapping in mappings.values():
            mapping.close()
        for device, address in sinks.items():
            driver().free(device, address)

    def _leaves(self, what: str, mapping: _Mapping) -> OutOfRange:
        return OutOfRange(
            f"{what} leaves the {mapping.nbytes} bytes of GPU memory that the peer has exported",
            operation="map",
            peer=self._peer,
        )

    def _unreachable(self, reason: str) -> TransportUnavailable:
        return TransportUnavailable(
            f"the peer's GPU memory cannot be mapped: {reason}", operation="map", peer=self._peer
        )


class MappedChunks:
    """A peer's chunks, mapped for kernels of one device until `close`.

    Attributes:
        base: where the first one begins here.
        nbytes: of all.
    """

    def __init__(self, device: int, pid: int, chunks: Sequence[tuple[int, int]]) -> None:
        """Map chunks that process `pid` has exported.

        Raises:
            DeviceError: the kernel refuses the descriptors, or the driver what they stand for.
        """
        cuda = driver()
        self._device = device
        self.nbytes = sum(size for _, size in chunks)
        self._mapped: list[tuple[int, int]] = []
        self.base = cuda.reserve(device, self.nbytes)
        try:
            start = self.base
            with _closing(os.pidfd_open(pid)) as process:
                for fd, size in chunks:
                    with _closing(_copy(process, fd)) as copy:
                        cuda.map_chunk(device, start, size, copy)
                    self._mapped.append((start, size))
                    start += size
            cuda.allow(device, self.base, self.nbytes)
        except (OSError, DeviceError) as error:
            self.close()
            if isinstance(error, DeviceError):
                raise
            raise DeviceError(
                f"its file descriptors cannot be copied ({error.strerror}): the kernel must allow "
                "pidfd_getfd, as it must process_vm_writev",
                operation="map",
            ) from error

    def close(self) -> None:
        """Unmap them: no kernel uses them any more."""
        cuda = driver()
        for start, size in self._mapped:
            cuda.unmap_chunk(self._device, start, size)
        cuda.unreserve(self._device, self.base, self.nbytes)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    """Return a file descriptor, closed at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def _copy(pidfd: int, fd: int) -> int:
    """Return a copy of another process's file descriptor. Raises OSError."""
    copy: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return copy
