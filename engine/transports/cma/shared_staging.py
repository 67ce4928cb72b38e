"""Between two processes of one host: through memory that both share, pinned for the GPUs.

For what `cma` and `cuda_ipc` cannot reach: GPU memory without peer access, or one end in GPU memory
and the other in host memory. Whoever has the bytes gathers them into a slot of its own staging and
says so; the other scatters them, counts them, and gives the slot back. There is no third copy.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import ChecksumMismatch, DeviceError, EngineError, LinkError, ProtocolError
from ...memory import iovec
from ...runtime.pipeline import work_off
from ...staging.mover import Moved, Mover, new_mover
from ...staging.shared_slots import SharedSlots
from ...transfer.staged import hold_until_computed
from ...wire import tables
from ...wire.messages import (
    Acknowledge,
    Arrived,
    OpenStaging,
    ReadRequest,
    Refuse,
    Staged,
    Unstaged,
)
from ..workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from ...transfer.ticket import Ticket
    from ...wire.messages import LinkMessage
    from ..base import PathHost, Transfer

# Two H200s, 1 GiB of 32 KiB pieces, GB/s by slots and their size: 4 of 32 MiB 35, 8 of 16 MiB 40, 12 of
# 16 MiB 41, 12 of 24 MiB 43, 16 of 8 MiB 23. A part costs each side 0.3 ms in Python, and a slot goes
# to and fro in 2 ms besides its copies, since sleeping threads are woken on the way.
NUM_SLOTS = 8
SLOT_NBYTES = 24 << 20
# Parts grow to a slot's size, so that the second stage begins soon, and shrink at the end.
FIRST_PART_NBYTES = 4 << 20

log = logging.getLogger(__name__)


class _Reply(NamedTuple):
    """Pieces of this process's memory that the peer reads."""

    ask: ReadRequest
    admitted: tables.Admitted


class _Gathered(NamedTuple):
    """A slot that is being filled."""

    slot: int
    moved: Moved
    message: Callable[[int | None], Staged]
    nbytes: int
    verify: bool
    end: Callable[[EngineError | None], None]
    ticket: Ticket | None  # of a write; a peer that reads keeps its own


class _Scattered(NamedTuple):
    """A slot that is being emptied."""

    slot: int
    moved: Moved
    end: Callable[[EngineError | None], None]


