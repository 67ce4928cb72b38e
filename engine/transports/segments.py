"""Segments: consecutive pieces of a transfer that pass through this process in one frame or slot.

`tcp`, `verbs` and the staged half of `cma` work alike. Whoever has the bytes gathers a segment and
sends it, the other places it: a write's is answered with `Acknowledge` or `Refuse`, a read's is asked
for with `ReadRequest`, and answers that itself.
"""

from __future__ import annotations

import functools
import itertools
import logging
import queue
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from ..errors import (
    ChecksumMismatch,
    DeviceError,
    EngineError,
    LinkError,
    PeerLost,
    ProtocolError,
    QuotaExceeded,
    RailError,
    RegionGone,
)
from ..runtime.quota import Quota
from ..wire import frames, tables
from ..wire.messages import Acknowledge, Arrived, ReadRequest, Refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..memory.iovec import Iovec
    from ..transfer.ticket import Ticket
    from ..transfer.transfer import Transfer
    from .base import PathHost

# Tables of pieces that a peer is sent before it has answered: 24 bytes a piece, so that a long read of
# small ones would fill its control channel, which ends the link at 16 MiB. At least 20 segments, which
# is more than a peer has slots or rails; large pieces are all asked for at once.
ASKED_NBYTES = 4 << 20

# Of what a peer may ask for at a time. A reply keeps some 1 KiB besides its tables of pieces; so
# much is 300 replies of 8,192 pieces, 2.5 GiB of pieces of 1 KiB.
MAX_ASKED_NBYTES = 64 << 20
REPLY_NBYTES = 1 << 10
TAKE_S = 30.0  # for the next reply to be taken
TAKE_BACK_S = 5.0  # if the memory that it reads is to be given back

log = logging.getLogger(__name__)


class Segment(NamedTuple):
    """A segment of this end's: of a write, to be sent, or of a read, that is asked for.

    Attributes:
        pieces: which of the transfer's.
        verify: whether a checksum goes with it.
        ticket: where its times are noted.
    """

    transfer: Transfer
    pieces: slice
    verify: bool
    ticket: Ticket | None

    def begin(self) -> tuple[Iovec, int] | None:
        """Begin to send it: its pieces in this process, and the GPU that holds them, -1 for host
        memory. None if the transfer has ended. Two works: the sender's, and the peer's answer."""
        transfer = self.transfer
        return (transfer.local[self.pieces], transfer.device()) if transfer.begin(2) else None

    def frame(self) -> tuple[frames.Header, bytes]:
        """Return the header and the tables of the frame that carries it."""
        transfer = self.transfer
        regions = tables.region_rows(transfer.remote_regions)
        pieces = tables.piece_rows(transfer, self.pieces)
        header = frames.Header(
            kind=frames.WRITE,
            flags=frames.HAS_IMM if transfer.imm is not None else 0,
            imm=transfer.imm or 0,
            table=len(regions),
            transfer=transfer.id,
            nbytes=int(transfer.nbytes[self.pieces].sum()),
            num_pieces=len(pieces),
            crc=0,
        )
        return header, regions.tobytes() + pieces.tobytes()

    @property
    def table_nbytes(self) -> int:
        """How large the tables are that ask for it."""
        regions = len(self.transfer.remote_regions) * tables.REGION_ROW.itemsize
        pieces = (self.pieces.stop - self.pieces.start) * tables.PIECE_ROW.itemsize
        return int(regions + pieces)

    def ask(self) -> ReadRequest:
        """Return what asks the peer for it."""
        transfer = self.transfer
        return ReadRequest(
            transfer=transfer.id,
            first=self.pieces.start,
            regions=tables.region_rows(transfer.remote_regions).tobytes(),
            pieces=tables.piece_rows(transfer, self.pieces).tobytes(),
            verify=self.verify,
        )

    def fail(self, error: EngineError) -> None:
        """End the transfer with an error, once nobody works on it."""
        self.transfer.stop(error)

    def sent(self, error: EngineError | None = None) -> None:
        """End the sending thread's work; with an error, nothing was sent."""
        if error is not None:
            self.transfer.stop(error)
            self.transfer.end(0)  # the peer will not answer what it was not sent
        self.transfer.end(0)

    def placed(self, nbytes: int, error: EngineError | None, staged: bool) -> None:
        """End the wait for a segment of a read: its bytes are placed, or could not be."""
        transfer = self.transfer
        if error is not None:
            transfer.stop(error)
            transfer.end(0)
            return
        transfer.ticket._mark("first byte")
        if staged:
            transfer.ticket._mark_staged("scattered", nbytes)
        transfer.end(nbytes)


