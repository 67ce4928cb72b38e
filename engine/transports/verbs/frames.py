"""The staged path of a verbs link: many small pieces as one frame in a slot, one write a frame.

Copies run on the engine's copier threads, posts on the link's thread: while one frame is on the
wire, the next is gathered and the one before is scattered. GPU memory goes this way whatever the
size of its pieces.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EngineError, LinkError, ProtocolError
from ...memory import iovec
from ...wire import frames, tables
from ...wire.messages import Acknowledge, ReadRequest, Refuse, SlotFree
from ..segments import (
    Outstanding,
    Replies,
    Reply,
    Segment,
    admit_write,
    answer_to_nothing,
    checksum_mismatch,
)
from . import queue_pair as verbs_qp
from .slots import (
    FRAME_NBYTES,
    FRAME_PIECES,
    NUM_SLOTS,
    PIECE_NBYTES,
    SLOT_NBYTES,
    SlotCopies,
    bytes_begin,
)
from .work_requests import MIN_SHARE_NBYTES, cuts

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...transfer.transfer import Transfer
    from ..base import PathHost
    from ..segments import Landing
    from .loop import Loop
    from .rail import Rail
    from .slots import Slots


FULL_NBYTES = FRAME_NBYTES - PIECE_NBYTES  # a frame ends with the piece that reaches it
FEWEST_FRAMES = 4  # of a transfer that is not small


@dataclasses.dataclass
class _Frame:
    """A slot of ours that is in use: until its bytes have left it and the peer has answered."""

    item: Segment | Reply
    rail: Rail | None = None
    left: bool = False
    answered: bool = False


class Frames:
    """Frames of one link, both ways. Used by the link's thread; other methods say so."""

    def __init__(
        self,
        link: PathHost,
        loop: Loop,
        slots: Slots,
        *,
        copy: Callable[[Callable[[], None]], None],
        taken_apart: Callable[[Rail], None],
    ) -> None:
        """`copy` runs a task on a copier thread; `taken_apart` hears that a frame of a rail is."""
        self._link = link
        self._loop = loop
        self._slots = slots
        self._copy = copy
        self._taken_apart = taken_apart
        self._copies = SlotCopies(link, slots)
        self.warm = self._copies.warm
        self._turn = 0
        self._free = deque(range(NUM_SLOTS))
        self._waiting: deque[Segment | Reply] = deque()
        self._gathered: deque[tuple[int, int]] = deque()
        self._frames: dict[int, _Frame] = {}
        self._outstanding = Outstanding(link)
        self._replies = Replies(link, FRAME_NBYTES)
        self.tick = self._replies.tick
        self._scattering: dict[int, int] = {}

    # Sending.

    @property
    def busy(self) -> bool:
        """Whether frames are on their way, or wait to be."""
        return bool(self._frames or self._waiting)

    def submit(self, transfer: Transfer) -> None:
        """Start a transfer."""
        _cut(transfer)
        rails = sum(rail.up for rail in self._loop.rails)
        limit_nbytes = even_limit(transfer.total_nbytes, rails)
        cuts = iovec.chunks(transfer.nbytes, limit_nbytes, FRAME_PIECES)
        self._outstanding.submit(transfer, cuts, self._waiting.append)
        self.advance()

    def serve(self, ask: ReadRequest) -> None:
        """Answer a peer that reads."""
        reply = self._replies.serve(ask)
        if reply is not None:
            self._waiting.append(reply)
            self.advance()

    def advance(self) -> None:
        """Gather into free slots, and posts what is gathered, as far as it goes."""
        while self._free and self._waiting:
            item = self._waiting.popleft()
            source = item.begin()
            if source is not None:
                slot = self._free.popleft()
                self._frames[slot] = _Frame(item)
                self._copy(functools.partial(self._gather, slot, item, *source))
        while self._gathered:
            slot, nbytes = self._gathered[0]
            rail = self._next_rail()
            if rail is None or rail.staged is None:
                return
            self._gathered.popleft()
            self._frames[slot].rail = rail
            address, key = rail.peer_slots
            here = self._slots.outgoing(slot).ctypes.data
            row = [
                address + slot * SLOT_NBYTES,
                key,
                here,
                nbytes,
                self._slots.keys(rail.device)[0],
            ]
            ticket = self._frames[slot].item.ticket
            if ticket is not None:
                ticket._mark("on wire")
            batch = (1, nbytes, None, slot)
            self._loop.post(rail, rail.staged, verbs_qp.WRITE, [row], slot, batch)

    def _next_rail(self) -> Rail | None:
        """Return a rail that can take a frame, in turn; None if none can now."""
        rails = self._loop.rails
        for _ in rails:
            self._turn = (self._turn + 1) % len(rails)
            rail = rails[self._turn]
            if rail.up and rail.staged is not None and rail.staged.room and rail.staged.credits:
                return rail
        return None

    def _gather(self, slot: int, item: Segment | Reply, pieces: iovec.Iovec, device: int) -> None:
        """On a copier thread."""
        header, body = item.frame()
        buffer = self._slots.outgoing(slot)
        head_nbytes = frames.HEADER_NBYTES + len(body)
        start = bytes_begin(head_nbytes)
        staged = buffer[start : start + header.nbytes]
        try:
            self._copies.gather(staged, pieces, device)
            if item.verify:
                # No processor reads a GPU's memory: there, what lies in the slot has to do.
                crc = iovec.checksum(pieces if device < 0 else _whole(staged))
                header = header._replace(flags=header.flags | frames.HAS_CRC, crc=crc)
        except EngineError as error:
            self._loop.soon(functools.partial(self._not_gathered, slot, error))
            return
        buffer[:head_nbytes] = np.frombuffer(frames.encode(header) + body, np.uint8)
        if item.ticket is not None:
            item.ticket._mark_staged("gathered", header.nbytes)
        self._loop.soon(functools.partial(self._ready, slot, start + header.nbytes))

    def _ready(self, slot: int, nbytes: int) -> None:
        self._gathered.append((slot, nbytes))
        self.advance()

    def _not_gathered(self, slot: int, error: EngineError) -> None:
        """A frame that cannot be filled is not sent, and so not answered."""
        frame = self._frames[slot]
        frame.answered = frame.left = True
        frame.item.sent(error)
        self._settle(slot, frame)

    def left(self, slot: int) -> None:
        """A frame's bytes are in the peer's slot."""
        frame = self._frames[slot]
        if not frame.left:
            frame.left = True
            frame.item.sent()
        self._settle(slot, frame)

    def acknowledged(self, message: Acknowledge) -> None:
        """The peer has placed a frame of a write."""
        frame = self._frames.get(-1 if message.slot is None else message.slot)
        if (
            frame is None
            or frame.answered
            or not isinstance(frame.item, Segment)
            or frame.item.transfer.id != message.transfer
        ):
            self._link.fail(answer_to_nothing())
            return
        frame.answered = True
        frame.item.transfer.end(message.nbytes)
        self._settle(message.slot or 0, frame)

    def freed(self, message: SlotFree) -> None:
        """The peer has taken a frame apart that needs no further answer, or has refused it."""
        frame = self._frames.get(message.slot)
        if frame is None or frame.answered:
            self._link.fail(answer_to_nothing())
            return
        frame.answered = True
        self._settle(message.slot, frame)

    def expects_refusal(self, message: Refuse) -> bool:
        """Return whether a refusal is an answer to anything. On the progress thread."""
        return self._outstanding.refused(message) or any(
            isinstance(frame.item, Segment)
            and frame.item.transfer.id == message.transfer
            and not frame.answered
            for frame in list(self._frames.values())
        )

    def lost(self, slot: int, error: EngineError) -> None:
        """A frame's rail broke before it left: the peer's word decides whether it arrived. One that
        reads is refused what it may have got all the same: then the refusal answers nothing that is
        still asked, and is passed over."""
        self._frames[slot].item.fail(error)
        self.left(slot)

    def rail_closed(self, rail: Rail) -> None:
        """The peer has dealt with all that came over a rail: what it did not answer never came."""
        for slot, frame in list(self._frames.items()):
            if frame.rail is rail and frame.left and not frame.answered:
                frame.answered = True
                if isinstance(frame.item, Segment):
                    frame.item.transfer.end(0)
                self._settle(slot, frame)
        self.advance()

    def _settle(self, slot: int, frame: _Frame) -> None:
        if frame.left and frame.answered:
            del self._frames[slot]
            self._free.append(slot)
            self.advance()

    def close(self) -> None:
        """The link is down and no thread copies: ends the use of memory that peers wanted."""
        left = [frame.item for frame in self._frames.values() if not frame.left]
        for item in (*self._waiting, *left):
            if isinstance(item, Reply):
                item.sent()
        self._copies.close()

    # Receiving.

    def arrived(self, rail: Rail, slot: int, nbytes: int) -> None:
        """A frame has come."""
        if slot >= NUM_SLOTS or not frames.HEADER_NBYTES <= nbytes <= SLOT_NBYTES:
            self._link.fail(ProtocolError(f"{nbytes} bytes came in slot {slot}"))
            return
        self._scattering[rail.number] = self._scattering.get(rail.number, 0) + 1
        self._copy(functools.partial(self._take_apart, rail, slot, nbytes))

    def scattering(self, rail: Rail) -> bool:
        """Return whether frames that came over this rail are being taken apart."""
        return self._scattering.get(rail.number, 0) > 0

    def _take_apart(self, rail: Rail, slot: int, nbytes: int) -> None:
        """On a copier thread."""
        try:
            data = self._slots.incoming(slot)[:nbytes]
            header = frames.decode(data[: frames.HEADER_NBYTES].tobytes())
            if header.kind == frames.WRITE:
                self._place_write(slot, data, header)
            else:
                self._place_read(slot, data, header)
        except LinkError as error:
            self._link.fail(error)
        finally:
            self._loop.soon(functools.partial(self._taken, rail))

    def _taken(self, rail: Rail) -> None:
        self._scattering[rail.number] -= 1
        self._taken_apart(rail)

    def _place_write(self, slot: int, data: Any, header: frames.Header) -> None:
        first = frames.HEADER_NBYTES + header.table * tables.REGION_ROW.itemsize
        stop = first + header.num_pieces * tables.PIECE_ROW.itemsize
        start = bytes_begin(stop)
        _check_size(len(data), start + header.nbytes)
        # Out of the slot before they are checked: the peer could change them there.
        rows = data[frames.HEADER_NBYTES : first].tobytes(), data[first:stop].tobytes()
        imm = header.imm if header.flags & frames.HAS_IMM else None
        number = header.transfer
        landing = admit_write(self._link, number, imm, rows, header.nbytes, slot=slot)
        failure = None
        if landing is not None:
            failure = self._place(data[start:], header, landing)
            landing.placed(failure, True)
        if landing is None or failure is not None:
            self._link.send(SlotFree(slot))

    def _place_read(self, slot: int, data: Any, header: frames.Header) -> None:
        start = bytes_begin(frames.HEADER_NBYTES)
        _check_size(len(data), start + header.nbytes)
        landing = self._outstanding.take_read(header.transfer, header.table, header.nbytes)
        # If it is none: its rail broke and the peer refused it, then it came after all.
        failure = None if landing is None else self._place(data[start:], header, landing)
        self._link.send(SlotFree(slot))
        if landing is not None:
            landing.placed(failure, True)

    def _place(self, staged: Any, header: frames.Header, landing: Landing) -> EngineError | None:
        """Put a frame's bytes where they belong; the error if that fails or they are not what was
        sent. A checksum is that of host memory, or of what goes to a GPU."""
        checked, on_gpu = header.flags & frames.HAS_CRC, landing.device >= 0
        if checked and on_gpu and iovec.checksum(_whole(staged)) != header.crc:
            return checksum_mismatch(self._link.peer.name, landing.imm)
        try:
            self._copies.scatter(staged, landing.pieces, landing.device)
            if checked and not on_gpu and iovec.checksum(landing.pieces) != header.crc:
                return checksum_mismatch(self._link.peer.name, landing.imm)
        except EngineError as error:
            return error
        except BaseException:
            landing.give_up()
            raise
        return None


