"""How two engines meet on a fresh stream socket: who are you, prove it, what can we do together.

    client                                   server
    Hello(nonce, whom it means)   ──────▶
                                  ◀──────    Challenge(nonce, proof over both)
    Proof(proof, introduction)    ──────▶
                                  ◀──────    Welcome(introduction, or a refusal in words)
    Confirm(or a refusal)         ──────▶

Both prove that they know the server's secret, which travels in its `EngineAddress` over the control
plane and never over this socket; and, where the client names one, a one-time token (`Admissions`).
Neither says who it is before the other has proven itself: a stranger sees random bytes, and what it
says itself is not even decoded. For `cma` each end also reads a random word from the other's memory
(`ProcessProbe`): permission is tried, not guessed.
"""

from __future__ import annotations

import contextlib
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
    """Whom the client means, and which one-time token it will prove, if any."""

    version: int
    server_engine_id: str
    nonce: Nonce
    token_id: bytes = b""


class _Versioned(msgspec.Struct, frozen=True):
    """What the hello of every version has."""

    version: int


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The server's proof; `refused` in words if there is nothing to talk about."""

    refused: str
    nonce: Nonce
    proof: bytes


class Introduction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who the client is, and what the connection is for: a link's control channel (`rail` -1) or one
    of its rails."""

    identity: Identity
    transport: str
    link_id: str
    rail: int
    num_rails: int
    probe: Uint63 = 0
    probe_word: bytes = b""
    offer: bytes = b""
    token_id: bytes = b""


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The client's proof, which covers its encoded `Introduction`."""

    proof: bytes
    introduction: bytes


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who the server is, with its answer to the client's offer; or why it refuses after all."""

    refused: str
    identity: Identity | None = None
    probe: Uint63 = 0
    probe_word: bytes = b""
    answer: bytes = b""


class Confirm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The client's last word; `refused` in words if it gives up."""

    refused: str


# Made here and not where it is used: msgspec works a type out when it first meets it, and two threads
# that do so at once take the process down (msgspec 0.22: segmentation fault).
_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (Identity, _Versioned, Hello, Challenge, Introduction, Proof, Welcome, Confirm)
}


