"""The links of one engine: opened, waited for, and forgotten when they have quiesced."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from ..errors import DeadlineExceeded, LinkClosed
from ..link.link import Link
from ..transports.cma import path as cma
from ..transports.cuda_ipc import path as cuda_ipc
from ..transports.selection import LOCAL
from ..transports.tcp import path as tcp
from ..transports.verbs import path as verbs

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from ..context import EngineContext
    from ..transfer.ticket import Ticket
    from ..transports.verbs.rail import Meeting
    from ..wire.identity import Identity


class LinkTable:
    """Links that are up, or that a peer may still reach this process through. Thread-safe.

    Attributes:
        closed: whether the engine is closed, and no link opens any more.
    """

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Condition()
        self._links: list[Link] = []

    def all(self) -> list[Link]:
        """Return every link that is here."""
        with self._lock:
            return list(self._links)

    def open(
        self,
        core: EngineContext,
        control: socket.socket,
        peer: Identity,
        transport: str,
        *,
        rails: list[socket.socket],
        meeting: Meeting | None,
        opener: bytes,
    ) -> Link:
        """Make and start a link; it owns the sockets and the meeting.

        Args:
            control: the socket of its control channel.
            rails: the others, of a tcp link.
            meeting: of a verbs link.
            opener: names the token that opened it; b"" without one.

        Raises:
            LinkClosed: the engine is closed. Everything that was given is closed too.
        """
        with self._lock:
            if self.closed:
                close_all([control, *rails])
                if meeting is not None:
                    meeting.close()
                raise LinkClosed("the engine was closed", operation="connect")
            if transport in LOCAL:
                make = cma.CmaPath if transport == "cma" else cuda_ipc.CudaIpcPath
                link = Link(core, control, peer, transport, lambda host: make(host, peer.pid))
            elif meeting is not None:
                link = Link(
                    core, control, peer, transport, lambda host: verbs.VerbsPath(host, meeting)
                )
            else:
                link = Link(core, control, peer, transport, lambda host: tcp.TcpPath(host, rails))
            link.token_id = opener
            core.device_counters.link_opened(link)
            link.start()
            self._links.append(link)
            link.quiesced.add_done_callback(partial(self._quiesced, link))
            self._lock.notify_all()
        return link

    def wait(self, engine_id: str, opener: bytes, timeout_s: float) -> Link:
        """Return the link to an engine that connects to this one; wait until it is there.

        Args:
            opener: names the token that opened it; any link to that engine if b"".

        Raises:
            DeadlineExceeded: it did not connect.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            while True:
                for link in self._links:
                    meant = link.peer.engine_id == engine_id and opener in (b"", link.token_id)
                    if meant and not link.closed:
                        return link
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._lock.wait(left_s):
                    raise DeadlineExceeded(
                        f"no link from engine {engine_id[:8]} came in {timeout_s} s",
                        operation="accept",
                    )

    def _quiesced(self, link: Link, ticket: Ticket) -> None:
        """Forget a link that nothing can reach any more."""
        if ticket.exception() is not None:
            return  # the engine was closed first
        with self._lock:
            if link in self._links:
                self._links.remove(link)
            closed = self.closed
        counters = link.core.device_counters
        if counters.link_quiesced(link) and not closed:
            link.core.copiers.run(counters.cleanse)

    def close(self) -> list[Link] | None:
        """Open no link any more. The links that are here, the first time; then None."""
        with self._lock:
            if self.closed:
                return None
            self.closed = True
            return list(self._links)


def close_all(socks: Iterable[socket.socket]) -> None:
    """Close sockets."""
    for sock in socks:
        sock.close()
