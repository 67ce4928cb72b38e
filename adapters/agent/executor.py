"""Carries out what handoff machines ask for: messages, writes, reads, counters, timers.

For whoever has the agent's turn. An engine's tickets end on its threads and come back as events.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from ...control.errors import BlocksMismatch, ControlError
from ...control.handoff import events
from ...control.handoff.messages import Accepted
from ...control.handoff.timeline import Recorder
from ...engine.errors import Cancelled, EngineError, LinkError
from ...engine.transfer.moves import TokenMove
from .event_loop import Timers
from .tables import unpack_table, unpack_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ...control.handoff.events import Action, Event, Layers
    from ...control.handoff.messages import Side
    from ...control.handoff.registry import Handoffs, Steps
    from ...control.handoff.timeline import Timeline
    from ...engine.memory.regions import RegisteredCache
    from ...engine.transfer.plan import TransferPlan
    from ...engine.transfer.ticket import Ticket
    from ...engine.transfer_engine import TransferEngine
    from .handoff import Handoff
    from .messaging import Messaging
    from .sessions import Sessions

NEVER_S = 1e9  # the machines keep the time of a counter
ENGINE_MARGIN_S = 10.0  # beyond a handoff's deadline, which the machines keep
RATE_NBYTES = 1 << 20  # smaller transfers tell the latency, not the bandwidth
RATE_WEIGHT = 0.2  # of the newest transfer in a pair's bandwidth
MAX_RATES = 256
TIMELINES = 1024  # handoffs that the recorder remembers; half a KB each

log = logging.getLogger("kvferry.agent")


class HandoffEnded(msgspec.Struct, frozen=True):
    """Tells observers how a handoff ended, before its user hears of it.

    Attributes:
        peer: "" on the prefill side of one that nobody asked for.
        seconds: from the call of `receive` or `send`.
        nbytes: that were moved; 0 if it failed.
        staged_nbytes: of these, what went through staging at this end.
        served: whether the peer read them, of which this end sees nothing.
        transport: of the link; "" if there is none.
    """

    side: Side
    request_id: str
    peer: str
    seconds: float
    nbytes: int
    staged_nbytes: int
    served: bool
    transport: str
    error: Exception | None


class Work:
    """What an agent keeps for one handoff: its user's end, tickets and timers."""

    def __init__(self, side: Side, key: int) -> None:
        self.side: Side = side
        self.key = key  # of its machine
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
        self.timers = Timers()


class _AllWork(dict[tuple["Side", int], Work]):
    """The work of each handoff, by its side and key; it begins when it is first looked for."""

    def __missing__(self, at: tuple[Side, int]) -> Work:
        work = self[at] = Work(*at)
        return work


