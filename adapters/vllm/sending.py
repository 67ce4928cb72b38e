"""Requests' blocks on their way out of a worker, layer by layer."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from ...control.errors import ControlError
from ...engine.errors import EngineError
from ..agent.handoff import HandoffSet
from ..agent.ranks import num_readers

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from ..agent.agent import Agent
    from ..agent.handoff import SendHandoff
    from .cache import Tables
    from .orders import Figures, SendOrder

REFUSAL_S = 10.0  # how long a refused handoff waits for who asks for it

log = logging.getLogger("kvferry.vllm")


class _Send:
    """One request's blocks on their way out, to as many ranks of decode as read from this one.

    Attributes:
        handoffs: one, and as many more as decode turns out to need.
        next_layer: the position of the layer that goes out next.
        computed: whether all have.
        reportable: whether the scheduler waits for its end.
        cancelled: whether it was this engine that gave up.
        error: why it could not be opened.
    """

    def __init__(self, order: SendOrder) -> None:
        self.order = order
        self.handoffs: HandoffSet[SendHandoff]
        self.next_layer = 0
        self.computed = False
        self.reportable = False
        self.cancelled = False
        self.error: Exception | None = None


class Sending:
    """All sends of one worker. Called by vLLM's thread; the agent reports from its own.

    Args:
        timeout_s: how long a send may take, with the time that it waits for decode.
        changed: guards what both threads touch; notified when a send ends.
        figures: where its end is noted.
    """

    def __init__(
        self,
        agent: Agent,
        tables: Tables,
        timeout_s: float,
        changed: threading.Condition,
        figures: Figures,
    ) -> None:
        self._agent = agent
        self._tables = tables
        self._timeout_s = timeout_s
        self._changed = changed
        self._figures = figures
        self._streaming: list[_Send] = []
        self._sends: dict[str, _Send] = {}
        self._ended: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._sends)

    def open(self, order: SendOrder) -> None:
        """This step computes the last of a prompt. What cannot be opened has ended at once."""
        send = self._sends[order.req_id] = _Send(order)
        try:
            with self._changed:
                first = self._open_for_reader(send, partial(self._asked, send))
                send.handoffs = HandoffSet([first])
        except (ControlError, EngineError, ValueError) as error:
            send.handoffs, send.error = HandoffSet(()), error
            self._at_rest(send)
            return
        self._streaming.append(send)
        send.handoffs.blocks_free.add_done_callback(lambda _: self._at_rest(send))

    def refuse(self, handoff_id: str) -> None:
        """Decode may ask for this, and it will never have blocks."""
        try:
            self._agent.open_send(
                handoff_id,
                self._tables.empty(),
                timeout_s=REFUSAL_S,
                on_asked=partial(self._refuse_others, handoff_id),
            ).finish()
        except (ControlError, EngineError, ValueError) as error:
            log.warning("decode is not told that %s has no KV: %s", handoff_id, error)

    def layer_computed(self, position: int) -> None:
        """A layer of this step's forward pass is done."""
        for send in self._streaming:
            if send.next_layer == position:
                with self._changed:  # a rank of decode may ask just now
                    send.next_layer += 1
                    for handoff in send.handoffs.parts:
                        handoff.write_layers(range(position, position + 1))

    def all_computed(self) -> None:
        """The forward pass is done, all layers of it."""
        for send in self._streaming:
            with self._changed:
                send.computed = True
                for handoff in send.handoffs.parts:
                    handoff.finish()
        self._streaming.clear()

    def finish(self, req_id: str, cancel: str = "") -> None:
        """The request ended: its send is reported when it has, too."""
        send = self._sends.get(req_id)
        if send is None:
            return
        with self._changed:
            send.reportable = True
        if cancel:
            send.cancelled = True
            self._cancel(send, cancel)

    def reportable(self) -> set[str]:
        """Requests that ended, and whose send did. Called with the lock."""
        return {req_id for req_id in self._ended if self._sends[req_id].reportable}

    def take_reportable(self) -> set[str]:
        """Return the same, once. Called with the lock."""
        ended = self.reportable()
        self._ended -= ended
        for req_id in ended:
            self._note(self._sends.pop(req_id))
        return ended

    def _open_for_reader(
        self, send: _Send, on_asked: Callable[[str], None] | None = None
    ) -> SendHandoff:
        """Open one more handoff of the same blocks, as far along as the others. Called with the
        lock."""
        order = send.order
        handoff = self._agent.open_send(
            order.handoff_id,
            self._tables.of_cache(order.tables, order.num_tokens),
            timeout_s=self._timeout_s,
            on_asked=on_asked,
        )
        if send.next_layer:
            handoff.write_layers(range(send.next_layer))
        if send.computed:
            handoff.finish()
        return handoff

    def _refuse_others(self, handoff_id: str, peer: str) -> None:
        """On the agent's thread: the other ranks that will ask are answered, too."""
        for _ in range(1, self._num_readers(peer)):
            self._agent.send(handoff_id, self._tables.empty(), timeout_s=REFUSAL_S)

    def _num_readers(self, peer: str) -> int:
        """With who asks it is known how many will."""
        try:
            return num_readers(self._agent, peer)
        except (ControlError, EngineError):
            return 1  # it is gone again, and its handoff ends for that reason

    def _asked(self, send: _Send, peer: str) -> None:
        """On the agent's thread."""
        readers = self._num_readers(peer)
        with self._changed:
            while len(send.handoffs.parts) < readers:
                send.handoffs.add(self._open_for_reader(send))

    def _at_rest(self, send: _Send) -> None:
        """Note the end of all of its handoffs. On any thread, an engine's too."""
        with self._changed:
            if self._sends.get(send.order.req_id) is send:
                self._ended.add(send.order.req_id)
                self._changed.notify_all()

    def _cancel(self, send: _Send, reason: str) -> None:
        with self._changed:
            send.handoffs.cancel(reason)

    def _note(self, send: _Send) -> None:
        error = send.error or send.handoffs.error
        if error is None:
            self._figures.sent_nbytes.append(send.handoffs.nbytes)
            return
        if not send.cancelled:
            self._figures.sends_failed += 1
        log.warning("KV of request %s was not handed over: %s", send.order.req_id, error)
