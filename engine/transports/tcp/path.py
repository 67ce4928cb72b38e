"""TCP: any host, straight from registered memory to registered memory; GPU memory by staging.

A link is one control connection and several rails. Each rail is a blocking socket with a thread
that sends and a thread that receives: `recvmsg` with MSG_WAITALL fills up to 1,024 pieces in one
system call, where an epoll loop wakes for every few hundred KiB (decision 0002 has the figures).
Rails take frames from one queue, so a slow one carries less.

Pieces go to the kernel as an iovec; tiny ones, and those in GPU memory, pass through `staging.py`.
"""

from __future__ import annotations

import functools
import logging
import queue
import socket
import threading
from typing import TYPE_CHECKING

from ...errors import EngineError, LinkError, ProtocolError
from ...memory import iovec
from ...runtime.pipeline import Finisher
from ...transfer.staged import hold_until_computed, note_compute
from ...wire import tables
from ...wire.messages import Acknowledge, Arrived, LinkMessage, ReadRequest, Refuse
from ..base import Availability, DataPath
from ..cma.path import answer_to_nothing
from ..workers import Workers
from .rail import FRAME_NBYTES, Receiver, Reply, Sender

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ...transfer.transfer import Transfer
    from ..base import PathHost

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


class TcpPath(DataPath):
    """Frames over rails.

    Attributes:
        num_rails: how many.
        finisher: waits for what the GPUs scatter.
    """

    kinds = frozenset({"host", "cuda"})

    def __init__(self, link: PathHost, rails: list[socket.socket]) -> None:
        self._link = link
        self._rails = rails
        self._queue: queue.SimpleQueue[tuple[Transfer, slice] | Reply | None] = queue.SimpleQueue()
        self._reads: dict[tuple[int, int], tuple[Transfer, slice]] = {}
        self._unanswered: dict[int, int] = {}  # frames of each write that the peer has not answered
        self._lock = threading.Lock()
        self._crew = Workers(link, "a rail", disconnected=(OSError, EOFError))
        self.num_rails = len(rails)
        self.finisher = Finisher(f"{link.core.identity.name}-placed")
        self._workers: list[Sender | Receiver] = []
        self._threads: list[threading.Thread] = []
        for number, rail in enumerate(rails):
            tune(rail)
            rail.settimeout(None)
            sender, receiver = Sender(self, link, rail, self._queue), Receiver(self, link, rail)
            self._workers += (sender, receiver)
            self._threads += (
                self._thread(f"send{number}", sender.run),
                self._thread(f"recv{number}", receiver.run),
            )

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def before(self, transfer: Transfer, stream: torch.cuda.Stream | None) -> None:
        note_compute(transfer, stream)

    def submit(self, transfer: Transfer) -> None:
        hold_until_computed(self._link.core.gate, transfer, self._submit)

    def _submit(self, transfer: Transfer) -> None:
        if transfer.write and transfer.imm is not None:
            # Every byte is counted as its frame arrives; the write, once all of them did.
            done = Arrived(transfer.imm, 0, 1, write_nbytes=transfer.total_nbytes)
            transfer.on_placed = functools.partial(self._link.send, done)
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
                ask = tables.read_request(transfer, part, verify=self._link.core.verify)
                self._link.send(ask)

    def handle(self, message: LinkMessage) -> bool:
        if isinstance(message, Acknowledge):
            transfer = self._link.transfer(message.transfer)
            if not self.answered(message.transfer) or transfer is None:
                self._link.fail(answer_to_nothing())
            else:
                transfer.end(message.nbytes)
        elif isinstance(message, ReadRequest):
            self._serve_read(message)
        elif isinstance(message, Refuse):
            with self._lock:
                read = self._reads.pop((message.transfer, message.first), None)
            if read is not None or self.answered(message.transfer):
                return False  # the link ends the transfer
            self._link.fail(answer_to_nothing())
        else:
            return False
        return True

    # What the rails' threads call.

    def sending(self, transfer: int) -> None:
        """A frame of a write is being sent, which the peer will answer."""
        with self._lock:
            self._unanswered[transfer] = self._unanswered.get(transfer, 0) + 1

    def answered(self, transfer: int) -> bool:
        """Takes note of an answer to a frame; False if none was awaited."""
        with self._lock:
            left = self._unanswered.pop(transfer, 0) - 1
            if left > 0:
                self._unanswered[transfer] = left
        return left >= 0

    def take_read(self, transfer: int, first: int) -> tuple[Transfer, slice]:
        """The part of a read that a data frame answers.

        Raises:
            ProtocolError: it answers none.
        """
        with self._lock:
            entry = self._reads.pop((transfer, first), None)
        if entry is None:
            raise ProtocolError("a data frame answers no read of ours", operation="receive")
        return entry

    def refuse_read(self, transfer: int, first: int, error: EngineError) -> None:
        """Tells the peer that it will not get what it asked for."""
        self._link.send(Refuse(transfer, type(error).__name__, error.message, first))

    def halt(self, halted: Callable[[], None]) -> None:
        self._crew.close()
        for rail in self._rails:
            self._queue.put(None)
            try:
                rail.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the peer has closed it already
        self._crew.halt(functools.partial(self._leave, halted))

    def _leave(self, halted: Callable[[], None]) -> None:
        """The last rail's thread has ended."""
        self._drop_replies()

        def finished() -> None:
            for worker in self._workers:
                worker.close()
            for rail in self._rails:
                rail.close()
            halted()

        self.finisher.close(finished)

    def _serve_read(self, ask: ReadRequest) -> None:
        try:
            admitted = tables.admit(self._link.core.regions, ask.regions, ask.pieces, staged=True)
        except LinkError as error:
            self._link.fail(error)
        except EngineError as error:
            self.refuse_read(ask.transfer, ask.first, error)
        else:
            self._queue.put(Reply(ask.transfer, ask.first, admitted, ask.verify))
            if not self._crew.busy:
                self._drop_replies()  # nobody else will

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        self._crew.enter()
        name = f"{self._link.core.identity.name}-{name}"
        return threading.Thread(target=self._crew.run, args=(work,), name=name, daemon=True)

    def _drop_replies(self) -> None:
        """Ends the use of memory that peers wanted to read."""
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, Reply):
                item.admitted.release()
