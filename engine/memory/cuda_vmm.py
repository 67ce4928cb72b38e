"""GPU memory that was mapped in chunks, shared between processes by file descriptors.

Memory of CUDA's virtual memory management, which torch's expandable segments are, has no IPC handle.
Its owner exports each chunk as a file descriptor, which stays open while the region is registered.
A peer takes a copy of each (`pidfd_getfd`, which the kernel allows to whom it allows
`process_vm_writev`), and maps the chunks one behind the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from typing import TYPE_CHECKING

from ..errors import DeviceError
from .cuda_driver import driver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PIDFD_GETFD = 438  # the same number on every architecture


class ExportedChunks:
    """The chunks that hold a region, open for peers until `close`.

    Attributes:
        base: where the first one begins.
        chunks: file descriptor and bytes of each, in the order of their addresses.
    """

    def __init__(self, device: int, address: int, nbytes: int) -> None:
        """Exports what holds `[address, address + nbytes)`.

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


class MappedChunks:
    """A peer's chunks, mapped for kernels of one device until `close`.

    Attributes:
        base: where the first one begins here.
    """

    def __init__(self, device: int, pid: int, chunks: Sequence[tuple[int, int]]) -> None:
        """Maps chunks that process `pid` has exported.

        Raises:
            DeviceError: the kernel refuses the descriptors, or the driver what they stand for.
        """
        cuda = driver()
        self._device = device
        self._nbytes = sum(size for _, size in chunks)
        self._mapped: list[tuple[int, int]] = []
        self.base = cuda.reserve(device, self._nbytes)
        try:
            start = self.base
            with _closing(os.pidfd_open(pid)) as process:
                for fd, size in chunks:
                    with _closing(_copy(process, fd)) as copy:
                        cuda.map_chunk(device, start, size, copy)
                    self._mapped.append((start, size))
                    start += size
            cuda.allow(device, self.base, self._nbytes)
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
        """Unmaps them: no kernel uses them any more."""
        cuda = driver()
        for start, size in self._mapped:
            cuda.unmap_chunk(self._device, start, size)
        cuda.unreserve(self._device, self.base, self._nbytes)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    """A file descriptor, closed at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def _copy(pidfd: int, fd: int) -> int:
    """A copy of another process's file descriptor. Raises OSError."""
    copy: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return copy


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
