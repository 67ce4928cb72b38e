"""Counters in GPU memory: what lets a CUDA stream wait for bytes without the host in the loop.

Each engine has one array of 64-bit words on each GPU that it registered memory of. The kernel that
moves bytes adds their number to word `imm % NUM_SLOTS` of the receiver's array, after they are
visible there. Words only grow; what an imm must reach is its word's value when it was expected
plus the bytes it expects. A word is owned by one imm at a time. One whose imm failed is dirty, and owned
by nobody while a peer may still add to it: a late addition completes nothing. It is read anew when the
links that were up at the failure have quiesced. An imm without a word is counted by the host alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from ..memory.cuda_driver import driver
from ..memory.cuda_events import held_streams

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
        self._waits: dict[int, int] = {}  # slot: streams that were let to wait for it
        self._spinners: list[tuple[int, int]] = []  # stream, event
        self._seen: set[int] = set()  # imms whose bytes a thread has seen here, ahead of the news
        self._ahead: OrderedDict[int, int] = OrderedDict()  # imm: bytes whose news is to come
        self._values: dict[int, int] = {}  # slot: bytes that are known to have been added
        self._of_imm: dict[int, int] = {}  # imm: bytes added before it was expected
        self._links: dict[object, int] = {}  # that are up, by how many had been opened before
        self._num_opened = 0
        self._dirty: dict[int, int] = {}  # slot: links with smaller numbers may still add to it
        self._wordless: dict[int, int] = {}  # dirty slot: tickets of imms that are added to it

    def array(self, device: int) -> tuple[bytes, int]:
        """IPC handle and address of the array on `device`; made with the first call."""
        with self._lock:
            array = self._arrays.get(device)
            if array is None:
                cuda = driver()
                address = cuda.allocate(device, COUNTERS_NBYTES)
                array = self._arrays[device] = (cuda.export(device, address), address)
            return array

    def owned(self, imm: int) -> bool:
        """Return whether an imm's word is another's: what is added to it would complete that one."""
        return imm % NUM_SLOTS in self._owners

    def dirty(self, imm: int) -> bool:
        """Return whether an imm's word may still be added to under an imm that failed."""
        return imm % NUM_SLOTS in self._dirty

    def link_opened(self, link: object) -> None:
        """Peers may add to words over this link."""
        with self._lock:
            self._links[link] = self._num_opened
            self._num_opened += 1

    def link_quiesced(self, link: object) -> bool:
        """Nothing is added over this link any more; return whether there are words to `cleanse`."""
        with self._lock:
            self._links.pop(link, None)
            return bool(self._cleansable())

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
            if len(self._arrays) != 1 or slot in self._owners:
                return
            wordless = slot in self._dirty
            if wordless:
                self._wordless[slot] = self._wordless.get(slot, 0) + 1
            else:
                self._owners[slot] = (imm, self._values.get(slot, 0) - early + nbytes)
        ticket.add_done_callback(self._wordless_ended if wordless else self._ended)

    def wait(self, ticket: Ticket, stream: torch.cuda.Stream) -> bool:
        """Let a stream wait for the ticket's word; False if it has none."""
        imm = ticket.imm
        if imm is None:
            return False
        slot = imm % NUM_SLOTS
        with self._lock:
            owner = self._owners.get(slot)
            if owner is None or owner[0] != imm:
                return False
            ((array_device, (_, address)),) = self._arrays.items()
            # Until the ticket ends: a thread of this process ends the wait if the peer does not.
            self._waits[slot] = self._waits.get(slot, 0) + 1
            held_streams.add(1)
        # Without the lock: the stream may be full, and wait for what `_ended` writes. If the ticket
        # ends now the word has what is waited for, since words only grow.
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
            held_streams.add(-self._waits.pop(slot, 0))
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
                self._dirty[slot] = self._num_opened
            if not self._arrays:
                return  # the engine is closed, and nothing waits any more
            ((device, (_, address)),) = self._arrays.items()
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = driver().new_stream(device)
            driver().write_value(device, stream, address + slot_offset(ticket.imm), target)
            self._values[slot] = target

    def _wordless_ended(self, ticket: Ticket) -> None:
        """An imm whose word is dirty has ended: if it failed, more of its bytes may come."""
        assert ticket.imm is not None
        slot = ticket.imm % NUM_SLOTS
        with self._lock:
            self._wordless[slot] -= 1
            if not self._wordless[slot]:
                del self._wordless[slot]
            if ticket.exception() is not None:
                self._dirty[slot] = self._num_opened

    def _cleansable(self) -> list[int]:
        """Return the dirty slots whose words nobody can add to any more."""
        oldest = min(self._links.values(), default=self._num_opened)
        return [
            slot
            for slot, opened in self._dirty.items()
            if opened <= oldest and slot not in self._wordless
        ]

    def cleanse(self) -> None:
        """Read the dirty words anew that nobody can add to any more. May wait for the GPU."""
        with self._lock:
            for slot in self._cleansable():
                for device, (_, address) in self._arrays.items():
                    self._values[slot] = driver().read_word(device, address + slot * WORD_NBYTES)
                del self._dirty[slot]

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
