"""GPU memory exported for the kernels of a peer, which maps it (`transports/cuda_ipc/peer_memory.py`).

What is exported is always a whole allocation, so a tensor of a caching allocator is an offset in one.
Memory that CUDA's virtual memory management mapped in chunks, which torch's expandable segments are, has
no IPC handle: its owner exports each chunk that holds a region as a file descriptor, which stays open
while the region is registered.
"""

from __future__ import annotations

import os
import weakref

from ..errors import DeviceError, NotRegistered
from .cuda_driver import driver
from .descriptors import CudaMemory


def export_tensor(
    device: int, address: int, nbytes: int, counters: bytes = b"", counters_address: int = 0
) -> tuple[CudaMemory, ExportedChunks | None]:
    """Export what holds a tensor, and say where its engine counts on that GPU.

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
                "file descriptor for every 20 MiB (ulimit -n)"
            ) from other
        base = exported.base
    uuid = cuda.device_uuid(device)
    chunks = exported.chunks if exported else ()
    memory = CudaMemory(handle, address - base, uuid, counters, counters_address, chunks)
    return memory, exported


class ExportedChunks:
    """The chunks that hold a region, open for peers until `close`.

    Attributes:
        base: where the first one begins.
        chunks: file descriptor and bytes of each, in the order of their addresses.
    """

    def __init__(self, device: int, address: int, nbytes: int) -> None:
        """Export what holds `[address, address + nbytes)`.

        Raises:
            DeviceError: it is no such memory, or its allocator did not make it for sharing; or there
                are too few file descriptors.
        """
        cuda = driver()
        self.chunks: tuple[tuple[int, int], ...] = ()
        fds: list[int] = []
        self.close = weakref.finalize(self, _close, fds)
        start = self.base = cuda.chunk(device, address)[0]
        while start < address + nbytes:
            begin, size = cuda.chunk(device, start)
            if begin != start or size < 1:
                raise DeviceError("its chunks do not follow each other", operation="register")
            fds.append(cuda.export_chunk(device, start))
            self.chunks += ((fds[-1], size),)
            start += size


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
