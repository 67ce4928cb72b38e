"""The staged path of a verbs link: many small pieces as one frame in a slot, one write a frame.

Copies run on the engine's copier threads, posts on the link's thread: while one frame is on the
wire, the next is gathered and the one before is scattered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import iovec, tables
from ..errors import EngineError, LinkError, ProtocolError
from ..wire import Acknowledge, ReadRequest, Refuse, SlotFree
from . import tcp_frames as frames
from .cma import answer_to_nothing, checksum_mismatch
from .verbs_staging import (
    FRAME_NBYTES,
    FRAME_PIECES,
    NUM_SLOTS,
    PIECE_NBYTES,
    SLOT_NBYTES,
    gather,
    scatter,
)
from .verbs_work import MIN_SHARE_NBYTES, cuts

if TYPE_CHECKING:
    from .base import Transfer
    from .verbs import VerbsPath
    from .verbs_rail import Rail
    from .verbs_staging import Slots


class Reply(NamedTuple):
    """Pieces of this process's memory that a peer reads."""

    transfer: int
    first: int
    admitted: tables.Admitted
    verify: bool


class Part(NamedTuple):
    """Pieces of a write, as many as a frame takes."""

    transfer: Transfer
    pieces: slice


@dataclasses.dataclass
class _Frame:
    """A slot of ours that is in use: until its bytes have left it and the peer has answered."""

    item: Part | Reply
    rail: Rail | None = None
    left: bool = False
    answered: bool = False