class SharedStaging:
    """Both directions of one link. Its two threads start with the first transfer that needs them."""

    def __init__(self, link: PathHost, pid: int) -> None:
        self._link = link
        self._pid = pid
        self._lock = threading.Lock()
        self._making = threading.Lock()  # of slots and movers, which takes a while
        self._out: queue.SimpleQueue[tuple[Transfer, slice] | _Reply | None] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[Staged | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._filled: set[int] = set()  # slots that the peer is to empty
        self._reads: dict[tuple[int, int], tuple[Transfer, slice]] = {}
        self._unanswered: dict[int, int] = {}
        self._named: tuple[object, bytes] = (None, b"")
        self._mine: SharedSlots | None = None
        self._theirs: SharedSlots | None = None
        # Its owner ended before we could open it; what it has said is still coming.
        self._closed = False
        self._movers: dict[tuple[str, int], Mover] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._workers = Workers(link, "staging")

    # What the path calls.

    def submit(self, transfer: Transfer) -> None:
        """Starts a transfer, once the compute before it is done."""
        hold_until_computed(self._link.core.gate, transfer, self._submit)

    def prepare(self, device: int) -> None:
        """Makes and pins this side's staging beforehand, and loads what the GPU needs. May block.

        Raises:
            DeviceError: the GPU's driver refuses.
        """
        self._mover("out", device, self._slots())

    def handle(self, message: LinkMessage) -> bool:
        """Handles a control message on the progress thread; False if it is not for staging."""
        if isinstance(message, Staged):
            if not self._closed:
                self._start("in", self._take_in)
                self._in.put(message)
        elif isinstance(message, Unstaged):
            self._unstaged(message.slot)
        elif isinstance(message, OpenStaging):
            self._open(message)
        elif isinstance(message, ReadRequest):
            self._serve_read(message)
        elif isinstance(message, Acknowledge):
            transfer = self._link.transfer(message.transfer)
            if not self._answered(message.transfer) or transfer is None:
                self._answer_to_nothing()
            else:
                transfer.end(message.nbytes)
        elif isinstance(message, Refuse):
            with self._lock:
                read = self._reads.pop((message.transfer, message.first), None)
            if read is None and not self._answered(message.transfer):
                return False  # it answers something else
            transfer = self._link.transfer(message.transfer)
            if transfer is not None:
                transfer.stop(self._link.refusal(transfer, message.error, message.reason))
                transfer.end(0)
        else:
            return False
        return True

    def halt(self, halted: Callable[[], None]) -> None:
        """Stops all work, then calls `halted` once, from any thread. Never blocks."""
        self._workers.close()
        self._out.put(None)
        self._free.put(None)
        self._in.put(None)
        self._workers.halt(functools.partial(self._leave, halted))

    # Submitting.

    def _submit(self, transfer: Transfer) -> None:
        link = self._link
        if transfer.write and transfer.imm is not None:
            done = Arrived(transfer.imm, 0, 1, write_nbytes=transfer.total_nbytes)
            transfer.on_placed = functools.partial(link.send, done)
        if not transfer.total_nbytes:
            if transfer.begin():
                transfer.end(0)
            return
        for part in _parts(transfer.nbytes):
            if transfer.write:
                self._out.put((transfer, part))
            elif transfer.begin():
                with self._lock:
                    self._reads[transfer.id, part.start] = (transfer, part)
                ask = tables.read_request(transfer, part, verify=link.core.verify)
                link.send(ask)
        self._start(
            "out" if transfer.write else "in", self._send if transfer.write else self._take_in
        )

    def _serve_read(self, ask: ReadRequest) -> None:
        try:
            admitted = tables.admit(self._link.core.regions, ask.regions, ask.pieces, staged=True)
        except LinkError as error:
            self._link.fail(error)
            return
        except EngineError as error:
            self._refuse(ask.transfer, ask.first, error)
            return
        if admitted.nbytes > SLOT_NBYTES:
            admitted.release()
            self._link.fail(
                ProtocolError(
                    f"a read of {admitted.nbytes} bytes is larger than a slot", operation="receive"
                )
            )
            return
        self._out.put(_Reply(ask, admitted))
        if not self._start("out", self._send):
            self._drop_out()

    # The thread that gathers.

    def _send(self) -> None:
        work_off(self._out, self._begin, self._announce, self._ahead, self._drop, _done)

    def _ahead(self, _: _Gathered, begun: int) -> bool:
        return not self._free.empty()

    def _begin(self, item: tuple[Transfer, slice] | _Reply) -> _Gathered | None:
        slots = self._slots()
        slot = self._free.get()
        if slot is None:  # halting
            self._free.put(None)
            if isinstance(item, _Reply):
                item.admitted.release()
            return None
        begun = (
            self._begin_reply(slots, slot, item)
            if isinstance(item, _Reply)
            else self._begin_write(slots, slot, *item)
        )
        if begun is None:
            self._free.put(slot)
        return begun

    def _region_rows(self, transfer: Transfer) -> bytes:
        """The region table of a transfer; most transfers name the regions of the one before."""
        if self._named[0] is not transfer.remote_regions:
            rows = tables.region_rows(transfer.remote_regions).tobytes()
            self._named = (transfer.remote_regions, rows)
        return self._named[1]

    def _begin_write(
        self, slots: SharedSlots, slot: int, transfer: Transfer, part: slice
    ) -> _Gathered | None:
        if not transfer.begin(2):  # this thread, and the peer's answer
            return None
        nbytes = int(transfer.nbytes[part].sum())

        def message(crc: int | None) -> Staged:
            return Staged(
                transfer=transfer.id,
                first=part.start,
                slot=slot,
                nbytes=nbytes,
                reply=False,
                regions=self._region_rows(transfer),
                pieces=tables.piece_rows(transfer, part).tobytes(),
                imm=transfer.imm,
                crc=crc,
            )

        def end(error: EngineError | None) -> None:
            if error is not None:
                transfer.stop(error)
                transfer.end(0)  # the peer will not answer what it was not told
            transfer.end(0)

        verify = self._link.core.verify
        pieces, ticket = transfer.local[part], transfer.ticket
        return self._gather(
            slots, slot, transfer.device(), pieces, message, nbytes, verify, end, ticket
        )

    def _begin_reply(self, slots: SharedSlots, slot: int, reply: _Reply) -> _Gathered | None:
        ask, admitted = reply

        def message(crc: int | None) -> Staged:
            return Staged(
                transfer=ask.transfer,
                first=ask.first,
                slot=slot,
                nbytes=admitted.nbytes,
                reply=True,
                regions=b"",
                pieces=b"",
                imm=None,
                crc=crc,
            )

        def end(error: EngineError | None) -> None:
            admitted.release()
            if error is not None:
                self._refuse(ask.transfer, ask.first, error)

        return self._gather(
            slots, slot, admitted.device, admitted.iov, message, admitted.nbytes, ask.verify, end
        )

    def _gather(
        self,
        slots: SharedSlots,
        slot: int,
        device: int,
        pieces: iovec.Iovec,
        message: Callable[[int | None], Staged],
        nbytes: int,
        verify: bool,
        end: Callable[[EngineError | None], None],
        ticket: Ticket | None = None,
    ) -> _Gathered | None:
        try:
            mover = self._mover("out", device, slots)
            moved = mover.gather(pieces, slots.slot(slot))
        except EngineError as error:
            end(error)
            return None
        except BaseException:
            end(None)
            raise
        return _Gathered(slot, moved, message, nbytes, verify, end, ticket)

    def _announce(self, gathered: _Gathered) -> None:
        failure: EngineError | None = None
        try:
            gathered.moved.wait()
            if gathered.ticket is not None:
                gathered.ticket._mark_staged("gathered", gathered.nbytes)
                gathered.ticket._mark("on wire")
            crc = None
            if gathered.verify:
                crc = self._checksum(self._slots(), gathered.slot, gathered.nbytes)
            staged = gathered.message(crc)
            with self._lock:
                self._filled.add(gathered.slot)
                if not staged.reply:
                    number = staged.transfer
                    self._unanswered[number] = self._unanswered.get(number, 0) + 1
            self._link.send(staged)
        except DeviceError as error:
            failure = error
            self._free.put(gathered.slot)
        gathered.end(failure)

    def _drop(self, gathered: _Gathered) -> None:
        """The thread fails: the GPU must be done with the source before anybody believes so."""
        try:
            gathered.moved.wait()
        except DeviceError as error:
            gathered.end(error)
        else:
            gathered.end(None)

    # The thread that scatters.

    def _take_in(self) -> None:
        self._warm()
        work_off(self._in, self._scatter, self._placed, _always, _wait, _done)

    def _warm(self) -> None:
        """Prepares what GPU memory that is registered already will need: making it later could
        wait for a stream that waits for us."""
        slots = self._theirs
        for device in self._link.core.regions.gpus():
            if slots is not None:
                try:
                    self._mover("in", device, slots)
                except DeviceError as error:
                    log.warning("kvferry: GPU %d cannot be staged: %s", device, error)

    def _scatter(self, staged: Staged) -> _Scattered | None:
        slots = self._theirs
        if slots is None or staged.slot >= slots.num_slots or staged.nbytes > slots.slot_nbytes:
            raise ProtocolError(
                f"slot {staged.slot} with {staged.nbytes} bytes is in no staging of the peer's",
                operation="receive",
            )
        return self._scatter_reply(slots, staged) if staged.reply else self._admit(slots, staged)

    def _scatter_reply(self, slots: SharedSlots, staged: Staged) -> _Scattered | None:
        with self._lock:
            entry = self._reads.pop((staged.transfer, staged.first), None)
        if entry is None:
            raise ProtocolError("staged bytes answer no read of ours", operation="receive")
        transfer, part = entry
        pieces = transfer.local[part]
        if staged.nbytes != int(transfer.nbytes[part].sum()):
            raise ProtocolError("staged bytes are not what was asked for", operation="receive")

        def end(error: EngineError | None) -> None:
            if error is not None:
                transfer.stop(error)
            else:
                transfer.ticket._mark("first byte")
                transfer.ticket._mark_staged("scattered", staged.nbytes)
            transfer.end(0 if error is not None else staged.nbytes)

        return self._put(slots, staged, pieces, transfer.device(), end)

    def _admit(self, slots: SharedSlots, staged: Staged) -> _Scattered | None:
        link = self._link
        try:
            admitted = tables.admit(link.core.regions, staged.regions, staged.pieces, staged=True)
        except LinkError:
            raise
        except EngineError as error:
            link.send(Unstaged(staged.slot))
            link.reject(staged.transfer, staged.imm, error, first=staged.first)
            return None

        def end(error: EngineError | None) -> None:
            admitted.release()
            if error is not None:
                link.reject(staged.transfer, staged.imm, error, first=staged.first)
                return
            if staged.imm is not None:
                link.count(staged.imm, staged.nbytes, 0, staged=True)
            link.send(Acknowledge(staged.transfer, staged.nbytes))

        if admitted.nbytes != staged.nbytes:
            admitted.release()
            raise ProtocolError(
                f"a slot holds {staged.nbytes} bytes but its pieces take {admitted.nbytes}",
                operation="receive",
            )
        return self._put(slots, staged, admitted.iov, admitted.device, end)

    def _put(
        self,
        slots: SharedSlots,
        staged: Staged,
        pieces: iovec.Iovec,
        device: int,
        end: Callable[[EngineError | None], None],
    ) -> _Scattered | None:
        try:
            self._check(slots, staged)
            mover = self._mover("in", device, slots)
            moved = mover.scatter(slots.slot(staged.slot), pieces)
        except EngineError as error:
            self._link.send(Unstaged(staged.slot))
            end(error)
            return None
        except BaseException:
            end(None)
            raise
        return _Scattered(staged.slot, moved, end)

    def _placed(self, scattered: _Scattered) -> None:
        failure: EngineError | None = None
        try:
            scattered.moved.wait()
        except DeviceError as error:
            failure = error
        self._link.send(Unstaged(scattered.slot))
        scattered.end(failure)

    # Both.

    def _check(self, slots: SharedSlots, staged: Staged) -> None:
        if staged.crc is None:
            return
        if self._checksum(slots, staged.slot, staged.nbytes) != staged.crc:
            raise ChecksumMismatch(
                "the bytes that arrived are not the bytes that were sent; nothing was counted",
                operation="verify",
                peer=self._link.peer.name,
                imm=staged.imm,
            )

    def _checksum(self, slots: SharedSlots, slot: int, nbytes: int) -> int:
        return iovec.checksum(iovec.one(slots.slot(slot), nbytes))

    def _slots(self) -> SharedSlots:
        """This side's staging; made with the first call, and the peer told."""
        with self._making:
            slots = self._mine
            if slots is None:
                slots = self._mine = SharedSlots.make(NUM_SLOTS, SLOT_NBYTES)
                self._link.core.staging.add(NUM_SLOTS * SLOT_NBYTES)
                for slot in range(NUM_SLOTS):
                    self._free.put(slot)
                self._link.send(OpenStaging(slots.descriptor, NUM_SLOTS, SLOT_NBYTES))
            return slots

    def _mover(self, direction: str, device: int, slots: SharedSlots) -> Mover:
        """Who copies between the slots and a device; made with the first call."""
        with self._making:
            mover = self._movers.get((direction, device))
            if mover is None:
                mover = new_mover(device, self._link.core.max_programs)
                self._movers[direction, device] = mover
                if device >= 0:
                    slots.pin(mover)
                    if direction == "out" and self._free.qsize() == NUM_SLOTS:
                        mover.warm(slots.slot(0))  # while nobody fills it
            return mover

    def _open(self, message: OpenStaging) -> None:
        try:
            if self._theirs is not None:
                raise ProtocolError("the peer's staging is open already", operation="receive")
            self._theirs = SharedSlots.open(
                self._pid, message.descriptor, message.num_slots, message.slot_nbytes
            )
        except (FileNotFoundError, ProcessLookupError):
            self._closed = True
            self._link.suspect()  # its process has ended, or it has just closed the link
        except EngineError as error:
            self._link.fail(error)
        else:
            self._start("in", self._take_in)

    def _unstaged(self, slot: int) -> None:
        with self._lock:
            known = slot in self._filled
            self._filled.discard(slot)
        if known:
            self._free.put(slot)
        else:
            self._answer_to_nothing()

    def _answered(self, transfer: int) -> bool:
        """Takes note of an answer to a part; False if none was awaited."""
        with self._lock:
            left = self._unanswered.pop(transfer, 0) - 1
            if left > 0:
                self._unanswered[transfer] = left
        return left >= 0

    def _answer_to_nothing(self) -> None:
        self._link.fail(
            ProtocolError("the peer answers something that it was not asked", operation="receive")
        )

    def _refuse(self, transfer: int, first: int, error: EngineError) -> None:
        self._link.send(Refuse(transfer, type(error).__name__, error.message, first))

    def _start(self, name: str, work: Callable[[], None]) -> bool:
        """Starts a thread if it does not run yet; False if the link is halting."""
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
        """The last thread has ended."""
        self._drop_out()
        for slots in (self._mine, self._theirs):
            if slots is not None:
                slots.close()
        if self._mine is not None:
            self._link.core.staging.add(-NUM_SLOTS * SLOT_NBYTES)
        for mover in self._movers.values():
            mover.close()
        halted()

    def _drop_out(self) -> None:
        while True:
            try:
                item = self._out.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, _Reply):
                item.admitted.release()


def _parts(nbytes: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Cuts a list of pieces into consecutive parts, each of which a slot holds."""
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


def _wait(scattered: Any) -> None:
    """The thread fails: its scatters end before anybody believes that they have."""
    try:
        scattered.moved.wait()
    except DeviceError as error:
        scattered.end(error)
    else:
        scattered.end(None)
