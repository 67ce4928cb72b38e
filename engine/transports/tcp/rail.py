"""One rail of a tcp link: the thread that sends frames and the thread that receives them.

Host memory goes from its place to its place. What the socket does not reach, or reaches slowly, is
staged: while one frame is being sent, the next is gathered; while one is scattered, the next is
being received.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...errors import DeviceError, EngineError, LinkError, ProtocolError
from ...memory import iovec
from ...runtime.pipeline import work_off
from ...staging.mover import new_mover, suits
from ...staging.ring import Buffer, Ring
from ...wire import frames as frames
from ...wire import tables
from ...wire.messages import Acknowledge
from ..cma.path import checksum_mismatch

if TYPE_CHECKING:
    import queue
    import socket
    from collections.abc import Callable

    from ...staging.mover import Moved
    from ...transfer.ticket import Ticket
    from ..base import PathHost, Transfer
    from .path import TcpPath

    Placed = Callable[[EngineError | None, bool], None]  # why not, and whether through staging

FRAME_NBYTES = 8 << 20  # flat from 4 to 32 MiB; smaller frames share better between rails
BUFFER_NBYTES = 12 << 20  # a frame, and what its last piece may add
DISCARD_NBYTES = 1 << 20
SENT_AT_ONCE = 2  # one is sent while the next is gathered
RECEIVED_AT_ONCE = 3  # one is scattered, one waits for that, one is received

log = logging.getLogger(__name__)


class Reply(NamedTuple):
    """Pieces of this process's memory that a peer reads."""

    transfer: int
    first: int
    admitted: tables.Admitted
    verify: bool


class _Frame(NamedTuple):
    """A frame that is about to be sent."""

    header: frames.Header
    body: bytes
    pieces: iovec.Iovec
    verify: bool
    end: Callable[[EngineError | None], None]
    staged: tuple[Ring, Buffer, Moved] | None
    ticket: Ticket | None  # of a write; a peer that reads keeps its own


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
        """The ring of a device; made with the first call."""
        ring = self._rings.get(device)
        if ring is None:
            mover = new_mover(device, self._link.core.max_programs)
            meter = self._link.core.staging
            ring = self._rings[device] = Ring(mover, self._count, BUFFER_NBYTES, meter)
        return ring

    def warm(self) -> None:
        """Prepares what GPU memory that is registered already will need: making it later could
        wait for a stream that waits for us."""
        for device in self._link.core.regions.gpus():
            try:
                ring = self.ring(device)
                ring.fill()
            except DeviceError as error:
                log.warning("kvferry: GPU %d cannot be staged: %s", device, error)

    def close(self) -> None:
        for ring in self._rings.values():
            ring.close()


