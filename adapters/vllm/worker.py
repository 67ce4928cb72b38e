"""The worker side of the vLLM connector: one agent for each rank, driven by the scheduler's orders.

    before the forward pass   sends are opened
    after each layer          its blocks go out
    after the forward pass    what is left goes out; receives begin
    at the end of the step    what has ended is reported, once

A request is reported only when nobody can touch its blocks any more: vLLM reuses them at once.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ...control.keys import Keys, is_local
from ..agent.agent import Agent
from .cache import Tables
from .orders import Figures, Results
from .receiving import Receiving, agent_name
from .sending import Sending

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...engine.layout.kv_layout import KVLayout
    from .orders import Orders
    from .settings import Settings

# Without a forward pass vLLM sleeps 1 ms and asks again, through two processes. Waiting here instead
# saves those rounds: a load is seen when it ends, often in the step that began it. New requests wait
# as long at worst.
IDLE_WAIT_S = 0.002


class WorkerSide:
    """One rank's worker. Called by vLLM's thread; agents report from threads of their own.

    Args:
        engine_id, rank: name this rank's agent.
        role: `prefill`, `decode` or `both`.
        settings: see there.
        layout, names: see `cache.describe_caches`.
        caches: by vLLM's names of the layers.
        num_blocks: of vLLM's block manager.
        ranks: the layouts of all ranks of this engine, if it has several.
        first_place: of this engine's first rank among those of all data-parallel engines: ports are
            counted from it.
        model: what clients call it; for the daemon.

    Attributes:
        agent: this rank's.
        figures: what ended since somebody took them.
    """

    def __init__(
        self,
        *,
        engine_id: str,
        rank: int,
        role: Any,
        settings: Settings,
        layout: KVLayout,
        names: Sequence[str],
        caches: Mapping[str, Any],
        num_blocks: int,
        ranks: Sequence[KVLayout] = (),
        first_place: int = 0,
        model: str = "",
    ) -> None:
        order = layout.layers
        self._positions = {
            name: order.index(region.layers[0])
            for name, region in zip(names, layout.regions, strict=True)
        }
        self._tables = Tables(layout, num_blocks)
        self._changed = threading.Condition()
        place = first_place + rank
        port = str(settings.port + place) if settings.port else "*"
        host = settings.host if is_local(settings.host) else "*"
        self.agent = Agent(
            name=agent_name(engine_id, rank),
            role=role,
            layout=layout,
            tensors=[caches[name] for name in names],
            bind=f"tcp://{host}:{port}",
            transports=settings.transports or None,
            verify=settings.verify,
            max_programs=settings.max_programs or None,
            advertise_host=settings.host,
            keys=Keys.load(settings.keys) if settings.keys else None,
            # An engine is placed as one: its first rank speaks for all.
            daemon=settings.daemon if rank == 0 else "",
            service=settings.service,
            http=settings.http_of(place),
            fixed_role=True,  # vLLM's scheduler has the one that it was started with
            model=model,
            ranks=ranks,
            rank=rank if ranks else 0,
        )
        self._reports = bool(settings.daemon) and rank == 0
        self.figures = Figures()
        shared = (self._changed, self.figures)
        lease_s = settings.lease_s + settings.timeout_s
        self._sending = Sending(self.agent, self._tables, lease_s, *shared)
        self._receiving = Receiving(
            self.agent, self._tables, settings, *shared, ranked=len(ranks) > 1
        )

    def close(self) -> None:
        """End everything."""
        self.agent.close()

    # A step, in order

    def before_forward(self, orders: Orders) -> None:
        """End what must not be read any more, and open what this step computes."""
        if self._reports:
            self.agent.report(
                queued_tokens=orders.queued_tokens,
                free_blocks=orders.free_blocks * self._tables.split,
            )
        for req_id in orders.cancelled_sends:
            self._sending.finish(req_id, cancel="the request was aborted")
        for req_id in orders.finished_sends:
            self._sending.finish(req_id)
        for handoff_id in orders.refused:
            self._sending.refuse(handoff_id)
        for order in orders.sends:
            self._sending.open(order)

    def layer_computed(self, name: str) -> None:
        """A layer of this step's forward pass is done."""
        position = self._positions.get(name)
        if position is not None:
            self._sending.layer_computed(position)

    def after_forward(self) -> None:
        """The forward pass is done, all layers of it."""
        self._sending.all_computed()

    def begin_receives(self, orders: Orders) -> None:
        """Begin to load, and end loads that nobody waits for any more.

        Waits for those that this step's forward pass needs; it comes after this then.
        """
        for order in orders.receives:
            self._receiving.begin(order)
        for req_id in orders.cancelled_receives:
            self._receiving.cancel(req_id)
        needed = [order for order in orders.receives if order.in_step]
        if needed:
            self._receiving.wait_for(needed)

    def take_failed_blocks(self) -> set[int]:
        """Blocks, by vLLM's ids, that a forward pass needed and that were not loaded; once."""
        return self._receiving.take_failed_blocks()

    def take_results(self, *, idle: bool) -> Results:
        """Return what has ended since the last call. Waits a little if the step has nothing else to
        do."""
        results = Results()
        with self._changed:
            if idle and (self._receiving or self._sending) and not self._something_to_report():
                self._changed.wait_for(self._something_to_report, IDLE_WAIT_S)
            results.sent = self._sending.take_reportable()
            self._receiving.take_ended(results)
        return results

    def _something_to_report(self) -> bool:
        return self._receiving.reportable or bool(self._sending.reportable())
