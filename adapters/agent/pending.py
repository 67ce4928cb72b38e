"""Something that an engine waits for: one handoff, or several as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...control.errors import HandoffTimeout
from ...engine.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from typing_extensions import Self

    from ...engine.transfer.ticket import Ticket


class Pending:
    """What ends once, with a byte count or an error, and whose blocks are free then or later.

    Thread-safe.

    Attributes:
        request_id: the request; "" for several.
        peer: the peer agent's name; "" where that is nobody in particular.
        blocks_free: a ticket that ends well when no peer and no thread of this process can touch
            this side's blocks any more: after a failure that may be later. It ends with
            `AgentClosed` if this agent was closed before that could be known.
    """

    def __init__(self, request_id: str, peer: str, outcome: Ticket, blocks_free: Ticket) -> None:
        self.request_id = request_id
        self.peer = peer
        self.blocks_free = blocks_free
        self._outcome = outcome

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

        `timeout_s` bounds this wait alone; every handoff has a deadline of its own.

        Raises:
            HandoffError, AgentClosed: how it failed. HandoffTimeout: `timeout_s` passed.
        """
        try:
            return self._outcome.wait(timeout_s)
        except DeadlineExceeded as error:  # of this wait: the outcome itself has no deadline
            raise HandoffTimeout(
                f"{self.request_id or self!r} is still pending after a wait of {timeout_s} s",
                peer=self.peer,
                operation=self._outcome.operation,
            ) from error

    def __await__(self) -> Generator[object, None, int]:
        return self._outcome.__await__()

    def add_done_callback(self, callback: Callable[[Self], None]) -> None:
        """Calls `callback(self)` when it ended, on any thread, even one of the engine's that watches
        over links. It must not block."""
        self._outcome.add_done_callback(lambda _: callback(self))
