"""What an engine holds of a handoff: wait for it, cancel it, know when its blocks are free."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..engine.tickets import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ..control.events import Event


class Handoff:
    """One request's KV on its way, seen from this side. Thread-safe.

    On the decode side, done means that the KV is in the destination blocks. On the prefill side,
    that every byte is placed.

    Attributes:
        request_id: the request.
        peer: the peer agent's name; "" on the prefill side, which serves whoever asks.
        blocks_free: a ticket that ends well when no peer and no thread of this process can touch
            this side's blocks any more. After success that is at once; after a failure it may be
            later. Give blocks back to their allocator after this, never after `done()`.
        started_s, finished_s: monotonic seconds; `finished_s` is 0 until it is done.
    """

    def __init__(self, request_id: str, peer: str, operation: str) -> None:
        self.request_id = request_id
        self.peer = peer
        self.started_s = time.monotonic()
        self.finished_s = 0.0
        self.blocks_free = Ticket("free", peer=peer)
        self._outcome = Ticket(operation, peer=peer)
        self._outcome.add_done_callback(self._note_end)
        self._tell: Callable[[Event], None] | None = None

    def __repr__(self) -> str:
        state = "pending" if not self.done() else repr(self.error) if self.error else "done"
        return f"<{type(self).__name__} {self.request_id} {state}>"

    def done(self) -> bool:
        """Whether it ended, well or badly."""
        return self._outcome.done()

    @property
    def error(self) -> Exception | None:
        """What it failed with; None while pending and after success."""
        return self._outcome.exception()

    @property
    def nbytes(self) -> int:
        """Bytes moved; 0 until it ends well."""
        return self._outcome.nbytes

    def wait(self, timeout_s: float | None = None) -> int:
        """Blocks until it ends; returns the bytes moved.

        `timeout_s` bounds this wait alone; the handoff has its own deadline.

        Raises:
            HandoffError: how it failed. DeadlineExceeded: `timeout_s` passed.
        """
        return self._outcome.wait(timeout_s)

    def __await__(self) -> Generator[object, None, int]:
        return self._outcome.__await__()

    def cancel(self, reason: str = "cancelled") -> None:
        """Asks for its end: it fails with `HandoffCancelled`, unless it ends before that."""
        from ..control.events import UserCancelled

        self._event(UserCancelled(reason))

    def add_done_callback(self, callback: Callable[[Handoff], None]) -> None:
        """Calls `callback(handoff)` when it ended. It must not block."""
        self._outcome.add_done_callback(lambda _: callback(self))

    def _event(self, event: Event) -> None:
        if self._tell is not None:
            self._tell(event)

    def _note_end(self, _: Ticket) -> None:
        self.finished_s = time.monotonic()


class SendHandoff(Handoff):
    """A handoff whose layers are sent while later ones are being computed."""

    def write_layers(self, layers: range) -> None:
        """Layers `layers.start` up to `layers.stop`, counted within this cache, are computed.

        Call it in ascending order, each layer once, when the bytes are in memory.
        """
        from ..control.events import SourceReady

        self._event(SourceReady((layers.start, layers.stop)))

    def finish(self) -> None:
        """All layers are computed; those that were not named yet go now."""
        from ..control.events import SourceFinished

        self._event(SourceFinished())
