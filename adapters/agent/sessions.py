"""An agent's peers: how each was met, what its cache looks like, and the link to it.

A session (`control/handoff/session.py`) decides; here its wishes are carried out. Plans are made and links
are opened and closed on short-lived threads, since all of these may block.

A session has a link of its own, which its one-time token ties to it: where both sides have dialled,
or have met anew in other roles, each handoff's bytes take the link of the session that it belongs to,
and the end of one session is not the end of another.
"""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from ...control.errors import AgentClosed, ControlError, HelloRefused
from ...control.handoff.events import ClearTimer, Received, Send, SetTimer, TimerFired
from ...control.handoff.messages import Bye, Describe, Hello, Refused
from ...control.handoff.session import (
    ENDED,
    UP,
    Ended,
    LinkOpened,
    OpenLink,
    Reconcile,
    Reconciled,
    Session,
    Up,
    make_hello,
)
from ...engine.connect.handshake import HANDSHAKE_TIMEOUT_S, TOKEN_NBYTES
from ...engine.errors import EngineError, LinkClosed
from ...engine.memory.descriptors import CacheDescriptor
from ...engine.plan.rank_plan import RankPlan, check_covers
from ...engine.wire.identity import EngineAddress
from .event_loop import Timers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from ...control.handoff.events import Action, Event
    from ...control.handoff.machine import Timing
    from ...control.handoff.messages import Message, Reason, Role, Side
    from ...control.handoff.registry import Handoffs, Steps
    from ...engine.layout.kv_layout import KVLayout
    from ...engine.link.link import Link
    from ...engine.memory.regions import RegisteredCache
    from ...engine.transfer.plan import TransferPlan
    from ...engine.transfer.ticket import Ticket
    from ...engine.transfer_engine import TransferEngine
    from .messaging import Messaging, ReplyTo

MAX_STRANGERS = 256  # sessions that peers began and that are not up yet
LINK_TIMEOUT_S = HANDSHAKE_TIMEOUT_S
STRANGER_TIMEOUT_S = 2 * LINK_TIMEOUT_S
TOKEN_TIMEOUT_S = 4 * LINK_TIMEOUT_S  # the peer may have to make its plans first, for seconds
PATIENCE_S = 0.1  # for what is in flight when a peer says goodbye; it has all it waits for
FAREWELL_S = 0.25  # for a peer to hear that this agent leaves, before its links are cut

log = logging.getLogger("kvferry.agent")


class PeerSession:
    """One session with one peer.

    Attributes:
        session, route: who it is, and how messages reach it.
        endpoint: what this side dialled; "" if the peer did.
        waiter: ends with the peer's name, or with why there is none.
        peer_cache: the peer's cache, once it has described it.
        write_plan, read_plan: from our cache to the peer's, and back, as far as roles need them;
            None also where, of two sets of ranks, these two have nothing to move.
        link: the link, once it is there.
        down: whether the link was there and is no more.
        quiesced: whether the peer can reach nothing any more.
    """

    def __init__(
        self, session: Session, route: ReplyTo, endpoint: str, waiter: Future[str] | None
    ) -> None:
        self.session = session
        self.route = route
        self.endpoint = endpoint
        self.waiter = waiter
        self.engine_id = ""
        self.token = b""  # what lets the peer open its link to us, once
        self.peer_cache: CacheDescriptor | None = None
        self.write_plan: TransferPlan | None = None
        self.read_plan: TransferPlan | None = None
        self.link: Link | None = None
        self.down = False
        self.quiesced = False
        self.failure: EngineError | None = None  # why the link could not be opened
        self.patient = False  # the peer leaves, and acknowledgements may still be on their way
        self.parting = ""  # why the session ended, if that came before the link went down
        self.timers = Timers()

    @property
    def up(self) -> bool:
        """Whether handoffs may begin."""
        return self.session.state == UP and not self.down