class Executor:
    """All handoffs' work. One owner at a time: who has the turn.

    Args:
        name: of the agent.
        stream: for GPU memory, one on which nothing runs; see `idle_stream`.
        sides: the registries of the handoffs.
        peers: where their links, plans and routes are.

    Attributes:
        work: by side of the handoff and its machine's key.
        rates: bytes a second, as measured with each peer.
        recorder: the last handoffs' timelines.
        observers: called with each `HandoffEnded`; they must be quick.
        after_steps: called after whatever was carried out, if it is set.
    """

    def __init__(
        self,
        name: str,
        engine: TransferEngine,
        cache: RegisteredCache,
        stream: torch.cuda.Stream | None,
        sides: Mapping[Side, Handoffs],
        peers: Sessions,
        messaging: Messaging,
    ) -> None:
        self.work = _AllWork()
        self.rates: dict[str, float] = {}
        self.recorder = Recorder(TIMELINES)
        self.observers: list[Callable[[HandoffEnded], None]] = []
        self.after_steps: Callable[[], None] | None = None
        self._name = name
        self._engine = engine
        self._held = cache.layout.layers
        self._stream = stream
        self._sides = sides
        self._peers = peers
        self._messaging = messaging
        # Looked up by type, because matching one class after the other takes longer than most acts.
        self._acts: dict[type[Action], Callable[[Work, Any], None]] = {
            events.Send: self._send,
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

    @property
    def inflight_nbytes(self) -> int:
        """Of the handoffs that are not over, as far as their size is known."""
        return sum(work.nbytes for work in self.work.values())

    def begin(self, side: Side, key: int, handoff: Handoff) -> Work:
        """Take up the work of a handoff whose user is known."""
        work = self.work[side, key]
        work.handoff = handoff
        handoff._key = key
        work.timeline = self.recorder.begin(
            handoff.request_id, side, self._name, handoff.peer or work.peer, handoff.started_s
        )
        if handoff._placed_ns or work.placed_ns:
            work.timeline.take({"placed": handoff._placed_ns or work.placed_ns})
        work.timeline.mark("asked" if side == "decode" else "offered")
        return work

    def tell(self, side: Side, key: int, event: Event) -> None:
        """Something happened to a handoff: does what its machine asks for then."""
        registry = self._sides.get(side)
        if registry is not None:  # else the agent has another role by now, and the handoff is over
            self.carry_out(side, registry.handle(key, event))

    def carry_out(self, side: Side, steps: Steps) -> None:
        """Do what machines ask for, in order, and forget the work of those that are over."""
        live = self._sides[side].machines
        for key, action in steps:
            acts_for = self.work[side, key]
            try:
                self._acts[type(action)](acts_for, action)
            except Exception as error:  # it ends this handoff alone; what comes after it is done
                log.exception("a handoff's %s failed; please report this", type(action).__name__)
                why = f"{type(action).__name__} failed: {error}"
                self._messaging.call_soon(partial(self._send_refused, acts_for, why))
        for key in dict(steps):
            if key not in live:
                work = self.work.pop((side, key), None)
                if work is not None and work.timers:
                    work.timers.stop_all()
        if self.after_steps is not None:
            self.after_steps()

    def _tell_soon(self, work: Work, event: Event) -> None:
        """As `tell`, in another turn: what a machine asks for must not come back to it at once."""
        self._messaging.call_soon(partial(self.tell, work.side, work.key, event))

    def _send(self, work: Work, action: events.Send) -> None:
        message = action.message
        peer = self._peers.get(message.session)
        refused = partial(self._send_refused, work)
        if peer is None:
            self._messaging.call_soon(partial(refused, "the peer is not known"))
            return
        if type(message) is Accepted and not work.placed_ns:  # else the peer repeats its request
            self._note_request(work, message.session, peer.session.name)
        self._messaging.tell(peer.route, message, refused)

    def _send_refused(self, work: Work, reason: str) -> None:
        if work.key:
            self.tell(work.side, work.key, events.SendRefused(reason))

    def _note_request(self, work: Work, session: int, peer: str) -> None:
        """Prefill's side has a request, of this peer."""
        work.placed_ns = time.monotonic_ns()
        work.session, work.peer = session, peer
        if work.timeline is not None:
            work.timeline.peer = peer
            work.timeline.take({"placed": work.placed_ns})

    def _set_timer(self, work: Work, action: events.SetTimer) -> None:
        fired = partial(self.tell, work.side, work.key, events.TimerFired(action.kind))
        work.timers.start(action.kind, self._messaging.call_later(action.seconds, fired))

    def _clear_timer(self, work: Work, action: events.ClearTimer) -> None:
        work.timers.stop(action.kind)

    def _expect(self, work: Work, action: events.Expect) -> None:
        peer = self._peers.get(work.session)
        try:
            work.counter = self._engine.expect(
                action.imm,
                nbytes=action.nbytes,
                # A handoff of no bytes is counted by its one empty write.
                writes=None if action.nbytes else 1,
                engine_id=peer.engine_id if peer is not None else "",
                timeout_s=NEVER_S,
            )
        except EngineError as error:
            self._tell_soon(work, events.CounterEnded(0, error))
            return
        work.counter.add_done_callback(partial(self._counter_ended, work.key))

    def _retire(self, work: Work, action: events.RetireCounter) -> None:
        if work.counter is not None:
            work.counter.cancel()

    def _start_write(self, work: Work, action: events.StartWrite) -> None:
        work.session, work.nbytes = action.request.session, action.request.nbytes
        _mark(work, "submitted")
        self._start(work, action.op, partial(self._write, action))

    def _start_read(self, work: Work, action: events.StartRead) -> None:
        _mark(work, "submitted")
        self._start(work, action.op, partial(self._read, work, action))

    def _cancel(self, work: Work, action: events.CancelOperations) -> None:
        for ticket in work.tickets.values():
            ticket.cancel()

    def _tear_down(self, work: Work, action: events.TearDownLink) -> None:
        log.warning("%s: the link is torn down: %s", self._name, action.reason)
        self._peers.tear_down(action.session, action.reason)

    def _keep(self, work: Work, action: events.Quarantine) -> None:
        log.warning("%s: blocks are kept in quarantine: %s", self._name, action.reason)

    def _release(self, work: Work, action: events.ReleaseBlocks) -> None:
        if work.handoff is not None:
            _mark(work, "free")
            work.handoff.blocks_free._finish(0)

    def _succeed(self, work: Work, action: events.Succeed) -> None:
        if work.handoff is not None:
            self._note_end(work, work.handoff, action.nbytes, None)
            work.handoff._outcome._finish(action.nbytes)

    def _fail(self, work: Work, action: events.Fail) -> None:
        if work.handoff is not None:
            self._note_end(work, work.handoff, 0, action.error)
            work.handoff._outcome._fail(action.error)

    def _note_end(self, work: Work, handoff: Handoff, nbytes: int, error: Exception | None) -> None:
        """Note how a handoff ended, and tell the observers, before its user hears of it."""
        timeline = work.timeline
        if timeline is not None:
            timeline.mark("failed" if error is not None else "ready")
            timeline.nbytes = nbytes
            timeline.error = type(error).__name__ if error is not None else ""
        if not self.observers:
            return
        peer = self._peers.get(work.session)
        ended = HandoffEnded(
            work.side,
            handoff.request_id,
            handoff.peer or work.peer,
            time.monotonic() - handoff.started_s,
            nbytes,
            work.staged_nbytes,
            work.side == "prefill" and not work.tickets,
            peer.link.transport if peer is not None and peer.link is not None else "",
            error,
        )
        for observe in self.observers:
            observe(ended)

    def _start(self, work: Work, op: int, begin: Callable[[], Ticket | None]) -> None:
        """Begin a write or a read; however it ends, the machine hears of it later."""
        try:
            ticket = begin()
        except (EngineError, ControlError) as error:
            self._tell_soon(work, events.OperationEnded(op, 0, error))
            return
        if ticket is None:
            self._tell_soon(work, events.OperationEnded(op))
            return
        work.tickets[op] = ticket
        ticket.add_done_callback(
            partial(self._operation_ended, work.side, work.key, op, work.session, time.monotonic())
        )

    def _write(self, action: events.StartWrite) -> Ticket | None:
        """Write what a request wants of some layers; None if decode's rank holds others.

        Raises:
            BlocksMismatch: decode counts on other bytes than these. EngineError: from the engine.
        """
        request = action.request
        peer = self._peers.get(request.session)
        if peer is None or peer.link is None or peer.write_plan is None:
            raise LinkError("there is no link to write over", operation="write")
        link, plan = peer.link, peer.write_plan
        timeout_s = request.timeout_s + ENGINE_MARGIN_S
        move = None
        if request.stop_token:
            tables = unpack_tables(action.tables), unpack_tables(request.tables)
            move = TokenMove(plan, *tables, request.start_token, request.stop_token)
        nbytes = plan.nbytes(request.num_blocks) if move is None else move.nbytes
        if nbytes != request.nbytes:
            raise BlocksMismatch(
                f"decode expects {request.nbytes} bytes, prefill would write {nbytes}"
            )
        if move is None and not request.num_blocks:
            return link.signal(request.imm, timeout_s=timeout_s)
        layers = self._layers_of(plan, action.layers)
        if layers is not None and not layers:
            return None
        how: dict[str, Any] = {"layers": layers, "stream": self._stream, "timeout_s": timeout_s}
        if move is not None:
            tables = move.src_tables, move.dst_tables
            return link.write_tokens(
                plan, *tables, start=move.start, stop=move.stop, imm=request.imm, **how
            )
        src, dst = unpack_table(action.tables[0]), unpack_table(request.tables[0])
        return link.write_blocks(plan, src, dst, imm=request.imm, **how)

    def _layers_of(self, plan: TransferPlan, positions: Layers) -> tuple[int, ...] | None:
        """Return the layers at these positions that a plan moves; None if these are all that it
        does."""
        held = self._held[slice(*positions)]
        if len(held) == len(self._held):
            return None if plan.layers else ()
        moved = set(plan.layers)
        return tuple(layer for layer in held if layer in moved)

    def _read(self, work: Work, action: events.StartRead) -> Ticket | None:
        """Read what was asked for out of the blocks that prefill has named."""
        peer = self._peers.get(work.session)
        if peer is None or peer.link is None or peer.read_plan is None:
            raise LinkError("there is no link to read over", operation="read")
        link, plan, asked, tables = peer.link, peer.read_plan, work.request, action.ready.tables
        how: dict[str, Any] = {"stream": self._stream, "timeout_s": NEVER_S}
        if asked is not None and asked["stop_token"]:
            src_tables, dst_tables = unpack_tables(tables), unpack_tables(asked["tables"])
            start, stop = asked["start_token"], asked["stop_token"]
            return link.read_tokens(plan, src_tables, dst_tables, start=start, stop=stop, **how)
        if not action.ready.num_blocks or asked is None:
            return None
        src, dst = unpack_table(tables[0]), unpack_table(asked["tables"][0])
        return link.read_blocks(plan, src, dst, **how)

    def _operation_ended(
        self, side: Side, key: int, op: int, session: int, began_s: float, ticket: Ticket
    ) -> None:
        """On an engine thread."""
        ended = events.OperationEnded(op, ticket.nbytes, ticket.exception())
        took_s = time.monotonic() - began_s
        self._messaging.call_soon(partial(self._moved, side, key, ended, session, took_s, ticket))

    def _moved(
        self,
        side: Side,
        key: int,
        ended: events.OperationEnded,
        session: int,
        took_s: float,
        ticket: Ticket,
    ) -> None:
        peer = self._peers.get(session)
        work = self.work.get((side, key))
        if work is not None:
            _learn(work, ticket)
            _mark(work, "written" if side == "prefill" else "read")
        if ended.error is None and ended.nbytes >= RATE_NBYTES and peer is not None:
            name, rate = peer.session.name, ended.nbytes / max(took_s, 1e-9)
            known = self.rates.get(name, rate)
            if name in self.rates or len(self.rates) < MAX_RATES:
                self.rates[name] = known + RATE_WEIGHT * (rate - known)
        self.tell(side, key, ended)

    def _counter_ended(self, key: int, ticket: Ticket) -> None:
        """On an engine thread."""
        error = ticket.exception()
        if error is None:
            self._messaging.loop.call_now(partial(self._tell_counter, key, ticket))
        elif not isinstance(error, Cancelled):  # else the machine has retired it
            self._messaging.call_soon(partial(self._tell_counter, key, ticket))

    def _tell_counter(self, key: int, ticket: Ticket) -> None:
        work = self.work.get(("decode", key))
        peer = self._peers.get(work.session) if work is not None else None
        error = ticket.exception()
        if work is not None:
            _learn(work, ticket)
        if error is not None and peer is not None and peer.link is not None and peer.link.closed:
            return  # `LinkDown` is on its way, and says more
        self.tell("decode", key, events.CounterEnded(ticket.nbytes, error))


def _learn(work: Work, ticket: Ticket) -> None:
    """What the transport saw of an operation, or of what arrived."""
    work.staged_nbytes += ticket.staged_nbytes
    if work.timeline is not None:
        work.timeline.take(ticket.marks)


def _mark(work: Work, name: str) -> None:
    if work.timeline is not None:
        work.timeline.mark(name)


def idle_stream(device: int) -> torch.cuda.Stream | None:
    """Return a stream for which transfers need not wait: what they move was computed before the
    machines
    heard of it. The current stream of the agent's thread may hold the work of a whole model."""
    if device < 0:
        return None
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
