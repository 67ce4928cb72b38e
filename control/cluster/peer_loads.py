"""What agents told other daemons of their loads, taken from those daemons' own publications.

Loads change every second and nobody needs the old ones: they would only wear out a store. A daemon
that cannot be reached leaves its agents' loads as they were last heard.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import zmq

from ..curve import protect_client
from ..errors import ProtocolError
from .messages import LOADS_TOPIC, Loads, answers

if TYPE_CHECKING:
    from ..keys import Keys
    from .messages import Load
    from .store import Peer

BATCH = 16  # publications taken at once; a daemon has a few a second, of 256 KiB
QUEUE_MESSAGES = 512


class PeerLoads:
    """Subscriptions to the other daemons' loads, in the daemon's loop."""

    def __init__(self, context: zmq.Context[Any], keys: Keys | None, poller: zmq.Poller) -> None:
        self._context = context
        self._keys = keys
        self._poller = poller
        self._sockets: dict[Peer, zmq.Socket[bytes]] = {}

    def follow(self, peers: dict[int, Peer]) -> None:
        """Follow these daemons, and no others."""
        if len(peers) == len(self._sockets) and all(p in self._sockets for p in peers.values()):
            return
        for peer in set(self._sockets) - set(peers.values()):
            socket = self._sockets.pop(peer)
            self._poller.unregister(socket)
            socket.close(0)
        for peer in set(peers.values()) - set(self._sockets):
            if bool(peer.public_key) != (self._keys is not None):
                continue  # one of us has keys and the other none: there is no talking
            self._sockets[peer] = socket = self._context.socket(zmq.SUB)
            socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
            protect_client(socket, self._keys, peer.public_key)
            socket.subscribe(LOADS_TOPIC)
            with contextlib.suppress(zmq.ZMQError):  # a name that nobody knows
                socket.connect(peer.publisher)
            self._poller.register(socket, zmq.POLLIN)

    def take(self, ready: dict[Any, int]) -> dict[int, dict[str, Load]]:
        """Return the loads that have come, by the daemon that published them."""
        found: dict[int, dict[str, Load]] = {}
        for peer, socket in self._sockets.items():
            if socket in ready:
                loads = found.setdefault(peer.daemon, {})
                with contextlib.suppress(zmq.Again, ProtocolError, ValueError):
                    for _ in range(BATCH):
                        _, frame = socket.recv_multipart(zmq.NOBLOCK)
                        message = answers.decode(frame)
                        if isinstance(message, Loads):
                            loads.update(message.loads)
        return found
