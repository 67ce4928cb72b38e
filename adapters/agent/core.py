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
from ...control.handoff.registry import DecodeHandoffs, PrefillHandoffs
from ...control.handoff.session import make_hello
from .executor import Executor, idle_stream
from .handoff import Handoff, SendHandoff
from .messaging import Messaging
from .sessions import Sessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...control.handoff.events import Event, SourceOffered
    from ...control.handoff.machine import Timing
    from ...control.handoff.messages import Message, Role, Side
    from ...control.handoff.registry import Handoffs
    from ...control.keys import Keys
    from ...engine.memory.descriptors import CacheDescriptor
    from ...engine.memory.regions import RegisteredCache
    from ...engine.transfer_engine import TransferEngine
    from .messaging import ReplyTo
    from .sessions import PeerSession

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
        messaging: its sockets, and its turns.
        sessions: the peers.
        executor: what is done with the engine.
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
        make_hello(name, role, 0, 0)  # a name that no peer takes fails before there are sockets
        stream = idle_stream(cache.device)
        self.name = name
        self._engine = engine
        self._timing = timing
        self._sides = sides = _sides(role, timing)
        self._closing = False
        self._all_back: Callable[[], None] = lambda: None
        self.messaging = messaging = Messaging(bind, self._on_frame, name, keys)
        self.sessions = peers = Sessions(
            name,
            role,
            engine,
            cache,
            described,
            messaging,
            timing,
            sides,
            take_steps=lambda side, steps: self.executor.carry_out(side, steps),
        )
        self.executor = Executor(name, engine, cache, stream, sides, peers, messaging)
        loop = messaging.loop
        loop.inline_copies = engine.take_inline_copies(loop.replace_thread)
        messaging.start()

    # Handoffs: what users ask for

    def receive(self, handoff: Handoff, peer: PeerSession, fields: dict[str, Any]) -> None:
        """Ask `peer` for a request's blocks."""
        try:
            registry = self._registry("decode")
            assert isinstance(registry, DecodeHandoffs)
            if handoff._withdrawn:
                raise HandoffCancelled(handoff._withdrawn, handoff=handoff.request_id)
            key, steps = registry.begin(peer.session.number, handoff.request_id, **fields)
        except ControlError as error:
            handoff._refuse(error)
            return
        work = self.executor.begin("decode", key, handoff)
        work.session = peer.session.number
        work.nbytes = fields["nbytes"]
        work.request = fields
        self.executor.carry_out("decode", steps)

    def offer(self, handoff: Handoff, source: SourceOffered) -> None:
        """Has a request's blocks for whoever asks."""
        try:
            registry = self._registry("prefill")
            assert isinstance(registry, PrefillHandoffs)
        except ControlError as error:
            handoff._refuse(error)
            return
        key, steps = registry.offer(handoff.request_id, source)
        self.executor.begin("prefill", key, handoff)
        self._say_who_asked(key)
        self.executor.carry_out("prefill", steps)

    def _say_who_asked(self, key: int) -> None:
        """Tell the user of a handoff who asked for it, as soon as both are known."""
        machine = self._sides["prefill"].machines.get(key)
        work = self.executor.work.get(("prefill", key))
        handoff = work.handoff if work is not None else None
        if machine is None or not machine.peer or not isinstance(handoff, SendHandoff):
            return
        told, handoff.on_asked = handoff.on_asked, None
        if told is not None:
            told(machine.peer)

    def tell(self, side: Side, handoff: Handoff, event: Event) -> None:
        """Something happened to a handoff."""
        if handoff._key:
            self.executor.tell(side, handoff._key, event)
        elif isinstance(event, events.UserCancelled):
            handoff._withdrawn = event.reason or "cancelled"

    def _registry(self, side: Side) -> Handoffs:
        if self._closing:
            raise AgentClosed("the agent was closed", operation="hand off")
        if side in self._sides:
            return self._sides[side]
        what = f"{self.name} is {self.sessions.role} now: it changed its role"
        raise AgentDraining(what, operation="hand off")

    def count_handoffs(self) -> int:
        """Count those that are not over."""
        return sum(len(registry.machines) for registry in self._sides.values())

    def flip(self, role: Role) -> None:
        """Take another role: the agent is idle and all its links are down."""
        self.sessions.role = role
        self._sides.clear()
        self._sides.update(_sides(role, self._timing))

    # Messages

    def _on_frame(self, route: ReplyTo, frame: bytes) -> None:
        try:
            message = decode(frame)
        except ProtocolError as error:
            self.messaging.refuse(route, 0, "protocol", error.message)
            return
        kind = type(message)
        if kind not in ADDRESSED:
            self.sessions.hear(route, message)
            return
        assert isinstance(message, HandoffMessage)
        peer = self.sessions.get(message.session)
        if peer is None or peer.route != route:
            self.messaging.refuse(route, message.session, "session", "this agent does not know you")
            return
        side = ADDRESSED[kind] or _other_side(message)
        registry = self._sides.get(side)
        if registry is None:
            detail = f"{self.name} is {self.sessions.role}, it has no use for {kind.__name__}"
            self.messaging.refuse(route, 0, "role", detail)
            return
        steps = registry.receive(message)
        if not steps:
            return
        if kind is Request:
            for key in dict(steps):
                self._say_who_asked(key)
        self.executor.carry_out(side, steps)

    # The end

    def begin_close(self, all_back: Callable[[], None]) -> None:
        """End every handoff with `AgentClosed`; calls `all_back` once all blocks are back.

        And once every link is down: it may do so more than once.
        """
        self._closing = True
        self._all_back = all_back
        self.executor.after_steps = self._report_if_all_back
        for (side, key), work in list(self.executor.work.items()):
            if work.handoff is not None:
                work.handoff._outcome._fail(
                    AgentClosed(
                        "the agent was closed",
                        handoff=work.handoff.request_id,
                        operation="close",
                    )
                )
            self.executor.tell(side, key, events.UserCancelled("the agent was closed"))
        self.sessions.say_goodbye("the agent was closed")
        self._report_if_all_back()

    def end_close(self) -> None:
        """Say of the blocks that did not come back that they never will, as far as is known."""
        for work in self.executor.work.values():
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
        """Stop the thread and close the sockets. Not from the thread itself. Once."""
        self.messaging.close()
        inline_copies = self.messaging.loop.inline_copies
        if inline_copies is not None:
            self._engine.return_inline_copies(inline_copies)

    def _report_if_all_back(self) -> None:
        if not self.count_handoffs() and not self.sessions.any_link:
            self._all_back()


def _sides(role: Role, timing: Timing) -> dict[Side, Handoffs]:
    sides: dict[Side, Handoffs] = {}
    if role != "prefill":
        sides["decode"] = DecodeHandoffs(timing)
    if role != "decode":
        sides["prefill"] = PrefillHandoffs(timing)
    return sides


def _other_side(message: HandoffMessage) -> Side:
    return "decode" if getattr(message, "side", "") == "prefill" else "prefill"
