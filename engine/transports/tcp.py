"""TCP: any host, host memory, straight from registered memory to registered memory.

A link is one control connection and several rails. Each rail is a blocking socket with a thread
that sends and a thread that receives: `recvmsg` with MSG_WAITALL fills up to 1,024 pieces in one
system call, where an epoll loop wakes for every few hundred KiB (decision 0002 has the figures).
Rails take frames from one queue, so a slow one carries less.

Pieces go to the kernel as an iovec. Only tiny ones pass through `staging.py` first.
"""

from __future__ import annotations

import functools
import logging
import queue
import socket
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .. import iovec, tables
from ..errors import EngineError, LinkError, ProtocolError
from ..staging import Staging
from ..wire import Acknowledge, Arrived, LinkMessage, ReadRequest, Refuse
from . import tcp_frames as frames
from .base import Availability, DataPath, Transfer
from .cma import answer_to_nothing, checksum_mismatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..link import Link

FRAME_NBYTES = 8 << 20  # flat from 4 to 32 MiB; smaller frames share better between rails
DISCARD_NBYTES = 1 << 20
DEFAULT_RAILS = 2  # 32 KiB pieces on two cores, loopback: 1 rail 2.6 GB/s, 2 rails 3.0, 4 rails 3.0


log = logging.getLogger(__name__)


def probe() -> Availability:
    """Opens a connection to this host."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=1.0),
        ):
            return Availability(True, "loopback connects")
    except OSError as error:
        return Availability(False, f"no TCP connection to 127.0.0.1 ({error})")


def tune(sock: socket.socket) -> None:
    """Options of every connection. Buffers are left to the kernel, which grows them: a fixed 4 MiB
    was slower on loopback and caps a long fat pipe."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _Reply(NamedTuple):
    """Pieces of this process's memory that a peer reads."""

    transfer: int
    first: int
    admitted: tables.Admitted
    verify: bool


