"""Staging between two processes of one host: slots in memory that both share, pinned for the GPUs.

For what `cma` and `cuda_ipc` cannot reach: GPU memory without peer access, or one end in GPU memory
and the other in host memory. Whoever has the bytes gathers them into a slot of its own staging and
says so; the other scatters them, counts them, and gives the slot back. There is no third copy.
"""

from __future__ import annotations

import functools
import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import DeviceError, EngineError, ProtocolError
from ...memory import iovec
from ...runtime.pipeline import work_off
from ...staging.mover import Moved, outcome
from ...staging.shared_slots import SharedSlots
from ...transfer.compute_gate import hold_until_computed
from ...wire import tables
from ...wire.messages import (
    Acknowledge,
    OpenStaging,
    ReadRequest,
    Staged,
    Unstaged,
)
from ..segments import (
    Outstanding,
    Replies,
    Reply,
    admit_write,
    answer_to_nothing,
    begin_counted,
    checksum_mismatch,
    drop_replies,
    prepare_gpus,
)
from ..workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from ...transfer.transfer import Transfer
    from ...wire.messages import LinkMessage
    from ..base import PathHost
    from ..segments import Landing, Segment

# Two H200s, 1 GiB of 32 KiB pieces, GB/s by slots and their size: 4 of 32 MiB 35, 8 of 16 MiB 40, 12 of
# 16 MiB 41, 12 of 24 MiB 43, 16 of 8 MiB 23. A part costs each side 0.3 ms in Python, and a slot goes
# to and fro in 2 ms besides its copies, since sleeping threads are woken on the way.
NUM_SLOTS = 8
SLOT_NBYTES = 24 << 20
# Parts grow to a slot's size, so that the second stage begins soon, and shrink at the end.
FIRST_PART_NBYTES = 4 << 20


class _Gathered(NamedTuple):
    """A slot that is being filled with the bytes of a segment."""

    slot: int
    moved: Moved
    item: Segment | Reply
    nbytes: int

    def end(self, error: EngineError | None) -> None:
        """End the use of where they come from."""
        self.item.sent(error)


class _Scattered(NamedTuple):
    """A slot that is being emptied."""

    slot: int
    moved: Moved
    landing: Landing

    def end(self, error: EngineError | None) -> None:
        """End the use of where its bytes go."""
        self.landing.placed(error, True)


