"""How two engines meet on a fresh stream socket: who are you, prove it, what can we do together.

    client                                   server
    Hello(nonce, what for)      ──────▶
                                ◀──────      Challenge(nonce, proof over both)
    Proof(proof over both)      ──────▶
                                ◀──────      Welcome (or a refusal in words)

Both prove that they know the server's secret, which travels in its `EngineAddress` over the control
plane and never over this socket; and, where the client names one, a one-time token (`Admissions`). For
`cma` each end also reads a random word from the other's memory (`ProcessProbe`): permission is tried,
not guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from ..errors import (
    EngineError,
    LinkError,
    OutOfRange,
    PeerLost,
    ProtocolError,
    TransportUnavailable,
)
from ..memory.fields import DECODE_ERRORS, Nonce, Uint63
from ..transports.cma import path as cma
from ..transports.selection import LOCAL
from ..wire.identity import EngineAddress, Identity
from ..wire.messages import LINK_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

# A slow machine may need longer: an emulated one takes seconds for the first handshake.
HANDSHAKE_TIMEOUT_S = float(os.environ.get("KVFERRY_HANDSHAKE_TIMEOUT_S", "5"))
MAX_HELLO_NBYTES = 65_536  # the cards of 64 rails
NONCE_NBYTES = 32
TOKEN_NBYTES = 32
MAX_TOKENS = 4096  # waiting at once; the oldest goes first
RAIL_TIMEOUT_S = 10.0  # for a link's rails to follow its control channel

_T = TypeVar("_T")


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a connection is for: a link's control channel (`rail` -1) or one of its rails."""

    version: int
    identity: Identity
    server_engine_id: str
    transport: str
    link_id: str
    rail: int
    num_rails: int
    nonce: Nonce
    probe: Uint63 = 0
    probe_word: bytes = b""
    token_id: bytes = b""


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The server's answer; `refused` in words if there is nothing to talk about."""

    refused: str
    identity: Identity
    nonce: Nonce
    proof: bytes
    probe: Uint63 = 0
    probe_word: bytes = b""


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The client's proof, and what of its end the transport needs; `refused` in words if the client
    gives up."""

    refused: str
    proof: bytes
    offer: bytes = b""


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The server's last word, with its answer to the client's offer."""

    refused: str
    answer: bytes = b""


# Made here and not where it is used: msgspec works a type out when it first meets it, and two threads
# that do so at once take the process down (msgspec 0.22: segmentation fault).
_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (Identity, Hello, Challenge, Proof, Welcome)
}


