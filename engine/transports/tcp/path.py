"""TCP: any host, straight from registered memory to registered memory; GPU memory by staging.

A link is one control connection and several rails. Each rail is a blocking socket with a thread
that sends and a thread that receives: `recvmsg` with MSG_WAITALL fills up to 1,024 pieces in one
system call, where an epoll loop wakes for every few hundred KiB (decision 0002 has the figures).
Rails take frames from one queue, so a slow one carries less.

Pieces go to the kernel as an iovec; tiny ones, and those in GPU memory, pass through `staging.py`.
"""

from __future__ import annotations

import functools
import queue
import socket
import threading
from typing import TYPE_CHECKING

from ...memory import iovec
from ...runtime import fork
from ...runtime.pipeline import Finisher
from ...transfer.compute_gate import hold_until_computed
from ...transfer.transfer import Transfer
from ...wire import tables
from ...wire.messages import Acknowledge, ReadRequest, Refuse
from ..base import Availability, DataPath
from ..segments import (
    Outstanding,
    Replies,
    Reply,
    Segment,
    answer_to_nothing,
    begin_counted,
    drop_replies,
)
from ..workers import Workers
from .rail import BUFFER_NBYTES, FRAME_NBYTES, Receiver, Sender

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...transfer.transfer import Transfer
    from ..base import PathHost

DEFAULT_RAILS = 2  # 32 KiB pieces on two cores, loopback: 1 rail 2.6 GB/s, 2 rails 3.0, 4 rails 3.0


def probe() -> Availability:
    """Open a connection to this host."""
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
    """Frames over rails."""

    kinds = frozenset({"host", "cuda"})

    def __init__(self, link: PathHost, rails: list[socket.socket]) -> None:
        self._link = link
        self._rails = rails
        self._queue: queue.SimpleQueue[Segment | Reply | None] = queue.SimpleQueue()
        self._outstanding = Outstanding(link)
        self._replies = Replies(link, BUFFER_NBYTES)
        self.handlers = {
            Acknowledge: self._outstanding.acknowledged,
            ReadRequest: self._serve_read,
            Refuse: self._refused,
        }
        self._crew = Workers(link, "a rail", disconnected=(OSError, EOFError))
        self._finisher = Finisher(f"{link.core.identity.name}-placed")
        self._workers: list[Sender | Receiver] = []
        self._threads: list[threading.Thread] = []
        fork.disown_in_child(self)
        for number, rail in enumerate(rails):
            tune(rail)
            rail.settimeout(None)
            sender = Sender(link, self._outstanding, rail, self._queue, len(rails))
            receiver = Receiver(link, self._outstanding, rail, self._finisher)
            self._workers += (sender, receiver)
            self._threads += (
                self._thread(f"send{number}", sender.run),
                self._thread(f"recv{number}", receiver.run),
            )

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, transfer: Transfer) -> None:
        hold_until_computed(self._link.core.gate, transfer, self._submit)

    def _submit(self, transfer: Transfer) -> None:
        if begin_counted(self._link, transfer):
            cuts = iovec.chunks(transfer.nbytes, FRAME_NBYTES, tables.MAX_PIECES)
            self._outstanding.submit(transfer, cuts, self._queue.put)

    def _serve_read(self, ask: ReadRequest) -> bool:
        reply = self._replies.serve(ask)
        if reply is not None:
            self._queue.put(reply)
            if not self._crew.busy:
                drop_replies(self._queue)  # nobody else will
        return True

    def _refused(self, message: Refuse) -> bool:
        if self._outstanding.refused(message):
            return False  # the link ends the transfer
        self._link.fail(answer_to_nothing())
        return True

    def tick(self) -> None:
        self._replies.tick()

    def halt(self, halted: Callable[[], None]) -> None:
        self._crew.close()
        for rail in self._rails:
            self._queue.put(None)
            try:
                rail.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the peer has closed it already
        self._crew.halt(functools.partial(self._leave, halted))

    def forked(self) -> list[int]:
        """Return what a child shares with this process."""
        return [rail.fileno() for rail in self._rails if rail.fileno() >= 0]

    def _leave(self, halted: Callable[[], None]) -> None:
        """The last rail's thread has ended."""
        drop_replies(self._queue)

        def finished() -> None:
            for worker in self._workers:
                worker.close()
            for rail in self._rails:
                rail.close()
            halted()

        self._finisher.close(finished)

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        self._crew.enter()
        name = f"{self._link.core.identity.name}-{name}"
        return threading.Thread(target=self._crew.run, args=(work,), name=name, daemon=True)
