"""What an engine holds of a handoff: wait for it, cancel it, know when its blocks are free."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from ...control.handoff.events import SourceFinished, SourceReady, UserCancelled
from ...engine.transfer.ticket import Ticket
from .compute_order import ComputeOrder
from .pending import Pending

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ...control.handoff.events import Event
    from ...engine.transfer_engine import TransferEngine


class Handoff(Pending):
    """One request's KV on its way, seen from this side. Thread-safe.

    On the decode side, done means that the KV is in the destination blocks. On the prefill side,
    that every byte is placed. After success the blocks are free at once, so `wait` is enough; after
    a failure only `blocks_free` tells.

    Attributes:
        peer: the peer agent's name; "" on the prefill side, which serves whoever asks.
        started_s, finished_s: monotonic seconds; `finished_s` is 0 until it is done.
    """

    def __init__(
        self,
        request_id: str,
        peer: str,
        operation: str,
        tell: Callable[[Handoff, Event], None],
    ) -> None:
        outcome = Ticket(operation, peer=peer)
        super().__init__(request_id, peer, outcome, blocks_free=Ticket("free", peer=peer))
        self.started_s = time.monotonic()
        self.finished_s = 0.0
        outcome.add_done_callback(self._note_end)
        self._tell = tell
        self._key = 0  # of its machine; for who has the agent's turn
        self._placed_ns = 0  # when its peer was known and connected; decode's side
        self._withdrawn = ""  # why it was cancelled before it had one; likewise

    def cancel(self, reason: str = "cancelled") -> None:
        """Asks for its end: it fails with `HandoffCancelled`, unless it ends before that."""
        self._tell(self, UserCancelled(reason))

    def _note_end(self, _: Ticket) -> None:
        self.finished_s = time.monotonic()


class SendHandoff(Handoff):
    """A handoff whose layers go out while later ones are being computed. One writer.

    Attributes:
        on_asked: called once with the name of the agent that asked for it, on the agent's thread,
            before anything that its question causes. It must not block. Set it before the handoff
            can be asked for, or by `Agent.open_send`.
    """

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
        self.on_asked: Callable[[str], None] | None = None

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
