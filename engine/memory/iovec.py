"""Scatter-gather lists as NumPy arrays, and the system calls that walk them.

An iovec array is `uint64[n, 2]`: address and nbytes, which is exactly C's `struct iovec[n]`. Python
does O(1) work a system call, whatever the number of pieces; ctypes releases the interpreter lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import zlib
from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RegionGone

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt
    import torch

    Iovec = npt.NDArray[np.uint64]
    FewEntries = array[int]

IOV_MAX = 1024

_libc = ctypes.CDLL(None, use_errno=True)


class _MsgHeader(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_len", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_len", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_len", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


def _function(name: str, *arguments: type) -> ctypes._NamedFuncPointer:
    function = getattr(_libc, name)
    function.restype = ctypes.c_ssize_t
    function.argtypes = arguments
    return function  # type: ignore[no-any-return]


_VM_ARGUMENTS = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_process_vm_readv = _function("process_vm_readv", *_VM_ARGUMENTS)
_process_vm_writev = _function("process_vm_writev", *_VM_ARGUMENTS)
_sendmsg = _function("sendmsg", ctypes.c_int, ctypes.POINTER(_MsgHeader), ctypes.c_int)
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.restype = ctypes.py_object
_memory_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_WRITABLE = 0x200  # PyBUF_WRITE
_recvmsg = _function("recvmsg", ctypes.c_int, ctypes.POINTER(_MsgHeader), ctypes.c_int)
_msync = _function("msync", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_msync.restype = ctypes.c_int
_MS_ASYNC = 1  # starts nothing on Linux; what is left is the check that every page is mapped
_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")


def is_mapped(addresses: npt.NDArray[np.integer], nbytes: npt.NDArray[np.integer] | int) -> bool:
    """Return whether all pages of the pieces are mapped: whoever dereferences others is killed.

    One system call of 0.8 us where nothing is missing between the first byte and the last, whatever
    the number of pieces and their sizes; two more for each hole.
    """
    starts = addresses.view(np.int64)
    ends = starts + (nbytes if isinstance(nbytes, int) else nbytes.view(np.int64))
    if not len(starts) or all_mapped(int(np.minimum.reduce(starts)), int(np.maximum.reduce(ends))):
        return True
    order = np.argsort(starts)
    first = starts[order] & -_PAGE_NBYTES
    end = np.maximum.accumulate(ends[order])
    gaps = first[1:] - (end[:-1] + _PAGE_NBYTES - 1 & -_PAGE_NBYTES)
    stretches = [(0, len(starts))]
    while stretches:
        start, stop = stretches.pop()
        if all_mapped(int(first[start]), int(end[stop - 1])):
            continue
        between = gaps[start : stop - 1]
        if not len(between) or int(between.max()) <= 0:
            return False
        cut = start + int(between.argmax()) + 1
        stretches += [(start, cut), (cut, stop)]
    return True


def not_mapped(operation: str) -> RegionGone:
    """Return the error for memory that was unmapped behind the engine."""
    return RegionGone(
        f"memory of a region is not mapped any more ({os.strerror(errno.EFAULT)}): it was freed "
        "while registered",
        operation=operation,
    )


def all_mapped(start: int, end: int) -> bool:
    """Return whether all pages from one address to another are mapped."""
    first = start & -_PAGE_NBYTES
    return end <= start or _msync(first, end - first, _MS_ASYNC) == 0


def make(addresses: npt.NDArray[np.integer], nbytes: npt.NDArray[np.integer]) -> Iovec:
    """Return an iovec array of these addresses and lengths."""
    iov = np.empty((len(addresses), 2), np.uint64)
    iov[:, 0] = addresses
    iov[:, 1] = nbytes
    return iov


def one(address: int, nbytes: int) -> Iovec:
    """Return an iovec array of a single entry."""
    return np.array([[address, nbytes]], np.uint64)


def bytes_at(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """View memory of this process that is known by its address alone. Keeps nothing alive."""
    # ctypes makes a type for each new length: 30 us instead of 3.
    return np.frombuffer(_memory_at(address, nbytes, _WRITABLE), np.uint8)


def gpu_bytes_at(device: int, address: int, nbytes: int) -> torch.Tensor:
    """Memory of a GPU that is known by its address alone, as a uint8 tensor. Keeps nothing alive."""
    import torch

    interface = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 2}
    memory = SimpleNamespace(__cuda_array_interface__=interface)
    return torch.as_tensor(memory, device=torch.device("cuda", device))


def chunks(nbytes: npt.NDArray[np.int64], limit_nbytes: int, limit: int) -> Iterator[slice]:
    """Cut a list of pieces into consecutive parts of at most `limit` pieces and, but for the
    last piece of each, `limit_nbytes` bytes. O(parts) Python steps."""
    ends = np.cumsum(nbytes)
    start, done = 0, 0
    while start < len(ends):
        stop = int(np.searchsorted(ends, done + limit_nbytes, side="left")) + 1
        stop = min(stop, start + limit, len(ends))
        yield slice(start, stop)
        start, done = stop, int(ends[stop - 1])


def join_remote(local: Iovec, remote: Iovec) -> tuple[Iovec, Iovec]:
    """Return the same copies in the order of their remote addresses, neighbours there as one entry.

    Returns what was given if that joins less than half of them. O(n log n).
    """
    order = np.argsort(remote[:, 0])
    address, nbytes = remote[:, 0][order], remote[:, 1][order]
    breaks = address[1:] != (address + nbytes)[:-1]
    if 2 * np.count_nonzero(breaks) > len(breaks):
        return local, remote
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    joined = make(address[starts], np.add.reduceat(nbytes, starts))
    # As one number of 16 bytes each: twice as fast as picking rows.
    return local.view(np.complex128)[order].view(np.uint64), joined


def few(entries: Iterable[int]) -> FewEntries:
    """Return a few entries for `process_vm`, addresses and lengths by turns: NumPy's way to make an
    array of them takes 20 microseconds more when the caches are cold."""
    return array("q", entries)


def process_vm(
    pid: int,
    local: npt.NDArray[np.integer] | FewEntries,
    remote: npt.NDArray[np.integer] | FewEntries,
    nbytes: int,
    *,
    write: bool,
) -> None:
    """Copy between this process's `local` and process `pid`'s `remote`, `nbytes` bytes each.

    Both are iovec arrays of 8-byte integers of either sign, C-contiguous, and are consumed: a
    partial copy advances them in place. Or both are what `few` makes, of at most `IOV_MAX` entries.

    Raises:
        OSError: ESRCH (no such process), EPERM (not allowed), EFAULT (memory not mapped).
    """
    call = _process_vm_writev if write else _process_vm_readv
    if isinstance(local, array) and isinstance(remote, array):
        (here, words), (there, remote_words) = local.buffer_info(), remote.buffer_info()
        if call(pid, here, words // 2, there, remote_words // 2, 0) == nbytes:
            return
        # Once more, from the start: what has been copied is copied again, or the error comes again.
        local = np.frombuffer(local, np.int64).reshape(-1, 2)
        remote = np.frombuffer(remote, np.int64).reshape(-1, 2)
    assert isinstance(local, np.ndarray)
    assert isinstance(remote, np.ndarray)
    local_address = local.__array_interface__["data"][0]
    remote_address = remote.__array_interface__["data"][0]
    here = there = 0
    while here < len(local):
        count, remote_count = min(IOV_MAX, len(local) - here), min(IOV_MAX, len(remote) - there)
        done = call(
            pid,
            local_address + 16 * here,
            count,
            remote_address + 16 * there,
            remote_count,
            0,
        )
        if done == nbytes:
            return
        if done < 0:
            _raise_unless_interrupted()
            continue
        if done == 0:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        here = _advance(local, here, count, done)
        there = _advance(remote, there, remote_count, done)


def send(fd: int, iov: Iovec) -> None:
    """Send all of `iov` over a blocking stream socket. `iov` is consumed.

    Raises:
        OSError: the connection ended.
    """
    _stream(_sendmsg, fd, iov, socket.MSG_NOSIGNAL)


def receive(fd: int, iov: Iovec) -> None:
    """Fill all of `iov` from a blocking stream socket. `iov` is consumed.

    Raises:
        EOFError: the peer closed before `iov` was full.
        OSError: the connection ended.
    """
    _stream(_recvmsg, fd, iov, socket.MSG_WAITALL)


def checksum(iov: Iovec) -> int:
    """CRC-32 over the pieces in order. Walks them one by one: for verification only.

    Raises:
        RegionGone: memory is not mapped.
    """
    if not is_mapped(iov[:, 0], iov[:, 1]):
        raise not_mapped("verify")
    crc = 0
    for address, nbytes in iov.tolist():
        crc = zlib.crc32((ctypes.c_char * nbytes).from_address(address), crc)
    return crc


def _stream(call: ctypes._NamedFuncPointer, fd: int, iov: Iovec, flags: int) -> None:
    header = _MsgHeader()
    start = 0
    while start < len(iov):
        count = min(IOV_MAX, len(iov) - start)
        header.iov = iov.ctypes.data + 16 * start
        header.iov_len = count
        done = call(fd, ctypes.byref(header), flags)
        if done < 0:
            _raise_unless_interrupted()
            continue
        if done == 0 and call is _recvmsg and bool(iov[start : start + count, 1].any()):
            raise EOFError
        start = _advance(iov, start, count, done)


def _raise_unless_interrupted() -> None:
    code = ctypes.get_errno()
    if code != errno.EINTR:
        raise OSError(code, os.strerror(code))


def _advance(iov: npt.NDArray[np.integer], start: int, count: int, done: int) -> int:
    """Index of the first piece that is not finished after `done` bytes; trims that piece."""
    ends = np.cumsum(iov[start : start + count, 1].astype(np.int64))
    if done >= ends[-1]:
        return start + count
    finished = int(np.searchsorted(ends, done, side="right"))
    rest = done - (int(ends[finished - 1]) if finished else 0)
    first = start + finished
    iov[first, 0] += iov.dtype.type(rest)
    iov[first, 1] -= iov.dtype.type(rest)
    return first