def host_id() -> str:
    """Name this kernel and process namespace: where it is equal, process ids mean the same."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def connect(
    sock: socket.socket,
    address: EngineAddress,
    hello: Callable[[bytes], Hello],
    check: Callable[[Challenge], str],
    token: bytes = b"",
    offer: bytes = b"",
) -> tuple[Challenge, bytes]:
    """Return the client's half, on a blocking socket whose timeout bounds all of it.

    Args:
        hello: makes the hello around a nonce.
        token: what the server was told to expect, if it was; the hello names it.
        check: a reason to give up after the server has proven itself, or "".
        offer: what of this end the transport needs at the other.

    Returns:
        The server's challenge, and its answer to the offer.

    Raises:
        TransportUnavailable: either end refused, in words.
        ProtocolError, PeerLost: the other end is no kvferry engine, or went away.
    """
    deadline_s = _deadline_s(sock)
    nonce = secrets.token_bytes(NONCE_NBYTES)
    peer = address.identity.name
    secret = address.secret + token
    _send(sock, hello(nonce))
    challenge = _receive(sock, Challenge, peer, deadline_s)
    if challenge.refused:
        raise TransportUnavailable(challenge.refused, operation="connect", peer=peer)
    if not hmac.compare_digest(challenge.proof, _proof(secret, b"server", nonce, challenge.nonce)):
        raise ProtocolError(
            "the engine at this address does not know its own secret: another process listens "
            "there now",
            operation="connect",
            peer=peer,
        )
    refused = check(challenge)
    proof = _proof(secret, b"client", nonce, challenge.nonce)
    _send(sock, Proof(refused, proof, offer))
    if refused:
        raise TransportUnavailable(refused, operation="connect", peer=peer)
    welcome = _receive(sock, Welcome, peer, deadline_s)
    if welcome.refused:
        raise TransportUnavailable(welcome.refused, operation="connect", peer=peer)
    return challenge, welcome.answer


def accept(
    sock: socket.socket,
    me: Identity,
    secret: bytes,
    probe: tuple[int, bytes],
    check: Callable[[Hello], str],
    token_of: Callable[[Hello], tuple[bytes, str]] = lambda _: (b"", ""),
    answer: Callable[[Hello, bytes], bytes] = lambda hello, offer: b"",
) -> Hello:
    """Return the server's half, on a blocking socket whose timeout bounds all of it.

    Args:
        probe: address and content of a word of this process that a `cma` client tries to read.
        check: a reason to refuse a client that has proven itself, or "".
        token_of: the token that a client has to prove, too, and a reason to refuse it, or "".
        answer: what of this end the transport needs, for a client that is not refused.

    Raises:
        TransportUnavailable: refused by either end. ProtocolError, PeerLost: as for `connect`.
    """
    deadline_s = _deadline_s(sock)
    hello = _receive(sock, Hello, "", deadline_s)
    peer = hello.identity.name
    refused = ""
    if hello.version != LINK_VERSION:
        refused = f"link protocol {hello.version} is not {LINK_VERSION}: install equal versions"
    elif hello.server_engine_id != me.engine_id:
        refused = "this engine was restarted since its address was published: fetch the new one"
    else:
        token, refused = token_of(hello)
        secret += token
    nonce = secrets.token_bytes(NONCE_NBYTES)
    _send(
        sock,
        Challenge(refused, me, nonce, _proof(secret, b"server", hello.nonce, nonce), *probe),
    )
    if refused:
        raise TransportUnavailable(refused, operation="accept", peer=peer)
    proof = _receive(sock, Proof, peer, deadline_s)
    if not hmac.compare_digest(proof.proof, _proof(secret, b"client", hello.nonce, nonce)):
        _send(
            sock, Welcome("the proof is wrong: the address and its secret do not belong together")
        )
        raise ProtocolError("a client failed its proof", operation="accept", peer=peer)
    refused = proof.refused or check(hello)
    answered = b""
    if not refused:
        try:
            answered = answer(hello, proof.offer)
        except EngineError as error:
            refused = error.message
    _send(sock, Welcome(refused, answered))
    if refused:
        raise TransportUnavailable(refused, operation="accept", peer=peer)
    return hello


def _deadline_s(sock: socket.socket) -> float:
    return time.monotonic() + (sock.gettimeout() or 0.0)


def _proof(secret: bytes, role: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    return hmac.new(secret, role + client_nonce + server_nonce, hashlib.sha256).digest()


def _send(sock: socket.socket, message: msgspec.Struct) -> None:
    body = msgspec.msgpack.encode(message)
    try:
        sock.sendall(len(body).to_bytes(4, "little") + body)
    except OSError as error:
        raise _lost(error, "") from error


def _receive(sock: socket.socket, kind: type[_T], peer: str, deadline_s: float) -> _T:
    try:
        size = int.from_bytes(_exactly(sock, 4, deadline_s), "little")
        if not 0 < size <= MAX_HELLO_NBYTES:
            raise ProtocolError(
                f"a {kind.__name__} of {size} bytes is not between 1 and {MAX_HELLO_NBYTES}",
                operation="handshake",
                peer=peer,
            )
        body = _exactly(sock, size, deadline_s)
    except EOFError as error:
        raise PeerLost(
            f"the peer closed the connection instead of sending {kind.__name__}",
            operation="handshake",
            peer=peer,
        ) from error
    except OSError as error:
        if isinstance(error, LinkError):
            raise
        raise _lost(error, peer) from error
    try:
        message: _T = _decoders[kind].decode(body)
    except DECODE_ERRORS as error:
        raise ProtocolError(
            f"a {kind.__name__} does not decode: {error}", operation="handshake", peer=peer
        ) from error
    return message


def _lost(error: OSError, peer: str) -> PeerLost:
    what = "did not answer in time" if isinstance(error, TimeoutError) else f"is gone: {error}"
    return PeerLost(f"the peer {what}", operation="handshake", peer=peer)


def _exactly(sock: socket.socket, nbytes: int, deadline_s: float) -> bytes:
    parts = bytearray()
    while len(parts) < nbytes:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:  # a timeout a byte would let a peer take hours
            raise TimeoutError
        sock.settimeout(left_s)
        part = sock.recv(nbytes - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


class _Entry:
    __slots__ = ("deadline_s", "engine_id", "link_id", "token")

    def __init__(self, token: bytes, engine_id: str, deadline_s: float) -> None:
        self.token = token
        self.engine_id = engine_id
        self.deadline_s = deadline_s
        self.link_id = ""


def token_id(token: bytes) -> bytes:
    """Name a token to whoever has it, and tell nobody else anything."""
    return hashlib.sha256(b"kvferry token" + token).digest()[:16] if token else b""


class Admissions:
    """The one-time tokens of one engine: who may open a link to it. Thread-safe.

    An engine's address holds a secret that admits whoever has it, for as long as the engine lives. A
    token narrows that to one link of one peer: whoever meets the peer elsewhere, and knows it, gives
    the same token to both engines. What it proves about the peer is not the engine's business.

    Args:
        required: whether a link without a token is refused.
    """

    def __init__(self, *, required: bool) -> None:
        self._required = required
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}

    def expect(self, token: bytes, engine_id: str, timeout_s: float) -> None:
        """Let that engine open one link with that token, within `timeout_s`.

        Raises:
            OutOfRange: the token is not of 32 bytes.
        """
        if len(token) != TOKEN_NBYTES:
            raise OutOfRange(
                f"a token has {TOKEN_NBYTES} bytes, not {len(token)}", operation="admit"
            )
        with self._lock:
            self._forget_late(time.monotonic())
            while len(self._entries) >= MAX_TOKENS:
                del self._entries[next(iter(self._entries))]
            deadline_s = time.monotonic() + timeout_s
            self._entries[token_id(token)] = _Entry(token, engine_id, deadline_s)

    def token_of(self, hello: Hello) -> tuple[bytes, str]:
        """Return the token that a client has to prove, and why it is refused even so ("" if it is
        not)."""
        if not hello.token_id:
            return b"", "this engine admits links with a one-time token only" * self._required
        with self._lock:
            self._forget_late(time.monotonic())
            entry = self._entries.get(hello.token_id)
            if entry is None or not hmac.compare_digest(
                entry.engine_id.encode(), hello.identity.engine_id.encode()
            ):
                return b"", "this token is used, late or another engine's: meet again"
            return entry.token, ""

    def use(self, hello: Hello) -> str:
        """Use up the token that a client has proven. Returns why it is refused even so,
        or ""."""
        if not hello.token_id:
            return ""
        with self._lock:
            entry = self._entries.get(hello.token_id)
            first = hello.rail < 0
            if entry is None or entry.link_id != ("" if first else hello.link_id):
                return "this token has been used: meet again"
            if first:
                entry.link_id = hello.link_id  # its rails may still come; another link may not
                entry.deadline_s = time.monotonic() + RAIL_TIMEOUT_S
        return ""

    def _forget_late(self, now_s: float) -> None:
        for number in [n for n, e in self._entries.items() if e.deadline_s < now_s]:
            del self._entries[number]


class ProcessProbe:
    """This process's word, and a look at those of others.

    Attributes:
        address: of the word, in this process.
        word: its content.
    """

    def __init__(self) -> None:
        self._array = np.frombuffer(bytearray(secrets.token_bytes(16)), np.uint64)
        self.address = int(self._array.ctypes.data)
        self.word = self._array.tobytes()

    def refusal(self, sock: socket.socket, transport: str, peer: Hello | Challenge) -> str:
        """Try to read the word of whoever is at the other end; a reason to refuse it, or "".

        Args:
            peer: what it has sent (`Hello` or `Challenge`): who it is, and where its word lies.
        """
        if transport not in LOCAL:
            return ""
        pid = _peer_pid(sock)
        if transport == "cuda_ipc" and peer.identity.pid == pid:
            return ""  # no need to reach its host memory
        try:
            if peer.identity.pid == pid and cma.read_word(pid, peer.probe) == peer.probe_word:
                return ""
        except OSError as error:
            return cma.refusal(error)
        return "the engine at the other end of the socket is not the process that it seems to be"


def _peer_pid(sock: socket.socket) -> int:
    """Return the process at the other end of a Unix socket, as this process's namespace numbers it."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[0])
