"""One-time tokens: who may open a link to this engine.

An engine's address holds a secret that admits whoever has it, for as long as the engine lives. A
token narrows that to one link of one peer: whoever meets the peer elsewhere, and knows it, gives
the same token to both engines. What it proves about the peer is not the engine's business.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from typing import TYPE_CHECKING

from ..errors import OutOfRange

if TYPE_CHECKING:
    from .handshake import Hello

TOKEN_NBYTES = 32
MAX_TOKENS = 4096  # waiting at once; the oldest goes first
RAIL_TIMEOUT_S = 10.0  # for a link's rails to follow its control channel


class _Entry:
    __slots__ = ("deadline_s", "engine_id", "link_id", "token")

    def __init__(self, token: bytes, engine_id: str, deadline_s: float) -> None:
        self.token = token
        self.engine_id = engine_id
        self.deadline_s = deadline_s
        self.link_id = ""


def token_id(token: bytes) -> bytes:
    """Names a token to whoever has it, and tells nobody else anything."""
    return hashlib.sha256(b"kvferry token" + token).digest()[:16] if token else b""


class Admissions:
    """The tokens of one engine. Thread-safe.

    Args:
        required: whether a link without a token is refused.
    """

    def __init__(self, *, required: bool) -> None:
        self._required = required
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}

    def expect(self, token: bytes, engine_id: str, timeout_s: float) -> None:
        """Lets that engine open one link with that token, within `timeout_s`.

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
        """The token that a client has to prove, and why it is refused even so ("" if it is not)."""
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
        """A client has proven its token: it is used up. Returns why it is refused even so, or ""."""
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
