"""An agent's membership: carries out what `control/cluster/presence.py` asks for, on the agent's thread.

The daemon is a convenience: agents that know each other go on when it dies, and what this file
waits for never holds up a handoff.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from ...control.cluster.client import publisher_endpoint
from ...control.cluster.messages import CHANGES_TOPIC, Load, Registration, answers, requests
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
    from collections.abc import Callable

    from ...control.cluster.messages import Member
    from ...control.cluster.presence import PresenceAction
    from ...control.handoff.messages import Role
    from .core import AgentCore
    from .messaging import Route

FLIP_QUIET_S = 1.0  # without a handoff before the role changes: what was placed before has come
FLIP_LOOK_S = 0.1

log = logging.getLogger("kvferry.agent")


class Enrolment:
    """One agent's standing with the daemon, and its picture of the others.

    Attributes:
        draining: whether the daemon wants nothing new placed here.
        report: what the engine said of its load.

    `members`, `registered`, `wait` and `report` are safe from any thread; the rest lives on the
    agent's.
    """

    def __init__(
        self,
        core: AgentCore,
        address: str,
        registration: Registration,
        lease_s: float,
        *,
        on_role: Callable[[Role], None],
    ) -> None:
        self.draining = False
        self.report = Load(free_blocks=registration.num_blocks)
        self._core = core
        self._addresses = [split_address(one) for one in address.split(",")]
        self._presence = Presence(registration, lease_s, daemons=len(self._addresses))
        self._on_role = on_role
        self._changed = threading.Condition()
        self._standing = Standing(present=False, reason="the daemon has not answered yet")
        self._seen: dict[str, int] = {}
        self._busy_s = 0.0
        self._routes: list[Route] = []
        self._turn = 0
        self._publisher: Route | None = None

    @property
    def members(self) -> dict[str, Member]:
        """Who is there, by name, as far as is known. Not to be changed."""
        return self._presence.view.members

    @property
    def registered(self) -> bool:
        """Whether the daemon knows this agent."""
        return self._standing.present

    @property
    def generation(self) -> int:
        """Of the last registration."""
        return self._presence.generation

    def wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until what is known of the cluster makes `condition` true; False if it does not."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    @property
    def reason(self) -> str:
        """Why this agent is not registered."""
        return self._standing.reason

    # On the agent's thread

    def start(self) -> None:
        """Begins to register."""
        for address in self._addresses:
            address_and_key = join_address(*address)
            route = self._core.mailbox.dial(address_and_key, self._on_answer, queue=False)
            self._routes.append(route)  # all now: one that dies is replaced within a heartbeat
        self._carry_out(self._presence.start())

    def leave(self) -> None:
        """Tells the daemon that the agent goes."""
        self._carry_out(self._presence.leave())

    def _on_answer(self, _: Route, frame: bytes) -> None:
        try:
            message = answers.decode(frame)
        except ProtocolError as error:
            log.warning("%s: the daemon says what is no message: %s", self._core.name, error)
            return
        self._carry_out(self._presence.hear(message))

    def _on_publication(self, route: Route, frame: bytes) -> None:
        if frame != CHANGES_TOPIC:  # the first of two parts
            self._on_answer(route, frame)

    def _fire(self, number: int) -> None:
        workbench, report = self._core.workbench, self.report
        self._presence.load = msgspec.structs.replace(
            report,
            handoffs=self._core.num_handoffs,
            inflight_nbytes=workbench.inflight_nbytes,
            rates=dict(workbench.rates),
        )
        self._presence.activity = workbench.report_activity()
        self._carry_out(self._presence.fire(number))

    def _carry_out(self, actions: list[PresenceAction]) -> None:
        for action in actions:
            match action:
                case ToDaemon(ask=ask):
                    route = self._routes[self._turn]
                    self._core.mailbox.send(route, requests.encode(ask), _nobody_minds)
                case AskAnother():
                    self._turn = (self._turn + 1) % len(self._routes)
                    endpoint, _ = self._addresses[self._turn]
                    log.warning("%s: asks the daemon at %s instead", self._core.name, endpoint)
                case Wake(number=number, seconds=seconds):
                    self._core.mailbox.call_later(seconds, partial(self._fire, number))
                case Subscribe(publisher=publisher):
                    self._subscribe(publisher)
                case MembersChanged():
                    self._members_changed()
                case Wanted(draining=draining, role=role):
                    self.draining = draining
                    self._want_role(role)
                    self._notify()
                case Standing():
                    if action != self._standing:
                        level = logging.INFO if action.present else logging.WARNING
                        log.log(level, "%s: %s", self._core.name, action.reason or "registered")
                    self._standing = action
                    self._notify()

    def _subscribe(self, publisher: str) -> None:
        mailbox = self._core.mailbox
        if self._publisher is not None:
            mailbox.hang_up(self._publisher)
        endpoint, server_key = self._addresses[self._turn]
        address = join_address(publisher_endpoint(endpoint, publisher), server_key)
        self._publisher = mailbox.subscribe(address, (CHANGES_TOPIC,), self._on_publication)

    def _members_changed(self) -> None:
        for name, member in self.members.items():
            if self._seen.get(name) != member.generation:
                self._core.acquaintances.replaced(name, member.registration.life)
        self._seen = {name: member.generation for name, member in self.members.items()}
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # Changing the role

    def _want_role(self, role: str) -> None:
        self._core.flipping = role if role != self._core.role else ""  # type: ignore[assignment]
        if self._core.flipping:
            log.info("%s: becomes %s once it is idle", self._core.name, role)
            self._busy_s = time.monotonic()
            self._flip_when_idle(role)

    def _flip_when_idle(self, role: str) -> None:
        core, now_s = self._core, time.monotonic()
        if core.flipping != role or self._presence.state != PRESENT:
            return  # it was taken back
        if core.num_handoffs:
            self._busy_s = now_s
        if now_s - self._busy_s < FLIP_QUIET_S:
            core.mailbox.call_later(FLIP_LOOK_S, partial(self._flip_when_idle, role))
        elif core.acquaintances.any_link:
            core.acquaintances.say_goodbye(f"{core.name} becomes {role}")
            core.mailbox.call_later(FLIP_LOOK_S, partial(self._flip_when_idle, role))
        else:
            core.flip()
            self._on_role(core.role)
            changed = msgspec.structs.replace(self._presence.registration, role=core.role)
            self._carry_out(self._presence.change(changed))


def _nobody_minds(reason: str) -> None:
    """The daemon is not there: the presence machine asks again."""
