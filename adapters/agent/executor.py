"""What handoff machines ask of the transfer engine, carried out: writes, reads, counters, timers.

For whoever has the agent's turn. An engine's tickets end on its threads and come back as events.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...control.cluster.messages import MAX_LIVE, Activity, LiveHandoff
from ...control.errors import BlocksMismatch, ControlError
from ...control.handoff import events
from ...control.handoff.messages import BLOCK_ID_NBYTES, unpack_block_ids
from ...control.handoff.timeline import Recorder
from ...engine.errors import Cancelled, EngineError, LinkError
from ...engine.plan.block_tables import FEW_IDS
from .activity import ActivityLog, short
from .compute_order import idle_stream
from .tables import read_tokens, write_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...control.handoff.events import Action, Event, Layers
    from ...control.handoff.messages import Side
    from ...control.handoff.timeline import Timeline
    from ...engine.memory.regions import RegisteredCache
    from ...engine.plan.block_tables import BlockIds
    from ...engine.transfer.plan import TransferPlan
    from ...engine.transfer.ticket import Ticket
    from ...engine.transfer_engine import TransferEngine
    from .event_loop import Timer
    from .handoff import Handoff
    from .messaging import Mailbox
    from .metrics import AgentMetrics
    from .sessions import Acquaintances

    Tell = Callable[[Side, int, Event], None]

NEVER_S = 1e9  # the machines keep the time of a counter
ENGINE_MARGIN_S = 10.0  # beyond a handoff's deadline, which the machines keep
RATE_NBYTES = 1 << 20  # smaller transfers tell the latency, not the bandwidth
RATE_WEIGHT = 0.2  # of the newest transfer in a pair's bandwidth
MAX_RATES = 256
TIMELINES = 1024  # handoffs that the recorder remembers; half a KB each

log = logging.getLogger("kvferry.agent")


class Work:
    """What an agent keeps for one handoff: its user's end, tickets and timers."""

    def __init__(self) -> None:
        self.handoff: Handoff | None = None
        self.session = 0
        self.peer = ""  # prefill: who asked
        self.timeline: Timeline | None = None
        self.placed_ns = 0  # prefill: when its request came
        self.nbytes = 0
        self.staged_nbytes = 0  # of those that were moved, through staging here
        self.request: dict[str, Any] | None = None  # decode: what was asked for
        self.tickets: dict[int, Ticket] = {}
        self.counter: Ticket | None = None
        self.timers: dict[str, Timer] = {}