class Frames:
    """Frames of one link, both ways. Used by the link's thread; other methods say so."""

    def __init__(self, path: VerbsPath, slots: Slots) -> None:
        self._path = path
        self._link = path.link
        self._slots = slots
        self._free = deque(range(NUM_SLOTS))
        self._waiting: deque[Part | Reply] = deque()
        self._gathered: deque[tuple[int, int]] = deque()
        self._frames: dict[int, _Frame] = {}
        self._reads: dict[tuple[int, int], tuple[Transfer, slice]] = {}
        self._scattering: dict[int, int] = {}

    # Sending.

    @property
    def busy(self) -> bool:
        """Whether frames are on their way, or wait to be."""
        return bool(self._frames or self._waiting)

    def submit(self, transfer: Transfer) -> None:
        """Starts a transfer."""
        _cut(transfer)
        rails = sum(rail.up for rail in self._path.rails)
        limit_nbytes = even_limit(transfer.total_nbytes, rails)
        for part in iovec.chunks(transfer.nbytes, limit_nbytes, FRAME_PIECES):
            if transfer.write:
                self._waiting.append(Part(transfer, part))
            elif transfer.begin():
                self._reads[transfer.id, part.start] = (transfer, part)
                ask = tables.read_request(transfer, part, verify=self._link.core.verify)
                self._link.send(ask)
        self.advance()

    def serve(self, ask: ReadRequest) -> None:
        """Answers a peer that reads."""
        try:
            admitted = tables.admit(self._link.core.regions, ask.regions, ask.pieces)
        except LinkError as error:
            self._link.fail(error)
            return
        except EngineError as error:
            self._link.send(Refuse(ask.transfer, type(error).__name__, error.message, ask.first))
            return
        if admitted.nbytes > FRAME_NBYTES:
            admitted.release()
            self._link.fail(
                ProtocolError(
                    f"the peer reads {admitted.nbytes} bytes at once, a frame has {FRAME_NBYTES}",
                    operation="receive",
                )
            )
            return
        self._waiting.append(Reply(ask.transfer, ask.first, admitted, ask.verify))
        self.advance()

    def advance(self) -> None:
        """Gathers into free slots, and posts what is gathered, as far as it goes."""
        while self._free and self._waiting:
            item = self._waiting.popleft()
            if isinstance(item, Part) and not item.transfer.begin(2):  # the copy, and the answer
                continue
            slot = self._free.popleft()
            self._frames[slot] = _Frame(item)
            self._path.copy(functools.partial(self._gather, slot, item))
        while self._gathered:
            slot, nbytes = self._gathered[0]
            rail = self._path.next_rail()
            if rail is None:
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
            item = self._frames[slot].item
            if isinstance(item, Part):
                item.transfer.ticket._mark("on wire")
            self._path.post_frame(rail, slot, row, nbytes)

    def _gather(self, slot: int, item: Part | Reply) -> None:
        """On a copier thread."""
        if isinstance(item, Part):
            transfer, part = item
            local = transfer.local[part]
            header, body = frames.of_write(transfer, part)
            verify = self._link.core.verify
        else:
            local, body, verify = item.admitted.iov, b"", item.verify
            header = frames.of_reply(item.transfer, item.first, item.admitted)
        if verify:
            crc = iovec.checksum(local)
            header = header._replace(flags=header.flags | frames.HAS_CRC, crc=crc)
        head = np.frombuffer(frames.encode(header) + body, np.uint8)
        buffer = self._slots.outgoing(slot)
        buffer[: len(head)] = head
        gather(buffer[len(head) : len(head) + header.nbytes], local)
        if isinstance(item, Part):
            item.transfer.ticket._mark_staged("gathered", header.nbytes)
        self._path.soon(functools.partial(self._ready, slot, len(head) + header.nbytes))

    def _ready(self, slot: int, nbytes: int) -> None:
        self._gathered.append((slot, nbytes))
        self.advance()

    def left(self, slot: int) -> None:
        """A frame's bytes are in the peer's slot."""
        frame = self._frames[slot]
        self._leave(frame)
        self._settle(slot, frame)

    def acknowledged(self, message: Acknowledge) -> None:
        """The peer has placed a frame of a write."""
        frame = self._frames.get(-1 if message.slot is None else message.slot)
        if (
            frame is None
            or frame.answered
            or not isinstance(frame.item, Part)
            or frame.item.transfer.id != message.transfer
        ):
            self._link.fail(answer_to_nothing())
            return
        frame.answered = True
        frame.item.transfer.end(message.nbytes)
        self._settle(message.slot or 0, frame)

    def freed(self, slot: int) -> None:
        """The peer has taken a frame apart that needs no further answer, or has refused it."""
        frame = self._frames.get(slot)
        if frame is None or frame.answered:
            self._link.fail(answer_to_nothing())
            return
        frame.answered = True
        self._settle(slot, frame)

    def expects_refusal(self, message: Refuse) -> bool:
        """Whether a refusal is an answer to anything. On the progress thread."""
        if self._reads.pop((message.transfer, message.first), None) is not None:
            return True
        return any(
            isinstance(frame.item, Part)
            and frame.item.transfer.id == message.transfer
            and not frame.answered
            for frame in list(self._frames.values())
        )

    def lost(self, slot: int, error: EngineError) -> None:
        """A frame's rail broke before it left: the peer's word decides whether it arrived."""
        frame = self._frames[slot]
        if isinstance(frame.item, Part):
            frame.item.transfer.stop(error)
        else:
            self._refuse_reply(frame.item, error)
        self._leave(frame)
        self._settle(slot, frame)

    def rail_closed(self, rail: Rail) -> None:
        """The peer has dealt with all that came over a rail: what it did not answer never came."""
        for slot, frame in list(self._frames.items()):
            if frame.rail is rail and frame.left and not frame.answered:
                frame.answered = True
                if isinstance(frame.item, Part):
                    frame.item.transfer.end(0)
                self._settle(slot, frame)
        self.advance()

    def _refuse_reply(self, reply: Reply, error: EngineError) -> None:
        """The reader learns that its bytes are lost. They may have come all the same: then the
        refusal answers nothing that is still asked, and is passed over."""
        self._link.send(Refuse(reply.transfer, "RailError", error.message, reply.first))

    def _leave(self, frame: _Frame) -> None:
        if frame.left:
            return
        frame.left = True
        if isinstance(frame.item, Part):
            frame.item.transfer.end(0)
        else:
            frame.item.admitted.release()

    def _settle(self, slot: int, frame: _Frame) -> None:
        if frame.left and frame.answered:
            del self._frames[slot]
            self._free.append(slot)
            self.advance()

    def close(self) -> None:
        """The link is down and no thread copies: ends the use of memory that peers wanted."""
        for item in self._waiting:
            if isinstance(item, Reply):
                item.admitted.release()
        for frame in self._frames.values():
            if isinstance(frame.item, Reply) and not frame.left:
                frame.item.admitted.release()

    # Receiving.

    def arrived(self, rail: Rail, slot: int, nbytes: int) -> None:
        """A frame has come."""
        if slot >= NUM_SLOTS or not frames.HEADER_NBYTES <= nbytes <= SLOT_NBYTES:
            self._link.fail(
                ProtocolError(f"{nbytes} bytes came in slot {slot}", operation="receive")
            )
            return
        self._scattering[rail.number] = self._scattering.get(rail.number, 0) + 1
        self._path.copy(functools.partial(self._take_apart, rail, slot, nbytes))

    def scattering(self, rail: Rail) -> bool:
        """Whether frames that came over this rail are being taken apart."""
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
            self._path.soon(functools.partial(self._taken, rail))

    def _taken(self, rail: Rail) -> None:
        self._scattering[rail.number] -= 1
        self._path.settle(rail)

    def _place_write(self, slot: int, data: Any, header: frames.Header) -> None:
        link = self._link
        first = frames.HEADER_NBYTES + header.table * tables.REGION_ROW.itemsize
        start = first + header.num_pieces * tables.PIECE_ROW.itemsize
        _check_size(len(data), start + header.nbytes)
        # Out of the slot before they are checked: the peer could change them there.
        regions, pieces = data[frames.HEADER_NBYTES : first].tobytes(), data[first:start].tobytes()
        imm = header.imm if header.flags & frames.HAS_IMM else None
        try:
            admitted = tables.admit(link.core.regions, regions, pieces)
        except LinkError:
            raise
        except EngineError as error:
            link.reject(header.transfer, imm, error)
            link.send(SlotFree(slot))
            return
        try:
            _check_size(admitted.nbytes, header.nbytes)
            scatter(data[start:], admitted.iov)
            crc = iovec.checksum(admitted.iov) if header.flags & frames.HAS_CRC else 0
        finally:
            admitted.release()
        if header.flags & frames.HAS_CRC and crc != header.crc:
            link.reject(header.transfer, imm, checksum_mismatch(link.peer.name, imm))
            link.send(SlotFree(slot))
            return
        if imm is not None:
            link.count(imm, header.nbytes, 0, staged=True)
        link.send(Acknowledge(header.transfer, header.nbytes, slot))

    def _place_read(self, slot: int, data: Any, header: frames.Header) -> None:
        _check_size(len(data), frames.HEADER_NBYTES + header.nbytes)
        entry = self._reads.pop((header.transfer, header.table), None)
        self_nbytes = header.nbytes
        if entry is None:
            # Its rail broke and the peer refused it, then it came after all: nobody waits for it.
            self._link.send(SlotFree(slot))
            return
        transfer, part = entry
        local = transfer.local[part]
        _check_size(int(transfer.nbytes[part].sum()), self_nbytes)
        scatter(data[frames.HEADER_NBYTES :], local)
        wrong = header.flags & frames.HAS_CRC and iovec.checksum(local) != header.crc
        self._link.send(SlotFree(slot))
        if wrong:
            transfer.stop(checksum_mismatch(self._link.peer.name, None))
        else:
            transfer.ticket._mark("first byte")
            transfer.ticket._mark_staged("scattered", self_nbytes)
        transfer.end(0 if wrong else self_nbytes)


