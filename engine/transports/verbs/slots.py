"""Staging of a verbs link: slots that hold one frame each, at both ends.

A frame is what a tcp rail carries (`wire/frames.py`): header, tables, bytes. It is put together in a
slot here, written into the slot of the same number at the peer by one work request, checked and
taken apart there. Whoever owns the bytes decides where they go, so a lying peer is refused as on
tcp. The bytes begin at a multiple of 256, which a GPU's kernel reads and writes at its widest.

Host memory is copied by NumPy or the kernel. A GPU's mover gathers straight into the slot and scatters
straight out of it: the slots are pinned for CUDA, as they are for the RDMA devices (decision 0049).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ...staging.mover import Movers, gather, scatter
from ...wire import frames
from ...wire.tables import MAX_REGIONS, PIECE_ROW, REGION_ROW
from ..segments import prepare_gpus

if TYPE_CHECKING:
    import numpy.typing as npt

    from ...memory import iovec
    from ...staging.mover import Mover
    from ..base import PathHost
    from .device import Device

    Bytes = npt.NDArray[np.uint8]

# A frame costs both ends some 18,000 steps of a Python loop, whatever its size.
NUM_SLOTS = 4
FRAME_NBYTES = 2 << 20
FRAME_PIECES = 4096
PIECE_NBYTES = 64 << 10  # longer pieces are cut before they are staged
BYTES_ALIGN_NBYTES = 256
_PAGE_NBYTES = 4096
_TABLES_NBYTES = MAX_REGIONS * REGION_ROW.itemsize + FRAME_PIECES * PIECE_ROW.itemsize
SLOT_NBYTES = (
    -(-(frames.HEADER_NBYTES + _TABLES_NBYTES + BYTES_ALIGN_NBYTES + FRAME_NBYTES) // _PAGE_NBYTES)
    * _PAGE_NBYTES
)
SLOTS_NBYTES = 2 * NUM_SLOTS * SLOT_NBYTES  # of one end of a link


class Slots:
    """The slots of one end of a link: half to send from, half to receive into.

    Attributes:
        address, nbytes: all of its memory, and one page more, which no peer reaches.
        inbox: address of the half to receive into.
        spare: address of that page.
    """

    def __init__(self) -> None:
        half = NUM_SLOTS * SLOT_NBYTES
        whole = np.empty(2 * half + 2 * _PAGE_NBYTES, np.uint8)
        start = -whole.ctypes.data % _PAGE_NBYTES
        self._memory: Bytes = whole[start : start + 2 * half]
        self.address = int(self._memory.ctypes.data)
        self.nbytes = 2 * half + _PAGE_NBYTES
        self.inbox = self.address + half
        self.spare = self.inbox + half
        self._pinned: dict[Device, Any] = {}

    def keys(self, device: Device) -> tuple[int, int]:
        """Return the local and the remote key of the slots on a device; pins them there at
        first."""
        if device not in self._pinned:
            self._pinned[device] = device.pin(self.address, len(self._memory))
        entry = self._pinned[device]
        return entry.lkey, entry.rkey

    def outgoing(self, slot: int) -> Bytes:
        """Return the slot's bytes to send from."""
        return self._memory[slot * SLOT_NBYTES : (slot + 1) * SLOT_NBYTES]

    def incoming(self, slot: int) -> Bytes:
        """Return the slot's bytes to receive into."""
        return self.outgoing(NUM_SLOTS + slot)

    def release(self, device: Device) -> None:
        """Unpin the slots from a device that no rail uses any more."""
        entry = self._pinned.pop(device, None)
        if entry is not None:
            try:
                entry.close()
            except device.library.error:
                return  # the device is gone, and the registration with it

    def close(self) -> None:
        """Unpin the slots everywhere."""
        for device in list(self._pinned):
            self.release(device)


def bytes_begin(head_nbytes: int) -> int:
    """Return where in a slot the bytes begin, behind a header and tables of this size."""
    return -(-head_nbytes // BYTES_ALIGN_NBYTES) * BYTES_ALIGN_NBYTES


class SlotCopies:
    """Copies in and out of one link's slots, by the host or by a GPU's mover. Thread-safe, but for
    `close`."""

    def __init__(self, link: PathHost, slots: Slots) -> None:
        self._link = link
        self._spare = slots.spare
        self._movers = Movers(slots.address, slots.nbytes)
        self._beginning: dict[int, threading.Lock] = {}  # by GPU: one thread begins at a time
        self.close = self._movers.close

    def gather(self, into: Bytes, pieces: iovec.Iovec, device: int) -> None:
        """Copy pieces of a GPU's memory, or the host's for -1, one after the other into a slot.

        Raises:
            DeviceError, RegionGone: the GPU failed, or the memory is gone.
        """
        if device < 0:
            gather(pieces, into)
        elif len(into):
            mover = self._mover(device)
            with self._beginning[device]:
                moved = mover.gather(pieces, int(into.ctypes.data))
            moved.wait()

    def scatter(self, out_of: Bytes, pieces: iovec.Iovec, device: int) -> None:
        """Copy what lies in a slot into the pieces. Raises DeviceError."""
        if device < 0:
            scatter(out_of, pieces)
        elif len(out_of):
            mover = self._mover(device)
            with self._beginning[device]:
                moved = mover.scatter(int(out_of.ctypes.data), pieces)
            moved.wait()

    def warm(self) -> None:
        """Prepare the movers of this process's GPUs."""
        prepare_gpus(self._link, self._mover)

    def _mover(self, device: int) -> Mover:
        self._beginning.setdefault(device, threading.Lock())
        return self._movers.get(device, self._link.core.max_programs, lambda: self._spare)
