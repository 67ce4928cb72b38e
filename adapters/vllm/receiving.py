"""Requests' blocks on their way into a worker, from one or several ranks of a prefill engine."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from ...control.errors import ControlError, HelloRefused, NotConnected
from ...engine.errors import EngineError
from ..agent.handoff import HandoffSet
from ..agent.ranks import connect_ranks
from .orders import Results
from .steps import TIMEOUT_S as IN_STEP_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...engine.layout.kv_layout import KVLayout
    from ..agent.agent import Agent
    from ..agent.handoff import Handoff
    from ..agent.ranks import RankPeers
    from .cache import Tables
    from .orders import Figures, ReceiveOrder
    from .settings import Settings

CONNECT_TIMEOUT_S = 5.0

Addresses = tuple[str, ...]  # of a prefill engine's agents, by rank

log = logging.getLogger("kvferry.vllm")


def agent_name(engine_id: str, rank: int) -> str:
    """Return what the agent of an engine's rank is called."""
    return f"{engine_id}/{rank}"


class _Receive:
    """One request's blocks on their way in, from the ranks of prefill that have some of them.

    Attributes:
        handoffs: one for each of those ranks; None before they are known.
        error: why it could not begin, or what the first that failed failed with.
    """

    def __init__(self, order: ReceiveOrder) -> None:
        self.order = order
        self.handoffs: HandoffSet[Handoff] | None = None
        self.error: Exception | None = None
        self.cancelled = ""
        self.retried = False
        self.started_s = time.monotonic()


