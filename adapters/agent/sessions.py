"""An agent's peers: how each was met, what its cache looks like, and the link to it.

A session (`control/handoff/session.py`) decides; here its wishes are carried out. Plans are made and links
are opened and closed on short-lived threads, since all of these may block.

A session has a link of its own, which its one-time token ties to it: where both sides have dialled,
or have met anew in other roles, each handoff's bytes take the link of the session that it belongs to,
and the end of one session is not the end of another.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
from functools import partial
from typing import TYPE_CHECKING

from ...control.errors import AgentClosed, ControlError, HelloRefused
from ...control.handoff.events import ClearTimer, Received, Send, SetTimer, TimerFired
from ...control.handoff.messages import Bye, Describe, Hello, Refused
from ...control.handoff.session import (
    ENDED,
    Ended,
    LinkOpened,
    OpenLink,
    Reconcile,
    Reconciled,
    Session,
    Up,
    make_hello,
)
from ...engine.connect.admission import TOKEN_NBYTES
from ...engine.connect.handshake import HANDSHAKE_TIMEOUT_S, EngineAddress
from ...engine.errors import EngineError, LinkClosed
from ...engine.memory.descriptors import CacheDescriptor
from .acquaintance import Acquaintance
from .rank_plans import plan_between

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ...control.handoff.machine import Timing
    from ...control.handoff.messages import Message, Reason
    from ...control.handoff.session import SessionAction, SessionEvent
    from ...engine.link.link import Link
    from ...engine.transfer.ticket import Ticket
    from .core import AgentCore
    from .messaging import Route

MAX_STRANGERS = 256  # sessions that peers began and that are not up yet
LINK_TIMEOUT_S = HANDSHAKE_TIMEOUT_S
STRANGER_TIMEOUT_S = 2 * LINK_TIMEOUT_S
TOKEN_TIMEOUT_S = 4 * LINK_TIMEOUT_S  # the peer may have to make its plans first, for seconds
PATIENCE_S = 0.1  # for what is in flight when a peer says goodbye; it has all it waits for
FAREWELL_S = 0.25  # for a peer to hear that this agent leaves, before its links are cut

log = logging.getLogger("kvferry.agent")


class Acquaintances:
    """All peers of one agent, met or being met. Lives on the agent's thread."""

    def __init__(self, core: AgentCore, timing: Timing) -> None:
        self._core = core
        self._timing = timing
        self.life = secrets.randbits(62)
        self._numbers = itertools.count(secrets.randbits(61) + 1)
        self._all: dict[int, Acquaintance] = {}
        self._by_name: dict[str, Acquaintance] = {}
        self._digest = core.cache.layout.digest()
        self._cache = core.described.encode()
        self._hello(0)  # a name that no peer would take fails here

    def get(self, number: int) -> Acquaintance | None:
        """The acquaintance of this session number; one that is down may still be known."""
        return self._all.get(number)

    def by_name(self, name: str) -> Acquaintance | None:
        """The latest acquaintance of that name that is up. Any thread."""
        return self._by_name.get(name)

    # Meeting

    def meet(
        self,
        endpoint: str,
        timeout_s: float,
        waiter: Future[str],
        expected: tuple[str, int] | None = None,
    ) -> None:
        """Gets acquainted with the agent at `endpoint`; one that is known already stays.

        `expected` is the name and the life that it has to have, if that is known.
        """
        for known in self._all.values():
            if known.endpoint == endpoint and known.up:
                waiter.set_result(known.session.name)
                return
        try:
            route = self._core.mailbox.dial(endpoint)
        except ControlError as error:
            waiter.set_exception(error)
            return
        except Exception as error:
            waiter.set_exception(HelloRefused(f"{endpoint!r} cannot be dialled: {error}"))
            return
        number = next(self._numbers)
        self._begin(number, route, endpoint, waiter, timeout_s, expected)

    def hear(self, route: Route, message: Message) -> None:
        """A message that gets agents acquainted, or parts them."""
        known = self._all.get(message.session)
        if known is None and isinstance(message, Hello) and not route.dealer:
            known = self._stranger(message.session, route)
        if known is not None and known.route == route:
            known.patient = isinstance(message, Bye) and self._core.is_busy(known)
            self._tell(known, Received(message))
        elif not isinstance(message, Refused | Bye):
            self._core.refuse(route, message.session, "session", "this agent does not know you")

    def _stranger(self, number: int, route: Route) -> Acquaintance | None:
        waiting = sum(1 for known in self._all.values() if not known.endpoint and not known.link)
        if waiting >= MAX_STRANGERS:
            return None
        return self._begin(number, route, "", None, STRANGER_TIMEOUT_S)

    def _begin(
        self,
        number: int,
        route: Route,
        endpoint: str,
        waiter: Future[str] | None,
        timeout_s: float,
        expected: tuple[str, int] | None = None,
    ) -> Acquaintance:
        core = self._core
        token = secrets.token_bytes(TOKEN_NBYTES)
        engine = core.engine.address.encode()
        session = Session(
            self._hello(number),
            Describe(number, self._digest, self._cache, engine, token),
            self._timing,
            dials=bool(endpoint),
            timeout_s=timeout_s,
            expected=expected,
        )
        known = self._all[number] = Acquaintance(session, route, endpoint, waiter)
        known.token = token
        self._carry_out(known, session.start())
        return known

    def _hello(self, number: int) -> Hello:
        return make_hello(self._core.name, self._core.role, self.life, number)

    # What sessions ask for

    def _tell(self, known: Acquaintance, event: SessionEvent) -> None:
        self._carry_out(known, known.session.handle(event))

    def _carry_out(self, known: Acquaintance, actions: list[SessionAction]) -> None:
        for action in actions:
            match action:
                case Send(message=message):
                    self._core.send(known.route, message)
                case SetTimer(kind=kind, seconds=seconds):
                    self._clear_timer(known, kind)
                    known.timers[kind] = self._core.mailbox.call_later(
                        seconds, partial(self._tell, known, TimerFired(kind))
                    )
                case ClearTimer(kind=kind):
                    self._clear_timer(known, kind)
                case Reconcile(describe=describe):
                    _in_background(self._reconcile, known, describe)
                case OpenLink(describe=describe, dial=dial):
                    _in_background(self._open_link, known, describe, dial)
                case Up():
                    self._came_up(known)
                case Ended(error=error):
                    self._ended(known, known.failure or error)

    def _clear_timer(self, known: Acquaintance, kind: str) -> None:
        timer = known.timers.pop(kind, None)
        if timer is not None:
            timer.cancel()

    def _reconcile(self, known: Acquaintance, describe: Describe) -> None:
        """Makes the plans that both roles allow. In the background."""
        engine, cache, ours = self._core.engine, self._core.cache, known.session.role
        theirs = known.session.peer.role if known.session.peer is not None else "both"
        problem = ""
        try:
            peer_cache = CacheDescriptor.decode(describe.cache)
            known.engine_id = EngineAddress.decode(describe.engine).engine_id
            known.peer_cache = peer_cache
            mine = self._core.described
            if not known.session.dials:  # before the peer hears of the token
                engine.admit(known.token, known.engine_id, TOKEN_TIMEOUT_S)
            if ours != "decode" and theirs != "prefill":
                known.write_plan = plan_between(engine, cache, mine, peer_cache, writes=True)
            if ours != "prefill" and theirs != "decode":
                known.read_plan = plan_between(engine, cache, mine, peer_cache, writes=False)
        except EngineError as error:
            problem = error.message
        self._core.mailbox.call_soon(partial(self._tell, known, Reconciled(problem)))

    def _open_link(self, known: Acquaintance, describe: Describe, dial: bool) -> None:
        """Dials the peer's engine, or awaits its call. In the background."""
        engine = self._core.engine
        try:
            if dial:
                link = engine.connect(
                    describe.engine, token=describe.token, timeout_s=LINK_TIMEOUT_S
                )
            else:
                link = engine.accept_link(known.engine_id, LINK_TIMEOUT_S, token=known.token)
        except EngineError as error:
            known.failure = error
            self._core.mailbox.call_soon(partial(self._tell, known, LinkOpened(error.message)))
            return
        self._core.mailbox.call_soon(partial(self._link_opened, known, link))

    def _link_opened(self, known: Acquaintance, link: Link) -> None:
        known.link = link
        if known.session.state == ENDED:
            self._close_link(known)  # too late: nobody waits for it any more
            return
        self._tell(known, LinkOpened())
        link.down.add_done_callback(
            lambda _: self._core.mailbox.call_soon(partial(self._link_down, known))
        )

    def _came_up(self, known: Acquaintance) -> None:
        name, peer = known.session.name, known.session.peer
        for other in list(self._all.values()):
            same_name = other is not known and other.up and other.session.name == name
            if same_name and other.session.peer.generation != peer.generation:  # type: ignore[union-attr]
                self._depose(other, f"{name} was restarted")
        self._core.came_up(known)
        self._by_name[name] = known
        if known.waiter is not None and not known.waiter.done():
            known.waiter.set_result(name)

    # Parting

    def tear_down(self, number: int, reason: str) -> None:
        """Takes the link of a session down."""
        known = self._all.get(number)
        if known is not None:
            self._part(known, "link", reason)

    @property
    def any_link(self) -> bool:
        """Whether a link is up."""
        return any(known.link is not None and not known.down for known in self._all.values())

    def senders(self) -> dict[str, str]:
        """The peers that may send to this agent over a link that is up, and its transport."""
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
        """Tells every peer that this agent leaves; each then closes its links, or else we do.

        What was said before is heard before: a peer takes the last `Done` for an end, not a loss.
        """
        for known in list(self._all.values()):
            if known.session.state != ENDED:
                self._core.send(known.route, Bye(known.session.number, reason))
                self._core.mailbox.call_later(FAREWELL_S, partial(self._close_link, known))
            if known.waiter is not None and not known.waiter.done():
                known.waiter.set_exception(AgentClosed(reason, operation="connect"))

    def _depose(self, known: Acquaintance, detail: str) -> None:
        """Parts from an earlier life of a name, here and now: it may be alive, and what it says when
        it notices comes too late."""
        self._part(known, "session", detail)
        self._link_down(known)

    def _part(self, known: Acquaintance, reason: Reason, detail: str) -> None:
        error = HelloRefused(detail, peer=known.session.name, operation="link")
        self._carry_out(known, known.session.refuse(reason, error))
        self._close_link(known)

    def _ended(self, known: Acquaintance, error: Exception) -> None:
        known.parting = known.parting or str(error)
        for kind in list(known.timers):
            self._clear_timer(known, kind)
        if known.waiter is not None and not known.waiter.done():
            known.waiter.set_exception(error)
        if known.link is None:
            self._forget(known)
        elif known.patient:
            self._core.mailbox.call_later(PATIENCE_S, partial(self._close_link, known))
        else:
            self._close_link(known)

    def _close_link(self, known: Acquaintance) -> None:
        if known.link is not None:
            reason = known.parting or "the agent closed the link"
            known.link.fail(LinkClosed(reason, operation="close"))

    def _link_down(self, known: Acquaintance) -> None:
        """The link of a session that was up, or about to be, is down."""
        if known.down or known.link is None:
            return
        known.down = True
        name, reason = known.session.name, known.parting or str(known.link.error)
        if self._by_name.get(name) is known:
            del self._by_name[name]
        self._close_link(known)
        known.quiesced = _at_rest(known.link.quiesced)
        self._core.went_down(known, reason)
        self._part(known, "link", reason)
        if not known.quiesced:
            known.link.quiesced.add_done_callback(
                lambda ticket: self._core.mailbox.call_soon(
                    partial(self._link_quiesced, known, ticket)
                )
            )
        self._forget_old()
        self._core.mailbox.call_later(self._timing.remember_s, partial(self._fade, known))

    def _fade(self, known: Acquaintance) -> None:
        """It has been down for a while: its route is closed, unless blocks wait for it."""
        self._core.forget(known)
        self._forget_old()
        if known.session.number in self._all:
            self._core.mailbox.call_later(self._timing.remember_s, partial(self._fade, known))

    def _link_quiesced(self, known: Acquaintance, ticket: Ticket) -> None:
        if not _at_rest(ticket):
            return  # the engine was closed first: nobody knows any more
        known.quiesced = True
        self._core.quiesced(known)
        self._forget_old()

    def _forget_old(self) -> None:
        """Sessions that are down stay as long as a desk still answers for them."""
        for known in list(self._all.values()):
            if known.down and known.quiesced and not self._core.is_needed(known):
                self._forget(known)

    def _forget(self, known: Acquaintance) -> None:
        self._all.pop(known.session.number, None)
        self._core.mailbox.hang_up(known.route)


def _at_rest(quiesced: Ticket) -> bool:
    """Whether the peer of a link can reach nothing: its ticket ended, and ended well."""
    return quiesced.done() and quiesced.exception() is None


def _in_background(call: Callable[..., object], *arguments: object) -> None:
    threading.Thread(target=call, args=arguments, name="kvferry-agent", daemon=True).start()
