"""An agent towards the daemon: registered, kept alive, and told what is wanted of it.

    away → registering → present        and back to registering whenever the daemon does not know us

Pure: events in, actions out. Nothing here ever fails: a daemon that does not answer is asked again,
for ever, and the agent works on without it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar

from ..handoff.events import Action
from .messages import (
    VERSION,
    Activity,
    Beat,
    Changes,
    Denied,
    Deregister,
    Heartbeat,
    Load,
    Look,
    Register,
    Registered,
    Snapshot,
    Tick,
)
from .view import View

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .messages import AnyAnswer, Ask, Registration

# Before the second registration if nobody answers, and twice as long before the next.
RETRY_S = 0.25
RETRY_MOST_S = 8.0
SUPERSEDED_RETRY_S = 1.0
BEATS_A_LEASE = 3  # two may be lost
BEATS_A_LOOK = 16  # at most, for an answer: 1, 2, 4, … while none comes
ANSWER_S = 0.5  # for a heartbeat, where there is another daemon to ask
REGISTRATIONS_A_DAEMON = 4  # unanswered ones after which another is asked

REGISTERING, PRESENT = "registering", "present"


class ToDaemon(Action, frozen=True):
    """Send this request."""

    ask: Ask


class AskAnother(Action, frozen=True):
    """Send what follows to the next daemon of the cluster."""


class Wake(Action, frozen=True):
    """Call `fire` in so many seconds, with this number: only the latest number counts."""

    number: int
    seconds: float


class Subscribe(Action, frozen=True):
    """Follow this publisher, from now on and instead of any other."""

    publisher: str


class MembersChanged(Action, frozen=True):
    """The members of `Presence.view` are others than before."""


class Wanted(Action, frozen=True):
    """The daemon wants this agent drained or not, and in another role or not ("")."""

    draining: bool
    role: str


class Standing(Action, frozen=True):
    """The agent is registered now; or no longer, and why."""

    present: bool
    reason: str = ""


class Presence:
    """One agent's conversation with the daemon. Not thread-safe: one owner.

    Attributes:
        registration: what is said of the agent; `change` replaces it.
        generation: of the last registration; 0 before the first.
        view: who else is there.
        state: `registering` or `present`.
    """

    def __init__(self, registration: Registration, lease_s: float, *, daemons: int = 1) -> None:
        self.registration = registration
        self.generation = 0
        self.view = View()
        self.state = REGISTERING
        self.load = Load(free_blocks=registration.num_blocks)
        self.activity = Activity()
        self._lease_s = lease_s
        self._others = daemons > 1
        self._awaiting = False  # the next wake looks for the answer to a heartbeat
        self._publisher = ""
        self._wanted = Wanted(draining=False, role="")
        self._request = 0
        self._wake = 0
        # An overloaded daemon answers late what was asked again meanwhile: an answer counts from the
        # first request on that asked for the same thing, whichever was the last.
        self._first_register = 0
        self._first_look = 0
        self._look_request = 0
        self._looks = 0  # without an answer
        self._beats_to_look = 0
        # Agents that lose a daemon together must not come back together, time and again.
        self._jitter = random.Random(registration.life)
        self._tries = 0
        self._unanswered = 0
        self._actions: list[Action] = []

    def start(self) -> list[Action]:
        """Return the first actions."""
        self._begin()
        return self._taken()

    def change(self, registration: Registration) -> list[Action]:
        """Register again: the agent is another now, its role has changed."""
        self.registration = registration
        self._begin()
        return self._taken()

    def leave(self) -> list[Action]:
        """Return the agent goes; nobody waits for an answer."""
        if self.state == PRESENT:
            self._do(ToDaemon(Deregister(self._number(), self.registration.name, self.generation)))
        self._wake += 1
        return self._taken()

    def fire(self, number: int) -> list[Action]:
        """Return a `Wake` is due."""
        if number == self._wake:
            if self.state != PRESENT:
                self._unanswered += 1
                if self._unanswered % REGISTRATIONS_A_DAEMON == 0:
                    self._ask_another()
                self._register()
            elif not self._awaiting:
                self._beat()
            elif self._unanswered:
                self._ask_another()
                self._beat()
            else:
                self._awaiting = False
                self._sleep(self._lease_s / BEATS_A_LEASE - self._patience_s)
        return self._taken()

    def hear(self, message: AnyAnswer) -> list[Action]:
        """Return an answer or a publication of the daemon."""
        heard = self._heard.get(type(message))
        if heard is not None:
            heard(self, message)
        return self._taken()

    def _beaten(self, answer: Beat) -> None:
        self._unanswered = 0
        self._want(Wanted(answer.state == "draining", answer.wanted_role))

    def _looked(self, snapshot: Snapshot) -> None:
        if snapshot.request >= self._first_look:
            self._unanswered = 0
            self._look_request = self._looks = 0
            self._follow(snapshot.publisher)
            self._picture(snapshot)

    def _registered(self, answer: Registered) -> None:
        if answer.request < self._first_register or self.state != REGISTERING:
            return
        self.state = PRESENT
        self.generation = answer.generation
        self._lease_s = answer.lease_s
        self._unanswered = 0
        self._want(Wanted(draining=False, role=""))
        self._do(Standing(present=True))
        self._follow(answer.publisher)
        self._first_look, self._looks = self._request + 1, 0
        self._look()
        self._awaiting = False
        self._sleep(self._lease_s / BEATS_A_LEASE)

    def _denied(self, denial: Denied) -> None:
        self._unanswered = 0
        if denial.reason == "store":
            self._ask_another()  # it may be that only this daemon cannot reach it
        if denial.reason == "superseded":
            self._lose(denial.detail)
            self._sleep(SUPERSEDED_RETRY_S)
        elif self.state == PRESENT and denial.reason in ("unknown", "generation"):
            self._lose(denial.detail)
            self._begin()
        elif self.state == REGISTERING and denial.request >= self._first_register:
            self._do(Standing(present=False, reason=denial.detail or denial.reason))
            self._sleep(SUPERSEDED_RETRY_S)

    def _picture(self, message: Snapshot | Changes | Tick) -> None:
        if self.view.hear(message):
            self._do(MembersChanged())
        if self.view.stale and not self._look_request and self.state == PRESENT:
            self._look()

    def _follow(self, publisher: str) -> None:
        if publisher != self._publisher:
            self._publisher = publisher
            self._do(Subscribe(publisher))

    @property
    def _patience_s(self) -> float:
        """How long an answer to a heartbeat may take before another daemon is asked."""
        return min(ANSWER_S, self._lease_s / BEATS_A_LEASE / 2)

    def _ask_another(self) -> None:
        if self._others:
            self._publisher = ""  # of the daemon before, whatever its name
            self.view.stale = True
            self._first_register = self._first_look = self._request + 1
            self._look_request = self._looks = self._tries = 0
            self._do(AskAnother())

    def _lose(self, reason: str) -> None:
        if self.state == PRESENT:
            self.state = REGISTERING
            self._do(Standing(present=False, reason=reason))

    def _want(self, wanted: Wanted) -> None:
        if wanted != self._wanted:
            self._wanted = wanted
            self._do(wanted)

    def _begin(self) -> None:
        """Register with what is true as of this moment: answers to earlier requests count no more."""
        self._first_register, self._tries = self._request + 1, 0
        self._register()

    def _register(self) -> None:
        self.state = REGISTERING
        ask = Register(self._number(), VERSION, self.registration, self._lease_s, self.generation)
        self._do(ToDaemon(ask))
        self._sleep(min(RETRY_S * 2**self._tries, RETRY_MOST_S) * self._jitter.uniform(0.5, 1.5))
        self._tries = min(self._tries + 1, 16)

    def _beat(self) -> None:
        self._unanswered += 1
        name, generation = self.registration.name, self.generation
        beat = Heartbeat(self._number(), name, generation, self.load, self.activity)
        self._do(ToDaemon(beat))
        self._beats_to_look -= 1
        if self._beats_to_look <= 0:
            self._look_request = 0  # an answer that has not come by now was lost
        if self.view.stale and not self._look_request:
            self._look()
        self._awaiting = self._others
        self._sleep(self._patience_s if self._others else self._lease_s / BEATS_A_LEASE)

    def _look(self) -> None:
        self._look_request = self._number()
        self._do(ToDaemon(Look(self._look_request)))
        longest = min(2**self._looks, BEATS_A_LOOK)
        self._beats_to_look = self._jitter.randint((longest + 1) // 2, longest)
        self._looks = min(self._looks + 1, 16)

    def _sleep(self, seconds: float) -> None:
        self._wake += 1
        self._do(Wake(self._wake, seconds))

    def _number(self) -> int:
        self._request += 1
        return self._request

    def _do(self, action: Action) -> None:
        self._actions.append(action)

    def _taken(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    _heard: ClassVar[Mapping[type, Callable[..., None]]] = {
        Registered: _registered,
        Beat: _beaten,
        Denied: _denied,
        Snapshot: _looked,
        Changes: _picture,
        Tick: _picture,
    }