class Reply(NamedTuple):
    """A segment that a peer reads: pieces of this process's memory, in use until it is `sent`."""

    link: PathHost
    transfer: int
    first: int
    admitted: tables.Admitted
    verify: bool
    ended: Callable[[], None]
    ticket: Ticket | None = None  # the peer that reads keeps its own

    def begin(self) -> tuple[Iovec, int] | None:
        """Return its pieces, whose memory is in use already, and the GPU that holds them. None if
        the memory is being taken back: what has not begun by then does not."""
        if not self.admitted.closing:
            return self.admitted.iov, self.admitted.device
        gone = RegionGone("the region is being deregistered", operation="read")
        self.sent(gone)
        return None

    def frame(self) -> tuple[frames.Header, bytes]:
        """Return the header of the frame that carries it; it has no tables."""
        header = frames.Header(
            kind=frames.DATA,
            flags=0,
            imm=0,
            table=self.first,
            transfer=self.transfer,
            nbytes=self.admitted.nbytes,
            num_pieces=len(self.admitted.iov),
            crc=0,
        )
        return header, b""

    def fail(self, error: EngineError) -> None:
        """Tell the peer that it will not get what it asked for."""
        _refuse(self.link, self.transfer, self.first, error)

    def sent(self, error: EngineError | None = None) -> None:
        """End the use of its memory; with an error, nothing was sent."""
        self.admitted.release()
        self.ended()
        if error is not None:
            self.fail(error)


class Landing(NamedTuple):
    """Where the bytes of a segment go that has come: memory in use until it is `placed`, or given up.

    Attributes:
        pieces: in this process.
        device: the GPU that holds them, -1 for host memory.
        imm: of a peer's write, if it has one.
        placed: called with the error, if they could not be put there, and whether they are staged.
        give_up: called instead if the link fails meanwhile, which ends the transfer of a read.
    """

    pieces: Iovec
    device: int
    imm: int | None
    placed: Callable[[EngineError | None, bool], None]
    give_up: Callable[[], None]


