"""The agent's thread: it feeds the pure machines of `control/` and carries out what they ask for.

Frames, timers, engine tickets and user calls all come in here, one at a time; out go messages,
engine calls and outcomes. What blocks (opening and closing links, making plans) runs on short-lived
threads of its own and comes back as one more event.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..control import events
from ..control.desk import DecodeDesk, PrefillDesk
from ..control.errors import AgentClosed, BlocksMismatch, ControlError, ProtocolError
from ..control.handoff import MAX_REASON_CHARS
from ..control.messages import Accepted, Done, HandoffMessage, Ready, Refused, Request, Sent
from ..control.wire import decode, encode
from ..engine.errors import Cancelled, EngineError, LinkError
from .acquaintances import Acquaintance, Acquaintances
from .mailbox import Mailbox
from .token_handoffs import read_tokens, write_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from ..control.desk import Desk, Steps
    from ..control.events import Action, Event, SourceOffered
    from ..control.handoff import Timing
    from ..control.messages import Message, Reason, Side
    from ..engine.memory import CacheDescriptor, RegisteredCache
    from ..engine.tickets import Ticket
    from ..engine.transfer import TransferEngine
    from .handoffs import Handoff
    from .mailbox import Route, Timer

NEVER_S = 1e9  # the machines keep the time of a counter
ENGINE_MARGIN_S = 10.0  # beyond a handoff's deadline, which the machines keep

log = logging.getLogger("kvferry.agent")


class Work:
    """What the agent's thread keeps for one handoff: its user's end, tickets and timers."""

    def __init__(self) -> None:
        self.handoff: Handoff | None = None
        self.session = 0
        self.request: dict[str, Any] | None = None  # decode: what was asked for
        self.block_ids: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.tickets: dict[int, Ticket] = {}
        self.counter: Ticket | None = None
        self.timers: dict[str, Timer] = {}


class AgentCore:
    """Everything of an agent that lives on its mailbox's thread.

    Attributes:
        described: its cache as peers see it, with its place among the ranks of its engine.
        acquaintances: the peers.
        mailbox: its thread.
        messages_refused: messages that could not be queued for their peer.
        frames_refused: frames that were no message, or of no session.
    """

    def __init__(
        self,
        name: str,
        role: str,
        engine: TransferEngine,
        cache: RegisteredCache,
        bind: str,
        timing: Timing,
        described: CacheDescriptor | None = None,
    ) -> None:
        self.engine = engine
        self.cache = cache
        self.described = described or cache.descriptor
        self.name = name
        self.role = role
        self.messages_refused = 0
        self.frames_refused = 0
        self._desks: dict[Side, Desk] = {}
        if role != "prefill":
            self._desks["decode"] = DecodeDesk(timing)
        if role != "decode":
            self._desks["prefill"] = PrefillDesk(timing)
        self._work: dict[tuple[Side, int], Work] = {}
        self._closing = False
        self._all_back: Callable[[], None] = lambda: None
        self.acquaintances = Acquaintances(self, timing)
        self.mailbox = Mailbox(bind, self._on_frame, name)
        self.mailbox.start()

    # Handoffs: what users ask for

    def receive(self, handoff: Handoff, peer: Acquaintance, fields: dict[str, Any]) -> None:
        """Asks `peer` for a request's blocks."""
        desk = self._desks["decode"]
        assert isinstance(desk, DecodeDesk)
        try:
            self._check_open()
            key, steps = desk.begin(peer.session.number, handoff.request_id, **fields)
        except ControlError as error:
            handoff._outcome._fail(error)
            handoff.blocks_free._finish(0)
            return
        work = self._begin("decode", key, handoff)
        work.session = peer.session.number
        work.request = fields
        work.block_ids = np.frombuffer(fields["tables"][0], np.int32)
        self._carry_out("decode", steps)

    def offer(self, handoff: Handoff, source: SourceOffered) -> None:
        """Has a request's blocks for whoever asks."""
        desk = self._desks["prefill"]
        assert isinstance(desk, PrefillDesk)
        try:
            self._check_open()
        except AgentClosed as error:
            handoff._outcome._fail(error)
            handoff.blocks_free._finish(0)
            return
        key, steps = desk.offer(handoff.request_id, source)
        self._begin("prefill", key, handoff)
        self._carry_out("prefill", steps)

    def tell(self, side: Side, handoff: Handoff, event: Event) -> None:
        """Something happened to a handoff."""
        if handoff._key:
            self._tell(side, handoff._key, event)

    def _begin(self, side: Side, key: int, handoff: Handoff) -> Work:
        work = self._work.setdefault((side, key), Work())
        work.handoff = handoff
        handoff._key = key
        return work

    def _check_open(self) -> None:
        if self._closing:
            raise AgentClosed("the agent was closed", operation="hand off")

    def _tell(self, side: Side, key: int, event: Event) -> None:
        self._carry_out(side, self._desks[side].handle(key, event))

    # Handoffs: what machines ask for

    def _carry_out(self, side: Side, steps: Steps) -> None:
        desk = self._desks[side]
        keys = {key for key, _ in steps}
        for key, action in steps:
            self._act(side, key, action)
        for key in keys:
            if key not in desk.machines:
                work = self._work.pop((side, key), None)
                for timer in work.timers.values() if work is not None else ():
                    timer.cancel()
        self._report_if_all_back()

    def _act(self, side: Side, key: int, action: Action) -> None:
        if isinstance(action, events.Send):
            self._send_of_handoff(side, key, action.message)
            return
        work = self._work.setdefault((side, key), Work())
        match action:
            case events.SetTimer(kind=kind, seconds=seconds):
                self._clear_timer(work, kind)
                work.timers[kind] = self.mailbox.call_later(
                    seconds, partial(self._tell, side, key, events.TimerFired(kind))
                )
            case events.ClearTimer(kind=kind):
                self._clear_timer(work, kind)
            case events.Expect(imm=imm, nbytes=nbytes):
                # A handoff of no bytes is counted by its one empty write.
                writes = None if nbytes else 1
                try:
                    work.counter = self.engine.expect(
                        imm, nbytes=nbytes, writes=writes, timeout_s=NEVER_S
                    )
                except EngineError as error:
                    ended = events.CounterEnded(0, error)
                    self.mailbox.call_soon(partial(self._tell, side, key, ended))
                    return
                work.counter.add_done_callback(partial(self._counter_ended, key))
            case events.RetireCounter():
                if work.counter is not None:
                    work.counter.cancel()
            case events.StartWrite():
                self._start(side, key, work, action.op, partial(self._write, action))
            case events.StartRead():
                self._start(side, key, work, action.op, partial(self._read, work, action))
            case events.CancelOperations():
                for ticket in work.tickets.values():
                    ticket.cancel()
            case events.TearDownLink(session=number, reason=reason):
                log.warning("%s: the link is torn down: %s", self.name, reason)
                self.acquaintances.tear_down(number, reason)
            case events.Quarantine(reason=reason):
                log.warning("%s: blocks are kept in quarantine: %s", self.name, reason)
            case events.ReleaseBlocks() if work.handoff is not None:
                work.handoff.blocks_free._finish(0)
            case events.Succeed(nbytes=nbytes) if work.handoff is not None:
                work.handoff._outcome._finish(nbytes)
            case events.Fail(error=error) if work.handoff is not None:
                work.handoff._outcome._fail(error)

    def _clear_timer(self, work: Work, kind: str) -> None:
        timer = work.timers.pop(kind, None)
        if timer is not None:
            timer.cancel()

    def _start(
        self, side: Side, key: int, work: Work, op: int, begin: Callable[[], Ticket | None]
    ) -> None:
        """Begins a write or a read; however it ends, the machine hears of it later."""
        try:
            ticket = begin()
        except (EngineError, ControlError) as error:
            ended: Event = events.OperationEnded(op, 0, error)
            self.mailbox.call_soon(partial(self._tell, side, key, ended))
            return
        if ticket is None:
            self.mailbox.call_soon(partial(self._tell, side, key, events.OperationEnded(op)))
            return
        work.tickets[op] = ticket
        ticket.add_done_callback(partial(self._operation_ended, side, key, op))

    def _write(self, action: events.StartWrite) -> Ticket | None:
        request = action.request
        peer = self.acquaintances.get(request.session)
        if peer is None or peer.link is None or peer.write_plan is None:
            raise LinkError("there is no link to write over", operation="write")
        plan = peer.write_plan
        if request.stop_token:
            return write_tokens(peer.link, plan, action, self.cache.layout.layers)
        nbytes = plan.nbytes(request.num_blocks)
        if nbytes != request.nbytes:
            raise BlocksMismatch(
                f"decode expects {request.nbytes} bytes, prefill would write {nbytes}"
            )
        timeout_s = request.timeout_s + ENGINE_MARGIN_S
        if not request.num_blocks:
            return peer.link.signal(request.imm, timeout_s=timeout_s)
        held = self.cache.layout.layers[slice(*action.layers)]
        layers = [layer for layer in held if layer in plan.layers]
        if not layers:
            return None  # decode's rank holds other layers
        return peer.link.write_blocks(
            plan,
            np.frombuffer(action.tables[0], np.int32),
            np.frombuffer(request.tables[0], np.int32),
            imm=request.imm,
            layers=layers,
            timeout_s=timeout_s,
        )

    def _read(self, work: Work, action: events.StartRead) -> Ticket | None:
        peer = self.acquaintances.get(work.session)
        if peer is None or peer.link is None or peer.read_plan is None:
            raise LinkError("there is no link to read over", operation="read")
        if work.request is not None and work.request["stop_token"]:
            return read_tokens(peer.link, peer.read_plan, action, work.request)
        if not action.ready.num_blocks:
            return None
        return peer.link.read_blocks(
            peer.read_plan,
            np.frombuffer(action.ready.tables[0], np.int32),
            work.block_ids,
            timeout_s=NEVER_S,
        )

    def _operation_ended(self, side: Side, key: int, op: int, ticket: Ticket) -> None:
        """On an engine thread."""
        ended = events.OperationEnded(op, ticket.nbytes, ticket.exception())
        self.mailbox.call_soon(partial(self._tell, side, key, ended))

    def _counter_ended(self, key: int, ticket: Ticket) -> None:
        """On an engine thread."""
        if not isinstance(ticket.exception(), Cancelled):  # else the machine has retired it
            self.mailbox.call_soon(partial(self._tell_counter, key, ticket))

    def _tell_counter(self, key: int, ticket: Ticket) -> None:
        work = self._work.get(("decode", key))
        peer = self.acquaintances.get(work.session) if work is not None else None
        error = ticket.exception()
        if error is not None and peer is not None and peer.link is not None and peer.link.closed:
            return  # `LinkDown` is on its way, and says more
        self._tell("decode", key, events.CounterEnded(ticket.nbytes, error))

    # Messages

    def _on_frame(self, route: Route, frame: bytes) -> None:
        try:
            message = decode(frame)
        except ProtocolError as error:
            self.refuse(route, 0, "protocol", error.message)
            return
        if not isinstance(message, HandoffMessage):
            self.acquaintances.hear(route, message)
            return
        desk = self._desks.get(_addressed_side(message))
        peer = self.acquaintances.get(message.session)
        if peer is None or peer.route != route:
            self.refuse(route, message.session, "session", "this agent does not know you")
        elif desk is None:
            detail = f"{self.name} is {self.role}, it has no use for {type(message).__name__}"
            self.refuse(route, 0, "role", detail)
        else:
            self._carry_out(desk.side, desk.receive(message))

    def refuse(self, route: Route, number: int, reason: Reason, detail: str) -> None:
        """Answers a frame that makes no sense here."""
        self.frames_refused += 1
        self.send(route, Refused(number, reason, detail[:MAX_REASON_CHARS]))

    def send(self, route: Route, message: Message) -> str:
        """Sends a message; returns "" or why that cannot be."""
        reason = self.mailbox.send(route, encode(message))
        if reason:
            self.messages_refused += 1
        return reason

    def _send_of_handoff(self, side: Side, key: int, message: Message) -> None:
        peer = self.acquaintances.get(message.session)
        reason = self.send(peer.route, message) if peer is not None else "the peer is not known"
        if reason and key:
            self.mailbox.call_soon(partial(self._tell, side, key, events.SendRefused(reason)))

    # Links

    def came_up(self, peer: Acquaintance) -> None:
        """Handoffs with this peer may begin."""
        for desk in self._desks.values():
            desk.open_session(peer.session.number, peer.session.name)

    def went_down(self, peer: Acquaintance, reason: str) -> None:
        """The link to this peer is down."""
        for side, desk in self._desks.items():
            number, quiesced = peer.session.number, peer.quiesced
            self._carry_out(side, desk.link_down(number, reason, quiesced=quiesced))
        self._report_if_all_back()

    def quiesced(self, peer: Acquaintance) -> None:
        """This peer, whose link is down, can reach nothing any more."""
        for side, desk in self._desks.items():
            self._carry_out(side, desk.quiesced(peer.session.number))

    def is_busy(self, peer: Acquaintance) -> bool:
        """Whether a handoff with this peer is under way."""
        return any(desk.busy(peer.session.number) for desk in self._desks.values())

    def is_needed(self, peer: Acquaintance) -> bool:
        """Whether a desk may still have something to say to this peer."""
        return any(desk.knows(peer.session.number) for desk in self._desks.values())

    # The end

    def begin_close(self, all_back: Callable[[], None]) -> None:
        """Ends every handoff with `AgentClosed`; calls `all_back` once all blocks are back.

        And once every link is down: it may do so more than once.
        """
        self._closing = True
        self._all_back = all_back
        for (side, key), work in list(self._work.items()):
            if work.handoff is not None:
                work.handoff._outcome._fail(
                    AgentClosed(
                        "the agent was closed",
                        handoff=work.handoff.request_id,
                        operation="close",
                    )
                )
            self._tell(side, key, events.UserCancelled("the agent was closed"))
        self.acquaintances.say_goodbye()
        self._report_if_all_back()

    def end_close(self) -> None:
        """Says of the blocks that did not come back that they never will, as far as is known."""
        for work in self._work.values():
            if work.handoff is not None:
                work.handoff.blocks_free._fail(
                    AgentClosed(
                        "the agent was closed while a peer could still reach the blocks: keep "
                        "them as long as this process lives",
                        handoff=work.handoff.request_id,
                        operation="close",
                    )
                )

    def _report_if_all_back(self) -> None:
        at_work = any(desk.machines for desk in self._desks.values())
        if self._closing and not at_work and not self.acquaintances.any_link:
            self._all_back()


def _addressed_side(message: HandoffMessage) -> Side:
    """The side of the handoff that a message is for."""
    if isinstance(message, Request | Done):
        return "prefill"
    if isinstance(message, Accepted | Ready | Sent):
        return "decode"
    return "decode" if getattr(message, "side", "") == "prefill" else "prefill"