class Sender:
    """The thread that sends."""

    def __init__(
        self,
        path: TcpPath,
        link: PathHost,
        rail: socket.socket,
        items: queue.SimpleQueue[tuple[Transfer, slice] | Reply | None],
    ) -> None:
        self._path = path
        self._link = link
        self._rail = rail
        self._items = items
        self._rings = _Rings(link, SENT_AT_ONCE)

    def run(self) -> None:
        """Sends what the queue holds, until it holds a None. Raises what ends the rail."""
        self._rings.warm()
        work_off(self._items, self._begin, self._send, self._ahead, self._drop)

    def close(self) -> None:
        """Frees the staging; the thread has ended."""
        self._rings.close()

    def _ahead(self, latest: _Frame, begun: int) -> bool:
        """A frame is gathered while another is sent, unless another rail would rather have it."""
        if latest.staged is None or begun >= SENT_AT_ONCE:
            return False
        return self._items.qsize() >= self._path.num_rails

    def _begin(self, item: tuple[Transfer, slice] | Reply) -> _Frame | None:
        if isinstance(item, Reply):
            return self._begin_reply(item)
        transfer, part = item
        if not transfer.begin(2):  # this thread, and the peer's answer
            return None
        header, body = frames.of_write(transfer, part)

        def end(error: EngineError | None) -> None:
            if error is not None:
                transfer.stop(error)
                transfer.end(0)  # the peer will not answer what was not sent
            transfer.end(0)

        verify, ticket = self._link.core.verify, transfer.ticket
        local = transfer.local[part]
        return self._stage(header, body, local, transfer.device(), verify, end, ticket)

    def _begin_reply(self, reply: Reply) -> _Frame | None:
        admitted = reply.admitted
        header = frames.of_reply(reply.transfer, reply.first, admitted)

        def end(error: EngineError | None) -> None:
            admitted.release()
            if error is not None:
                self._path.refuse_read(reply.transfer, reply.first, error)

        return self._stage(header, b"", admitted.iov, admitted.device, reply.verify, end)

    def _stage(
        self,
        header: frames.Header,
        body: bytes,
        pieces: iovec.Iovec,
        device: int,
        verify: bool,
        end: Callable[[EngineError | None], None],
        ticket: Ticket | None = None,
    ) -> _Frame | None:
        """Begins to gather the frame's pieces, if they go through staging."""
        staged = None
        try:
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
            end(error)
            return None
        except BaseException:
            end(None)
            raise
        return _Frame(header, body, pieces, verify, end, staged, ticket)

    def _send(self, frame: _Frame) -> None:
        failure: EngineError | None = None
        try:
            if frame.staged is not None:
                frame.staged[2].wait()
                if frame.ticket is not None:
                    frame.ticket._mark_staged("gathered", frame.header.nbytes)
            self._put(frame)
        except DeviceError as error:
            failure = error
        finally:
            if frame.staged is not None:
                frame.staged[0].give(frame.staged[1])
            frame.end(failure)

    def _put(self, frame: _Frame) -> None:
        header = frame.header
        if header.kind == frames.WRITE:
            self._path.sending(header.transfer)
        if frame.verify:
            crc = iovec.checksum(frame.pieces)
            header = header._replace(flags=header.flags | frames.HAS_CRC, crc=crc)
        head = np.frombuffer(frames.encode(header) + frame.body, np.uint8)
        first = iovec.one(head.ctypes.data, len(head))
        if frame.ticket is not None:
            frame.ticket._mark("on wire")
        iovec.send(self._rail.fileno(), np.concatenate((first, frame.pieces)))

    def _drop(self, frame: _Frame) -> None:
        """The rail has ended under a frame that was gathered."""
        failure: EngineError | None = None
        if frame.staged is not None:
            try:
                frame.staged[2].wait()
            except DeviceError as error:
                failure = error
            frame.staged[0].give(frame.staged[1])
        frame.end(failure)


