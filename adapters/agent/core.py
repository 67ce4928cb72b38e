"""What an agent does in its turns: feeds the pure machines of `control/`, carries out what they ask for.

Frames, timers, engine tickets and user calls all come in here, one at a time; out go messages,
engine calls and outcomes. What blocks (opening and closing links, making plans) runs on short-lived
threads of its own and comes back as one more event.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ...control.errors import (
    AgentClosed,
    AgentDraining,
    ControlError,
    HandoffCancelled,
    ProtocolError,
)
from ...control.handoff import events
from ...control.handoff.machine import MAX_REASON_CHARS
from ...control.handoff.messages import (
    Accepted,
    Done,
    HandoffMessage,
    Ready,
    Refused,
    Request,
    Sent,
)
from ...control.handoff.registry import DecodeDesk, PrefillDesk
from ...control.wire import decode, encode
from .executor import Workbench
from .handoff import Handoff, SendHandoff
from .messaging import Mailbox
from .sessions import Acquaintances

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...control.handoff.events import Event, SourceOffered
    from ...control.handoff.machine import Timing
    from ...control.handoff.messages import Message, Reason, Role, Side
    from ...control.handoff.registry import Desk, Steps
    from ...control.keys import Keys
    from ...engine.memory.regions import CacheDescriptor, RegisteredCache
    from ...engine.transfer_engine import TransferEngine
    from .acquaintance import Acquaintance
    from .messaging import Route

log = logging.getLogger("kvferry.agent")


class AgentCore:
    """Everything of an agent that needs its turn.

    Attributes:
        described: its cache as peers see it, with its place among the ranks of its engine.
        acquaintances: the peers.
        mailbox: its sockets, and its turns.
        workbench: what is done with the engine.
        role: what the agent does now.
        flipping: the role that it takes once it is idle; "" if it stays.
        messages_refused: messages that could not be queued for their peer.
        frames_refused: frames that were no message, or of no session.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        engine: TransferEngine,
        cache: RegisteredCache,
        bind: str,
        timing: Timing,
        keys: Keys | None = None,
        described: CacheDescriptor | None = None,
    ) -> None:
        self.engine = engine
        self.cache = cache
        self.described = described or cache.descriptor
        self.name = name
        self.role: Role = role
        self.flipping: Role | Literal[""] = ""
        self.messages_refused = 0
        self.frames_refused = 0
        self._timing = timing
        self._desks = _desks(role, timing)
        self.workbench = Workbench(engine, cache, name)
        self._closing = False
        self._all_back: Callable[[], None] = lambda: None
        self.acquaintances = Acquaintances(self, timing)
        self.mailbox = Mailbox(bind, self._on_frame, name, keys)
        self.workbench.start(self._tell, self.acquaintances, self.mailbox)
        turns = self.mailbox.turns
        turns.errands = engine.take_errands(turns.replace_thread)
        self.mailbox.start()

    # Handoffs: what users ask for

    def receive(self, handoff: Handoff, peer: Acquaintance, fields: dict[str, Any]) -> None:
        """Asks `peer` for a request's blocks."""
        desk = self._desks.get("decode")
        try:
            self._check_open("decode")
            if handoff._withdrawn:
                raise HandoffCancelled(handoff._withdrawn, handoff=handoff.request_id)
            assert isinstance(desk, DecodeDesk)
            key, steps = desk.begin(peer.session.number, handoff.request_id, **fields)
        except ControlError as error:
            refuse(handoff, error)
            return
        work = self.workbench.begin("decode", key, handoff)
        work.session = peer.session.number
        work.nbytes = fields["nbytes"]
        work.request = fields
        self._carry_out("decode", steps)

    def offer(self, handoff: Handoff, source: SourceOffered) -> None:
        """Has a request's blocks for whoever asks."""
        desk = self._desks.get("prefill")
        try:
            self._check_open("prefill")
            assert isinstance(desk, PrefillDesk)
        except ControlError as error:
            refuse(handoff, error)
            return
        key, steps = desk.offer(handoff.request_id, source)
        self.workbench.begin("prefill", key, handoff)
        self._say_who_asked(key)
        self._carry_out("prefill", steps)

    def _say_who_asked(self, key: int) -> None:
        """Tells the user of a handoff who asked for it, as soon as both are known."""
        machine = self._desks["prefill"].machines.get(key)
        work = self.workbench.work.get(("prefill", key))
        handoff = work.handoff if work is not None else None
        if machine is None or not machine.peer or not isinstance(handoff, SendHandoff):
            return
        told, handoff.on_asked = handoff.on_asked, None
        if told is not None:
            told(machine.peer)

    def tell(self, side: Side, handoff: Handoff, event: Event) -> None:
        """Something happened to a handoff."""
        if handoff._key and side in self._desks:
            self._tell(side, handoff._key, event)
        elif not handoff._key and isinstance(event, events.UserCancelled):
            handoff._withdrawn = event.reason or "cancelled"

    def _check_open(self, side: Side) -> None:
        if self._closing:
            raise AgentClosed("the agent was closed", operation="hand off")
        if side not in self._desks:
            raise AgentDraining(
                f"{self.name} is {self.role} now: it changed its role", operation="hand off"
            )

    def _tell(self, side: Side, key: int, event: Event) -> None:
        desk = self._desks.get(side)
        if desk is not None:  # else the agent has another role by now, and the handoff is over
            self._carry_out(side, desk.handle(key, event))

    # Handoffs: what machines ask for

    def _carry_out(self, side: Side, steps: Steps) -> None:
        desk = self._desks[side]
        keys = {key for key, _ in steps}
        for key, action in steps:
            if isinstance(action, events.Send):
                self._send_of_handoff(side, key, action.message)
            else:
                self.workbench.act(side, key, action)
        for key in keys:
            if key not in desk.machines:
                self.workbench.end(side, key)
        self._report_if_all_back()

    @property
    def num_handoffs(self) -> int:
        """Handoffs that are not over."""
        return sum(len(desk.machines) for desk in self._desks.values())

    # Changing the role

    def flip(self) -> None:
        """Takes the role `flipping`: the agent is idle and all its links are down."""
        assert self.flipping
        self.role, self.flipping = self.flipping, ""
        self._desks = _desks(self.role, self._timing)

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
        peer = self.acquaintances.get(message.session)
        if peer is None or peer.route != route:
            self.refuse(route, message.session, "session", "this agent does not know you")
            return
        desk = self._desks.get(_addressed_side(message))
        if desk is None:
            detail = f"{self.name} is {self.role}, it has no use for {type(message).__name__}"
            self.refuse(route, 0, "role", detail)
        else:
            steps = desk.receive(message)
            if not steps:
                return
            if isinstance(message, Request):
                for key in {key for key, _ in steps}:
                    self._say_who_asked(key)
            self._carry_out(desk.side, steps)

    def refuse(self, route: Route, number: int, reason: Reason, detail: str) -> None:
        """Answers a frame that makes no sense here."""
        self.frames_refused += 1
        self.send(route, Refused(number, reason, detail[:MAX_REASON_CHARS]))

    def send(
        self, route: Route, message: Message, refused: Callable[[str], None] | None = None
    ) -> None:
        """Sends a message; `refused` is told why if that cannot be."""
        self.mailbox.send(route, encode(message), partial(self._refused, refused))

    def _refused(self, refused: Callable[[str], None] | None, reason: str) -> None:
        self.messages_refused += 1
        if refused is not None:
            refused(reason)

    def _send_of_handoff(self, side: Side, key: int, message: Message) -> None:
        peer = self.acquaintances.get(message.session)

        def refused(reason: str) -> None:
            if key:
                self._tell(side, key, events.SendRefused(reason))

        if peer is not None:
            if isinstance(message, Accepted):
                self.workbench.placed(key, message.session, peer.session.name)
            self.send(peer.route, message, refused)
        else:
            self.mailbox.call_soon(partial(refused, "the peer is not known"))

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

    def forget(self, peer: Acquaintance) -> None:
        """This peer is down for so long that it asks about no handoff any more."""
        for desk in self._desks.values():
            desk.forget(peer.session.number)

    # The end

    def begin_close(self, all_back: Callable[[], None]) -> None:
        """Ends every handoff with `AgentClosed`; calls `all_back` once all blocks are back.

        And once every link is down: it may do so more than once.
        """
        self._closing = True
        self._all_back = all_back
        for (side, key), work in list(self.workbench.work.items()):
            if work.handoff is not None:
                work.handoff._outcome._fail(
                    AgentClosed(
                        "the agent was closed",
                        handoff=work.handoff.request_id,
                        operation="close",
                    )
                )
            self._tell(side, key, events.UserCancelled("the agent was closed"))
        self.acquaintances.say_goodbye("the agent was closed")
        self._report_if_all_back()

    def end_close(self) -> None:
        """Says of the blocks that did not come back that they never will, as far as is known."""
        for work in self.workbench.work.values():
            if work.handoff is not None:
                work.handoff.blocks_free._fail(
                    AgentClosed(
                        "the agent was closed while a peer could still reach the blocks: keep "
                        "them as long as this process lives",
                        handoff=work.handoff.request_id,
                        operation="close",
                    )
                )

    def close(self) -> None:
        """Stops the thread and closes the sockets. Not from the thread itself. Once."""
        self.mailbox.close()
        errands = self.mailbox.turns.errands
        if errands is not None:
            self.engine.return_errands(errands)

    def _report_if_all_back(self) -> None:
        if self._closing and not self.num_handoffs and not self.acquaintances.any_link:
            self._all_back()


def refuse(handoff: Handoff, error: Exception) -> None:
    """Ends a handoff that never began: its blocks are free."""
    handoff._outcome._fail(error)
    handoff.blocks_free._finish(0)


def _desks(role: Role, timing: Timing) -> dict[Side, Desk]:
    desks: dict[Side, Desk] = {}
    if role != "prefill":
        desks["decode"] = DecodeDesk(timing)
    if role != "decode":
        desks["prefill"] = PrefillDesk(timing)
    return desks


def _addressed_side(message: HandoffMessage) -> Side:
    """The side of the handoff that a message is for."""
    if isinstance(message, Request | Done):
        return "prefill"
    if isinstance(message, Accepted | Ready | Sent):
        return "decode"
    return "decode" if getattr(message, "side", "") == "prefill" else "prefill"