def host_id() -> str:
    """Name this kernel and process namespace: where it is equal, process ids mean the same."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def connect(
    sock: socket.socket,
    address: EngineAddress,
    introduction: Introduction,
    check: Callable[[Welcome], str],
    token: bytes = b"",
) -> tuple[Identity, bytes]:
    """Return the client's half, on a blocking socket whose timeout bounds all of it.

    Args:
        introduction: told to the server once it has proven itself.
        check: a reason to give up after the server has introduced itself, or "".
        token: what the server was told to expect, if it was; the hello names it.

    Returns:
        Who the server is, and its answer to the introduction's offer.

    Raises:
        TransportUnavailable: either end refused, in words.
        ProtocolError, PeerLost: the other end is no kvferry engine, or went away.
    """
    deadline_s = _deadline_s(sock)
    nonce = secrets.token_bytes(NONCE_NBYTES)
    peer = address.identity.name
    secret = address.secret + token
    with contextlib.suppress(PeerLost):  # it may have refused before it heard anything
        _send(sock, Hello(LINK_VERSION, address.engine_id, nonce, introduction.token_id))
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
    body = msgspec.msgpack.encode(introduction)
    _send(sock, Proof(_proof(secret, b"client", nonce, challenge.nonce, body), body))
    welcome = _receive(sock, Welcome, peer, deadline_s)
    refused = welcome.refused
    if not refused:
        refused = check(welcome)
        _send(sock, Confirm(refused))
    if refused:
        raise TransportUnavailable(refused, operation="connect", peer=peer)
    if welcome.identity is None:
        raise ProtocolError("the engine does not say who it is", operation="connect", peer=peer)
    return welcome.identity, welcome.answer


def accept(
    sock: socket.socket,
    me: Identity,
    secret: bytes,
    probe: tuple[int, bytes],
    check: Callable[[Introduction], str],
    token_of: Callable[[bytes], tuple[bytes, str]] = lambda _: (b"", ""),
    answer: Callable[[Introduction], bytes] = lambda _: b"",
    proven: Callable[[], None] = lambda: None,
) -> Introduction:
    """Return the server's half, on a blocking socket whose timeout bounds all of it.

    Args:
        probe: address and content of a word of this process that a `cma` client tries to read.
        check: a reason to refuse a client that has proven itself, or "".
        token_of: the token that a client has to prove, too, by its name, and a reason to refuse it,
            or "".
        answer: what of this end the transport needs, for a client that is not refused.
        proven: called once the client is no stranger any more.

    Raises:
        TransportUnavailable: refused by either end. ProtocolError, PeerLost: as for `connect`.
    """
    deadline_s = _deadline_s(sock)
    body = _receive_body(sock, Hello, "", deadline_s)
    version = _decode(body, _Versioned, "").version
    if version != LINK_VERSION:
        refused = f"link protocol {version} is not {LINK_VERSION}: install equal versions"
        refuse(sock, refused)
        raise TransportUnavailable(refused, operation="accept")
    hello = _decode(body, Hello, "")
    refused = ""
    if hello.server_engine_id != me.engine_id:
        refused = "this engine was restarted since its address was published: fetch the new one"
    else:
        token, refused = token_of(hello.token_id)
        secret += token
    if refused:
        refuse(sock, refused)
        raise TransportUnavailable(refused, operation="accept")
    nonce = secrets.token_bytes(NONCE_NBYTES)
    _send(sock, Challenge("", nonce, _proof(secret, b"server", hello.nonce, nonce)))
    proof = _receive(sock, Proof, "", deadline_s)
    expected = _proof(secret, b"client", hello.nonce, nonce, proof.introduction)
    if not hmac.compare_digest(proof.proof, expected):
        _send(
            sock, Welcome("the proof is wrong: the address and its secret do not belong together")
        )
        raise ProtocolError("a client failed its proof", operation="accept")
    proven()
    introduction = _decode(proof.introduction, Introduction, "")
    peer = introduction.identity.name
    if introduction.token_id != hello.token_id:
        raise ProtocolError("a client names two tokens", operation="accept", peer=peer)
    refused = check(introduction)
    answered = b""
    if not refused:
        try:
            answered = answer(introduction)
        except EngineError as error:
            refused = error.message
    _send(sock, Welcome(refused, me, *probe, answered))
    if not refused:
        refused = _receive(sock, Confirm, peer, deadline_s).refused
    if refused:
        raise TransportUnavailable(refused, operation="accept", peer=peer)
    return introduction


def refuse(sock: socket.socket, why: str) -> None:
    """Tell a client that there is nothing to talk about, and nothing else.

    Raises:
        PeerLost: it is gone.
    """
    _send(sock, Challenge(why, bytes(NONCE_NBYTES), b""))


def _deadline_s(sock: socket.socket) -> float:
    return time.monotonic() + (sock.gettimeout() or 0.0)


def _proof(
    secret: bytes, role: bytes, client_nonce: bytes, server_nonce: bytes, said: bytes = b""
) -> bytes:
    return hmac.new(secret, role + client_nonce + server_nonce + said, hashlib.sha256).digest()


def _send(sock: socket.socket, message: msgspec.Struct) -> None:
    body = msgspec.msgpack.encode(message)
    try:
        sock.sendall(len(body).to_bytes(4, "little") + body)
    except OSError as error:
        raise _lost(error, "") from error


def _receive(sock: socket.socket, kind: type[_T], peer: str, deadline_s: float) -> _T:
    return _decode(_receive_body(sock, kind, peer, deadline_s), kind, peer)


def _receive_body(sock: socket.socket, kind: type[Any], peer: str, deadline_s: float) -> bytes:
    try:
        size = int.from_bytes(_exactly(sock, 4, deadline_s), "little")
        if not 0 < size <= MAX_HELLO_NBYTES:
            raise ProtocolError(
                f"a {kind.__name__} of {size} bytes is not between 1 and {MAX_HELLO_NBYTES}",
                operation="handshake",
                peer=peer,
            )
        return _exactly(sock, size, deadline_s)
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


def _decode(body: bytes, kind: type[_T], peer: str) -> _T:
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

    def token_of(self, name: bytes) -> tuple[bytes, str]:
        """Return the token of that name, which a client has to prove, and why it is refused even so
        ("" if it is not)."""
        if not name:
            return b"", "this engine admits links with a one-time token only" * self._required
        with self._lock:
            self._forget_late(time.monotonic())
            entry = self._entries.get(name)
            if entry is None:
                return b"", "this token is used, late or another engine's: meet again"
            return entry.token, ""

    def use(self, client: Introduction) -> str:
        """Use up the token that a client has proven. Returns why it is refused even so,
        or ""."""
        if not client.token_id:
            return ""
        with self._lock:
            entry = self._entries.get(client.token_id)
            first = client.rail < 0
            if entry is None or entry.link_id != ("" if first else client.link_id):
                return "this token has been used: meet again"
            if not hmac.compare_digest(
                entry.engine_id.encode(), client.identity.engine_id.encode()
            ):
                return "this token is used, late or another engine's: meet again"
            if first:
                entry.link_id = client.link_id  # its rails may still come; another link may not
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

    def refusal(self, sock: socket.socket, transport: str, peer: Introduction | Welcome) -> str:
        """Try to read the word of whoever is at the other end; a reason to refuse it, or "".

        Args:
            peer: what it has sent (`Introduction` or `Welcome`): who it is, and where its word lies.
        """
        if transport not in LOCAL:
            return ""
        pid, _ = _peer(sock)
        same = peer.identity is not None and peer.identity.pid == pid
        if transport == "cuda_ipc" and same:
            return ""  # no need to reach its host memory
        try:
            if same and cma.read_word(pid, peer.probe) == peer.probe_word:
                return ""
        except OSError as error:
            return cma.refusal(error)
        return "the engine at the other end of the socket is not the process that it seems to be"


def foreign_user(sock: socket.socket) -> str:
    """Return why the user at the other end of a Unix socket is refused, or "": its name is no secret,
    and only the same user, or root, can reach this process's memory."""
    user = _peer(sock)[1]
    if user in (0, os.geteuid()):
        return ""
    return (
        f"this engine runs as user {os.geteuid()} and takes no local links of user {user}: run both "
        "as one user, or use tcp"
    )


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket, as this process's namespaces number them."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("iII", credentials)
    return pid, uid
