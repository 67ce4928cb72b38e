"""CURVE on ZeroMQ sockets, and the ZAP handler that lets in whom the allow-list names."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import zmq

from .keys import AllowList

if TYPE_CHECKING:
    from .keys import Keys, Permit

ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # where libzmq looks for it, in each context


def new_pair() -> tuple[bytes, bytes]:
    """Return a fresh key pair: public, secret; 32 bytes each."""
    public, secret = zmq.curve_keypair()
    return _unarmour(public), _unarmour(secret)


def _unarmour(key: bytes) -> bytes:
    from zmq.utils import z85

    return bytes(z85.decode(key))


def protect_server(socket: zmq.Socket[Any], keys: Keys | None) -> None:
    """Before `bind`: only clients that `Gatekeeper` lets in will get through."""
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.ZAP_DOMAIN, b"kvferry")
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def protect_client(socket: zmq.Socket[Any], keys: Keys | None, server: bytes) -> None:
    """Before `connect`: talks to the owner of the key `server`, and to nobody else."""
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, server)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)


def sender_key(frame: zmq.Frame) -> bytes:
    """Return the public key of whoever sent this frame; empty where there is no CURVE."""
    with contextlib.suppress(zmq.ZMQError):
        return bytes.fromhex(str(frame.get("User-Id")))
    return b""


class Gatekeeper:
    """Answers libzmq's question whether a client with a valid key may come in.

    Attributes:
        socket: poll it, and call `answer` when it is readable.
        refused: clients that were turned away.
    """

    def __init__(self, context: zmq.Context[Any], keys: Keys) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP_ENDPOINT)
        self.refused = 0
        self._allowed = AllowList(keys.allowed)

    def permit(self, key: bytes) -> Permit | None:
        """Return what the list as it is at this moment lets a key do; None if it is not in it."""
        return self._allowed.permit(key)

    def answer(self) -> None:
        """Answer all questions that wait."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            version, number, _, _, _, mechanism = parts[:6]
            key = parts[6] if mechanism == b"CURVE" and len(parts) == 7 else b""
            if self.permit(key) is not None:
                verdict = [b"200", b"OK", key.hex().encode()]
            else:
                self.refused += 1
                verdict = [b"400", b"this public key is not in the allow-list", b""]
            self.socket.send_multipart([version, number, *verdict, b""])