class SharedStaging:
    """Both directions of one link. Its two threads start with the first transfer that needs them.

    Attributes:
        handlers: what it does with the peer's messages.
    """

    def __init__(self, link: PathHost, pid: int) -> None:
        self._link = link
        self._pid = pid
        self._lock = threading.Lock()
        self._making = threading.Lock()  # of slots, which takes a while
        self._out: queue.SimpleQueue[Segment | Reply | None] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[Staged | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._filled: set[int] = set()  # slots that the peer is to empty
        self._held: set[int] = set()  # slots of the peer's that are to be emptied here
        self._opening: OpenStaging | None = None
        self._outstanding = Outstanding(link)
        self._replies = Replies(link, SLOT_NBYTES)
        self.tick = self._replies.tick
        self._named: tuple[object, bytes] = (None, b"")
        self._mine: SharedSlots | None = None
        self._theirs: SharedSlots | None = None
        # Its owner ended before we could open it; what it has said is still coming.
        self._closed = False
        self._threads: dict[str, threading.Thread] = {}
        self._workers = Workers(link, "staging")
        self.refused = self._outstanding.refused
        self.handlers: dict[type[LinkMessage], Callable[[Any], bool]] = {
            Staged: self._staged,
            Unstaged: self._unstaged,
            OpenStaging: self._open,
            ReadRequest: self._serve_read,
            Acknowledge: self._outstanding.acknowledged,
        }

    # What the path calls.

    def submit(self, transfer: Transfer) -> None:
        """Start a transfer, once the compute before it is done."""
        hold_until_computed(self._link.core.gate, transfer, self._submit)

    def prepare(self, device: int) -> None:
        """Make and pins this side's staging beforehand, and loads what the GPU needs. May block.

        Raises:
            DeviceError: the GPU's driver refuses.
        """
        slots = self._slots()
        slots.movers.get(
            device,
            self._link.core.max_programs,
            lambda: slots.slot(0) if self._free.qsize() == NUM_SLOTS else None,  # nobody fills it
        )

    def halt(self, halted: Callable[[], None]) -> None:
        """Stop all work, then calls `halted` once, from any thread. Never blocks."""
        self._workers.close()
        self._out.put(None)
        self._free.put(None)
        self._in.put(None)
        self._workers.halt(functools.partial(self._leave, halted))

    # Submitting.

    def _submit(self, transfer: Transfer) -> None:
        if begin_counted(self._link, transfer):
            self._outstanding.submit(transfer, _cuts(transfer.nbytes), self._out.put)
            self._start(
                "out" if transfer.write else "in", self._send if transfer.write else self._take_in
            )

    def _serve_read(self, ask: ReadRequest) -> bool:
        reply = self._replies.serve(ask)
        if reply is not None:
            self._out.put(reply)
            if not self._start("out", self._send):
                drop_replies(self._out)
        return True

    # The thread that gathers.

    def _send(self) -> None:
        work_off(self._out, self._begin, self._announce, self._ahead, _drop, _done)

    def _ahead(self, _: _Gathered, begun: int) -> bool:
        return not self._free.empty()

    def _begin(self, item: Segment | Reply) -> _Gathered | None:
        slots = self._slots()
        slot = self._free.get()
        if slot is None:  # halting
            self._free.put(None)
            if isinstance(item, Reply):
                item.sent()
            return None
        source = item.begin()
        if source is None:
            self._free.put(slot)
            return None
        pieces, device = source
        try:
            mover = slots.movers.get(device, self._link.core.max_programs)
            moved = mover.gather(pieces, slots.slot(slot))
        except EngineError as error:
            item.sent(error)
            self._free.put(slot)
            return None
        except BaseException:
            item.sent()
            raise
        return _Gathered(slot, moved, item, int(pieces[:, 1].sum()))

    def _announce(self, gathered: _Gathered) -> None:
        slot, moved, item, nbytes = gathered
        failure: EngineError | None = None
        try:
            moved.wait()
            if item.ticket is not None:
                item.ticket._mark_staged("gathered", nbytes)
                item.ticket._mark("on wire")
            crc = self._checksum(self._slots(), slot, nbytes) if item.verify else None
            if isinstance(item, Reply):
                number, first, imm, regions, pieces = item.transfer, item.first, None, b"", b""
            else:
                transfer = item.transfer
                number, first, imm = transfer.id, item.pieces.start, transfer.imm
                regions = self._region_rows(transfer)
                pieces = tables.piece_rows(transfer, item.pieces).tobytes()
                self._outstanding.sending(number)
            staged = Staged(
                transfer=number,
                first=first,
                slot=slot,
                nbytes=nbytes,
                reply=isinstance(item, Reply),
                regions=regions,
                pieces=pieces,
                imm=imm,
                crc=crc,
            )
            with self._lock:
                self._filled.add(slot)
            self._link.send(staged)
        except DeviceError as error:
            failure = error
            self._free.put(slot)
        item.sent(failure)

    def _region_rows(self, transfer: Transfer) -> bytes:
        """Encode a transfer's region table; most transfers name the regions of the one before."""
        if self._named[0] is not transfer.remote_regions:
            rows = tables.region_rows(transfer.remote_regions).tobytes()
            self._named = (transfer.remote_regions, rows)
        return self._named[1]

    # The thread that scatters.

    def _take_in(self) -> None:
        slots = self._their_slots()
        if slots is not None:
            cap = self._link.core.max_programs
            prepare_gpus(self._link, lambda device: slots.movers.get(device, cap))
        work_off(self._in, self._scatter, self._placed, _always, _drop, _done)

    def _their_slots(self) -> SharedSlots | None:
        """Return the peer's slots, opened with the first call; None if there are none. On this thread,
        since it is the peer who says what is opened, and that may take for ever."""
        message = self._opening
        if self._theirs is None and message is not None and not self._closed:
            try:
                self._theirs = SharedSlots.open(
                    self._pid, message.descriptor, message.num_slots, message.slot_nbytes
                )
            except (FileNotFoundError, ProcessLookupError):
                self._closed = True
                self._link.suspect()  # its process has ended, or it has just closed the link
        return self._theirs

    def _give_back(self, slot: int) -> None:
        """A slot of the peer's is empty again."""
        with self._lock:
            self._held.discard(slot)
        self._link.send(Unstaged(slot))

    def _scatter(self, staged: Staged) -> _Scattered | None:
        slots = self._their_slots()
        if self._closed:
            return None
        if slots is None or staged.slot >= slots.num_slots or staged.nbytes > slots.slot_nbytes:
            raise ProtocolError(
                f"slot {staged.slot} with {staged.nbytes} bytes is in no staging of the peer's"
            )
        landing = self._landing(staged)
        if landing is None:
            self._give_back(staged.slot)
            return None
        try:
            self._check(slots, staged)
            mover = slots.movers.get(landing.device, self._link.core.max_programs)
            moved = mover.scatter(slots.slot(staged.slot), landing.pieces)
        except EngineError as error:
            self._give_back(staged.slot)
            landing.placed(error, True)
            return None
        except BaseException:
            landing.give_up()
            raise
        return _Scattered(staged.slot, moved, landing)

    def _landing(self, staged: Staged) -> Landing | None:
        """Return where staged bytes go; None if that is refused."""
        number, first, nbytes = staged.transfer, staged.first, staged.nbytes
        if not staged.reply:
            rows = (staged.regions, staged.pieces)
            return admit_write(self._link, number, staged.imm, rows, nbytes, first=first)
        landing = self._outstanding.take_read(number, first, nbytes)
        if landing is None:
            raise ProtocolError("staged bytes answer no read of ours")
        return landing

    def _placed(self, scattered: _Scattered) -> None:
        failure = outcome(scattered.moved)
        self._give_back(scattered.slot)
        scattered.end(failure)

    # Both.

    def _check(self, slots: SharedSlots, staged: Staged) -> None:
        crc = staged.crc
        if crc is not None and self._checksum(slots, staged.slot, staged.nbytes) != crc:
            raise checksum_mismatch(self._link.peer.name, staged.imm)

    def _checksum(self, slots: SharedSlots, slot: int, nbytes: int) -> int:
        return iovec.checksum(iovec.one(slots.slot(slot), nbytes))

    def _slots(self) -> SharedSlots:
        """Return this side's slots; make them with the first call, and tell the peer."""
        with self._making:
            slots = self._mine
            if slots is None:
                slots = self._mine = SharedSlots.make(NUM_SLOTS, SLOT_NBYTES)
                self._link.core.staging.add(NUM_SLOTS * SLOT_NBYTES)
                for slot in range(NUM_SLOTS):
                    self._free.put(slot)
                self._link.send(OpenStaging(slots.descriptor, NUM_SLOTS, SLOT_NBYTES))
            return slots

    # The peer's messages, on the progress thread.

    def _staged(self, message: Staged) -> bool:
        if self._closed:
            return True
        with self._lock:
            full = message.slot in self._held
            self._held.add(message.slot)
        if full:
            self._link.fail(ProtocolError(f"slot {message.slot} is filled and not emptied yet"))
            return True
        self._start("in", self._take_in)
        self._in.put(message)
        return True

    def _open(self, message: OpenStaging) -> bool:
        if self._opening is not None:
            self._link.fail(ProtocolError("the peer's staging is open already"))
            return True
        self._opening = message
        self._start("in", self._take_in)
        return True

    def _unstaged(self, message: Unstaged) -> bool:
        with self._lock:
            known = message.slot in self._filled
            self._filled.discard(message.slot)
        if known:
            self._free.put(message.slot)
        else:
            self._link.fail(answer_to_nothing())
        return True

    # Threads.

    def _start(self, name: str, work: Callable[[], None]) -> bool:
        """Start a thread if it does not run yet; False if the link is halting."""
        with self._lock:
            if self._workers.closed:
                return False
            if name in self._threads:
                return True
            if not self._workers.enter():
                return False
            thread = self._threads[name] = threading.Thread(
                target=self._workers.run,
                args=(work,),
                name=f"{self._link.core.identity.name}-stage-{name}",
                daemon=True,
            )
        thread.start()
        return True

    def _leave(self, halted: Callable[[], None]) -> None:
        """Free everything: the last thread has ended."""
        drop_replies(self._out)
        for slots in (self._mine, self._theirs):
            if slots is not None:
                slots.close()
        if self._mine is not None:
            self._link.core.staging.add(-NUM_SLOTS * SLOT_NBYTES)
        halted()


def _cuts(nbytes: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Cut a list of pieces into consecutive parts, each of which a slot holds."""
    ends = np.cumsum(nbytes)
    start, done, limit_nbytes = 0, 0, FIRST_PART_NBYTES
    while start < len(ends):
        stop = int(np.searchsorted(ends, done + limit_nbytes, side="right"))
        stop = min(max(stop, start + 1), start + tables.MAX_PIECES)
        yield slice(start, stop)
        start, done = stop, int(ends[stop - 1])
        growing_nbytes = min(2 * limit_nbytes, SLOT_NBYTES)
        limit_nbytes = max(FIRST_PART_NBYTES, min(growing_nbytes, (int(ends[-1]) - done) // 2))


def _always(_: Any, __: int) -> bool:
    return True  # the peer has no more slots than it has told of


def _done(begun: _Gathered | _Scattered) -> bool:
    return begun.moved.done()


def _drop(begun: _Gathered | _Scattered) -> None:
    """Wait for the copies of a thread that fails: they end before anybody believes that they
    have."""
    begun.end(outcome(begun.moved))
