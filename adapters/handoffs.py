"""What an engine holds of a handoff: wait for it, cancel it, know when its blocks are free."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from ..control.errors import HandoffTimeout
from ..control.events import SourceFinished, SourceReady, UserCancelled
from ..engine.errors import DeadlineExceeded
from ..engine.tickets import Ticket
from .compute_order import ComputeOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import torch

    from ..control.events import Event
    from ..engine.transfer import TransferEngine


class Handoff:
    """One request's KV on its way, seen from this side. Thread-safe.

    On the decode side, done means that the KV is in the destination blocks. On the prefill side,
    that every byte is placed. After success the blocks are free at once, so `wait` is enough; after
    a failure only `blocks_free` tells.

    Attributes:
        request_id: the request.
        peer: the peer agent's name; "" on the prefill side, which serves whoever asks.
        blocks_free: a ticket that ends well when no peer and no thread of this process can touch
            this side's blocks any more: after a failure that may be later. It ends with
            `AgentClosed` if this agent was closed before that could be known.
        started_s, finished_s: monotonic seconds; `finished_s` is 0 until it is done.
    """

    def __init__(
        self,
        request_id: str,
        peer: str,
        operation: str,
        tell: Callable[[Handoff, Event], None],
    ) -> None:
        self.request_id = request_id
        self.peer = peer
        self.started_s = time.monotonic()
        self.finished_s = 0.0
        self.blocks_free = Ticket("free", peer=peer)
        self._outcome = Ticket(operation, peer=peer)
        self._outcome.add_done_callback(self._note_end)
        self._tell = tell
        self._key = 0  # of its machine; the agent's thread writes and reads it
        self._withdrawn = ""  # why it was cancelled before it had one; likewise

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
            HandoffError, AgentClosed: how it failed. HandoffTimeout: `timeout_s` passed.
        """
        try:
            return self._outcome.wait(timeout_s)
        except DeadlineExceeded as error:  # of this wait: the outcome itself has no deadline
            raise HandoffTimeout(
                f"{self.request_id} is still pending after a wait of {timeout_s} s",
                peer=self.peer,
                operation=self._outcome.operation,
            ) from error

    def __await__(self) -> Generator[object, None, int]:
        return self._outcome.__await__()

    def cancel(self, reason: str = "cancelled") -> None:
        """Asks for its end: it fails with `HandoffCancelled`, unless it ends before that."""
        self._tell(self, UserCancelled(reason))

    def add_done_callback(self, callback: Callable[[Handoff], None]) -> None:
        """Calls `callback(handoff)` when it ended. It must not block."""
        self._outcome.add_done_callback(lambda _: callback(self))

    def _note_end(self, _: Ticket) -> None:
        self.finished_s = time.monotonic()


class SendHandoff(Handoff):
    """A handoff whose layers go out while later ones are being computed. One writer."""

    def __init__(
        self,
        request_id: str,
        num_layers: int,
        tell: Callable[[Handoff, Event], None],
        engine: TransferEngine,
        device: int,
    ) -> None:
        super().__init__(request_id, "", "send", tell)
        self._order = ComputeOrder(engine, device, lambda error: self.cancel(error.message))
        self._num_layers = num_layers
        self._next_layer = 0
        self._complete = False

    def write_layers(self, layers: range, *, stream: torch.cuda.Stream | None = None) -> None:
        """The next layers are computed: they go out, once the request is known. Does not block.

        Args:
            layers: positions in the layout's `layers`; they follow on those named before.
            stream: for GPU memory, the stream that computes them: they go out when what it has been
                given so far is done. The device's current one if None.

        Raises:
            ValueError: layers are left out, named twice or not there.
        """
        if layers.step != 1 or layers.start != self._next_layer or self._complete:
            raise ValueError(
                f"{layers} cannot come now: name layers in order, each once, before finish(); "
                f"the next is {self._next_layer}"
            )
        if layers.stop > self._num_layers:
            raise ValueError(f"{layers} ends after the last of {self._num_layers} layers")
        if len(layers):
            self._next_layer = layers.stop
            ready = SourceReady((layers.start, layers.stop))
            self._order.after(stream, partial(self._tell, self, ready))

    def finish(self, *, stream: torch.cuda.Stream | None = None) -> None:
        """All layers are computed; those that were not named yet go now. Does not block.

        `stream` as for `write_layers`.
        """
        if not self._complete:
            self._complete = True
            self._order.after(stream, partial(self._tell, self, SourceFinished()))