class Outstanding:
    """The answers that one link waits for: to segments of its writes, and of its reads. Thread-safe.

    Reads are asked for in order, `ASKED_NBYTES` of tables ahead of the answers.
    """

    def __init__(self, link: PathHost) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._reads: dict[tuple[int, int], Segment] = {}
        self._unasked: deque[Segment] = deque()
        self._asked_nbytes = 0  # of tables that are not answered
        self._unanswered: dict[int, int] = {}  # segments of each write

    def submit(
        self, transfer: Transfer, cuts: Iterable[slice], send: Callable[[Segment], None]
    ) -> None:
        """Hand the segments of a write to `send`; ask the peer for those of a read."""
        verify = self._link.core.verify
        segments = (Segment(transfer, pieces, verify, transfer.ticket) for pieces in cuts)
        if transfer.write:
            for segment in segments:
                send(segment)
            return
        with self._lock:
            self._unasked.extend(segments)
        self._ask()

    def sending(self, transfer: int) -> None:
        """Note that a segment of a write is being sent, which the peer will answer."""
        with self._lock:
            self._unanswered[transfer] = self._unanswered.get(transfer, 0) + 1

    def acknowledged(self, message: Acknowledge) -> bool:
        """Handle the peer's word that it has placed a segment of a write."""
        transfer = self._link.transfer(message.transfer)
        if not self._answered(message.transfer) or transfer is None:
            self._link.fail(answer_to_nothing())
        else:
            transfer.end(message.nbytes)
        return True

    def refused(self, message: Refuse) -> bool:
        """Take note of a refusal; False if nothing was asked that it answers."""
        read = self._take(message.transfer, message.first)
        return read is not None or self._answered(message.transfer)

    def take_read(self, number: int, first: int, nbytes: int) -> Landing | None:
        """Return where a segment of a read goes that has come; None if it was not asked for.

        Raises:
            ProtocolError: so many bytes were not.
        """
        segment = self._take(number, first)
        if segment is None:
            return None
        transfer, part = segment.transfer, segment.pieces
        if nbytes != int(transfer.nbytes[part].sum()):
            raise ProtocolError(f"{nbytes} bytes of a read came, which is not what was asked for")
        placed = functools.partial(segment.placed, nbytes)
        return Landing(transfer.local[part], transfer.device(), None, placed, lambda: None)

    def _ask(self) -> None:
        """Ask for what comes next, as far as the window goes; what has ended is passed over."""
        while True:
            with self._lock:
                if not self._unasked:
                    return
                segment = self._unasked[0]
                nbytes = segment.table_nbytes
                if self._asked_nbytes and self._asked_nbytes + nbytes > ASKED_NBYTES:
                    return
                self._unasked.popleft()
                if not segment.transfer.begin():
                    continue
                self._asked_nbytes += nbytes
                self._reads[segment.transfer.id, segment.pieces.start] = segment
            self._link.send(segment.ask())

    def _take(self, number: int, first: int) -> Segment | None:
        """Take out a segment of a read that is answered, and ask for the next."""
        with self._lock:
            segment = self._reads.pop((number, first), None)
            if segment is None:
                return None
            self._asked_nbytes -= segment.table_nbytes
            more = bool(self._unasked)
        if more:
            self._ask()
        return segment

    def _answered(self, transfer: int) -> bool:
        with self._lock:
            left = self._unanswered.pop(transfer, 0) - 1
            if left > 0:
                self._unanswered[transfer] = left
        return left >= 0


def begin_counted(link: PathHost, transfer: Transfer) -> bool:
    """Note that a write is counted once all of its bytes are placed: they are counted one by one,
    as they arrive. False if the transfer has none: it has ended."""
    if transfer.write and transfer.imm is not None:
        done = Arrived(transfer.imm, 0, 1, write_nbytes=transfer.total_nbytes)
        transfer.on_placed = functools.partial(link.send, done)
    if not transfer.total_nbytes and transfer.begin():
        transfer.end(0)
    return transfer.total_nbytes > 0


class Replies:
    """What one link's peer reads here: admitted, charged to it, and watched. Thread-safe.

    A peer that asks and then takes nothing would keep memory in use for ever: its link goes down.

    Args:
        most_nbytes: bytes of one reply.
    """

    def __init__(self, link: PathHost, most_nbytes: int) -> None:
        self._link = link
        self._most_nbytes = most_nbytes
        self._tables = Quota("bytes of tables of reads", MAX_ASKED_NBYTES)
        self._lock = threading.Lock()
        self._waiting: dict[int, tables.Admitted] = {}
        self._numbers = itertools.count()
        self._moved_s = 0.0  # when one was sent, or the first of those that wait was asked for

    def serve(self, ask: ReadRequest) -> Reply | None:
        """Admit what the peer reads; None if it is refused, or the link has failed."""
        link = self._link
        cost_nbytes = REPLY_NBYTES + len(ask.regions) + len(ask.pieces)
        try:
            self._tables.take(cost_nbytes)
        except QuotaExceeded as error:
            link.fail(error)
            return None
        try:
            admitted = tables.admit(link.core.regions, ask.regions, ask.pieces, staged=True)
        except EngineError as error:
            self._tables.give(cost_nbytes)
            if isinstance(error, LinkError):
                link.fail(error)
            else:
                _refuse(link, ask.transfer, ask.first, error)
            return None
        reply = Reply(
            link, ask.transfer, ask.first, admitted, ask.verify, self._enter(admitted, cost_nbytes)
        )
        if admitted.nbytes > self._most_nbytes:
            reply.sent()
            link.fail(
                ProtocolError(
                    f"the peer reads {admitted.nbytes} bytes at once, and a part has at most "
                    f"{self._most_nbytes}"
                )
            )
            return None
        return reply

    def tick(self) -> None:
        """Fail the link if the peer does not take what it has asked for."""
        if not self._waiting:
            return
        with self._lock:
            silent_s = time.monotonic() - self._moved_s
            closing = any(admitted.closing for admitted in self._waiting.values())
        if self._waiting and silent_s > (TAKE_BACK_S if closing else TAKE_S):
            self._link.fail(
                PeerLost(f"the peer has taken nothing for {silent_s:.0f} s of what it reads here")
            )

    def _enter(self, admitted: tables.Admitted, cost_nbytes: int) -> Callable[[], None]:
        with self._lock:
            number = next(self._numbers)
            if not self._waiting:
                self._moved_s = time.monotonic()
            self._waiting[number] = admitted
        return functools.partial(self._ended, number, cost_nbytes)

    def _ended(self, number: int, cost_nbytes: int) -> None:
        with self._lock:
            del self._waiting[number]
            self._moved_s = time.monotonic()
        self._tables.give(cost_nbytes)


