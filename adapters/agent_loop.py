"""An agent's one thread: ZeroMQ sockets, timers, and the state machines' events and actions.

Everything that the machines must not do is done here: sending, timing, starting transfers. Nothing
here blocks: links are opened on threads of their own, and transfers end with callbacks.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import queue
import secrets
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from ..control import events, session, wire
from ..control.desk import DecodeDesk, PrefillDesk
from ..control.errors import AgentClosed, ControlError, LinkLost, ProtocolError
from ..control.messages import (
    Accepted,
    Bye,
    Cancel,
    Cancelled,
    Describe,
    Done,
    Failed,
    HandoffMessage,
    Hello,
    Ready,
    Refused,
    Request,
    Sent,
)
from ..control.session import Session, make_hello
from ..engine.errors import EngineError, LinkClosed
from ..engine.handshake import EngineAddress
from ..engine.memory import CacheDescriptor
from ..engine.tickets import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..control.desk import Desk, Steps
    from ..control.events import TimerKind
    from ..control.handoff import Timing
    from ..control.messages import Message
    from ..engine.link import Link
    from ..engine.memory import RegisteredCache
    from ..engine.transfer import TransferEngine
    from ..engine.transfer_plan import TransferPlan
    from .handoffs import Handoff

    TimerName = tuple[Desk | None, int, TimerKind]  # no desk: a session's

HIGH_WATER_MARK = 10_000  # messages queued for one peer; more is an error, never a silent drop
HELLO_TIMEOUT_S = 5.0
MAX_SESSIONS = 4096
NEVER_S = 7 * 86_400.0  # counters have no deadline of their own: the machines keep it

log = logging.getLogger(__name__)


class Acquaintance:
    """One session with one peer agent, and the link that belongs to it."""

    def __init__(self, machine: Session, send: Callable[[bytes], object], source: bytes) -> None:
        self.machine = machine
        self.send = send
        self.source = source  # the ROUTER's name for the peer, or our DEALER's endpoint
        self.up = Ticket("connect")
        self.link: Link | None = None
        self.write_plan: TransferPlan | None = None
        self.read_plan: TransferPlan | None = None
        self.engine: EngineAddress | None = None


class AgentLoop:
    """Owns the sockets and the desks; all but `post` and the start belong to its thread."""

    def __init__(
        self,
        *,
        name: str,
        role: str,
        engine: TransferEngine,
        cache: RegisteredCache,
        bind: str,
        timing: Timing,
    ) -> None:
        self.name = name
        self.role = role
        self.engine = engine
        self.cache = cache
        self._timing = timing
        self._generation = time.time_ns()
        self._describe = partial(
            Describe,
            layout_digest=cache.layout.digest(),
            cache=cache.descriptor.encode(),
            engine=engine.address.encode(),
        )
        self._decode = DecodeDesk(timing)
        self._prefill = PrefillDesk(timing)
        self._sessions: dict[int, Acquaintance] = {}
        self._handoffs: dict[tuple[Desk, int], Handoff] = {}
        self._keys: dict[Handoff, tuple[Desk, int]] = {}
        self._block_ids: dict[Handoff, np.ndarray[Any, Any]] = {}
        self._tickets: dict[Handoff, list[Ticket]] = {}
        self._counters: dict[int, Ticket] = {}
        self._timers: list[tuple[float, int, TimerName]] = []
        self._timer_numbers: dict[TimerName, int] = {}
        self._numbers = itertools.count()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = False
        self.closed = False
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self._router.bind(bind)
        except zmq.ZMQError as error:
            self._context.destroy(0)
            raise ControlError(
                f"cannot bind {bind}: {error}; give another `bind`", operation="start"
            ) from error
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._dealers: dict[zmq.Socket[bytes], int] = {}
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name=f"{name}-agent", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def post(self, command: Callable[[], None]) -> None:
        """Runs `command` on the loop's thread; from any thread.

        Raises:
            AgentClosed: the loop has ended.
        """
        if self.closed:
            raise AgentClosed("the agent is closed: make another")
        self._commands.put(command)
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already
            os.write(self._wake_write, b"\0")

    def stop(self) -> None:
        """Says goodbye, fails what is under way, ends the thread and waits for it."""
        if self.closed:
            return
        self.post(self._begin_stop)
        self._thread.join()

    # The loop.

    def _run(self) -> None:
        try:
            while not self._stopping:
                for ready, _ in self._poller.poll(self._until_timer_ms()):
                    self._ready(ready)
                self._run_commands()
                self._fire_timers()
        finally:
            self.closed = True
            self._run_commands()
            self._fail_all()
            self._context.destroy(linger=200)
            os.close(self._wake_read)

    def _ready(self, ready: Any) -> None:
        if ready == self._wake_read:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 65_536)
            return
        while True:
            try:
                frames = ready.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            source = frames[0] if ready is self._router else b""
            self._guarded(partial(self._receive, ready, source, frames[-1]))

    def _run_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            self._guarded(command)

    def _guarded(self, function: Callable[[], None]) -> None:
        """One failing event must not end the agent for every other peer."""
        try:
            function()
        except Exception:
            log.exception("kvferry: an agent's event failed; please report this")

    def _until_timer_ms(self) -> int | None:
        if not self._timers:
            return None
        return max(0, int((self._timers[0][0] - time.monotonic()) * 1e3) + 1)

    def _fire_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, number, name = heapq.heappop(self._timers)
            if self._timer_numbers.get(name) != number:
                continue  # set again, or cleared
            del self._timer_numbers[name]
            owner, key, kind = name
            if owner is None:
                self._guarded(partial(self._tell_session, key, events.TimerFired(kind)))
            else:
                self._guarded(partial(self._tell, owner, key, events.TimerFired(kind)))

    def _set_timer(self, name: TimerName, seconds: float) -> None:
        number = self._timer_numbers[name] = next(self._numbers)
        heapq.heappush(self._timers, (time.monotonic() + seconds, number, name))

    # Sockets.

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, 200)
        made.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        made.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        made.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_NBYTES)
        made.setsockopt(zmq.IMMEDIATE, 0)
        self._poller.register(made, zmq.POLLIN)
        return made

    def _receive(self, ready: zmq.Socket[bytes], source: bytes, frame: bytes) -> None:
        try:
            message = wire.decode(frame)
        except ProtocolError as error:
            log.warning("kvferry %s: dropped a frame: %s", self.name, error)
            self._reply(ready, source, Refused(0, "protocol", error.message[:1024]))
            return
        known = self._sessions.get(message.session)
        if known is not None and known.source != self._source_of(ready, source):
            return  # somebody else's number: not this peer's to use
        if known is None:
            if isinstance(message, Hello) and ready is self._router:
                known = self._met(source, message)
            elif isinstance(message, Refused | Bye):
                return
            else:
                self._reply(ready, source, Refused(message.session, "session", "unknown here"))
                return
        if isinstance(message, HandoffMessage):
            self._carry_out(*self._at_desk(message))
            return
        if isinstance(message, Refused | Bye) and known.machine.state == session.UP:
            reason = getattr(message, "detail", "") or message.reason
            self._link_lost(message.session, f"the peer left: {reason}")
        self._tell_session(message.session, session.Heard(message))

    def _source_of(self, ready: zmq.Socket[bytes], source: bytes) -> bytes:
        return source if ready is self._router else str(self._dealers.get(ready)).encode()

    def _reply(self, ready: zmq.Socket[bytes], source: bytes, message: Message) -> None:
        frames = [source, wire.encode(message)] if ready is self._router else [wire.encode(message)]
        with contextlib.suppress(zmq.ZMQError):  # it is gone, or does not read: nothing is owed
            ready.send_multipart(frames, zmq.NOBLOCK)

    def _at_desk(self, message: HandoffMessage) -> tuple[Desk, Steps]:
        to_prefill = isinstance(message, Request | Done)
        if isinstance(message, Failed | Cancel | Cancelled):
            to_prefill = message.side == "decode"
        else:
            assert to_prefill or isinstance(message, Accepted | Ready | Sent)
        desk: Desk = self._prefill if to_prefill else self._decode
        return desk, desk.receive(message)

    # Getting acquainted.

    def connect(self, address: str, timeout_s: float, up: Callable[[Acquaintance], None]) -> None:
        """Begins a session with the agent at `address`; `up` gets it at once."""
        number = secrets.randbits(62) | 1
        dealer = self._socket(zmq.DEALER)
        try:
            dealer.connect(address)
        except zmq.ZMQError as error:
            self._poller.unregister(dealer)
            dealer.close(0)
            failed = Acquaintance(self._session(number, dials=True), lambda _: None, b"")
            up(failed)
            failed.up._fail(
                ControlError(
                    f"{address!r} is no address: {error}; use tcp://host:port", operation="connect"
                )
            )
            return
        self._dealers[dealer] = number
        machine = self._session(number, dials=True, timeout_s=timeout_s)
        known = Acquaintance(
            machine,
            lambda frame: dealer.send(frame, zmq.NOBLOCK),
            str(number).encode(),
        )
        known.up.add_done_callback(lambda _: self._let_go(dealer, known))
        self._sessions[number] = known
        up(known)
        self._do_session(number, machine.start())

    def _met(self, source: bytes, hello: Hello) -> Acquaintance:
        """A peer that we have not heard of says hello."""
        machine = self._session(hello.session, dials=False)
        known = Acquaintance(
            machine,
            lambda frame: self._router.send_multipart([source, frame], zmq.NOBLOCK),
            source,
        )
        if len(self._sessions) >= MAX_SESSIONS:
            self._forget_ended()
        self._sessions[hello.session] = known
        self._do_session(hello.session, machine.start())
        return known

    def _let_go(self, dealer: zmq.Socket[bytes], known: Acquaintance) -> None:
        """Closes the socket of a session that never came up; on the loop's thread."""
        if known.up.exception() is not None and not dealer.closed:
            with contextlib.suppress(KeyError):
                self._poller.unregister(dealer)
            self._dealers.pop(dealer, None)
            dealer.close(200)

    def _forget_ended(self) -> None:
        for number in [n for n, k in self._sessions.items() if k.machine.state == session.ENDED]:
            del self._sessions[number]

    def _session(self, number: int, *, dials: bool, timeout_s: float = HELLO_TIMEOUT_S) -> Session:
        return Session(
            make_hello(self.name, self.role, self._generation, number),
            self._describe(number),
            self._timing,
            dials=dials,
            timeout_s=timeout_s,
        )

    def _tell_session(self, number: Any, event: session.SessionEvent) -> None:
        known = self._sessions.get(number)
        if known is not None:
            self._do_session(number, known.machine.handle(event))

    def _do_session(self, number: int, actions: list[session.SessionAction]) -> None:
        known = self._sessions[number]
        for action in actions:
            match action:
                case events.Send(message=message):
                    self._send(known, message)
                case events.SetTimer(kind=kind, seconds=seconds):
                    self._set_timer((None, number, kind), seconds)
                case events.ClearTimer(kind=kind):
                    self._timer_numbers.pop((None, number, kind), None)
                case session.Reconcile(describe=describe):
                    error = self._reconcile(known, describe)
                    self.post(partial(self._tell_session, number, session.Reconciled(error)))
                case session.OpenLink(dial=dial):
                    threading.Thread(
                        target=self._open_link, args=(number, known, dial), daemon=True
                    ).start()
                case session.Up():
                    for desk in (self._decode, self._prefill):
                        desk.open_session(number, known.machine.name)
                    self._watch_link(number, known)
                    known.up._finish(0)
                case session.Ended(error=failure):
                    if known.link is not None:
                        known.link.fail(LinkClosed(failure.message, operation="hello"))
                    known.up._fail(failure)

    def _reconcile(self, known: Acquaintance, describe: Describe) -> str:
        """Makes the plans between both caches; why that cannot be, or ""."""
        try:
            known.engine = EngineAddress.decode(describe.engine)
            theirs = CacheDescriptor.decode(describe.cache)
            known.write_plan = self.engine.plan(self.cache, theirs)
            known.read_plan = self.engine.plan(theirs, self.cache)
        except EngineError as error:
            return error.message
        return ""

    def _open_link(self, number: int, known: Acquaintance, dial: bool) -> None:
        """On a thread of its own: dials, or awaits the peer's call."""
        assert known.engine is not None, "reconciled before a link is opened"
        error = ""
        try:
            if dial:
                known.link = self.engine.connect(known.engine)
            else:
                known.link = self.engine.accept_link(known.engine.engine_id)
        except EngineError as failure:
            error = failure.message
        with contextlib.suppress(AgentClosed):
            self.post(partial(self._tell_session, number, session.LinkOpened(error)))

    def _watch_link(self, number: int, known: Acquaintance) -> None:
        link = known.link
        assert link is not None, "up means that there is a link"
        link.down.add_done_callback(
            lambda ticket: self._post_quietly(
                partial(self._link_lost, number, str(ticket.exception()))
            )
        )
        link.quiesced.add_done_callback(
            lambda _: self._post_quietly(partial(self._link_quiesced, number))
        )

    def _link_lost(self, number: int, reason: str) -> None:
        known = self._sessions[number]
        quiesced = known.link is None or known.link.quiesced.done()
        for desk in (self._decode, self._prefill):
            self._carry_out(desk, desk.link_down(number, reason, quiesced=quiesced))
        if known.link is not None and not known.link.closed:
            known.link.fail(LinkClosed(reason, operation="link"))

    def _link_quiesced(self, number: int) -> None:
        for desk in (self._decode, self._prefill):
            self._carry_out(desk, desk.quiesced(number))

    def _post_quietly(self, command: Callable[[], None]) -> None:
        with contextlib.suppress(AgentClosed):
            self.post(command)

    # Handoffs.

    def receive(
        self,
        handoff: Handoff,
        number: int,
        block_ids: np.ndarray[Any, Any],
        *,
        mode: Any,
        attempt: int,
        timeout_s: float,
    ) -> None:
        """Begins a handoff on the decode side."""
        known = self._sessions[number]
        assert known.read_plan is not None, "up means that there are plans"
        try:
            key, steps = self._decode.begin(
                number,
                handoff.request_id,
                attempt=attempt,
                mode=mode,
                imm=self.engine.new_imm(),
                num_blocks=len(block_ids),
                nbytes=known.read_plan.nbytes(len(block_ids)),
                timeout_s=timeout_s,
                tables=(block_ids.astype("<i4").tobytes(),),
            )
        except LinkLost as error:
            handoff._outcome._fail(error)
            handoff.blocks_free._finish(0)
            return
        self._own(self._decode, key, handoff, block_ids)
        self._carry_out(self._decode, steps)

    def offer(
        self, handoff: Handoff, block_ids: np.ndarray[Any, Any], *, whole: bool, timeout_s: float
    ) -> None:
        """Offers source blocks; with `whole` they are all computed."""
        source = events.SourceOffered(
            (block_ids.astype("<i4").tobytes(),), self.cache.layout.num_layers, timeout_s
        )
        key, steps = self._prefill.offer(handoff.request_id, source)
        self._own(self._prefill, key, handoff, block_ids)
        self._carry_out(self._prefill, steps)
        if whole:
            self._tell(self._prefill, key, events.SourceFinished())

    def tell(self, handoff: Handoff, event: events.Event) -> None:
        """Tells a handoff's machine what its owner says; nothing if it is over."""
        place = self._keys.get(handoff)
        if place is not None:
            self._tell(*place, event)

    def _own(self, desk: Desk, key: int, handoff: Handoff, block_ids: np.ndarray[Any, Any]) -> None:
        self._handoffs[desk, key] = handoff
        self._keys[handoff] = (desk, key)
        self._block_ids[handoff] = block_ids

    def _tell(self, desk: Any, key: Any, event: events.Event) -> None:
        self._carry_out(desk, desk.handle(key, event))

    def _carry_out(self, desk: Desk, steps: Steps) -> None:
        for key, action in steps:
            self._do(desk, key, action)

    def _do(self, desk: Desk, key: int, action: events.Action) -> None:
        handoff = self._handoffs.get((desk, key))
        match action:
            case events.Send(message=message):
                known = self._sessions.get(message.session)
                if known is not None:
                    refused = self._send(known, message)
                    if refused and key:
                        event = events.SendRefused(refused)
                        self.post(partial(self._tell, desk, key, event))
            case events.SetTimer(kind=kind, seconds=seconds):
                self._set_timer((desk, key, kind), seconds)
            case events.ClearTimer(kind=kind):
                self._timer_numbers.pop((desk, key, kind), None)
            case events.Expect(imm=imm, nbytes=nbytes):
                self._expect(desk, key, imm, nbytes)
            case events.RetireCounter(imm=imm):
                ticket = self._counters.pop(imm, None)
                if ticket is not None:
                    ticket.cancel()
            case events.StartWrite():
                self._start_write(desk, key, action)
            case events.StartRead():
                self._start_read(desk, key, action)
            case events.CancelOperations() if handoff is not None:
                for ticket in self._tickets.get(handoff, []):
                    ticket.cancel()
            case events.TearDownLink(session=number, reason=reason):
                known = self._sessions.get(number)
                if known is not None and known.link is not None:
                    known.link.fail(LinkClosed(reason, operation="link"))
            case events.Quarantine(reason=reason):
                log.warning("kvferry %s: blocks of %r are kept: %s", self.name, handoff, reason)
            case events.ReleaseBlocks() if handoff is not None:
                handoff.blocks_free._finish(0)
                self._forget_if_over(desk, key, handoff)
            case events.Succeed(nbytes=nbytes) if handoff is not None:
                handoff._outcome._finish(nbytes)
                self._forget_if_over(desk, key, handoff)
            case events.Fail(error=error) if handoff is not None:
                handoff._outcome._fail(error)
                self._forget_if_over(desk, key, handoff)

    def _forget_if_over(self, desk: Desk, key: int, handoff: Handoff) -> None:
        if handoff.done() and handoff.blocks_free.done():
            self._handoffs.pop((desk, key), None)
            self._keys.pop(handoff, None)
            self._block_ids.pop(handoff, None)
            self._tickets.pop(handoff, None)

    def _send(self, known: Acquaintance, message: Message) -> str:
        """Queues a message; why it could not be queued, or ""."""
        try:
            known.send(wire.encode(message))
        except zmq.Again:
            return f"{HIGH_WATER_MARK} messages wait for it already"
        except zmq.ZMQError as error:
            return f"it is not connected ({error})"
        except ProtocolError as error:
            return error.message
        return ""

    def _link_of(self, desk: Desk, key: int) -> tuple[Acquaintance, Link]:
        known = self._sessions[desk.machines[key].session]
        assert known.link is not None, "handoffs begin when the session is up"
        return known, known.link

    def _expect(self, desk: Desk, key: int, imm: int, nbytes: int) -> None:
        _, link = self._link_of(desk, key)
        ticket = self.engine.expect(imm, nbytes=nbytes, links=(link,), timeout_s=NEVER_S)
        self._counters[imm] = ticket

        def ended(ticket: Ticket) -> None:
            event = events.CounterEnded(ticket.nbytes, ticket.exception())
            self._post_quietly(partial(self._counted, imm, desk, key, event))

        ticket.add_done_callback(ended)

    def _counted(self, imm: int, desk: Desk, key: int, event: events.CounterEnded) -> None:
        self._counters.pop(imm, None)
        self._tell(desk, key, event)

    def _start_write(self, desk: Desk, key: int, action: events.StartWrite) -> None:
        known, link = self._link_of(desk, key)
        first, last = action.layers
        held = self.cache.layout.layers
        layers = None if (first, last) == (0, len(held)) else held[first:last]
        plan = known.write_plan
        assert plan is not None, "up means that there are plans"
        if layers is not None:
            layers = tuple(layer for layer in layers if layer in plan.plan.layers)
        self._begin_transfer(
            desk,
            key,
            action.op,
            lambda: link.write_blocks(
                plan,
                _ids(action.tables),
                _ids(action.request.tables),
                imm=action.request.imm,
                layers=layers,
                timeout_s=NEVER_S,
            ),
        )

    def _start_read(self, desk: Desk, key: int, action: events.StartRead) -> None:
        known, link = self._link_of(desk, key)
        plan = known.read_plan
        assert plan is not None, "up means that there are plans"
        mine = self._block_ids[self._handoffs[desk, key]]
        self._begin_transfer(
            desk,
            key,
            action.op,
            lambda: link.read_blocks(plan, _ids(action.ready.tables), mine, timeout_s=NEVER_S),
        )

    def _begin_transfer(self, desk: Desk, key: int, op: int, start: Callable[[], Ticket]) -> None:
        def ended(ticket: Ticket) -> None:
            event = events.OperationEnded(op, ticket.nbytes, ticket.exception())
            self._post_quietly(partial(self._tell, desk, key, event))

        try:
            ticket = start()
        except EngineError as error:
            self.post(partial(self._tell, desk, key, events.OperationEnded(op, 0, error)))
            return
        handoff = self._handoffs.get((desk, key))
        if handoff is not None:
            self._tickets.setdefault(handoff, []).append(ticket)
        ticket.add_done_callback(ended)

    # The end.

    def _begin_stop(self) -> None:
        self._stopping = True
        for number, known in self._sessions.items():
            if known.machine.state == session.UP:
                self._send(known, Bye(number, "closed"))

    def _fail_all(self) -> None:
        """Nobody waits for ever on an agent that is gone."""
        closed = AgentClosed("the agent was closed", operation="close")
        for known in self._sessions.values():
            known.up._fail(closed)
        for handoff in list(self._handoffs.values()):
            handoff._outcome._fail(closed)


def _ids(tables: tuple[bytes, ...]) -> np.ndarray[Any, Any]:
    """The block ids of the only group."""
    return np.frombuffer(tables[0], "<i4") if tables else np.zeros(0, np.int32)
