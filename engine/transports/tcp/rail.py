"""One rail of a tcp link: the thread that sends frames and the thread that receives them.

Host memory goes from its place to its place. What the socket does not reach, or reaches slowly, is
staged: while one frame is being sent, the next is gathered; while one is scattered, the next is
being received.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...errors import EngineError, ProtocolError
from ...memory import iovec
from ...runtime.pipeline import work_off
from ...staging.mover import new_mover, outcome, suits
from ...staging.ring import Buffer, Ring
from ...wire import frames, tables
from ..segments import admit_write, checksum_mismatch, prepare_gpus

if TYPE_CHECKING:
    import queue
    import socket
    from collections.abc import Callable

    from ...runtime.pipeline import Finisher
    from ...staging.mover import Moved
    from ..base import PathHost
    from ..segments import Landing, Outstanding, Reply, Segment

FRAME_NBYTES = 8 << 20  # flat from 4 to 32 MiB; smaller frames share better between rails
BUFFER_NBYTES = 12 << 20  # a frame, and what its last piece may add
DISCARD_NBYTES = 1 << 20
SENT_AT_ONCE = 2  # one is sent while the next is gathered
RECEIVED_AT_ONCE = 3  # one is scattered, one waits for that, one is received


class _Frame(NamedTuple):
    """A frame that is about to be sent."""

    item: Segment | Reply
    header: frames.Header
    body: bytes
    pieces: iovec.Iovec
    staged: tuple[Ring, Buffer, Moved] | None


class _Rings:
    """One thread's staging: a ring for each device whose pieces it has staged."""

    def __init__(self, link: PathHost, count: int) -> None:
        self._link = link
        self._count = count
        self._rings: dict[int, Ring] = {}
        self._limit_nbytes = link.core.paths.limit_nbytes("tcp")

    def ring_for(self, pieces: iovec.Iovec, device: int) -> Ring | None:
        """Through which ring the pieces go; None if they go direct."""
        if device < 0 and not suits(pieces, self._limit_nbytes):
            return None
        return self.ring(device)

    def ring(self, device: int) -> Ring:
        """Return the ring of a device; made with the first call."""
        ring = self._rings.get(device)
        if ring is None:
            mover = new_mover(device, self._link.core.max_programs)
            meter = self._link.core.staging
            ring = self._rings[device] = Ring(mover, self._count, BUFFER_NBYTES, meter)
        return ring

    def warm(self) -> None:
        """Prepare the rings of this process's GPUs."""
        prepare_gpus(self._link, lambda device: self.ring(device).fill())

    def close(self) -> None:
        """Free the staging."""
        for ring in self._rings.values():
            ring.close()


class Sender:
    """The thread that sends."""

    def __init__(
        self,
        link: PathHost,
        outstanding: Outstanding,
        rail: socket.socket,
        items: queue.SimpleQueue[Segment | Reply | None],
        num_rails: int,
    ) -> None:
        self._outstanding = outstanding
        self._rail = rail
        self._items = items
        self._num_rails = num_rails
        self._rings = _Rings(link, SENT_AT_ONCE)
        self.close = self._rings.close  # once the thread has ended

    def run(self) -> None:
        """Send what the queue holds, until it holds a None. Raises what ends the rail."""
        self._rings.warm()
        work_off(self._items, self._begin, self._send, self._ahead, self._drop)

    def _ahead(self, latest: _Frame, begun: int) -> bool:
        """Say that a frame is gathered while another is sent, unless another rail would rather have
        it."""
        if latest.staged is None or begun >= SENT_AT_ONCE:
            return False
        return self._items.qsize() >= self._num_rails

    def _begin(self, item: Segment | Reply) -> _Frame | None:
        """Begin to gather an item's pieces, if they go through staging."""
        source = item.begin()
        if source is None:
            return None
        pieces, device = source
        staged = None
        try:
            header, body = item.frame()
            ring = self._rings.ring_for(pieces, device)
            if ring is not None:
                buffer = ring.take(header.nbytes)
                try:
                    staged = (ring, buffer, ring.mover.gather(pieces, buffer.address))
                except BaseException:
                    ring.give(buffer)
                    raise
                pieces = buffer.part(header.nbytes)
        except EngineError as error:
            item.sent(error)
            return None
        except BaseException:
            item.sent()
            raise
        return _Frame(item, header, body, pieces, staged)

    def _send(self, frame: _Frame) -> None:
        failure: EngineError | None = None
        try:
            if frame.staged is not None:
                frame.staged[2].wait()
                if frame.item.ticket is not None:
                    frame.item.ticket._mark_staged("gathered", frame.header.nbytes)
            self._put(frame)
        except EngineError as error:
            failure = error
        finally:
            if frame.staged is not None:
                frame.staged[0].give(frame.staged[1])
            frame.item.sent(failure)

    def _put(self, frame: _Frame) -> None:
        header, ticket = frame.header, frame.item.ticket
        if header.kind == frames.WRITE:
            self._outstanding.sending(header.transfer)
        if frame.item.verify:
            crc = iovec.checksum(frame.pieces)
            header = header._replace(flags=header.flags | frames.HAS_CRC, crc=crc)
        head = np.frombuffer(frames.encode(header) + frame.body, np.uint8)
        first = iovec.one(head.ctypes.data, len(head))
        if ticket is not None:
            ticket._mark("on wire")
        iovec.send(self._rail.fileno(), np.concatenate((first, frame.pieces)))

    def _drop(self, frame: _Frame) -> None:
        """The rail has ended under a frame that was gathered."""
        failure = None
        if frame.staged is not None:
            failure = outcome(frame.staged[2])
            frame.staged[0].give(frame.staged[1])
        frame.item.sent(failure)