class TcpPath(DataPath):
    """Frames over rails."""

    def __init__(self, link: Link, rails: list[socket.socket]) -> None:
        self._link = link
        self._rails = rails
        self._queue: queue.SimpleQueue[tuple[Transfer, slice] | _Reply | None] = queue.SimpleQueue()
        self._reads: dict[tuple[int, int], tuple[Transfer, slice]] = {}
        self._unanswered: dict[int, int] = {}  # frames of each write that the peer has not answered
        self._lock = threading.Lock()
        self._halted: Callable[[], None] | None = None
        self._running = 2 * len(rails)
        for rail in rails:
            tune(rail)
            rail.settimeout(None)
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(work, rail),
                name=f"{link.core.identity.name}-{kind}{number}",
                daemon=True,
            )
            for number, rail in enumerate(rails)
            for kind, work in (("send", self._send_loop), ("recv", self._receive_loop))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, transfer: Transfer) -> None:
        if transfer.write and transfer.imm is not None:
            # Every byte is counted as its frame arrives; the write, once all of them did.
            transfer.on_placed = functools.partial(self._link.send, Arrived(transfer.imm, 0, 1))
        if not transfer.total_nbytes:
            if transfer.begin():
                transfer.end(0)
            return
        for part in iovec.chunks(transfer.nbytes, FRAME_NBYTES, tables.MAX_PIECES):
            if transfer.write:
                self._queue.put((transfer, part))
            elif transfer.begin():
                with self._lock:
                    self._reads[transfer.id, part.start] = (transfer, part)
                self._link.send(
                    ReadRequest(
                        transfer=transfer.id,
                        first=part.start,
                        regions=tables.region_rows(transfer.remote_regions).tobytes(),
                        pieces=tables.piece_rows(transfer, part).tobytes(),
                        verify=self._link.core.verify,
                    )
                )

    def handle(self, message: LinkMessage) -> bool:
        if isinstance(message, Acknowledge):
            transfer = self._link.transfer(message.transfer)
            if not self._answered(message.transfer) or transfer is None:
                self._link.fail(answer_to_nothing())
            else:
                transfer.end(message.nbytes)
        elif isinstance(message, ReadRequest):
            self._serve_read(message)
        elif isinstance(message, Refuse):
            with self._lock:
                read = self._reads.pop((message.transfer, message.first), None)
            if read is not None or self._answered(message.transfer):
                return False  # the link ends the transfer
            self._link.fail(answer_to_nothing())
        else:
            return False
        return True

    def _answered(self, transfer: int) -> bool:
        """Takes note of an answer to a frame; False if none was awaited."""
        with self._lock:
            left = self._unanswered.pop(transfer, 0) - 1
            if left > 0:
                self._unanswered[transfer] = left
        return left >= 0

    def halt(self, halted: Callable[[], None]) -> None:
        with self._lock:
            self._halted = halted
            running = self._running
        for rail in self._rails:
            self._queue.put(None)
            try:
                rail.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the peer has closed it already
        if not running:
            self._leave(halted)

    def _leave(self, halted: Callable[[], None]) -> None:
        """The last thread has ended."""
        for rail in self._rails:
            rail.close()
        self._drop_replies()
        halted()

    def _serve_read(self, ask: ReadRequest) -> None:
        try:
            admitted = tables.admit(self._link.core.regions, ask.regions, ask.pieces)
        except LinkError as error:
            self._link.fail(error)
        except EngineError as error:
            self._link.send(Refuse(ask.transfer, type(error).__name__, error.message, ask.first))
        else:
            self._queue.put(_Reply(ask.transfer, ask.first, admitted, ask.verify))
            if not self._running:
                self._drop_replies()  # nobody else will

    def _run(self, work: Callable[[socket.socket], None], rail: socket.socket) -> None:
        try:
            work(rail)
        except EngineError as error:
            self._link.fail(error)
        except (OSError, EOFError):
            self._link.suspect()
        except Exception as error:
            log.exception("kvferry: a rail failed; please report this")
            self._link.fail(LinkError(f"a rail failed: {error!r}", operation="transfer"))
        finally:
            with self._lock:
                self._running -= 1
                halted = self._halted if not self._running else None
            if halted is not None:
                self._leave(halted)

    def _drop_replies(self) -> None:
        """Ends the use of memory that peers wanted to read."""
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, _Reply):
                item.admitted.release()

    def _send_loop(self, rail: socket.socket) -> None:
        staging = Staging()
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, _Reply):
                self._send_reply(rail, staging, item)
            elif item[0].begin(2):  # this thread, and the peer's answer
                transfer = item[0]
                with self._lock:
                    self._unanswered[transfer.id] = self._unanswered.get(transfer.id, 0) + 1
                try:
                    self._send_write(rail, staging, *item)
                finally:
                    transfer.end(0)

    def _send_write(
        self, rail: socket.socket, staging: Staging, transfer: Transfer, part: slice
    ) -> None:
        local = transfer.local[part]
        regions = tables.region_rows(transfer.remote_regions)
        flags = frames.HAS_IMM if transfer.imm is not None else 0
        self._send_frame(
            rail,
            staging,
            frames.Header(
                kind=frames.WRITE,
                flags=flags,
                imm=transfer.imm or 0,
                table=len(regions),
                transfer=transfer.id,
                nbytes=int(transfer.nbytes[part].sum()),
                num_pieces=len(local),
                crc=0,
            ),
            regions.tobytes() + tables.piece_rows(transfer, part).tobytes(),
            local,
            self._link.core.verify,
        )

    def _send_reply(self, rail: socket.socket, staging: Staging, reply: _Reply) -> None:
        try:
            self._send_frame(
                rail,
                staging,
                frames.Header(
                    kind=frames.DATA,
                    flags=0,
                    imm=0,
                    table=reply.first,
                    transfer=reply.transfer,
                    nbytes=reply.admitted.nbytes,
                    num_pieces=len(reply.admitted.iov),
                    crc=0,
                ),
                b"",
                reply.admitted.iov,
                reply.verify,
            )
        finally:
            reply.admitted.release()

    def _send_frame(
        self,
        rail: socket.socket,
        staging: Staging,
        header: frames.Header,
        body: bytes,
        pieces: iovec.Iovec,
        verify: bool,
    ) -> None:
        if verify:
            crc = iovec.checksum(pieces)
            header = header._replace(flags=header.flags | frames.HAS_CRC, crc=crc)
        if staging.suits(pieces):
            pieces = staging.gather(pieces)
        head = np.frombuffer(frames.encode(header) + body, np.uint8)
        first = iovec.make(np.array([head.ctypes.data]), np.array([len(head)]))
        iovec.send(rail.fileno(), np.concatenate((first, pieces)))

    def _receive_loop(self, rail: socket.socket) -> None:
        fd = rail.fileno()
        head = np.zeros(frames.HEADER_NBYTES, np.uint8)
        staging = Staging()
        while True:
            _receive_array(fd, head)
            header = frames.decode(head.tobytes())
            self._link.heard()
            if header.kind == frames.WRITE:
                self._receive_write(fd, staging, header)
            else:
                self._receive_data(fd, staging, header)

    def _receive_write(self, fd: int, staging: Staging, header: frames.Header) -> None:
        link = self._link
        regions = np.zeros(header.table * tables.REGION_ROW.itemsize, np.uint8)
        pieces = np.zeros(header.num_pieces * tables.PIECE_ROW.itemsize, np.uint8)
        _receive_array(fd, regions)
        _receive_array(fd, pieces)
        imm = header.imm if header.flags & frames.HAS_IMM else None
        try:
            admitted = tables.admit(link.core.regions, regions.tobytes(), pieces.tobytes())
        except LinkError:
            raise
        except EngineError as error:
            _discard(fd, header.nbytes)
            link.reject(header.transfer, imm, error)
            return
        try:
            if admitted.nbytes != header.nbytes:
                raise ProtocolError(
                    f"a frame announces {header.nbytes} bytes but its pieces take "
                    f"{admitted.nbytes}",
                    operation="receive",
                )
            _receive_pieces(fd, staging, admitted.iov)
            crc = iovec.checksum(admitted.iov) if header.flags & frames.HAS_CRC else 0
        finally:
            admitted.release()
        if header.flags & frames.HAS_CRC and crc != header.crc:
            link.reject(header.transfer, imm, checksum_mismatch(link.peer.name, imm))
            return
        if imm is not None:
            link.count(imm, header.nbytes, 0)
        link.send(Acknowledge(header.transfer, header.nbytes))

    def _receive_data(self, fd: int, staging: Staging, header: frames.Header) -> None:
        with self._lock:
            entry = self._reads.pop((header.transfer, header.table), None)
        if entry is None:
            raise ProtocolError("a data frame answers no read of ours", operation="receive")
        transfer, part = entry
        local = transfer.local[part]
        if header.nbytes != int(transfer.nbytes[part].sum()):
            raise ProtocolError(
                f"a data frame has {header.nbytes} bytes, which is not what was asked for",
                operation="receive",
            )
        _receive_pieces(fd, staging, local)
        if header.flags & frames.HAS_CRC and iovec.checksum(local) != header.crc:
            transfer.stop(checksum_mismatch(self._link.peer.name, None))
            transfer.end(0)
            return
        transfer.end(header.nbytes)


def _receive_pieces(fd: int, staging: Staging, pieces: iovec.Iovec) -> None:
    if staging.suits(pieces):
        iovec.receive(fd, staging.empty(pieces))
        staging.scatter(pieces)
    else:
        iovec.receive(fd, pieces.copy())


def _receive_array(fd: int, array: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    if len(array):
        iovec.receive(fd, iovec.make(np.array([array.ctypes.data]), np.array([len(array)])))


def _discard(fd: int, nbytes: int) -> None:
    """Reads and drops a refused frame's bytes, so that the rail stays in step."""
    scratch = np.zeros(min(nbytes, DISCARD_NBYTES), np.uint8)
    while nbytes:
        size = min(nbytes, len(scratch))
        _receive_array(fd, scratch[:size])
        nbytes -= size
