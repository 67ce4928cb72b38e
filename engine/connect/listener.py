"""The end that listens: accepts connections, serves their handshakes, and puts links together.

Each handshake has a thread of its own, so that a slow client holds up nobody. The sockets of a tcp
link come one by one, the control channel first; they wait for each other here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..errors import EngineError, ProtocolError, TransportUnavailable
from ..runtime import fork
from ..transports.selection import LOCAL
from ..transports.tcp import path as tcp
from ..transports.verbs.rail import Meeting
from . import handshake
from .handshake import HANDSHAKE_TIMEOUT_S, Hello
from .links import close_all

if TYPE_CHECKING:
    from ..context import EngineContext
    from ..transports.selection import TransportSelection
    from .handshake import Admissions, ProcessProbe
    from .links import LinkTable

MAX_HANDSHAKES = 256  # connections that have not proven themselves yet

log = logging.getLogger(__name__)


class _Pending(NamedTuple):
    """A tcp link whose sockets are still arriving; number -1 is its control channel."""

    hello: Hello
    socks: dict[int, socket.socket]
    deadline_s: float


class Listener:
    """Opens the links that other engines dial. Thread-safe.

    Args:
        links: where links are opened.
        socks: the listening sockets, from `listen`; owned from here on.
        secret: what a client has to know.
        admissions: the one-time tokens that clients may have to prove.
    """

    def __init__(
        self,
        core: EngineContext,
        links: LinkTable,
        selection: TransportSelection,
        probe: ProcessProbe,
        socks: list[socket.socket],
        secret: bytes,
        admissions: Admissions,
    ) -> None:
        self._core = core
        self._links = links
        self._selection = selection
        self._probe = probe
        self._socks = socks
        self._secret = secret
        self._admissions = admissions
        self._lock = threading.Lock()
        self._closed = False
        self._pending: dict[str, _Pending] = {}
        self._greeting: dict[threading.Thread, socket.socket | None] = {}
        self._left: list[threading.Thread] = []  # handshakes that were being served at the end
        fork.disown_in_child(self)

    def start(self) -> None:
        """Begin to accept connections."""
        for sock in self._socks:
            sock.setblocking(False)
        self._watch()

    def tick(self, now: float) -> None:
        """Accept again where that had to stop, and give up links that do not become whole."""
        self._watch()
        with self._lock:
            late = [i for i, p in self._pending.items() if now > p.deadline_s]
            stale = [self._pending.pop(link_id) for link_id in late]
        for entry in stale:
            close_all(entry.socks.values())

    def close(self) -> None:
        """Accept nothing any more, and end the handshakes that are being served."""
        with self._lock:
            self._closed = True
            pending, self._pending = self._pending, {}
            greeting = dict(self._greeting)
        self._left = list(greeting)
        for listener in self._socks:
            self._core.progress.unwatch(listener.fileno())
            listener.close()
        for sock in greeting.values():
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # its thread wakes up and closes it
        for entry in pending.values():
            close_all(entry.socks.values())

    def join(self) -> None:
        """Wait for the handshakes that `close` has ended; the progress thread has stopped."""
        for thread in self._left:
            if thread is not threading.current_thread():
                thread.join(HANDSHAKE_TIMEOUT_S)

    def forked(self) -> list[int]:
        """Return what a child shares with this process."""
        socks = [*self._socks, *(sock for sock in self._greeting.values() if sock is not None)]
        for pending in self._pending.values():
            socks += pending.socks.values()
        return [sock.fileno() for sock in socks if sock.fileno() >= 0]

    def _watch(self) -> None:
        """Watch the sockets that are not watched."""
        progress = self._core.progress
        with self._lock:
            for listener in [] if self._closed else self._socks:
                if not progress.watches(listener.fileno()):
                    accept = partial(self._accept, listener)
                    progress.watch(listener.fileno(), select.EPOLLIN, accept)

    def _accept(self, listener: socket.socket, _: int) -> None:
        try:
            sock, _address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The client stays in the backlog, and epoll would tell so for ever: `tick` looks
                # again.
                self._core.progress.unwatch(listener.fileno())
            return  # or it went away before we looked
        unix = listener.family == socket.AF_UNIX
        name = f"{self._core.identity.name}-greet"
        thread = threading.Thread(target=self._welcome, args=(sock, unix), name=name, daemon=True)
        with self._lock:
            if self._closed or len(self._greeting) >= MAX_HANDSHAKES:
                sock.close()
                return
            self._greeting[thread] = sock
        thread.start()

    def _welcome(self, sock: socket.socket, unix: bool) -> None:
        """Serve one handshake, on a thread of its own."""
        owned = False
        meetings: list[Meeting] = []

        def answer(hello: Hello, offer: bytes) -> bytes:
            if hello.transport != "verbs":
                return b""
            meetings.append(Meeting(self._selection.nics, dialed=False))
            return meetings[0].answer(offer)

        try:
            sock.settimeout(HANDSHAKE_TIMEOUT_S)
            if not unix:
                tcp.tune(sock)
            hello = handshake.accept(
                sock,
                self._core.identity,
                self._secret,
                (self._probe.address, self._probe.word),
                lambda hello: self._refusal(sock, unix, hello) or self._admissions.use(hello),
                self._admissions.token_of,
                answer,
            )
            with self._lock:
                self._greeting[threading.current_thread()] = None  # `close` ends links otherwise
            if hello.transport == "tcp":
                self._file(sock, hello)
            else:
                self._open(sock, hello, [], meetings[0] if meetings else None)
            owned = True
        except (EngineError, OSError) as error:
            log.debug("kvferry: a handshake failed: %s", error)  # the client was told why
        finally:
            if not owned:
                sock.close()
                for meeting in meetings:
                    meeting.close()
            with self._lock:
                del self._greeting[threading.current_thread()]

    def _refusal(self, sock: socket.socket, unix: bool, hello: Hello) -> str:
        """Return a reason to refuse a client that has proven itself, or ""."""
        if hello.transport not in self._selection.offered or unix != (hello.transport in LOCAL):
            return f"transport {hello.transport!r} is not offered here"
        if hello.transport in LOCAL:
            return self._probe.refusal(sock, hello.transport, hello)
        if hello.transport == "verbs":
            return "" if hello.rail < 0 else "a verbs link has one connection"
        with self._lock:
            if self._closed:
                return "the engine is closing"
            if hello.rail < 0:
                if hello.link_id in self._pending or not 1 <= hello.num_rails <= 64:
                    return f"a link of {hello.num_rails} rails, or one that exists already"
                deadline_s = time.monotonic() + HANDSHAKE_TIMEOUT_S
                self._pending[hello.link_id] = _Pending(hello, {}, deadline_s)
                return ""
            pending = self._pending.get(hello.link_id)
            if (
                pending is None
                or pending.hello.identity != hello.identity
                or not 0 <= hello.rail < pending.hello.num_rails
            ):
                return f"rail {hello.rail} belongs to no link that is being opened"
        return ""

    def _file(self, sock: socket.socket, hello: Hello) -> None:
        """Files one socket of a tcp link, welcomed by now, and opens the link with its last one."""
        with self._lock:
            pending = self._pending.get(hello.link_id)
            if pending is None or hello.rail in pending.socks:
                raise ProtocolError("this link is open, or given up", operation="accept")
            pending.socks[hello.rail] = sock
            if len(pending.socks) <= pending.hello.num_rails:
                return
            del self._pending[hello.link_id]
        control, *rails = (sock for _, sock in sorted(pending.socks.items()))
        self._open(control, pending.hello, rails, None)

    def _open(
        self,
        control: socket.socket,
        hello: Hello,
        rails: list[socket.socket],
        meeting: Meeting | None,
    ) -> None:
        self._links.open(
            self._core,
            control,
            hello.identity,
            hello.transport,
            rails=rails,
            meeting=meeting,
            opener=hello.token_id,
        )


def listen(unix_name: str, tcp_host: str | None) -> list[socket.socket]:
    """Return the listening sockets: for processes of this host, then for `tcp`, where these are
    wanted.

    Raises:
        TransportUnavailable: an address cannot be listened on.
    """
    socks: list[socket.socket] = []
    try:
        if unix_name:
            socks.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            socks[-1].bind(f"\0{unix_name}")
            socks[-1].listen(128)
        if tcp_host is not None:
            socks.append(socket.create_server((tcp_host, 0), backlog=128))
    except (OSError, UnicodeError) as error:
        close_all(socks)
        raise TransportUnavailable(
            f"cannot listen on {tcp_host or unix_name}: {error}", operation="start"
        ) from error
    return socks