class Sessions:
    """All peers of one agent, met or being met. Lives on the agent's thread.

    Args:
        described: the cache as peers see it.
        sides: the registries of this agent's handoffs, which learn whose link is up, or down.
        take_steps: carries out what a registry of them asks for then.

    Attributes:
        role: what the agent does now; the next peers are told of this one.
        life: tells this life of the agent from the next.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        engine: TransferEngine,
        cache: RegisteredCache,
        described: CacheDescriptor,
        messaging: Messaging,
        timing: Timing,
        sides: Mapping[Side, Handoffs],
        take_steps: Callable[[Side, Steps], None],
    ) -> None:
        self.role: Role = role
        self.life = secrets.randbits(62)
        self._name = name
        self._engine = engine
        self._cache = cache
        self._described = described
        self._messaging = messaging
        self._timing = timing
        self._sides = sides
        self._take_steps = take_steps
        self._numbers = itertools.count(secrets.randbits(61) + 1)
        self._all: dict[int, PeerSession] = {}
        self._by_name: dict[str, PeerSession] = {}
        self._digest = cache.layout.digest()
        self._encoded = described.encode()
        self._acts: dict[type[Action], Callable[[PeerSession, Any], None]] = {
            Send: self._send,
            SetTimer: self._set_timer,
            ClearTimer: self._clear_timer,
            Reconcile: partial(_in_background, self._reconcile),
            OpenLink: partial(_in_background, self._open_link),
            Up: self._came_up,
            Ended: self._ended,
        }

    def get(self, number: int) -> PeerSession | None:
        """Return the session of this number; one that is down may still be known."""
        return self._all.get(number)

    def by_name(self, name: str) -> PeerSession | None:
        """Return the latest session of that name that is up. Any thread."""
        return self._by_name.get(name)

    # Meeting

    def meet(
        self,
        endpoint: str,
        timeout_s: float,
        waiter: Future[str],
        expected: tuple[str, int] | None = None,
    ) -> None:
        """Get acquainted with the agent at `endpoint`; one that is known already stays.

        `expected` is the name and the life that it has to have, if that is known.
        """
        for known in self._all.values():
            if known.endpoint == endpoint and known.up:
                waiter.set_result(known.session.name)
                return
        try:
            route = self._messaging.dial(endpoint)
        except ControlError as error:
            waiter.set_exception(error)
            return
        except Exception as error:
            waiter.set_exception(HelloRefused(f"{endpoint!r} cannot be dialled: {error}"))
            return
        number = next(self._numbers)
        self._begin(number, route, endpoint, waiter, timeout_s, expected)

    def hear(self, route: ReplyTo, message: Message) -> None:
        """A message that gets agents acquainted, or parts them."""
        known = self._all.get(message.session)
        if known is None and isinstance(message, Hello) and not route.dealer:
            known = self._stranger(message.session, route)
        if known is not None and known.route == route:
            known.patient = isinstance(message, Bye) and any(
                registry.busy(message.session) for registry in self._sides.values()
            )
            self._tell(known, Received(message))
        elif not isinstance(message, Refused | Bye):
            self._messaging.refuse(
                route, message.session, "session", "this agent does not know you"
            )

    def _stranger(self, number: int, route: ReplyTo) -> PeerSession | None:
        waiting = sum(1 for known in self._all.values() if not known.endpoint and not known.link)
        if waiting >= MAX_STRANGERS:
            return None
        return self._begin(number, route, "", None, STRANGER_TIMEOUT_S)

    def _begin(
        self,
        number: int,
        route: ReplyTo,
        endpoint: str,
        waiter: Future[str] | None,
        timeout_s: float,
        expected: tuple[str, int] | None = None,
    ) -> PeerSession:
        token = secrets.token_bytes(TOKEN_NBYTES)
        engine = self._engine.address.encode()
        session = Session(
            make_hello(self._name, self.role, self.life, number),
            Describe(number, self._digest, self._encoded, engine, token),
            self._timing,
            dials=bool(endpoint),
            timeout_s=timeout_s,
            expected=expected,
        )
        known = self._all[number] = PeerSession(session, route, endpoint, waiter)
        known.token = token
        self._carry_out(known, session.start())
        return known

    # What sessions ask for

    def _tell(self, known: PeerSession, event: Event) -> None:
        self._carry_out(known, known.session.handle(event))

    def _carry_out(self, known: PeerSession, actions: list[Action]) -> None:
        for action in actions:
            self._acts[type(action)](known, action)

    def _send(self, known: PeerSession, action: Send) -> None:
        self._messaging.tell(known.route, action.message)

    def _set_timer(self, known: PeerSession, action: SetTimer) -> None:
        fired = partial(self._tell, known, TimerFired(action.kind))
        known.timers.start(action.kind, self._messaging.call_later(action.seconds, fired))

    def _clear_timer(self, known: PeerSession, action: ClearTimer) -> None:
        known.timers.stop(action.kind)

    def _reconcile(self, known: PeerSession, action: Reconcile) -> None:
        """Make the plans that both roles allow. In the background."""
        describe, engine = action.describe, self._engine
        ours, mine = known.session.role, self._described
        theirs = known.session.peer.role if known.session.peer is not None else "both"
        problem = ""
        try:
            peer_cache = CacheDescriptor.decode(describe.cache)
            known.engine_id = EngineAddress.decode(describe.engine).engine_id
            known.peer_cache = peer_cache
            if not known.session.dials:  # before the peer hears of the token
                engine.admit(known.token, known.engine_id, TOKEN_TIMEOUT_S)
            if ours != "decode" and theirs != "prefill":
                known.write_plan = plan_between(engine, self._cache, mine, peer_cache, writes=True)
            if ours != "prefill" and theirs != "decode":
                known.read_plan = plan_between(engine, self._cache, mine, peer_cache, writes=False)
        except EngineError as error:
            problem = error.message
        self._messaging.call_soon(partial(self._tell, known, Reconciled(problem)))

    def _open_link(self, known: PeerSession, action: OpenLink) -> None:
        """Dial the peer's engine, or awaits its call. In the background."""
        there, engine = action.describe, self._engine
        try:
            if action.dial:
                link = engine.connect(there.engine, token=there.token, timeout_s=LINK_TIMEOUT_S)
            else:
                link = engine.accept_link(known.engine_id, LINK_TIMEOUT_S, token=known.token)
        except EngineError as error:
            known.failure = error
            self._messaging.call_soon(partial(self._tell, known, LinkOpened(error.message)))
            return
        self._messaging.call_soon(partial(self._link_opened, known, link))

    def _link_opened(self, known: PeerSession, link: Link) -> None:
        known.link = link
        if known.session.state == ENDED:
            self._close_link(known)  # too late: nobody waits for it any more
            return
        self._tell(known, LinkOpened())
        link.down.add_done_callback(
            lambda _: self._messaging.call_soon(partial(self._link_down, known))
        )

    def _came_up(self, known: PeerSession, _: Up) -> None:
        name, peer = known.session.name, known.session.peer
        for other in list(self._all.values()):
            same_name = other is not known and other.up and other.session.name == name
            if same_name and other.session.peer.generation != peer.generation:  # type: ignore[union-attr]
                self._depose(other, f"{name} was restarted")
        for registry in self._sides.values():
            registry.open_session(known.session.number, name)
        self._by_name[name] = known
        if known.waiter is not None and not known.waiter.done():
            known.waiter.set_result(name)

    # Parting

    def tear_down(self, number: int, reason: str) -> None:
        """Take the link of a session down."""
        known = self._all.get(number)
        if known is not None:
            self._part(known, "link", reason)

    @property
    def any_link(self) -> bool:
        """Whether a link is up."""
        return any(known.link is not None and not known.down for known in self._all.values())

    def senders(self) -> dict[str, str]:
        """Return the peers that may send to this agent over a link that is up, and its
        transport."""
        return {
            name: known.link.transport
            for name, known in self._by_name.items()
            if known.link is not None and known.read_plan is not None
        }

    def replaced(self, name: str, life: int) -> None:
        """The daemon knows another life under this name: whoever had it before is not that agent."""
        for known in list(self._all.values()):
            peer = known.session.peer
            if known.up and peer is not None and peer.name == name and peer.generation != life:
                self._depose(known, f"{name} was replaced by another life")

    def say_goodbye(self, reason: str) -> None:
        """Tell every peer that this agent leaves; each then close its links, or else we do.

        What was said before is heard before: a peer takes the last `Done` for an end, not a loss.
        """
        for known in list(self._all.values()):
            if known.session.state != ENDED:
                self._messaging.tell(known.route, Bye(known.session.number, reason))
                self._messaging.call_later(FAREWELL_S, partial(self._close_link, known))
            if known.waiter is not None and not known.waiter.done():
                known.waiter.set_exception(AgentClosed(reason, operation="connect"))

    def _depose(self, known: PeerSession, detail: str) -> None:
        """Parts from an earlier life of a name, here and now: it may be alive, and what it says when
        it notices comes too late."""
        self._part(known, "session", detail)
        self._link_down(known)

    def _part(self, known: PeerSession, reason: Reason, detail: str) -> None:
        self._carry_out(known, known.session.refuse(reason, detail))
        self._close_link(known)

    def _ended(self, known: PeerSession, action: Ended) -> None:
        error = known.failure or action.error
        known.parting = known.parting or str(error)
        known.timers.stop_all()
        if known.waiter is not None and not known.waiter.done():
            known.waiter.set_exception(error)
        if known.link is None:
            self._forget(known)
        elif known.patient:
            self._messaging.call_later(PATIENCE_S, partial(self._close_link, known))
        else:
            self._close_link(known)

    def _close_link(self, known: PeerSession) -> None:
        if known.link is not None:
            reason = known.parting or "the agent closed the link"
            known.link.fail(LinkClosed(reason, operation="close"))

    def _link_down(self, known: PeerSession) -> None:
        """The link of a session that was up, or about to be, is down."""
        if known.down or known.link is None:
            return
        known.down = True
        name, reason = known.session.name, known.parting or str(known.link.error)
        if self._by_name.get(name) is known:
            others = [each for each in self._all.values() if each.up and each.session.name == name]
            if others:  # both have dialled, and the other session is as good
                self._by_name[name] = others[-1]
            else:
                del self._by_name[name]
        self._close_link(known)
        known.quiesced = _at_rest(known.link.quiesced)
        for side, registry in self._sides.items():
            number, quiesced = known.session.number, known.quiesced
            self._take_steps(side, registry.link_down(number, reason, quiesced=quiesced))
        self._part(known, "link", reason)
        if not known.quiesced:
            known.link.quiesced.add_done_callback(
                lambda ticket: self._messaging.call_soon(
                    partial(self._link_quiesced, known, ticket)
                )
            )
        self._forget_old()
        self._messaging.call_later(self._timing.remember_s, partial(self._fade, known))

    def _fade(self, known: PeerSession) -> None:
        """It has been down for a while: its route is closed, unless blocks wait for it."""
        for registry in self._sides.values():
            registry.forget(known.session.number)
        self._forget_old()
        if known.session.number in self._all:
            self._messaging.call_later(self._timing.remember_s, partial(self._fade, known))

    def _link_quiesced(self, known: PeerSession, ticket: Ticket) -> None:
        if not _at_rest(ticket):
            return  # the engine was closed first: nobody knows any more
        known.quiesced = True
        for side, registry in self._sides.items():
            self._take_steps(side, registry.quiesced(known.session.number))
        self._forget_old()

    def _forget_old(self) -> None:
        """Sessions that are down stay as long as a registry still answers for them."""
        for known in list(self._all.values()):
            number = known.session.number
            needed = any(registry.knows(number) for registry in self._sides.values())
            if known.down and known.quiesced and not needed:
                self._forget(known)

    def _forget(self, known: PeerSession) -> None:
        self._all.pop(known.session.number, None)
        self._messaging.hang_up(known.route)