def admit_write(
    link: PathHost,
    transfer: int,
    imm: int | None,
    rows: tuple[bytes, bytes],
    nbytes: int,
    *,
    first: int = 0,
    slot: int | None = None,
) -> Landing | None:
    """Admit a segment that a peer writes; None if it is refused.

    Args:
        rows: its tables of regions and of pieces.
        nbytes: what came of it.
        slot: that it came in, if its acknowledgement names that.

    Raises:
        ProtocolError: its tables are none, or speak of more or fewer bytes.
    """
    try:
        admitted = tables.admit(link.core.regions, *rows, staged=True)
    except LinkError:
        raise
    except EngineError as error:
        link.reject(transfer, imm, error, first=first)
        return None
    if admitted.nbytes != nbytes:
        admitted.release()
        raise ProtocolError(f"{nbytes} bytes of a write came but its pieces take {admitted.nbytes}")

    def placed(error: EngineError | None, staged: bool) -> None:
        admitted.release()
        if error is not None:
            link.reject(transfer, imm, error, first=first)
            return
        if imm is not None:
            link.count(imm, nbytes, 0, staged=staged)
        link.send(Acknowledge(transfer, nbytes, slot))

    return Landing(admitted.iov, admitted.device, imm, placed, admitted.release)


def drop_replies(items: queue.SimpleQueue[Segment | Reply | None]) -> None:
    """End the use of memory that peers wanted to read, of all that a queue holds."""
    while True:
        try:
            item = items.get_nowait()
        except queue.Empty:
            return
        if isinstance(item, Reply):
            item.sent()


def prepare_gpus(link: PathHost, prepare: Callable[[int], object]) -> None:
    """Prepare staging for the GPUs whose memory is registered already: making it later could wait
    for a stream that waits for us."""
    for device in link.core.regions.gpus():
        try:
            prepare(device)
        except DeviceError as error:
            log.warning("kvferry: GPU %d cannot be staged: %s", device, error)


def answer_to_nothing() -> ProtocolError:
    """Return the error for a peer that acknowledges, checks or refuses what it was not asked."""
    return ProtocolError("the peer answers something that it was not asked")


def checksum_mismatch(peer: str, imm: int | None) -> ChecksumMismatch:
    """Return the error for bytes that changed on their way."""
    return ChecksumMismatch(
        "the bytes that arrived are not the bytes that were sent; nothing was counted",
        operation="verify",
        peer=peer,
        imm=imm,
    )


def _refuse(link: PathHost, transfer: int, first: int, error: EngineError) -> None:
    kind = "RailError" if isinstance(error, RailError) else type(error).__name__
    link.send(Refuse(transfer, kind, error.message, first))
