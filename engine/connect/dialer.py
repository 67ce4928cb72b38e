"""The end that dials: tries transports until one makes a link."""

from __future__ import annotations

import secrets
import socket
import time
from functools import partial
from typing import TYPE_CHECKING

from ..errors import EngineError, TransportUnavailable
from ..transports.selection import LOCAL, TRANSPORTS, unsuited
from ..transports.tcp import path as tcp
from ..transports.verbs.rail import Meeting
from . import handshake
from .handshake import Introduction, token_id
from .links import close_all

if TYPE_CHECKING:
    from ..context import EngineContext
    from ..link.link import Link
    from ..transports.selection import TransportSelection
    from ..wire.identity import EngineAddress
    from .handshake import ProcessProbe
    from .links import LinkTable


class Dialer:
    """Opens one engine's links to engines that listen. Thread-safe.

    Args:
        links: where links are opened.
        rails: sockets of a tcp link.
        queues: queue pairs for direct writes on each rail of a verbs link.
    """

    def __init__(
        self,
        core: EngineContext,
        links: LinkTable,
        selection: TransportSelection,
        probe: ProcessProbe,
        rails: int,
        queues: int,
    ) -> None:
        self._core = core
        self._links = links
        self._selection = selection
        self._probe = probe
        self._rails = rails
        self._queues = queues

    def connect(
        self, address: EngineAddress, transport: str | None, token: bytes, timeout_s: float
    ) -> Link:
        """Open a link over `transport`, or over the best one that both ends have.

        Raises:
            TransportUnavailable: none works; says why for each.
            PeerLost, ProtocolError: the peer is gone, or is something else now.
        """
        reasons: list[str] = []
        last: EngineError | None = None
        for name in TRANSPORTS if transport is None else (transport,):
            reason = self._selection.mismatch(name, address, self._core.identity.host_id)
            if transport is None and not reason:
                reason = unsuited(name, self._core.regions)
            if reason:
                reasons.append(f"{name}: {reason}")
                continue
            try:
                return self._connect(name, address, token, timeout_s)
            except EngineError as error:
                last = error
                reasons.append(f"{name}: {error.message}")
            except (OSError, UnicodeError) as error:
                why = error.strerror if isinstance(error, OSError) else None
                reasons.append(f"{name}: {why or error}")
        if last is not None and len(reasons) == 1:
            raise last
        raise TransportUnavailable(
            "; ".join(reasons), operation="connect", peer=address.identity.name
        ) from last

    def _connect(self, name: str, address: EngineAddress, token: bytes, timeout_s: float) -> Link:
        link_id = secrets.token_hex(16)
        num_rails = self._rails if name == "tcp" else 0
        socks: list[socket.socket] = []
        deadline_s = time.monotonic() + timeout_s
        meeting = Meeting(self._selection.nics, dialed=True) if name == "verbs" else None
        opener = token_id(token)
        try:
            offer = meeting.offer(address.nics, self._queues) if meeting is not None else b""
            for rail in range(-1, num_rails):
                left_s = max(0.01, deadline_s - time.monotonic())
                sock = _dial(name, address, left_s)
                socks.append(sock)
                sock.settimeout(left_s)
                identity, answer = handshake.connect(
                    sock,
                    address,
                    Introduction(
                        identity=self._core.identity,
                        transport=name,
                        link_id=link_id,
                        rail=rail,
                        num_rails=num_rails,
                        probe=self._probe.address,
                        probe_word=self._probe.word,
                        offer=offer,
                        token_id=opener,
                    ),
                    partial(self._probe.refusal, sock, name),
                    token,
                )
            if meeting is not None:
                meeting.take(answer)
        except BaseException:
            close_all(socks)
            if meeting is not None:
                meeting.close()
            raise
        return self._links.open(
            self._core,
            socks[0],
            identity,
            name,
            rails=socks[1:],
            meeting=meeting,
            opener=opener,
        )


def _dial(name: str, address: EngineAddress, timeout_s: float) -> socket.socket:
    if name in LOCAL:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(f"\0{address.unix_name}")
        except OSError:
            sock.close()
            raise
        return sock
    sock = socket.create_connection((address.tcp_host, address.tcp_port), timeout_s)
    tcp.tune(sock)
    return sock