class Receiver:
    """The thread that receives."""

    def __init__(self, path: TcpPath, link: PathHost, rail: socket.socket) -> None:
        self._path = path
        self._link = link
        self._rail = rail
        self._rings = _Rings(link, RECEIVED_AT_ONCE)

    def run(self) -> None:
        """Receives until the connection ends. Raises what ends the rail."""
        self._rings.warm()
        fd = self._rail.fileno()
        head = np.zeros(frames.HEADER_NBYTES, np.uint8)
        while True:
            _receive_array(fd, head)
            header = frames.decode(head.tobytes())
            self._link.heard()
            if header.kind == frames.WRITE:
                self._write(fd, header)
            else:
                self._data(fd, header)

    def close(self) -> None:
        """Frees the staging; the thread has ended, and what it began is finished."""
        self._rings.close()

    def _write(self, fd: int, header: frames.Header) -> None:
        link = self._link
        regions = np.zeros(header.table * tables.REGION_ROW.itemsize, np.uint8)
        pieces = np.zeros(header.num_pieces * tables.PIECE_ROW.itemsize, np.uint8)
        _receive_array(fd, regions)
        _receive_array(fd, pieces)
        imm = header.imm if header.flags & frames.HAS_IMM else None
        try:
            admitted = tables.admit(
                link.core.regions, regions.tobytes(), pieces.tobytes(), staged=True
            )
        except LinkError:
            raise
        except EngineError as error:
            _discard(fd, header.nbytes)
            link.reject(header.transfer, imm, error)
            return

        def placed(error: EngineError | None, staged: bool) -> None:
            admitted.release()
            if error is not None:
                link.reject(header.transfer, imm, error)
                return
            if imm is not None:
                link.count(imm, header.nbytes, 0, staged=staged)
            link.send(Acknowledge(header.transfer, header.nbytes))

        if admitted.nbytes != header.nbytes:
            admitted.release()
            raise ProtocolError(
                f"a frame announces {header.nbytes} bytes but its pieces take {admitted.nbytes}",
                operation="receive",
            )
        try:
            mismatch = functools.partial(checksum_mismatch, link.peer.name, imm)
            took = self._take(fd, header, admitted.iov, admitted.device, mismatch, placed)
        except BaseException:
            admitted.release()
            raise
        took()

    def _data(self, fd: int, header: frames.Header) -> None:
        transfer, part = self._path.take_read(header.transfer, header.table)
        local = transfer.local[part]
        if header.nbytes != int(transfer.nbytes[part].sum()):
            raise ProtocolError(
                f"a data frame has {header.nbytes} bytes, which is not what was asked for",
                operation="receive",
            )

        def placed(error: EngineError | None, staged: bool) -> None:
            if error is not None:
                transfer.stop(error)
            else:
                transfer.ticket._mark("first byte")
                if staged:
                    transfer.ticket._mark_staged("scattered", header.nbytes)
            transfer.end(0 if error is not None else header.nbytes)

        mismatch = functools.partial(checksum_mismatch, self._link.peer.name, None)
        self._take(fd, header, local, transfer.device(), mismatch, placed)()

    def _take(
        self,
        fd: int,
        header: frames.Header,
        pieces: iovec.Iovec,
        device: int,
        mismatch: Callable[[], EngineError],
        placed: Placed,
    ) -> Callable[[], None]:
        """Receives a frame's bytes; what it returns must be called, and sees to `placed`."""
        ring = self._rings.ring_for(pieces, device)
        checked = bool(header.flags & frames.HAS_CRC)
        if ring is None:
            iovec.receive(fd, pieces.copy())
            wrong = checked and iovec.checksum(pieces) != header.crc
            return functools.partial(placed, mismatch() if wrong else None, False)
        buffer = ring.take(header.nbytes)
        try:
            whole = buffer.part(header.nbytes)
            iovec.receive(fd, whole.copy())
            if checked and iovec.checksum(whole) != header.crc:
                ring.give(buffer)
                return functools.partial(placed, mismatch(), True)
        except BaseException:
            ring.give(buffer)
            raise
        return functools.partial(self._scatter, ring, buffer, pieces, placed)

    def _scatter(
        self,
        ring: Ring,
        buffer: Buffer,
        pieces: iovec.Iovec,
        placed: Placed,
    ) -> None:
        try:
            moved = ring.mover.scatter(buffer.address, pieces)
        except EngineError as error:
            ring.give(buffer)
            placed(error, True)
            return

        def finish() -> None:
            failure: EngineError | None = None
            try:
                moved.wait()
            except EngineError as error:
                failure = error
            ring.give(buffer)
            placed(failure, True)

        self._path.finisher.put(finish)


def _receive_array(fd: int, array: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    if len(array):
        iovec.receive(fd, iovec.one(array.ctypes.data, len(array)))


def _discard(fd: int, nbytes: int) -> None:
    """Reads and drops a refused frame's bytes, so that the rail stays in step."""
    scratch = np.zeros(min(nbytes, DISCARD_NBYTES), np.uint8)
    while nbytes:
        size = min(nbytes, len(scratch))
        _receive_array(fd, scratch[:size])
        nbytes -= size