def even_limit(total_nbytes: int, rails: int) -> int:
    """At most how many bytes a frame of a transfer has, so that every rail carries as much."""
    limit_nbytes = FRAME_NBYTES - PIECE_NBYTES  # a frame ends with the piece that reaches it
    if rails < 2 or total_nbytes <= MIN_SHARE_NBYTES:
        return limit_nbytes
    rounds = -(-total_nbytes // (rails * limit_nbytes))
    return -(-total_nbytes // (rails * rounds))


def _check_size(nbytes: int, announced_nbytes: int) -> None:
    if nbytes != announced_nbytes:
        raise ProtocolError(
            f"a frame announces {announced_nbytes} bytes but has {nbytes}", operation="receive"
        )


def _cut(transfer: Transfer) -> None:
    """Cuts a transfer's pieces to what a frame takes. Nothing of it has begun."""
    if int(transfer.nbytes.max()) <= PIECE_NBYTES:
        return
    row, begin, nbytes = cuts(transfer.nbytes, PIECE_NBYTES)
    transfer.local = iovec.make(transfer.local[row, 0].astype(np.int64) + begin, nbytes)
    transfer.nbytes = nbytes
    transfer.remote_index = transfer.remote_index[row]
    transfer.remote_offset = transfer.remote_offset[row] + begin