class Workbench:
    """All handoffs' work. One owner at a time: who has the turn.

    Attributes:
        work: by side of the handoff and its machine's key.
        rates: bytes a second, as measured with each peer.
        recorder: the last handoffs' timelines.
        activity: what the daemon shows of this agent.
        metrics: whom to tell how handoffs end, if anybody.
    """

    def __init__(self, engine: TransferEngine, cache: RegisteredCache, name: str) -> None:
        self.engine = engine
        self.cache = cache
        self.work: dict[tuple[Side, int], Work] = {}
        self.rates: dict[str, float] = {}
        self.recorder = Recorder(TIMELINES)
        self.metrics: AgentMetrics | None = None
        self.activity = ActivityLog()
        self._name = name
        self._held = cache.layout.layers
        self._stream = idle_stream(cache.device)
        # Looked up by type, because matching one class after the other takes longer than most acts.
        self._acts: dict[type[Action], Callable[[Side, int, Work, Any], None]] = {
            events.SetTimer: self._set_timer,
            events.ClearTimer: self._clear_timer,
            events.Expect: self._expect,
            events.RetireCounter: self._retire,
            events.StartWrite: self._start_write,
            events.StartRead: self._start_read,
            events.CancelOperations: self._cancel,
            events.TearDownLink: self._tear_down,
            events.Quarantine: self._keep,
            events.ReleaseBlocks: self._release,
            events.Succeed: self._succeed,
            events.Fail: self._fail,
        }
        self._tell: Tell
        self._acquaintances: Acquaintances
        self._mailbox: Mailbox

    @property
    def inflight_nbytes(self) -> int:
        """Of the handoffs that are not over, as far as their size is known."""
        return sum(work.nbytes for work in self.work.values())

    def report_activity(self) -> Activity:
        """For a heartbeat."""
        now_s = time.monotonic()
        live: list[LiveHandoff] = []
        for (side, _), work in self.work.items():
            if work.handoff is not None and len(live) < MAX_LIVE:
                live.append(
                    LiveHandoff(
                        short(work.handoff.request_id),
                        side,
                        work.handoff.peer or work.peer,
                        work.nbytes,
                        max(0.0, now_s - work.handoff.started_s),
                    )
                )
        return self.activity.report(now_s, self._acquaintances.senders(), tuple(live))

    def start(self, tell: Tell, acquaintances: Acquaintances, mailbox: Mailbox) -> None:
        """Gives it whom to tell of events, and where peers and time are."""
        self._tell, self._acquaintances, self._mailbox = tell, acquaintances, mailbox

    def begin(self, side: Side, key: int, handoff: Handoff) -> Work:
        """The work of a handoff whose user is known."""
        work = self._work_of(side, key)
        work.handoff = handoff
        handoff._key = key
        work.timeline = self.recorder.begin(
            handoff.request_id, side, self._name, handoff.peer or work.peer, handoff.started_s
        )
        if handoff._placed_ns or work.placed_ns:
            work.timeline.take({"placed": handoff._placed_ns or work.placed_ns})
        work.timeline.mark("asked" if side == "decode" else "offered")
        return work

    def placed(self, key: int, session: int, peer: str) -> None:
        """Prefill's side has a request, of this peer. Again and again, if the peer repeats it."""
        work = self._work_of("prefill", key)
        if not work.placed_ns:
            work.placed_ns = time.monotonic_ns()
            work.session, work.peer = session, peer
            if work.timeline is not None:
                work.timeline.peer = peer
                work.timeline.take({"placed": work.placed_ns})

    def _work_of(self, side: Side, key: int) -> Work:
        work = self.work.get((side, key))
        if work is None:
            work = self.work[side, key] = Work()
        return work

    def end(self, side: Side, key: int) -> None:
        """The handoff is over."""
        work = self.work.pop((side, key), None)
        for timer in work.timers.values() if work is not None else ():
            timer.cancel()

    def act(self, side: Side, key: int, action: Action) -> None:
        """Carries out what a machine asks for, except `Send`."""
        act = self._acts.get(type(action))
        if act is not None:
            act(side, key, self._work_of(side, key), action)

    def _set_timer(self, side: Side, key: int, work: Work, action: events.SetTimer) -> None:
        kind = action.kind
        timer = work.timers.get(kind)
        if timer is not None:
            timer.cancel()
        fired = partial(self._tell, side, key, events.TimerFired(kind))
        work.timers[kind] = self._mailbox.call_later(action.seconds, fired)

    def _clear_timer(self, side: Side, key: int, work: Work, action: events.ClearTimer) -> None:
        timer = work.timers.pop(action.kind, None)
        if timer is not None:
            timer.cancel()

    def _expect(self, side: Side, key: int, work: Work, action: events.Expect) -> None:
        peer = self._acquaintances.get(work.session)
        try:
            work.counter = self.engine.expect(
                action.imm,
                nbytes=action.nbytes,
                # A handoff of no bytes is counted by its one empty write.
                writes=None if action.nbytes else 1,
                engine_id=peer.engine_id if peer is not None else "",
                timeout_s=NEVER_S,
            )
        except EngineError as error:
            ended = events.CounterEnded(0, error)
            self._mailbox.call_soon(partial(self._tell, side, key, ended))
            return
        work.counter.add_done_callback(partial(self._counter_ended, key))

    def _retire(self, side: Side, key: int, work: Work, action: events.RetireCounter) -> None:
        if work.counter is not None:
            work.counter.cancel()

    def _start_write(self, side: Side, key: int, work: Work, action: events.StartWrite) -> None:
        work.session, work.nbytes = action.request.session, action.request.nbytes
        _mark(work, "submitted")
        self._start(side, key, work, action.op, partial(self._write, action))

    def _start_read(self, side: Side, key: int, work: Work, action: events.StartRead) -> None:
        _mark(work, "submitted")
        self._start(side, key, work, action.op, partial(self._read, work, action))

    def _cancel(self, side: Side, key: int, work: Work, action: events.CancelOperations) -> None:
        for ticket in work.tickets.values():
            ticket.cancel()

    def _tear_down(self, side: Side, key: int, work: Work, action: events.TearDownLink) -> None:
        log.warning("%s: the link is torn down: %s", self._name, action.reason)
        self._acquaintances.tear_down(action.session, action.reason)

    def _keep(self, side: Side, key: int, work: Work, action: events.Quarantine) -> None:
        log.warning("%s: blocks are kept in quarantine: %s", self._name, action.reason)

    def _release(self, side: Side, key: int, work: Work, action: events.ReleaseBlocks) -> None:
        if work.handoff is not None:
            _mark(work, "free")
            work.handoff.blocks_free._finish(0)

    def _succeed(self, side: Side, key: int, work: Work, action: events.Succeed) -> None:
        if work.handoff is not None:
            self._note(side, work, action.nbytes, None)
            work.handoff._outcome._finish(action.nbytes)

    def _fail(self, side: Side, key: int, work: Work, action: events.Fail) -> None:
        if work.handoff is not None:
            self._note(side, work, 0, action.error)
            work.handoff._outcome._fail(action.error)

    def _note(self, side: Side, work: Work, nbytes: int, error: Exception | None) -> None:
        """For the figures, before the user hears of it."""
        if work.timeline is not None:
            work.timeline.mark("failed" if error is not None else "ready")
            work.timeline.nbytes = nbytes
            work.timeline.error = type(error).__name__ if error is not None else ""
        if work.handoff is None:
            return
        seconds = time.monotonic() - work.handoff.started_s
        name = work.handoff.peer or work.peer
        self.activity.ended(side, work.handoff.request_id, name, seconds, nbytes, error)
        if self.metrics is not None:
            peer = self._acquaintances.get(work.session)
            transport = peer.link.transport if peer is not None and peer.link is not None else ""
            # What a peer reads, this end sees nothing of.
            served = side == "prefill" and not work.tickets
            parts = {"served" if served else "direct": nbytes - work.staged_nbytes}
            if work.staged_nbytes:
                parts["staged"] = work.staged_nbytes
            self.metrics.ended(side, transport, seconds, parts, error)

    def _start(
        self, side: Side, key: int, work: Work, op: int, begin: Callable[[], Ticket | None]
    ) -> None:
        """Begins a write or a read; however it ends, the machine hears of it later."""
        try:
            ticket = begin()
        except (EngineError, ControlError) as error:
            ended: Event = events.OperationEnded(op, 0, error)
            self._mailbox.call_soon(partial(self._tell, side, key, ended))
            return
        if ticket is None:
            self._mailbox.call_soon(partial(self._tell, side, key, events.OperationEnded(op)))
            return
        work.tickets[op] = ticket
        ticket.add_done_callback(
            partial(self._operation_ended, side, key, op, work.session, time.monotonic())
        )

    def _write(self, action: events.StartWrite) -> Ticket | None:
        request = action.request
        peer = self._acquaintances.get(request.session)
        if peer is None or peer.link is None or peer.write_plan is None:
            raise LinkError("there is no link to write over", operation="write")
        plan = peer.write_plan
        if request.stop_token:
            return write_tokens(peer.link, plan, action, self._held, self._stream)
        nbytes = plan.nbytes(request.num_blocks)
        if nbytes != request.nbytes:
            raise BlocksMismatch(
                f"decode expects {request.nbytes} bytes, prefill would write {nbytes}"
            )
        timeout_s = request.timeout_s + ENGINE_MARGIN_S
        if not request.num_blocks:
            return peer.link.signal(request.imm, timeout_s=timeout_s)
        layers = self._layers_of(plan, action.layers)
        if layers is not None and not layers:
            return None  # decode's rank holds other layers
        return peer.link.write_blocks(
            plan,
            _unpack(action.tables[0]),
            _unpack(request.tables[0]),
            imm=request.imm,
            layers=layers,
            stream=self._stream,
            timeout_s=timeout_s,
        )

    def _layers_of(self, plan: TransferPlan, positions: Layers) -> tuple[int, ...] | None:
        """The layers at these positions that a plan moves; None if these are all that it does."""
        held = self._held[slice(*positions)]
        if len(held) == len(self._held):
            return None if plan.layers else ()
        moved = set(plan.layers)
        return tuple(layer for layer in held if layer in moved)

    def _read(self, work: Work, action: events.StartRead) -> Ticket | None:
        peer = self._acquaintances.get(work.session)
        if peer is None or peer.link is None or peer.read_plan is None:
            raise LinkError("there is no link to read over", operation="read")
        if work.request is not None and work.request["stop_token"]:
            return read_tokens(peer.link, peer.read_plan, action, work.request, self._stream)
        if not action.ready.num_blocks or work.request is None:
            return None
        return peer.link.read_blocks(
            peer.read_plan,
            _unpack(action.ready.tables[0]),
            _unpack(work.request["tables"][0]),
            stream=self._stream,
            timeout_s=NEVER_S,
        )

    def _operation_ended(
        self, side: Side, key: int, op: int, session: int, began_s: float, ticket: Ticket
    ) -> None:
        """On an engine thread."""
        ended = events.OperationEnded(op, ticket.nbytes, ticket.exception())
        took_s = time.monotonic() - began_s
        self._mailbox.call_soon(partial(self._moved, side, key, ended, session, took_s, ticket))

    def _moved(
        self,
        side: Side,
        key: int,
        ended: events.OperationEnded,
        session: int,
        took_s: float,
        ticket: Ticket,
    ) -> None:
        peer = self._acquaintances.get(session)
        work = self.work.get((side, key))
        if work is not None:
            _learn(work, ticket)
            _mark(work, "written" if side == "prefill" else "read")
        if ended.error is None and ended.nbytes >= RATE_NBYTES and peer is not None:
            name, rate = peer.session.name, ended.nbytes / max(took_s, 1e-9)
            known = self.rates.get(name, rate)
            if name in self.rates or len(self.rates) < MAX_RATES:
                self.rates[name] = known + RATE_WEIGHT * (rate - known)
        self._tell(side, key, ended)

    def _counter_ended(self, key: int, ticket: Ticket) -> None:
        """On an engine thread."""
        error = ticket.exception()
        if error is None:
            self._mailbox.turns.call_now(partial(self._tell_counter, key, ticket))
        elif not isinstance(error, Cancelled):  # else the machine has retired it
            self._mailbox.call_soon(partial(self._tell_counter, key, ticket))

    def _tell_counter(self, key: int, ticket: Ticket) -> None:
        work = self.work.get(("decode", key))
        peer = self._acquaintances.get(work.session) if work is not None else None
        error = ticket.exception()
        if work is not None:
            _learn(work, ticket)
        if error is not None and peer is not None and peer.link is not None and peer.link.closed:
            return  # `LinkDown` is on its way, and says more
        self._tell("decode", key, events.CounterEnded(ticket.nbytes, error))


def _unpack(table: bytes) -> BlockIds:
    """Block ids for the engine, which moves a few of them without NumPy."""
    if len(table) <= FEW_IDS * BLOCK_ID_NBYTES:
        return unpack_block_ids(table)
    return np.frombuffer(table, np.int32)


def _learn(work: Work, ticket: Ticket) -> None:
    """What the transport saw of an operation, or of what arrived."""
    work.staged_nbytes += ticket.staged_nbytes
    if work.timeline is not None:
        work.timeline.take(ticket.marks)


def _mark(work: Work, name: str) -> None:
    if work.timeline is not None:
        work.timeline.mark(name)
