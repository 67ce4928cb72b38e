"""The control channel of one link: messages over a stream socket, both ways, and no thread waits.

What the socket does not take at once is kept, and goes out from the progress thread when it can.
What comes is decoded on the progress thread and handed on message by message.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

from ..errors import EngineError, PeerLost
from ..runtime import fork
from . import messages as wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..runtime.progress import Progress
    from .messages import LinkMessage

MAX_UNSENT_NBYTES = 16 << 20
RECEIVE_NBYTES = 1 << 18
_TCP_INFO = struct.Struct("=24xI28xI")  # of the kernel's tcp_info: tcpi_unacked, tcpi_last_ack_recv


class ControlChannel:
    """One link's control socket, which it owns.

    `send` and `close` may be called from any thread. The rest is the progress thread's.

    Args:
        peer: its name, for errors.
        fail: called with the error when the peer cannot be understood, or takes nothing.
    """

    def __init__(
        self,
        sock: socket.socket,
        progress: Progress,
        peer: str,
        fail: Callable[[EngineError], None],
    ) -> None:
        self.closed = False
        self._sock = sock
        self._progress = progress
        self._peer = peer
        self._fail = fail
        self._lock = threading.Lock()  # of the socket's end and of what is unsent
        self._unsent = bytearray()
        self._received = bytearray()
        fork.disown_in_child(self)

    def start(
        self,
        *,
        heard: Callable[[], None],
        handle: Callable[[LinkMessage], None],
        ended: Callable[[], None],
    ) -> None:
        """Begin to receive.

        Args:
            heard: called when anything has come.
            handle: called with each message.
            ended: called when everything that the peer said is read and no more will come.
        """
        self._heard, self._handle, self._ended = heard, handle, ended
        self._sock.setblocking(False)
        self._progress.watch(self._sock.fileno(), select.EPOLLIN, self._ready)

    def send(self, message: LinkMessage) -> None:
        """Send a message; never blocks. On a closed channel it does nothing."""
        data = wire.encode(message)
        with self._lock:
            if self.closed:
                return
            if not self._unsent:
                try:
                    done = self._sock.send(data)
                except BlockingIOError:
                    done = 0
                except OSError:
                    return  # the reading side finds out why, after what the peer still said
                data = data[done:]
            if data:
                if not self._unsent:
                    self._progress.change(self._sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
                self._unsent += data
            overflow = len(self._unsent) > MAX_UNSENT_NBYTES
        if overflow:
            self._fail(
                PeerLost(
                    f"the peer has not taken {MAX_UNSENT_NBYTES} bytes of control messages",
                    operation="send",
                    peer=self._peer,
                )
            )

    def owed_s(self) -> float:
        """Return for how long the peer's host has acknowledged nothing, though it was sent something;
        0.0 if it owes no answer, and where there is no network between. Its kernel answers while the
        peer is too busy to."""
        with self._lock:
            if self.closed or self._sock.family == socket.AF_UNIX:
                return 0.0
            try:
                info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
            except OSError:
                return 0.0  # the reading side finds out
        if len(info) < _TCP_INFO.size:
            return 0.0  # a sandbox that tells less
        unacknowledged, last_answer_ms = _TCP_INFO.unpack(info)
        return last_answer_ms / 1e3 if unacknowledged else 0.0

    def receive(self) -> bool:
        """Handle what has come, up to a limit; False if there was nothing."""
        try:
            data = self._sock.recv(RECEIVE_NBYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._ended()
            return False
        self._heard()
        self._received += data
        try:
            messages = wire.decode_all(self._received)
        except EngineError as error:
            self._fail(error)
            self._ended()  # nothing that comes after this can be understood
            return False
        for message in messages:
            self._handle(message)
        return True

    def unwatch(self) -> None:
        """Look at the socket no more; it stays open for a last word."""
        self._progress.unwatch(self._sock.fileno())

    def close(self) -> bool:
        """Close the socket; False if it was closed."""
        with self._lock:
            if self.closed:
                return False
            self.closed = True
            self._progress.unwatch(self._sock.fileno())
            with contextlib.suppress(OSError):  # the peer has hung up
                # A process that has inherited the socket must not keep the connection up.
                self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()
        return True

    def forked(self) -> list[int]:
        """Return what a child shares with this process."""
        return [] if self.closed else [self._sock.fileno()]

    def _ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            self.receive()

    def _flush(self) -> None:
        with self._lock:
            if self.closed:
                return
            try:
                done = self._sock.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                done = len(self._unsent)  # as in `send`
            del self._unsent[:done]
            if not self._unsent:
                self._progress.change(self._sock.fileno(), select.EPOLLIN)