class Receiver:
    """The thread that receives."""

    def __init__(
        self, link: PathHost, outstanding: Outstanding, rail: socket.socket, finisher: Finisher
    ) -> None:
        """`finisher`: waits for what the GPUs scatter."""
        self._link = link
        self._outstanding = outstanding
        self._rail = rail
        self._finisher = finisher
        self._rings = _Rings(link, RECEIVED_AT_ONCE)
        self.close = self._rings.close  # once the thread has ended, and what it began is finished

    def run(self) -> None:
        """Receive until the connection ends. Raises what ends the rail."""
        self._rings.warm()
        fd = self._rail.fileno()
        head = np.zeros(frames.HEADER_NBYTES, np.uint8)
        while True:
            _receive_array(fd, head)
            header = frames.decode(head.tobytes())
            self._link.heard()
            landing = self._landing(fd, header)
            if landing is None:
                _discard(fd, header.nbytes)
                continue
            try:
                took = self._take(fd, header, landing)
            except BaseException:
                landing.give_up()
                raise
            took()

    def _landing(self, fd: int, header: frames.Header) -> Landing | None:
        """Receive a frame's tables; return where its bytes go, None if that is refused."""
        if header.kind != frames.WRITE:
            landing = self._outstanding.take_read(header.transfer, header.table, header.nbytes)
            if landing is None:
                raise ProtocolError("a data frame answers no read of ours")
            return landing
        regions = np.zeros(header.table * tables.REGION_ROW.itemsize, np.uint8)
        pieces = np.zeros(header.num_pieces * tables.PIECE_ROW.itemsize, np.uint8)
        _receive_array(fd, regions)
        _receive_array(fd, pieces)
        imm = header.imm if header.flags & frames.HAS_IMM else None
        rows = (regions.tobytes(), pieces.tobytes())
        return admit_write(self._link, header.transfer, imm, rows, header.nbytes)

    def _take(self, fd: int, header: frames.Header, landing: Landing) -> Callable[[], None]:
        """Receive a frame's bytes; what it returns must be called, and sees to `placed`."""
        pieces, placed = landing.pieces, landing.placed
        ring = self._rings.ring_for(pieces, landing.device)
        checked = bool(header.flags & frames.HAS_CRC)
        if ring is None:
            iovec.receive(fd, pieces.copy())
            wrong = checked and iovec.checksum(pieces) != header.crc
            return functools.partial(placed, self._mismatch(landing) if wrong else None, False)
        buffer = ring.take(header.nbytes)
        try:
            whole = buffer.part(header.nbytes)
            iovec.receive(fd, whole.copy())
            if checked and iovec.checksum(whole) != header.crc:
                ring.give(buffer)
                return functools.partial(placed, self._mismatch(landing), True)
        except BaseException:
            ring.give(buffer)
            raise
        return functools.partial(self._scatter, ring, buffer, landing)

    def _scatter(self, ring: Ring, buffer: Buffer, landing: Landing) -> None:
        try:
            moved = ring.mover.scatter(buffer.address, landing.pieces)
        except EngineError as error:
            ring.give(buffer)
            landing.placed(error, True)
            return

        def finish() -> None:
            failure = outcome(moved)
            ring.give(buffer)
            landing.placed(failure, True)

        self._finisher.put(finish)

    def _mismatch(self, landing: Landing) -> EngineError:
        return checksum_mismatch(self._link.peer.name, landing.imm)


def _receive_array(fd: int, array: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    if len(array):
        iovec.receive(fd, iovec.one(array.ctypes.data, len(array)))


def _discard(fd: int, nbytes: int) -> None:
    """Read and drops a refused frame's bytes, so that the rail stays in step."""
    scratch = np.zeros(min(nbytes, DISCARD_NBYTES), np.uint8)
    while nbytes:
        size = min(nbytes, len(scratch))
        _receive_array(fd, scratch[:size])
        nbytes -= size
