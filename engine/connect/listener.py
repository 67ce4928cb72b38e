"""The end that listens: accepts connections, serves their handshakes, and puts links together.

Each handshake has a thread of its own, so that a slow client holds up nobody. Strangers take only
strangers' places: `_Strangers` has so many for each kind of socket and for each source, and gives the
longest held one to who comes next; who has proven itself holds none. The sockets of a tcp
link come one by one, the control channel first; they wait for each other here.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
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
from .handshake import HANDSHAKE_TIMEOUT_S, Introduction
from .links import close_all

if TYPE_CHECKING:
    from ..context import EngineContext
    from ..transports.selection import TransportSelection
    from .handshake import Admissions, ProcessProbe
    from .links import LinkTable

# Connections that have not proven themselves yet, of each kind of socket, and of one source. A client
# takes a millisecond, so whoever wants its place has to connect faster than so many in that time.
MAX_HANDSHAKES = 256
MAX_HANDSHAKES_OF_A_SOURCE = 64

log = logging.getLogger(__name__)


class _Pending(NamedTuple):
    """A tcp link whose sockets are still arriving; number -1 is its control channel."""

    client: Introduction
    socks: dict[int, socket.socket]
    deadline_s: float


class _Strangers:
    """Connections over one kind of socket that have not proven themselves, by their sources."""

    def __init__(self) -> None:
        self._socks: dict[socket.socket, str] = {}  # in the order in which they came

    def add(self, sock: socket.socket, source: str) -> socket.socket | None:
        """Take one in. Returns one that has to make room for it: of the same source, or the oldest."""
        same = [other for other, its in self._socks.items() if its == source]
        late = None
        if len(same) >= MAX_HANDSHAKES_OF_A_SOURCE:
            late = same[0]
        elif len(self._socks) >= MAX_HANDSHAKES:
            late = next(iter(self._socks))
        if late is not None:
            del self._socks[late]
        self._socks[sock] = source
        return late

    def remove(self, sock: socket.socket) -> None:
        """Take one out: it has proven itself, or is gone. Safe to call again."""
        self._socks.pop(sock, None)


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
        self._strangers = {family: _Strangers() for family in ("unix", "tcp")}
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
            sock, address = listener.accept()
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
            if self._closed or (unix and _turned_away(sock)):
                sock.close()
                return
            self._greeting[thread] = sock
            late = self._strangers_of(unix).add(sock, "" if unix else _source(address[0]))
            if late is not None:
                with contextlib.suppress(OSError):
                    late.shutdown(socket.SHUT_RDWR)  # its thread wakes up and closes it
        thread.start()

    def _strangers_of(self, unix: bool) -> _Strangers:
        return self._strangers["unix" if unix else "tcp"]

    def _welcome(self, sock: socket.socket, unix: bool) -> None:
        """Serve one handshake, on a thread of its own."""
        owned = False
        meetings: list[Meeting] = []

        def answer(client: Introduction) -> bytes:
            if client.transport != "verbs":
                return b""
            meetings.append(Meeting(self._selection.nics, dialed=False))
            return meetings[0].answer(client.offer)

        def proven() -> None:
            with self._lock:
                self._strangers_of(unix).remove(sock)

        try:
            sock.settimeout(HANDSHAKE_TIMEOUT_S)
            if not unix:
                tcp.tune(sock)
            client = handshake.accept(
                sock,
                self._core.identity,
                self._secret,
                (self._probe.address, self._probe.word),
                lambda client: self._refusal(sock, unix, client) or self._admissions.use(client),
                self._admissions.token_of,
                answer,
                proven,
            )
            with self._lock:
                self._greeting[threading.current_thread()] = None  # `close` ends links otherwise
            if client.transport == "tcp":
                self._file(sock, client)
            else:
                self._open(sock, client, [], meetings[0] if meetings else None)
            owned = True
        except (EngineError, OSError) as error:
            log.debug("kvferry: a handshake failed: %s", error)  # the client was told why
        finally:
            with self._lock:
                del self._greeting[threading.current_thread()]
                self._strangers_of(unix).remove(sock)
            if not owned:
                sock.close()
                for meeting in meetings:
                    meeting.close()

    def _refusal(self, sock: socket.socket, unix: bool, client: Introduction) -> str:
        """Return a reason to refuse a client that has proven itself, or ""."""
        if client.transport not in self._selection.offered or unix != (client.transport in LOCAL):
            return f"transport {client.transport!r} is not offered here"
        if client.transport in LOCAL:
            return self._probe.refusal(sock, client.transport, client)
        if client.transport == "verbs":
            return "" if client.rail < 0 else "a verbs link has one connection"
        with self._lock:
            if self._closed:
                return "the engine is closing"
            if client.rail < 0:
                if client.link_id in self._pending or not 1 <= client.num_rails <= 64:
                    return f"a link of {client.num_rails} rails, or one that exists already"
                deadline_s = time.monotonic() + HANDSHAKE_TIMEOUT_S
                self._pending[client.link_id] = _Pending(client, {}, deadline_s)
                return ""
            pending = self._pending.get(client.link_id)
            if (
                pending is None
                or pending.client.identity != client.identity
                or not 0 <= client.rail < pending.client.num_rails
            ):
                return f"rail {client.rail} belongs to no link that is being opened"
        return ""

    def _file(self, sock: socket.socket, client: Introduction) -> None:
        """Files one socket of a tcp link, welcomed by now, and opens the link with its last one."""
        with self._lock:
            pending = self._pending.get(client.link_id)
            if pending is None or client.rail in pending.socks:
                raise ProtocolError("this link is open, or given up", operation="accept")
            pending.socks[client.rail] = sock
            if len(pending.socks) <= pending.client.num_rails:
                return
            del self._pending[client.link_id]
        control, *rails = (sock for _, sock in sorted(pending.socks.items()))
        self._open(control, pending.client, rails, None)

    def _open(
        self,
        control: socket.socket,
        client: Introduction,
        rails: list[socket.socket],
        meeting: Meeting | None,
    ) -> None:
        self._links.open(
            self._core,
            control,
            client.identity,
            client.transport,
            rails=rails,
            meeting=meeting,
            opener=client.token_id,
        )


def _source(host: str) -> str:
    """Return the part of an address that one owner has: of IPv6, what a network is given."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host


def _turned_away(sock: socket.socket) -> bool:
    """Tell a client of another user that it is refused; whether it is one."""
    why = handshake.foreign_user(sock)
    if why:
        sock.settimeout(0.0)
        with contextlib.suppress(EngineError):
            handshake.refuse(sock, why)
    return bool(why)


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