def even_limit(total_nbytes: int, rails: int) -> int:
    """At most how many bytes a frame of a transfer has: so that every rail carries as much, and one
    frame is gathered while another is on the wire."""
    few_nbytes = max(-(-total_nbytes // FEWEST_FRAMES), FULL_NBYTES // 4)
    limit_nbytes = min(few_nbytes, FULL_NBYTES)
    if rails < 2 or total_nbytes <= MIN_SHARE_NBYTES:
        return limit_nbytes
    rounds = -(-total_nbytes // (rails * limit_nbytes))
    return -(-total_nbytes // (rails * rounds))


def _whole(staged: Any) -> iovec.Iovec:
    return iovec.one(staged.ctypes.data, len(staged))


def _check_size(nbytes: int, announced_nbytes: int) -> None:
    if nbytes != announced_nbytes:
        raise ProtocolError(f"a frame announces {announced_nbytes} bytes but has {nbytes}")


def _cut(transfer: Transfer) -> None:
    """Cut a transfer's pieces to what a frame takes. Nothing of it has begun."""
    if int(transfer.nbytes.max()) <= PIECE_NBYTES:
        return
    row, begin, nbytes = cuts(transfer.nbytes, PIECE_NBYTES)
    transfer.local = iovec.make(transfer.local[row, 0].astype(np.int64) + begin, nbytes)
    transfer.nbytes = nbytes
    transfer.remote_index = transfer.remote_index[row]
    transfer.remote_offset = transfer.remote_offset[row] + begin
