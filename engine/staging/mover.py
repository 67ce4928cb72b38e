"""Gather pieces of memory into staging, and scatter them from it.

A GPU's mover does it with a kernel, straight into pinned memory (`gpu_mover.py`); the one here serves
host memory, and so does whoever has equal rows of bytes. Equal rows are copied by NumPy, wherever
they lie, and pieces that are whole numbers of such rows are taken for rows. The kernel's
scatter-gather costs 300 to 500 ns a piece, NumPy 10 to 30 and the copy itself: pieces of 64 bytes,
2 MiB of them in the caches, 0.18 GB/s and 8 to 13, of 64 KiB 12 and 35. In memory that is in no cache
NumPy is as fast for large pieces, and six times as fast for 512 bytes.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import DeviceError, EngineError
from ..memory import iovec
from .thresholds import NEVER_DIRECT

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Ids = npt.NDArray[np.int64]

FEWEST_PIECES = 32  # fewer tiny ones are not worth the set-up of staging
FEWEST_ROWS = 16  # fewer pieces are left to the kernel
FEWEST_GRAIN_NBYTES = 16  # so are pieces that have only smaller rows in common
# A mover leaves larger pieces to the kernel, which says if their memory is gone.
GRID_BELOW_NBYTES = 4096
# The system call's remote list costs 1 us more a piece than its local one, and copies 20 % faster.
REMOTE_FROM_NBYTES = 32 << 10
# Rows on no grid of their size are copied twice, unless they are of whole grains of this size.
COARSE_GRAIN_NBYTES = 256
_AT_A_TIME_NBYTES = 256 << 10  # of rows that are copied twice: the first copy stays in the caches


log = logging.getLogger(__name__)


class Moved(Protocol):
    """A gather or scatter that was begun."""

    def done(self) -> bool:
        """Return whether `wait` would return, or raise, at once."""

    def wait(self) -> None:
        """Return when its bytes are visible.

        Raises:
            DeviceError: the GPU failed.
        """


def outcome(moved: Moved) -> EngineError | None:
    """Wait for a gather or scatter; return the error if it failed."""
    try:
        moved.wait()
    except EngineError as error:
        return error
    return None


class Mover(Protocol):
    """Copies between pieces of one device's memory and staging. One thread begins, any may wait.

    Where nothing is to be done for host memory, that is what happens here.
    """

    def gather(self, pieces: iovec.Iovec, address: int) -> Moved:
        """Copy the pieces to `address`, one after the other. Raises DeviceError."""

    def scatter(self, address: int, pieces: iovec.Iovec) -> Moved:
        """Copy what lies at `address` into the pieces. Raises DeviceError."""

    def pin(self, address: int, nbytes: int) -> None:
        """Make staging reachable for this mover. Raises DeviceError."""
        return

    def unpin(self, address: int) -> None:
        """End one `pin`."""
        return

    def warm(self, address: int) -> None:
        """Do beforehand what the first copy would have to do, with 256 bytes of staging."""
        return

    def close(self) -> None:
        """Free what it holds: nothing is in flight any more."""
        return


class _Done:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


_DONE = _Done()


class HostMover(Mover):
    """Moves pieces of host memory; done on return."""

    def gather(self, pieces: iovec.Iovec, address: int) -> Moved:
        """Copy the pieces to `address`."""
        gather(pieces, _staged(pieces, address), below_nbytes=GRID_BELOW_NBYTES)
        return _DONE

    def scatter(self, address: int, pieces: iovec.Iovec) -> Moved:
        """Copy from `address` into the pieces."""
        scatter(_staged(pieces, address), pieces, below_nbytes=GRID_BELOW_NBYTES)
        return _DONE


def new_mover(device: int, max_programs: int | None = None) -> Mover:
    """Return a mover for the memory of a GPU, or of the host for -1."""
    if device < 0:
        return HostMover()
    from .gpu_mover import GpuMover

    return GpuMover(device, max_programs)


class Movers:
    """The movers of one stretch of staging, one a device, each made when it is first asked for.
    Thread-safe, but for `close`."""

    def __init__(self, address: int, nbytes: int) -> None:
        self._address = address
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._movers: dict[int, Mover] = {}
        self._pinned_by: Mover | None = None

    def get(
        self, device: int, max_programs: int | None, idle: Callable[[], int | None] = lambda: None
    ) -> Mover:
        """Return the mover of a device, which reaches the staging.

        Args:
            idle: address of 256 bytes that nobody uses, in which a new one is warmed; None if there
                are none now. No mover is given out while it is asked and used.

        Raises:
            DeviceError: the GPU's driver refuses.
        """
        with self._lock:
            mover = self._movers.get(device)
            if mover is None:
                mover = new_mover(device, max_programs)
                try:
                    if device >= 0:
                        self._prepare(mover, idle())
                except BaseException:
                    mover.close()
                    raise
                self._movers[device] = mover
            return mover

    def close(self) -> None:
        """Free what it holds; nobody copies any more."""
        try:
            if self._pinned_by is not None:
                self._pinned_by.unpin(self._address)
            for mover in self._movers.values():
                mover.close()
        except DeviceError as error:  # the GPU is gone, and with it what it held
            log.warning("kvferry: staging is not freed: %s", error)
        self._movers.clear()

    def _prepare(self, mover: Mover, idle: int | None) -> None:
        pins = self._pinned_by is None  # one registration serves all GPUs of the process
        if pins:
            mover.pin(self._address, self._nbytes)
        try:
            if idle is not None:
                mover.warm(idle)
        except BaseException:
            if pins:
                mover.unpin(self._address)
            raise
        if pins:
            self._pinned_by = mover


def suits(pieces: iovec.Iovec, direct_from_nbytes: int) -> bool:
    """Return whether pieces of host memory go faster through staging: many, tiny, equal, on one
    grid."""
    if direct_from_nbytes >= NEVER_DIRECT:
        return len(pieces) > 0
    return _on_a_grid(pieces) and int(pieces[0, 1]) < direct_from_nbytes


def _on_a_grid(pieces: iovec.Iovec) -> bool:
    """Return whether they are many, small, equal, and lie whole multiples of their size apart."""
    if len(pieces) < FEWEST_PIECES:
        return False
    nbytes = int(pieces[0, 1])
    if not 0 < nbytes < GRID_BELOW_NBYTES or bool((pieces[:, 1] != nbytes).any()):
        return False
    return not bool(((pieces[:, 0] - pieces[:, 0].min()) % np.uint64(nbytes)).any())


# Host memory.


def gather(pieces: iovec.Iovec, into: Bytes, *, below_nbytes: int = NEVER_DIRECT) -> None:
    """Copy pieces of this process's memory one after the other into a buffer of their size.

    Args:
        below_nbytes: pieces of this size, and larger ones, are left to the kernel.

    Raises:
        RegionGone, DeviceError: the kernel says that the memory is gone, or cannot copy.
    """
    rows = _rows(pieces, below_nbytes)
    if rows is None:
        _copy(pieces, into, gather=True)
    else:
        take_rows(*rows, out=into)


def scatter(out_of: Bytes, pieces: iovec.Iovec, *, below_nbytes: int = NEVER_DIRECT) -> None:
    """Copy a buffer into the pieces, one after the other. As `gather`."""
    rows = _rows(pieces, below_nbytes)
    if rows is None:
        _copy(pieces, out_of, gather=False)
    else:
        put_rows(*rows, data=out_of)


def _staged(pieces: iovec.Iovec, address: int) -> Bytes:
    return iovec.bytes_at(address, int(pieces[:, 1].sum()))


def rows_at(addresses: Ids, nbytes: int) -> Bytes:
    """Read rows of equal size: `[row, byte]`, a view if they lie one after the other, else a copy."""
    first, last = int(addresses.min()), int(addresses.max())
    if _dense(addresses, last - first, nbytes):
        return _span(addresses, nbytes, None)[0].reshape(-1, nbytes)
    return take_rows(addresses, nbytes).reshape(-1, nbytes)


def take_rows(
    addresses: Ids, nbytes: int, counts: Ids | None = None, *, out: Bytes | None = None
) -> Bytes:
    """Copy rows of equal size one after the other into `out`, which is contiguous, or a new array.

    Args:
        counts: how many rows lie one after the other at each address; 1 if None.
    """
    raw, offsets = _span(addresses, nbytes, counts)
    grain, index = nbytes, offsets // nbytes
    if not bool((index * nbytes == offsets).all()):  # on no grid of their size
        every = int(np.bitwise_or.reduce(offsets)) | nbytes
        grain = every & -every
        if out is None or grain < COARSE_GRAIN_NBYTES:
            return _take_anywhere(raw, _each(offsets, counts, nbytes), nbytes, out)
        grains = nbytes // grain
        counts = np.full(len(offsets), grains) if counts is None else counts * grains
        index = offsets // grain
    item = f"V{grain}"
    into = None if out is None else out.view(item)
    # Other modes than "clip" make NumPy copy into a temporary first; the rows are in range.
    taken: Bytes = np.take(raw.view(item), _each(index, counts, 1), out=into, mode="clip")
    return taken.view(np.uint8)


def _take_anywhere(raw: Bytes, offsets: Ids, nbytes: int, out: Bytes | None) -> Bytes:
    rows = _anywhere(raw, nbytes)
    if out is None:
        return rows[offsets].view(np.uint8)
    into = out.view(rows.dtype)
    step = max(1, _AT_A_TIME_NBYTES // nbytes)
    for start in range(0, len(offsets), step):
        into[start : start + step] = rows[offsets[start : start + step]]
    return out


def put_rows(addresses: Ids, nbytes: int, counts: Ids | None = None, *, data: Bytes) -> None:
    """Copy `data`, which is contiguous, into rows of equal size. As `take_rows`."""
    raw, offsets = _span(addresses, nbytes, counts)
    if counts is None and _dense(offsets, len(raw) - nbytes, nbytes):
        raw[...] = data
        return
    rows = _anywhere(raw, nbytes)
    rows[_each(offsets, counts, nbytes)] = data.view(rows.dtype)


def _span(addresses: Ids, nbytes: int, counts: Ids | None) -> tuple[Bytes, Ids]:
    """View the memory from the first row to the last; and say where in it each address is.

    Raises:
        RegionGone: some of the rows are not mapped. (NumPy would end the process.)
    """
    first = int(np.minimum.reduce(addresses))  # half the time of `addresses.min()`
    ends = addresses if counts is None else addresses + (counts - 1) * nbytes
    stop = int(np.maximum.reduce(ends)) + nbytes
    sizes = nbytes if counts is None else counts * nbytes
    # There may be holes between the rows.
    if not iovec.all_mapped(first, stop) and not iovec.is_mapped(addresses, sizes):
        raise iovec.not_mapped("stage")
    return iovec.bytes_at(first, stop - first), addresses - first


def _each(begin: Ids, counts: Ids | None, step: int) -> Ids:
    """Count up from each beginning, so many times by `step`."""
    if counts is None:
        return begin
    ends = np.cumsum(counts)
    each: Ids = np.repeat(begin - (ends - counts) * step, counts)
    each += np.arange(int(ends[-1])) * step
    return each


def _anywhere(raw: Bytes, nbytes: int) -> npt.NDArray[np.void]:
    """View memory as the rows that begin at each of its bytes."""
    count = len(raw) - nbytes + 1
    rows: npt.NDArray[np.void] = np.ndarray((count,), f"V{nbytes}", raw, strides=(1,))
    return rows


def _dense(addresses: Ids, span_nbytes: int, nbytes: int) -> bool:
    """Return whether rows lie one after the other."""
    if span_nbytes != (len(addresses) - 1) * nbytes:
        return False
    return bool((addresses[1:] - addresses[:-1] == nbytes).all())


def _rows(pieces: iovec.Iovec, below_nbytes: int) -> tuple[Ids, int, Ids | None] | None:
    """Find equal rows that the pieces are made of: for `take_rows`. None where the kernel is to copy."""
    if len(pieces) < FEWEST_ROWS:
        return None
    addresses, nbytes = pieces[:, 0].view(np.int64), pieces[:, 1].view(np.int64)
    grain = int(nbytes[0])
    if bool((nbytes == grain).all()):
        return (addresses, grain, None) if 0 < grain < below_nbytes else None
    grain = int(np.gcd.reduce(nbytes))
    if grain < FEWEST_GRAIN_NBYTES or int(np.maximum.reduce(nbytes)) >= below_nbytes:
        return None
    return addresses, grain, nbytes // grain


def _copy(pieces: iovec.Iovec, buffer: Bytes, *, gather: bool) -> None:
    """Copy between pieces and a buffer, by the system call that walks two lists."""
    address, nbytes = int(buffer.ctypes.data), len(buffer)
    if not nbytes:
        return  # the call's answer to nothing is that of a failure
    try:
        local, remote, write = pieces.copy(), iovec.one(address, nbytes), gather
        if nbytes >= REMOTE_FROM_NBYTES * len(pieces):
            local, remote, write = remote, local, not gather
        iovec.process_vm(os.getpid(), local, remote, nbytes, write=write)
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise iovec.not_mapped("stage") from error
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise DeviceError(
                f"the kernel could not copy: {error.strerror}", operation="stage"
            ) from error
        if not iovec.is_mapped(pieces[:, 0], pieces[:, 1]):
            raise iovec.not_mapped("stage") from error
        for place, size in pieces.tolist():  # a sandbox forbids the call: one by one, then
            into, out_of = (address, place) if gather else (place, address)
            ctypes.memmove(into, out_of, size)
            address += size
