"""An agent's membership: carries out what `control/cluster/presence.py` asks for, on the agent's thread.

With each heartbeat goes what people who look at the cluster want to see of it. The daemon is a convenience: agents that know each other go on when it dies, and what this file
waits for never holds up a handoff.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from functools import partial
from heapq import nlargest
from typing import TYPE_CHECKING, Any

import msgspec

from ...control.cluster.client import publisher_endpoint
from ...control.cluster.messages import (
    CHANGES_TOPIC,
    MAX_ERRORS,
    MAX_FAILURES,
    MAX_LINKS,
    MAX_LIVE,
    SECONDS_BOUNDS,
    Activity,
    Failure,
    LinkActivity,
    LiveHandoff,
    Load,
    Registration,
    answers,
    requests,
)
from ...control.cluster.presence import (
    PRESENT,
    AskAnother,
    MembersChanged,
    Presence,
    Standing,
    Subscribe,
    ToDaemon,
    Wake,
    Wanted,
)
from ...control.errors import ProtocolError
from ...control.keys import join_address, split_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ...control.cluster.messages import Member
    from ...control.handoff.events import Action
    from ...control.handoff.messages import Role
    from ...engine.layout.kv_layout import KVLayout
    from .executor import Executor, HandoffEnded, Work
    from .messaging import Messaging, ReplyTo
    from .sessions import Sessions

FLIP_QUIET_S = 1.0  # without a handoff before the role changes: what was placed before has come
FLIP_LOOK_S = 0.1
MAX_ID_CHARS = 64  # of a request's id, which is shown and not used

log = logging.getLogger("kvferry.agent")


class Registrar:
    """One agent's standing with the daemon, and its picture of the others.

    Args:
        count_handoffs: says how many are not over.
        flip: takes another role, once the agent is idle and all its links are down.

    Attributes:
        draining: whether the daemon wants nothing new placed here.
        report: what the engine said of its load.
        standing: whether the daemon knows this agent, or why it does not.

    `members`, `standing`, `wait` and `report` are safe from any thread; the rest lives on the
    agent's.
    """

    def __init__(
        self,
        address: str,
        registration: Registration,
        lease_s: float,
        messaging: Messaging,
        peers: Sessions,
        executor: Executor,
        *,
        count_handoffs: Callable[[], int],
        flip: Callable[[Role], None],
    ) -> None:
        self.draining = False
        self.report = Load(free_blocks=registration.num_blocks)
        self._name = registration.name
        self._messaging = messaging
        self._peers = peers
        self._executor = executor
        self._count_handoffs = count_handoffs
        self._flip = flip
        self._flipping = ""  # the role that it takes once it is idle
        self._activity = ActivityLog()
        executor.observers.append(self._activity.note)
        self._addresses = [split_address(one) for one in address.split(",")]
        self._presence = Presence(registration, lease_s, daemons=len(self._addresses))
        self._changed = threading.Condition()
        self.standing = Standing(present=False, reason="the daemon has not answered yet")
        self._seen: dict[str, int] = {}
        self._busy_s = 0.0
        self._routes: list[ReplyTo] = []
        self._turn = 0
        self._publisher: ReplyTo | None = None
        self._acts: dict[type[Action], Callable[[Any], None]] = {
            ToDaemon: self._ask,
            AskAnother: self._ask_another,
            Wake: self._wake_later,
            Subscribe: self._subscribe,
            MembersChanged: self._members_changed,
            Wanted: self._obey,
            Standing: self._stand,
        }

    @property
    def members(self) -> dict[str, Member]:
        """Who is there, by name, as far as is known. Not to be changed."""
        return self._presence.view.members

    def wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until what is known of the cluster makes `condition` true; False if it does not."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    # On the agent's thread

    def start(self) -> None:
        """Begin to register."""
        for address in self._addresses:
            address_and_key = join_address(*address)
            route = self._messaging.dial(address_and_key, self._on_answer, queue=False)
            self._routes.append(route)  # all now: one that dies is replaced within a heartbeat
        self._carry_out(self._presence.start())

    def leave(self) -> None:
        """Tell the daemon that the agent goes."""
        self._carry_out(self._presence.leave())

    def _on_answer(self, _: ReplyTo, frame: bytes) -> None:
        try:
            message = answers.decode(frame)
        except ProtocolError as error:
            log.warning("%s: the daemon says what is no message: %s", self._name, error)
            return
        self._carry_out(self._presence.hear(message))

    def _on_publication(self, route: ReplyTo, frame: bytes) -> None:
        if frame != CHANGES_TOPIC:  # the first of two parts
            self._on_answer(route, frame)

    def _fire(self, number: int) -> None:
        executor, now_s = self._executor, time.monotonic()
        self._presence.load = msgspec.structs.replace(
            self.report,
            handoffs=self._count_handoffs(),
            inflight_nbytes=executor.inflight_nbytes,
            rates=dict(executor.rates),
        )
        live = _live_handoffs(executor.work.values(), now_s)
        self._presence.activity = self._activity.report(now_s, self._peers.senders(), live)
        self._carry_out(self._presence.fire(number))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            self._acts[type(action)](action)

    def _ask(self, action: ToDaemon) -> None:
        self._messaging.send(self._routes[self._turn], requests.encode(action.ask), _nobody_minds)

    def _ask_another(self, _: AskAnother) -> None:
        self._turn = (self._turn + 1) % len(self._routes)
        endpoint, _key = self._addresses[self._turn]
        log.warning("%s: asks the daemon at %s instead", self._name, endpoint)

    def _wake_later(self, action: Wake) -> None:
        self._messaging.call_later(action.seconds, partial(self._fire, action.number))

    def _obey(self, action: Wanted) -> None:
        self.draining = action.draining
        self._want_role(action.role)  # type: ignore[arg-type]  # "" or one that the daemon knows
        self._notify()

    def _stand(self, action: Standing) -> None:
        if action != self.standing:
            level = logging.INFO if action.present else logging.WARNING
            log.log(level, "%s: %s", self._name, action.reason or "registered")
        self.standing = action
        self._notify()

    def _subscribe(self, action: Subscribe) -> None:
        if self._publisher is not None:
            self._messaging.hang_up(self._publisher)
        endpoint, server_key = self._addresses[self._turn]
        address = join_address(publisher_endpoint(endpoint, action.publisher), server_key)
        self._publisher = self._messaging.subscribe(address, CHANGES_TOPIC, self._on_publication)

    def _members_changed(self, _: MembersChanged) -> None:
        for name, member in self.members.items():
            if self._seen.get(name) != member.generation:
                self._peers.replaced(name, member.registration.life)
        self._seen = {name: member.generation for name, member in self.members.items()}
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # Changing the role

    def _want_role(self, role: Role) -> None:
        self._flipping = role if role != self._presence.registration.role else ""
        if self._flipping:
            log.info("%s: becomes %s once it is idle", self._name, role)
            self._busy_s = time.monotonic()
            self._flip_when_idle(role)

    def _flip_when_idle(self, role: Role) -> None:
        now_s = time.monotonic()
        if self._flipping != role or self._presence.state != PRESENT:
            return  # it was taken back
        if self._count_handoffs():
            self._busy_s = now_s
        if now_s - self._busy_s < FLIP_QUIET_S:
            self._messaging.call_later(FLIP_LOOK_S, partial(self._flip_when_idle, role))
        elif self._peers.any_link:
            self._peers.say_goodbye(f"{self._name} becomes {role}")
            self._messaging.call_later(FLIP_LOOK_S, partial(self._flip_when_idle, role))
        else:
            self._flipping = ""
            self._flip(role)
            changed = msgspec.structs.replace(self._presence.registration, role=role)
            self._carry_out(self._presence.change(changed))


def _nobody_minds(reason: str) -> None:
    """The daemon is not there: the presence machine asks again."""


class ActivityLog:
    """How one agent's handoffs ended, for people: bounded, and off every handoff's path but for one
    call when it ends. For whoever has the agent's turn."""

    def __init__(self) -> None:
        self._began_s = self._reported_s = time.monotonic()
        self._nbytes = 0
        self._seconds = [0] * (len(SECONDS_BOUNDS) + 1)
        self._handoffs = 0
        self._errors: dict[str, int] = {}
        self._failures: deque[tuple[float, str, str, str]] = deque(maxlen=MAX_FAILURES)
        self._came: dict[str, int] = {}  # bytes by peer since the last report

    def note(self, ended: HandoffEnded) -> None:
        """Count one more."""
        if ended.error is not None:
            name = type(ended.error).__name__
            if name in self._errors or len(self._errors) < MAX_ERRORS:
                self._errors[name] = self._errors.get(name, 0) + 1
            failure = (time.monotonic(), _short(ended.request_id), name, ended.peer)
            self._failures.append(failure)
        elif ended.side == "decode":
            self._handoffs += 1
            self._nbytes += ended.nbytes
            self._seconds[bisect_left(SECONDS_BOUNDS, ended.seconds)] += 1
            self._came[ended.peer] = self._came.get(ended.peer, 0) + ended.nbytes

    def report(
        self, now_s: float, senders: Mapping[str, str], live: tuple[LiveHandoff, ...]
    ) -> Activity:
        """Return what is to be told now; `senders` are the peers that are linked, with the
        transport."""
        came, self._came = self._came, {}
        passed_s, self._reported_s = max(1e-3, now_s - self._reported_s), now_s
        flows = {peer: came.get(peer, 0) / passed_s for peer in {**senders, **came}}
        links = tuple(
            LinkActivity(peer, senders.get(peer, ""), flows[peer])
            for peer in nlargest(MAX_LINKS, flows, key=lambda peer: (flows[peer], peer))
        )
        failures = tuple(
            Failure(handoff, error, peer, max(0.0, now_s - at_s))
            for at_s, handoff, error, peer in self._failures
        )
        return Activity(
            age_s=now_s - self._began_s,
            nbytes=self._nbytes,
            seconds=tuple(self._seconds) if self._handoffs else (),
            errors=dict(self._errors),
            links=links,
            live=live,
            failures=failures,
        )


