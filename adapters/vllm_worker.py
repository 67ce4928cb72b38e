"""The worker side of the vLLM connector: one agent for each rank, driven by the scheduler's orders.

    before the forward pass   sends are opened, those of preempted requests ended
    after each layer          its blocks go out
    after the forward pass    what is left goes out; receives begin
    at the end of the step    what has ended is reported, once

A request is reported only when nobody can touch its blocks any more: vLLM reuses them at once.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..control.errors import ControlError, HelloRefused, NotConnected
from ..control.keys import Keys, is_local
from ..engine.errors import EngineError
from .agent import Agent
from .ranks import connect_ranks, num_readers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from ..engine.layout import KVLayout
    from .handoffs import Handoff, SendHandoff
    from .vllm_orders import Orders, ReceiveOrder, SendOrder
    from .vllm_settings import Settings

CONNECT_TIMEOUT_S = 5.0
PREEMPT_TIMEOUT_S = 10.0  # beyond what an agent needs to drain a write, or to cut its link
REFUSAL_S = 10.0  # how long a refused handoff waits for who asks for it
# Without a forward pass vLLM sleeps 1 ms and asks again, through two processes. Waiting here instead
# saves those rounds: a load is seen when it ends, often in the step that began it. New requests wait
# as long at worst.
IDLE_WAIT_S = 0.002

Addresses = tuple[str, ...]  # of a prefill engine's agents, by rank

log = logging.getLogger("kvferry.vllm")


class _Send:
    """One request's blocks on their way out, to as many ranks of decode as read from this one.

    Attributes:
        handoffs: one, and as many more as decode turns out to need.
        next_layer: the position of the layer that goes out next.
        computed: whether all have.
        reportable: whether the scheduler waits for its end.
        cancelled: whether it was this engine that gave up.
    """

    def __init__(self, order: SendOrder) -> None:
        self.order = order
        self.handoffs: list[SendHandoff] = []
        self.next_layer = 0
        self.computed = False
        self.reportable = False
        self.cancelled = False


class _Receive:
    """One request's blocks on their way in, from the ranks of prefill that have some of them.

    Attributes:
        handoffs: one for each of those ranks; empty before they are known.
        error: why it could not begin, or what the first that failed failed with.
    """

    def __init__(self, order: ReceiveOrder) -> None:
        self.order = order
        self.handoffs: list[Handoff] = []
        self.error: Exception | None = None
        self.cancelled = ""
        self.retried = False
        self.started_s = time.monotonic()


class Results:
    """What a step reports: requests by how they ended."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[str] = set()


