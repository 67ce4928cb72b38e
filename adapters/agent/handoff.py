"""What an engine holds of a handoff: wait for it, cancel it, know when its blocks are free."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from ...control.errors import HandoffTimeout
from ...control.handoff.events import SourceFinished, SourceReady, UserCancelled
from ...engine.errors import DeadlineExceeded
from ...engine.memory.cuda_events import mark
from ...engine.transfer.ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import torch
    from typing_extensions import Self

    from ...control.handoff.events import Event
    from ...engine.transfer_engine import TransferEngine

Part = TypeVar("Part", bound="Pending")


class Pending:
    """What ends once, with a byte count or an error, and whose blocks are free then or later.

    Thread-safe.

    Attributes:
        request_id: the request; "" for several.
        peer: the peer agent's name; "" where that is nobody in particular.
        finished_s: when it ended, in monotonic seconds; 0 until then.
        blocks_free: a ticket that ends well when no peer and no thread of this process can touch
            this side's blocks any more: after a failure that may be later. It ends with
            `AgentClosed` if this agent was closed before that could be known.
    """

    def __init__(self, request_id: str, peer: str, outcome: Ticket, blocks_free: Ticket) -> None:
        self.request_id = request_id
        self.peer = peer
        self.finished_s = 0.0
        self.blocks_free = blocks_free
        self._outcome = outcome
        outcome.add_done_callback(self._note_end)

    def __repr__(self) -> str:
        state = "pending" if not self.done() else repr(self.error) if self.error else "done"
        return f"<{type(self).__name__} {self.request_id} {state}>"

    def done(self) -> bool:
        """Return whether it ended, well or badly."""
        return self._outcome.done()

    @property
    def error(self) -> Exception | None:
        """What it failed with; None while pending and after success."""
        return self._outcome.exception()

    @property
    def nbytes(self) -> int:
        """Bytes moved; 0 until it ends well."""
        return self._outcome.nbytes

    def cancel(self, reason: str = "cancelled") -> None:
        """Ask for its end: it fails with `HandoffCancelled`, unless it ends before that."""
        raise NotImplementedError

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
        """Call `callback(self)` when it ended, on any thread, even one of the engine's that watches
        over links. It must not block."""
        self._outcome.add_done_callback(lambda _: callback(self))

    def _note_end(self, _: Ticket) -> None:
        self.finished_s = time.monotonic()


class Handoff(Pending):
    """One request's KV on its way, seen from this side. Thread-safe.

    On the decode side, done means that the KV is in the destination blocks. On the prefill side,
    that every byte is placed. After success the blocks are free at once, so `wait` is enough; after
    a failure only `blocks_free` tells.

    Attributes:
        peer: the peer agent's name; "" on the prefill side, which serves whoever asks.
        started_s: when it began, in monotonic seconds.
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
        self._tell = tell
        self._key = 0  # of its machine; for who has the agent's turn
        self._placed_ns = 0  # when its peer was known and connected; decode's side
        self._withdrawn = ""  # why it was cancelled before it had one; likewise

    def cancel(self, reason: str = "cancelled") -> None:
        """Ask for its end: it fails with `HandoffCancelled`, unless it ends before that."""
        self._tell(self, UserCancelled(reason))

    def _refuse(self, error: Exception) -> None:
        """End one that never began: its blocks are free."""
        self._outcome._fail(error)
        self.blocks_free._finish(0)


@dataclass
class _Step:
    event: SourceReady | SourceFinished
    computed: bool = False


class SendHandoff(Handoff):
    """A handoff whose layers go out while later ones are being computed. One writer.

    In GPU memory each is told of once the stream behind it has got there, in the order in which they
    were named. The host waits for nothing: the engine watches the events.

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
        self._engine = engine
        self._device = device  # the GPU of the cache, or -1: then what is named is computed
        self._lock = threading.Lock()
        self._uncomputed: deque[_Step] = deque()
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
            self._tell_after(stream, SourceReady((layers.start, layers.stop)))

    def finish(self, *, stream: torch.cuda.Stream | None = None) -> None:
        """All layers are computed; those that were not named yet go now. Does not block.

        `stream` as for `write_layers`.
        """
        if not self._complete:
            self._complete = True
            self._tell_after(stream, SourceFinished())

    def _tell_after(
        self, stream: torch.cuda.Stream | None, event: SourceReady | SourceFinished
    ) -> None:
        """Tell of `event` when `stream` has done what it has been given so far."""
        if self._device < 0:
            self._tell(self, event)
            return
        reached = mark(self._device, stream, "send")
        step = _Step(event)
        with self._lock:
            self._uncomputed.append(step)
        self._engine.when_computed(
            reached, partial(self._computed, step), lambda error: self.cancel(error.message)
        )

    def _computed(self, step: _Step) -> None:
        with self._lock:
            step.computed = True
            while self._uncomputed and self._uncomputed[0].computed:
                self._tell(self, self._uncomputed.popleft().event)


class HandoffSet(Pending, Generic[Part]):
    """Several handoffs of one request, as one: between ranks, each pair of ranks has one of its own.

    Done when all are. When one fails the others are cancelled, since a request whose KV one rank
    cannot move is of no use to the others, and the set fails with the first one's error.
    Thread-safe.

    Attributes:
        parts: the handoffs, or sets of them.
        blocks_free: a ticket that ends when all parts have ended and the blocks of all are free.
    """

    def __init__(self, parts: Sequence[Part] = ()) -> None:
        super().__init__("", "", Ticket("handoff"), Ticket("free"))
        self.parts: tuple[Part, ...] = ()
        self._lock = threading.Lock()
        self._num_pending = 1  # with this call, so that nothing ends before all are there
        self._num_held = 1  # parts that are pending, and parts whose blocks are not free
        self._never_free: Exception | None = None  # why blocks of a part cannot be given back
        for part in parts:
            self.add(part)
        self._one_ended()
        self._one_free()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.parts)}, {self._num_pending} pending>"

    def add(self, part: Part) -> None:
        """Take one more handoff in; where the set has ended already, that one is cancelled."""
        with self._lock:
            self.parts += (part,)
            self._num_pending += 1
            self._num_held += 2
        part.add_done_callback(self._part_ended)
        part.blocks_free.add_done_callback(self._part_free)
        if self.done():
            part.cancel(f"another rank failed: {self.error}" if self.error else "the others ended")

    def cancel(self, reason: str = "cancelled") -> None:
        """Ask for the end of all of them."""
        for part in self.parts:
            if not part.done():
                part.cancel(reason)

    def _part_ended(self, part: Part) -> None:
        if part.error is not None and self._outcome._fail(part.error):
            self.cancel(f"another rank failed: {part.error}")
        self._one_ended()
        self._one_free()

    def _part_free(self, blocks: Ticket) -> None:
        self._never_free = self._never_free or blocks.exception()
        self._one_free()

    def _one_ended(self) -> None:
        with self._lock:
            self._num_pending -= 1
            last = not self._num_pending
        if last:  # nothing happens if one has failed
            self._outcome._finish(sum(part.nbytes for part in self.parts))

    def _one_free(self) -> None:
        with self._lock:
            self._num_held -= 1
            last = not self._num_held
        if last and self._never_free is not None:
            self.blocks_free._fail(self._never_free)
        elif last:
            self.blocks_free._finish(0)