def _live_handoffs(works: Iterable[Work], now_s: float) -> tuple[LiveHandoff, ...]:
    """Return the oldest handoffs that are not over."""
    live = (
        LiveHandoff(
            _short(work.handoff.request_id),
            work.side,
            work.handoff.peer or work.peer,
            work.nbytes,
            max(0.0, now_s - work.handoff.started_s),
        )
        for work in works
        if work.handoff is not None
    )
    return tuple(itertools.islice(live, MAX_LIVE))


def _short(request_id: str) -> str:
    """Return a request's id as it is shown."""
    return request_id if len(request_id) <= MAX_ID_CHARS else request_id[: MAX_ID_CHARS - 1] + "…"


def check_registration(registration: Registration) -> None:
    """Check that a daemon would take it.

    Raises:
        ValueError: names the field.
    """
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(registration), type=Registration)
    except msgspec.ValidationError as error:
        raise ValueError(f"no daemon registers {registration.name!r}: {error}") from None


def describe_cache(layout: KVLayout) -> dict[str, Any]:
    """Return a cache in the numbers that placement reckons with, as fields of `Registration`."""
    tokens = max((region.tokens_per_slot for region in layout.regions), default=0)
    return {
        "layout_digest": layout.digest()[:256],
        "num_blocks": layout.num_blocks,
        "tokens_per_block": tokens,
        "token_nbytes": layout.block_nbytes // tokens if tokens else 0,
    }