def _at_rest(quiesced: Ticket) -> bool:
    """Return whether the peer of a link can reach nothing: its ticket ended, and ended well."""
    return quiesced.done() and quiesced.exception() is None


def _in_background(call: Callable[..., object], *arguments: object) -> None:
    threading.Thread(target=call, args=arguments, name="kvferry-agent", daemon=True).start()


def plan_between(
    engine: TransferEngine,
    cache: RegisteredCache,
    mine: CacheDescriptor,
    theirs: CacheDescriptor,
    *,
    writes: bool,
) -> TransferPlan | None:
    """Return the plan from this agent's cache to a peer's, or back; None if they have nothing to
    move.

    Of everything that both hold; or of their part, where the caches are spread over ranks.

    Raises:
        LayoutError: the two caches, or the two sets of ranks, cannot be reconciled; or, without
            ranks, the destination has layers or heads that the source lacks.
    """
    pair = (cache, theirs) if writes else (theirs, cache)
    src, dst = (mine, theirs) if writes else (theirs, mine)
    if not mine.ranks and not theirs.ranks:
        plan = engine.plan(*pair)
        check_covers(src.layout, dst.layout)
        return plan
    for route in rank_plan_of(src, dst).to(dst.rank):
        if route.src == src.rank:
            return engine.plan(*pair, keys=route.keys)
    return None


def rank_plan_of(src: CacheDescriptor, dst: CacheDescriptor) -> RankPlan:
    """Who sends what to whom between the ranks of two engines."""
    return _rank_plan(src.ranks or (src.layout,), dst.ranks or (dst.layout,))


@functools.lru_cache(maxsize=64)
def _rank_plan(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...]) -> RankPlan:
    """As `RankPlan`, remembered: every rank of a set asks for the same."""
    return RankPlan(src, dst)
