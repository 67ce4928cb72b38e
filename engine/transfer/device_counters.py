"""Counters in GPU memory: what lets a CUDA stream wait for bytes without the host in the loop.

Each engine has one array of 64-bit words on each GPU that it registered memory of. The kernel that
moves bytes adds their number to word `imm % NUM_SLOTS` of the receiver's array, after they are
visible there. Words only grow; what an imm must reach is its word's value when it was expected
plus the bytes it expects. A word is owned by one imm at a time, and one whose imm failed is not used
again while a peer may still add to it: a late addition completes nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from ..memory.cuda_driver import driver

if TYPE_CHECKING:
    import torch

    from .ticket import Ticket

NUM_SLOTS = 1 << 16  # 512 KiB a GPU
WORD_NBYTES = 8
COUNTERS_NBYTES = NUM_SLOTS * WORD_NBYTES


def slot_offset(imm: int) -> int:
    """Bytes from the array's start to an imm's word."""
    return imm % NUM_SLOTS * WORD_NBYTES


class DeviceCounters:
    """The arrays of one engine and what the host knows of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: dict[int, tuple[bytes, int]] = {}  # device: IPC handle, address
        self._streams: dict[int, int] = {}
        self._owners: dict[int, tuple[int, int]] = {}  # slot: imm, target
        self._spinners: list[tuple[int, int]] = []  # stream, event
        self._seen: set[int] = set()  # imms whose bytes a thread has seen here, ahead of the news
        self._ahead: OrderedDict[int, int] = OrderedDict()  # imm: bytes whose news is to come
        self._values: dict[int, int] = {}  # slot: bytes that are known to have been added
        self._of_imm: dict[int, int] = {}  # imm: bytes added before it was expected
        self._dirty: set[int] = set()

    def array(self, device: int) -> tuple[bytes, int]:
        """IPC handle and address of the array on `device`; made with the first call."""
        with self._lock:
            array = self._arrays.get(device)
            if array is None:
                cuda = driver()
                address = cuda.allocate(device, COUNTERS_NBYTES)
                array = self._arrays[device] = (cuda.export(device, address), address)
            return array

    def busy(self, imm: int) -> bool:
        """Return whether an imm's word is owned by another, or may still be added to."""
        slot = imm % NUM_SLOTS
        return slot in self._owners or slot in self._dirty

    def added(self, imm: int, nbytes: int) -> None:
        """A peer says that it has added so many bytes."""
        slot = imm % NUM_SLOTS
        with self._lock:
            known = min(self._ahead.get(imm, 0), nbytes)
            if known:
                nbytes -= known
                self._ahead[imm] -= known
            self._values[slot] = self._values.get(slot, 0) + nbytes
            if nbytes and slot not in self._owners and len(self._of_imm) < NUM_SLOTS:
                self._of_imm[imm] = self._of_imm.get(imm, 0) + nbytes

    def claim(self, ticket: Ticket, nbytes: int) -> None:
        """Give the ticket's imm its word until the ticket ends, if the word is free."""
        imm = ticket.imm
        assert imm is not None
        slot = imm % NUM_SLOTS
        with self._lock:
            early = self._of_imm.pop(imm, 0)
            if len(self._arrays) != 1 or slot in self._owners or slot in self._dirty:
                return
            self._owners[slot] = (imm, self._values.get(slot, 0) - early + nbytes)
        ticket.add_done_callback(self._ended)

    def wait(self, ticket: Ticket, stream: torch.cuda.Stream) -> bool:
        """Let a stream wait for the ticket's word; False if it has none."""
        imm = ticket.imm
        if imm is None:
            return False
        with self._lock:
            owner = self._owners.get(imm % NUM_SLOTS)
            if owner is None or owner[0] != imm:
                return False
            ((array_device, (_, address)),) = self._arrays.items()
            device = stream.device_index
            if array_device != device:
                driver().enable_peer_access(device, array_device)
            driver().wait_value(device, stream.cuda_stream, address + slot_offset(imm), owner[1])
            return True

    def spin(self, ticket: Ticket, nbytes: int) -> None:
        """Wait awake, without the interpreter lock, for the ticket's word; then end the ticket.

        Returns at once if it has none, and early if the ticket ends otherwise.
        """
        imm = ticket.imm
        assert imm is not None
        slot = imm % NUM_SLOTS
        with self._lock:
            owner = self._owners.get(slot)
            if owner is None or owner[0] != imm:
                return
            cuda = driver()
            ((device, (_, address)),) = self._arrays.items()
            if not self._spinners:
                self._spinners.append((cuda.new_stream(device), cuda.new_event(device)))
            stream, event = self._spinners.pop()
            cuda.wait_value(device, stream, address + slot_offset(imm), owner[1])
            with cuda.current(device):
                cuda.record(event, stream)
        try:
            cuda.synchronize_event(event)
        finally:
            with self._lock:
                self._spinners.append((stream, event))
        if not ticket.done():
            self._seen.add(imm)
            ticket._finish(nbytes)
            self._seen.discard(imm)

    def _ended(self, ticket: Ticket) -> None:
        """Give the word back; releases streams that wait for bytes that came another way."""
        assert ticket.imm is not None
        slot = ticket.imm % NUM_SLOTS
        with self._lock:
            _, target = self._owners.pop(slot)
            value = self._values.get(slot, 0)
            if value >= target and ticket.exception() is None:
                return
            if ticket.imm in self._seen:
                self._values[slot] = target
                self._ahead[ticket.imm] = target - value
                while len(self._ahead) > NUM_SLOTS:
                    self._ahead.popitem(last=False)
                return
            if ticket.exception() is not None:
                self._dirty.add(slot)
            if not self._arrays:
                return  # the engine is closed, and nothing waits any more
            ((device, (_, address)),) = self._arrays.items()
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = driver().new_stream(device)
            driver().write_value(device, stream, address + slot_offset(ticket.imm), target)
            self._values[slot] = target

    @property
    def dirty(self) -> bool:
        """Whether there are words of failed imms."""
        return bool(self._dirty)

    def cleanse(self) -> None:
        """No peer can add to any word now: reads the words of failed imms anew."""
        with self._lock:
            for slot in self._dirty:
                for device, (_, address) in self._arrays.items():
                    self._values[slot] = driver().read_word(device, address + slot * WORD_NBYTES)
            self._dirty.clear()

    def close(self, *, free: bool) -> None:
        """End the arrays' use; `free` unless a peer may still add to them."""
        with self._lock:
            arrays, self._arrays = self._arrays, {}
            streams, self._streams = self._streams, {}
            spinners, self._spinners = self._spinners, []
        for device, stream in streams.items():
            driver().destroy_stream(device, stream)
        for device, (_, address) in arrays.items():
            for stream, _ in spinners:
                driver().destroy_stream(device, stream)
            if free:
                driver().free(device, address)