class Receiving:
    """All receives of one worker. Called by vLLM's thread; the agent reports from its own.

    Args:
        ranked: whether this engine has several ranks.
        changed: guards what both threads touch; notified when a receive ends.
        figures: where its end is noted.
    """

    def __init__(
        self,
        agent: Agent,
        tables: Tables,
        settings: Settings,
        changed: threading.Condition,
        figures: Figures,
        *,
        ranked: bool,
    ) -> None:
        self._agent = agent
        self._tables = tables
        self._settings = settings
        self._changed = changed
        self._figures = figures
        self._ranked = ranked
        self._receives: dict[str, _Receive] = {}
        self._ended: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._peers: dict[Addresses, RankPeers] = {}
        self._connecting: dict[Addresses, list[_Receive]] = {}

    def __bool__(self) -> bool:
        return bool(self._receives)

    def begin(self, order: ReceiveOrder) -> None:
        """Ask prefill for what it has of a prompt."""
        receive = _Receive(order)
        if order.awaited:
            self._receives[order.req_id] = receive
        self._begin_or_refuse(receive)

    def _begin_or_refuse(self, receive: _Receive) -> None:
        """Begin; what cannot be is the end of this load alone, whatever stands against it."""
        try:
            self._begin(receive)
        except Exception as error:
            log.exception("a load could not begin; please report this")
            self._refuse(receive, error)

    def cancel(self, req_id: str) -> None:
        """Nobody waits for it any more."""
        receive = self._receives.get(req_id)
        if receive is not None:
            receive.cancelled = "the request was aborted"
            self._cancel_all(receive)

    @property
    def reportable(self) -> bool:
        """Whether any ended. Called with the lock."""
        return bool(self._ended)

    def take_ended(self, results: Results) -> None:
        """Those that ended, once. Called with the lock."""
        for req_id in self._ended:
            self._note(self._receives.pop(req_id), results)
        self._ended.clear()

    def wait_for(self, orders: Sequence[ReceiveOrder]) -> None:
        """Wait until these are loaded or failed, and nobody touches their blocks any more.

        They have deadlines of their own.
        """
        results = Results()
        wanted = {order.req_id for order in orders}
        with self._changed:
            self._changed.wait_for(lambda: self._ended.issuperset(wanted))
            self._ended -= wanted
            for req_id in wanted:
                self._note(self._receives.pop(req_id), results)
        for order in orders:
            if order.req_id in results.failed:  # what was here before is as good as ever
                block_tokens = self._tables.step_tokens * self._tables.split
                first = order.num_local_tokens // block_tokens
                self._failed_blocks.update(order.tables[0][first:])

    def take_failed_blocks(self) -> set[int]:
        """vLLM's blocks that were to be loaded and were not, of what failed in `wait_for`; once."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def _begin(self, receive: _Receive) -> None:
        order = receive.order
        addresses = tuple(order.addresses)
        peers = self._peers.get(addresses)
        if peers is None:
            self._connect_first(receive, addresses)
            return
        for rank, name in peers.names.items():
            wanted = agent_name(order.peer, rank)
            if name == wanted:
                continue
            if not receive.retried:  # who was there may have made way for whom the request names
                receive.retried = True
                self._peers.pop(addresses, None)
                self._connect_first(receive, addresses)
                return
            where = addresses[rank] if rank < len(addresses) else f"rank {rank}"
            why = f"{where} is {name}, not {wanted}: the prefill engine was restarted, or two have "
            why += "one address"
            self._refuse(receive, HelloRefused(why, peer=name, operation="receive"))
            return
        handoffs: list[Handoff] = []
        try:
            for name in peers.names.values():
                handoffs.append(self._receive_from(name, order, peers.plan.src))
        except (ControlError, EngineError, ValueError) as error:
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
        receive.handoffs = HandoffSet(handoffs)
        if receive.error is not None:
            receive.handoffs.cancel(f"another rank could not be asked: {receive.error}")
        receive.handoffs.blocks_free.add_done_callback(lambda _: self._at_rest(receive))
        if receive.cancelled:
            self._cancel_all(receive)

    def _receive_from(self, name: str, order: ReceiveOrder, theirs: Sequence[KVLayout]) -> Handoff:
        """Ask one rank of prefill, of those with these layouts, for what it has of a request.

        Raises:
            ControlError, EngineError: it cannot be asked.
        """
        tables = self._tables.rows(order.tables, order.num_tokens)
        mode, timeout_s = self._settings.mode, self._settings.timeout_s
        if order.in_step:
            # A read is over when this side says so. A peer that is frozen while it writes is not.
            mode, timeout_s = "pull", min(timeout_s, IN_STEP_TIMEOUT_S)
        step = self._tables.step_tokens
        skip = -(-order.num_local_tokens // step)
        if not self._ranked and len(theirs) == 1 and self._tables.pair_with(theirs[0]):
            return self._agent.receive(
                order.handoff_id,
                name,
                tables[0][skip:],
                mode=mode,
                skip_blocks=skip,
                timeout_s=timeout_s,
            )
        # Ranks, groups and blocks of other sizes know each other's tokens, not blocks; those before
        # `start_token` are never touched.
        return self._agent.receive_tokens(
            order.handoff_id,
            name,
            tables,
            num_tokens=max(order.num_tokens, skip * step),
            start_token=skip * step,
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
            # A router that calls both engines at once knows the first rank's address alone.
            peers = connect_ranks(self._agent, addresses, CONNECT_TIMEOUT_S, ports_follow=True)
            self._peers[addresses] = peers
        except (ControlError, EngineError, ValueError) as failure:
            error = failure
        except Exception as failure:
            log.exception("prefill at %s could not be met; please report this", addresses[:1])
            error = failure
        with self._changed:
            waiting = self._connecting.pop(addresses)
        for receive in waiting:
            if error is not None:
                self._refuse(receive, error)
            elif receive.cancelled and receive.order.awaited:
                self._refuse(receive, NotConnected(receive.cancelled, operation="receive"))
            else:
                self._begin_or_refuse(receive)

    def _refuse(self, receive: _Receive, error: Exception) -> None:
        """End a receive that never began."""
        receive.error = error
        if not receive.order.awaited:
            log.warning("prefill still holds blocks of %s: %s", receive.order.handoff_id, error)
        self._note_end(receive)

    def _at_rest(self, receive: _Receive) -> None:
        """Note the end of all of its handoffs. On any thread, an engine's too."""
        if receive.handoffs is not None:
            receive.error = receive.error or receive.handoffs.error
        self._note_end(receive)

    def _note_end(self, receive: _Receive) -> None:
        with self._changed:
            if self._receives.get(receive.order.req_id) is receive:
                self._ended.add(receive.order.req_id)
                self._changed.notify_all()

    def _cancel_all(self, receive: _Receive) -> None:
        if receive.handoffs is not None:
            receive.handoffs.cancel(receive.cancelled)

    def _note(self, receive: _Receive, results: Results) -> None:
        req_id = receive.order.req_id
        results.received.add(req_id)
        done = receive.handoffs
        if receive.error is None and done is not None:
            self._figures.load_seconds.append(done.finished_s - receive.started_s)
            self._figures.load_nbytes.append(done.nbytes)
            return
        results.failed.add(req_id)
        if not receive.cancelled:
            self._figures.loads_failed += 1
            log.warning("KV of request %s was not loaded: %s", req_id, receive.error)
