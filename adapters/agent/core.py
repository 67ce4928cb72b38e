"""What an agent does in its turns: feeds the pure machines of `control/`, has done what they ask for.

Frames, timers, engine tickets and user calls all come in here, one at a time; out go messages,
engine calls and outcomes. What blocks (opening and closing links, making plans) runs on short-lived
threads of its own and comes back as one more event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...control.errors import (
    AgentClosed,
    AgentDraining,
    ControlError,
    HandoffCancelled,
    ProtocolError,
)
from ...control.handoff import events
from ...control.handoff.messages import (
    Accepted,
    Cancel,
    Cancelled,
    Done,
    Failed,
    HandoffMessage,
    Ready,
    Request,
    Sent,
    decode,
)
from ...control.handoff.registry import DecodeDesk, PrefillDesk
from ...control.handoff.session import make_hello
from .executor import Workbench, idle_stream
from .handoff import Handoff, SendHandoff
from .messaging import Mailbox
from .sessions import Acquaintances

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...control.handoff.events import Event, SourceOffered
    from ...control.handoff.machine import Timing
    from ...control.handoff.messages import Message, Role, Side
    from ...control.handoff.registry import Desk, Steps
    from ...control.keys import Keys
    from ...engine.memory.descriptors import CacheDescriptor
    from ...engine.memory.regions import RegisteredCache
    from ...engine.transfer_engine import TransferEngine
    from .messaging import Route
    from .sessions import Acquaintance

# The side of a handoff that a message is for; None: the other side than that of its sender.
ADDRESSED: dict[type[Message], Side | None] = {
    Request: "prefill",
    Done: "prefill",
    Accepted: "decode",
    Ready: "decode",
    Sent: "decode",
    Failed: None,
    Cancel: None,
    Cancelled: None,
}


class AgentCore:
    """Everything of an agent that needs its turn.

    Args:
        described: its cache as peers see it, with its place among the ranks of its engine.

    Attributes:
        role: what the agent does now.
        mailbox: its sockets, and its turns.
        acquaintances: the peers.
        workbench: what is done with the engine.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        engine: TransferEngine,
        cache: RegisteredCache,
        described: CacheDescriptor,
        bind: str,
        timing: Timing,
        keys: Keys | None = None,
    ) -> None:
        make_hello(
            name, role, 0, 0
        )  # a name that no peer would take fails before sockets are there
        stream = idle_stream(cache.device)
        self.name = name
        self.role: Role = role
        self._engine = engine
        self._timing = timing
        self._desks = _desks(role, timing)
        self._closing = False
        self._all_back: Callable[[], None] = lambda: None
        self.mailbox = mailbox = Mailbox(bind, self._on_frame, name, keys)
        self.acquaintances = peers = Acquaintances(
            name, role, engine, cache, described, mailbox, timing
        )
        self.workbench = Workbench(name, engine, cache, stream, peers, mailbox, self._tell)
        peers.listen(self)
        turns = mailbox.turns
        turns.errands = engine.take_errands(turns.replace_thread)
        mailbox.start()

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
            handoff._refuse(error)
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
            handoff._refuse(error)
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

    def _carry_out(self, side: Side, steps: Steps) -> None:
        self.workbench.carry_out(side, steps, self._desks[side].machines)
        if self._closing:
            self._report_if_all_back()

    def count_handoffs(self) -> int:
        """Counts those that are not over."""
        return sum(len(desk.machines) for desk in self._desks.values())

    def flip(self, role: Role) -> None:
        """Takes another role: the agent is idle and all its links are down."""
        self.role = self.acquaintances.role = role
        self._desks = _desks(role, self._timing)

    # Messages

    def _on_frame(self, route: Route, frame: bytes) -> None:
        try:
            message = decode(frame)
        except ProtocolError as error:
            self.mailbox.refuse(route, 0, "protocol", error.message)
            return
        kind = type(message)
        if kind not in ADDRESSED:
            self.acquaintances.hear(route, message)
            return
        assert isinstance(message, HandoffMessage)
        peer = self.acquaintances.get(message.session)
        if peer is None or peer.route != route:
            self.mailbox.refuse(route, message.session, "session", "this agent does not know you")
            return
        side = ADDRESSED[kind] or _other_side(message)
        desk = self._desks.get(side)
        if desk is None:
            detail = f"{self.name} is {self.role}, it has no use for {kind.__name__}"
            self.mailbox.refuse(route, 0, "role", detail)
            return
        steps = desk.receive(message)
        if not steps:
            return
        if kind is Request:
            for key in dict(steps):
                self._say_who_asked(key)
        self._carry_out(side, steps)

    # Links, as a `SessionListener`

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
            self._engine.return_errands(errands)

    def _report_if_all_back(self) -> None:
        if self._closing and not self.count_handoffs() and not self.acquaintances.any_link:
            self._all_back()


def _desks(role: Role, timing: Timing) -> dict[Side, Desk]:
    desks: dict[Side, Desk] = {}
    if role != "prefill":
        desks["decode"] = DecodeDesk(timing)
    if role != "decode":
        desks["prefill"] = PrefillDesk(timing)
    return desks


def _other_side(message: HandoffMessage) -> Side:
    return "decode" if getattr(message, "side", "") == "prefill" else "prefill"