class WorkerSide:
    """One rank's worker. Called by vLLM's thread; agents report from threads of their own.

    Args:
        engine_id, rank: name this rank's agent.
        role: `prefill`, `decode` or `both`.
        settings: see there.
        layout, caches: see `vllm_layout.describe_caches`; the caches by position in the layout.
        positions: of the layers, by vLLM's name.
        ranks: the layouts of all ranks of this engine, if it has several.
        model: what clients call it; for the daemon.
        blocks_split: cache blocks that one block of vLLM's block manager stands for.
    """

    def __init__(
        self,
        *,
        engine_id: str,
        rank: int,
        role: Any,
        settings: Settings,
        layout: KVLayout,
        caches: list[Any],
        positions: dict[str, int],
        ranks: Sequence[KVLayout] = (),
        model: str = "",
        blocks_split: int = 1,
    ) -> None:
        self._settings = settings
        self._rank = rank
        self._positions = positions
        self._split = blocks_split
        self._ranked = len(ranks) > 1
        self._tokens = layout.regions[0].tokens_per_slot
        self._num_layers = layout.num_layers
        self._changed = threading.Condition()
        self._streaming: list[_Send] = []
        self._sends: dict[str, _Send] = {}
        self._receives: dict[str, _Receive] = {}
        self._ended_sends: set[str] = set()
        self._ended_receives: set[str] = set()
        self._peers: dict[Addresses, dict[int, str]] = {}
        self._connecting: dict[Addresses, list[_Receive]] = {}
        port = str(settings.port + rank) if settings.port else "*"
        host = settings.host if is_local(settings.host) else "*"
        self.agent = Agent(
            name=agent_name(engine_id, rank),
            role=role,
            layout=layout,
            tensors=caches,
            bind=f"tcp://{host}:{port}",
            transports=settings.transports or None,
            verify=settings.verify,
            advertise_host=settings.host,
            keys=Keys.load(settings.keys) if settings.keys else None,
            # An engine is placed as one: its first rank speaks for all.
            daemon=settings.daemon if rank == 0 else "",
            service=settings.service,
            model=model,
            ranks=ranks,
            rank=rank if ranks else 0,
        )
        self._reports = bool(settings.daemon) and rank == 0
        self._figures = _no_figures()

    def close(self) -> None:
        """Ends everything."""
        self.agent.close()

    # A step, in order

    def end_preempted(self, orders: Orders) -> None:
        """Before the blocks of preempted requests are given to others.

        Raises:
            RuntimeError: a peer still reads them.
        """
        for req_id in orders.preempted_sends:
            self._end_preempted(req_id)

    def before_forward(self, orders: Orders) -> None:
        """Ends what must not be read any more, and opens what this step computes."""
        if self._reports:
            self.agent.report(
                queued_tokens=orders.queued_tokens, free_blocks=orders.free_blocks * self._split
            )
        for req_id in orders.cancelled_sends:
            self._finish_send(req_id, cancel="the request was aborted")
        for req_id in orders.finished_sends:
            self._finish_send(req_id)
        for handoff_id in orders.refused:
            self.agent.send(handoff_id, [], timeout_s=REFUSAL_S)
        for order in orders.sends:
            self._open_send(order)

    def layer_computed(self, name: str) -> None:
        """A layer of this step's forward pass is done."""
        position = self._positions.get(name)
        for send in self._streaming if position is not None else ():
            if send.next_layer == position:
                with self._changed:  # a rank of decode may ask just now
                    send.next_layer += 1
                    for handoff in send.handoffs:
                        handoff.write_layers(range(position, position + 1))

    def after_forward(self) -> None:
        """The forward pass is done, all layers of it."""
        for send in self._streaming:
            with self._changed:
                send.computed = True
                for handoff in send.handoffs:
                    handoff.finish()
        self._streaming.clear()

    def begin_receives(self, orders: Orders) -> None:
        """Begins to load, and ends loads that nobody waits for any more."""
        for order in orders.receives:
            receive = _Receive(order)
            if order.awaited:
                self._receives[order.req_id] = receive
            self._begin_receive(receive)
        for req_id in orders.cancelled_receives:
            self._cancel_receive(req_id)

    def take_results(self, *, idle: bool) -> Results:
        """What has ended since the last call. Waits a little if the step has nothing else to do."""
        results = Results()
        with self._changed:
            if idle and (self._receives or self._sends) and not self._something_to_report():
                self._changed.wait_for(self._something_to_report, IDLE_WAIT_S)
            for req_id in [r for r in self._ended_sends if self._sends[r].reportable]:
                self._ended_sends.discard(req_id)
                self._note_sent(self._sends.pop(req_id))
                results.sent.add(req_id)
            for req_id in self._ended_receives:
                self._note_received(self._receives.pop(req_id), results)
            self._ended_receives.clear()
        return results

    @property
    def has_figures(self) -> bool:
        """Whether anything ended since `take_figures`."""
        return any(self._figures.values())

    def take_figures(self) -> dict[str, Any]:
        """What ended since the last call, as `vllm_stats.KVFerryStats` has it."""
        figures, self._figures = self._figures, _no_figures()
        return figures

    def _something_to_report(self) -> bool:
        return bool(self._ended_receives) or any(
            self._sends[req_id].reportable for req_id in self._ended_sends
        )

    # Sending

    def _open_send(self, order: SendOrder) -> None:
        send = self._sends[order.req_id] = _Send(order)
        self._streaming.append(send)
        with self._changed:
            self._add_reader(send)

    def _add_reader(self, send: _Send) -> None:
        """One more handoff of the same blocks, as far along as the others. Called with the lock."""
        order = send.order
        handoff = self.agent.open_send(
            order.handoff_id,
            self._cache_blocks(order.block_ids, 0, order.num_tokens),
            timeout_s=self._settings.lease_s + self._settings.timeout_s,
            on_asked=partial(self._asked, send) if not send.handoffs else None,
        )
        send.handoffs.append(handoff)
        if send.next_layer:
            handoff.write_layers(range(send.next_layer))
        if send.computed:
            handoff.finish()
        handoff.blocks_free.add_done_callback(lambda _: self._send_ended(send))
        handoff.add_done_callback(lambda _: self._send_ended(send))

    def _asked(self, send: _Send, peer: str) -> None:
        """On the agent's thread: with who asks it is known how many will."""
        try:
            readers = num_readers(self.agent, peer)
        except (ControlError, EngineError):
            return  # it is gone again, and the handoff ends for that reason
        with self._changed:
            while len(send.handoffs) < readers:
                self._add_reader(send)

    def _send_ended(self, send: _Send) -> None:
        """On an agent's thread."""
        with self._changed:
            handoffs = list(send.handoffs)
            if all(map(_at_rest, handoffs)) and self._sends.get(send.order.req_id) is send:
                self._ended_sends.add(send.order.req_id)
                self._changed.notify_all()
        _end_together(handoffs)

    def _finish_send(self, req_id: str, cancel: str = "") -> None:
        send = self._sends.get(req_id)
        if send is None:
            return
        with self._changed:
            send.reportable = True
        if cancel:
            send.cancelled = True
            self._cancel_send(send, cancel)

    def _end_preempted(self, req_id: str) -> None:
        """The blocks go to others in this very step: nothing may read them from here on."""
        send = self._sends.get(req_id)
        if send is None:
            return
        self._cancel_send(send, "the request was preempted")
        with self._changed:
            ended = self._changed.wait_for(lambda: req_id in self._ended_sends, PREEMPT_TIMEOUT_S)
            self._ended_sends.discard(req_id)
            del self._sends[req_id]
        if not ended:
            raise RuntimeError(
                f"the blocks of preempted request {req_id} are still being read after "
                f"{PREEMPT_TIMEOUT_S} s, and vLLM is about to overwrite them: stop the decode "
                "engine that does not answer"
            )

    def _cancel_send(self, send: _Send, reason: str) -> None:
        with self._changed:
            for handoff in send.handoffs:
                handoff.cancel(reason)

    def _note_sent(self, send: _Send) -> None:
        error = _first_error(send.handoffs)
        if error is None:
            self._figures["sent_nbytes"].append(sum(each.nbytes for each in send.handoffs))
        else:
            self._figures["sends_failed"] += not send.cancelled
            log.warning("KV of request %s was not handed over: %s", send.order.req_id, error)

    # Receiving

    def _begin_receive(self, receive: _Receive) -> None:
        order = receive.order
        addresses = tuple(order.addresses)
        names = self._peers.get(addresses)
        if names is None:
            self._connect_first(receive, addresses)
            return
        for rank, name in names.items():
            wanted = agent_name(order.peer, rank)
            if name != wanted:
                where = addresses[rank]
                why = f"{where} is {name} now, not {wanted}: the prefill engine was restarted"
                self._refuse(receive, HelloRefused(why, peer=name, operation="receive"))
                return
        handoffs: list[Handoff] = []
        try:
            for name in names.values():
                handoffs.append(self._receive_from(name, order))
        except (ControlError, EngineError) as error:
            lost = isinstance(error, NotConnected)
            if lost:
                self._peers.pop(addresses, None)  # the link went down; the peer may be back
            if lost and not handoffs and not receive.retried:
                receive.retried = True
                self._connect_first(receive, addresses)
                return
            receive.error = error
            if not handoffs:
                self._refuse(receive, error)
                return
            for handoff in handoffs:
                handoff.cancel(f"another rank could not be asked: {error}")
        receive.handoffs = handoffs
        for handoff in handoffs:
            handoff.blocks_free.add_done_callback(lambda _: self._receive_ended(receive))
            handoff.add_done_callback(lambda _: self._receive_ended(receive))
        if receive.cancelled:
            self._cancel_all(receive)

    def _receive_from(self, name: str, order: ReceiveOrder) -> Handoff:
        """Asks one rank of prefill for what it has of a request.

        Raises:
            ControlError, EngineError: it cannot be asked.
        """
        skip = -(-order.num_local_tokens // self._tokens)
        blocks = self._cache_blocks(order.block_ids, skip, order.num_tokens)
        mode, timeout_s = self._settings.mode, self._settings.timeout_s
        if not self._ranked and len(order.addresses) == 1:
            return self.agent.receive(
                order.handoff_id, name, blocks, mode=mode, skip_blocks=skip, timeout_s=timeout_s
            )
        # Ranks know each other's tokens, not blocks; those before `start_token` are never touched.
        return self.agent.receive_tokens(
            order.handoff_id,
            name,
            np.concatenate([np.zeros(skip, np.int64), blocks]),
            num_tokens=max(order.num_tokens, skip * self._tokens),
            start_token=skip * self._tokens,
            mode=mode,
            timeout_s=timeout_s,
        )

    def _connect_first(self, receive: _Receive, addresses: Addresses) -> None:
        with self._changed:
            waiting = self._connecting.setdefault(addresses, [])
            waiting.append(receive)
            first = len(waiting) == 1
        if first:
            threading.Thread(
                target=self._connect, args=(addresses,), name="kvferry-connect", daemon=True
            ).start()

    def _connect(self, addresses: Addresses) -> None:
        """On a thread of its own: gets acquainted, then begins what waits for it."""
        error: Exception | None = None
        try:
            peers = connect_ranks(self.agent, addresses, CONNECT_TIMEOUT_S)
            self._peers[addresses] = peers.names
        except (ControlError, EngineError) as failure:
            error = failure
        with self._changed:
            waiting = self._connecting.pop(addresses)
        for receive in waiting:
            if error is not None:
                self._refuse(receive, error)
            elif receive.cancelled and receive.order.awaited:
                self._refuse(receive, NotConnected(receive.cancelled, operation="receive"))
            else:
                self._begin_receive(receive)

    def _refuse(self, receive: _Receive, error: Exception) -> None:
        """Ends a receive that never began."""
        receive.error = error
        if not receive.order.awaited:
            log.warning("prefill still holds blocks of %s: %s", receive.order.handoff_id, error)
        self._note_end(receive)

    def _receive_ended(self, receive: _Receive) -> None:
        """On an agent's thread."""
        _end_together(receive.handoffs)
        if all(map(_at_rest, receive.handoffs)):
            receive.error = receive.error or _first_error(receive.handoffs)
            self._note_end(receive)

    def _note_end(self, receive: _Receive) -> None:
        with self._changed:
            if self._receives.get(receive.order.req_id) is receive:
                self._ended_receives.add(receive.order.req_id)
                self._changed.notify_all()

    def _cancel_receive(self, req_id: str) -> None:
        receive = self._receives.get(req_id)
        if receive is not None:
            receive.cancelled = "the request was aborted"
            self._cancel_all(receive)

    def _cancel_all(self, receive: _Receive) -> None:
        for handoff in receive.handoffs:
            handoff.cancel(receive.cancelled)

    def _note_received(self, receive: _Receive, results: Results) -> None:
        req_id = receive.order.req_id
        results.received.add(req_id)
        if receive.error is None:
            ended_s = max(each.finished_s for each in receive.handoffs)
            self._figures["load_seconds"].append(ended_s - receive.started_s)
            self._figures["load_nbytes"].append(sum(each.nbytes for each in receive.handoffs))
            return
        results.failed.add(req_id)
        if not receive.cancelled:
            self._figures["loads_failed"] += 1
            log.warning("KV of request %s was not loaded: %s", req_id, receive.error)

    def _cache_blocks(
        self, block_ids: Iterable[int], skip: int, num_tokens: int
    ) -> npt.NDArray[np.int64]:
        """The cache's blocks for a list of vLLM's, which begins after `skip` of the cache's."""
        ids = np.asarray(list(block_ids), np.int64)
        if self._split > 1:
            ids = (ids[:, None] * self._split + np.arange(self._split)).ravel()
        return ids[: max(0, -(-num_tokens // self._tokens) - skip)]


def _no_figures() -> dict[str, Any]:
    return {
        "load_seconds": [],
        "load_nbytes": [],
        "sent_nbytes": [],
        "loads_failed": 0,
        "sends_failed": 0,
    }


def agent_name(engine_id: str, rank: int) -> str:
    """What the agent of an engine's rank is called."""
    return f"{engine_id}/{rank}"


def _at_rest(handoff: Handoff) -> bool:
    """Whether it ended and nobody can touch its blocks."""
    return handoff.done() and handoff.blocks_free.done()


def _first_error(handoffs: Sequence[Handoff]) -> Exception | None:
    """What the first that failed failed with."""
    failed = [each for each in handoffs if each.error is not None]
    return min(failed, key=lambda each: each.finished_s).error if failed else None


def _end_together(handoffs: Sequence[Handoff]) -> None:
    """A request whose KV one rank cannot move is of no use to the others."""
    error = _first_error(handoffs)
    for each in handoffs if error is not None else ():
        if not each.done():
            each.cancel(f"another rank failed: {error}")
