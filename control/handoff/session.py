"""Two agents get acquainted: who they are, whether their caches fit, and one link between them.

    the side that connects      hello → describe → linking → welcome → up
    the side connected to       hello → describe → linking           → up

Identity comes first, so that agents of different versions part with a named refusal instead of a
parse error; then layouts, so that caches that cannot be reconciled never get a link. Each message
is repeated by the side that connects; the other side answers every repetition alike.

Pure, like the handoff machines: events in, actions out. Layouts and addresses are opaque bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

from ..errors import (
    HelloError,
    HelloRefused,
    HelloTimeout,
    LayoutMismatch,
    RoleMismatch,
    VersionMismatch,
)
from .events import Action, Event, Send
from .machine import MAX_REASON_CHARS, StateMachine
from .messages import VERSION, Bye, Describe, Hello, Refused, Welcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .events import TimerFired
    from .machine import Reactions, Timing
    from .messages import Reason

REASONS: dict[str, type[HelloError]] = {
    "version": VersionMismatch,
    "role": RoleMismatch,
    "layout": LayoutMismatch,
}


# Events, besides `Received` and `TimerFired` ------------------------------------------------------


class Reconciled(Event, frozen=True):
    """The peer's layout and memory can be worked with; or, with an `error`, why not."""

    error: str = ""


class LinkOpened(Event, frozen=True):
    """This side's end of the link is there; or, with an `error`, why not."""

    error: str = ""


# Actions, besides `Send`, `SetTimer`, `ClearTimer` --------------------------------------------------


class Reconcile(Action, frozen=True):
    """Find out whether the peer's cache fits ours; answer with `Reconciled`."""

    describe: Describe


class OpenLink(Action, frozen=True):
    """Dial the peer's engine, or await its call; answer with `LinkOpened`."""

    describe: Describe
    dial: bool


class Up(Action, frozen=True):
    """Handoffs may begin."""


class Ended(Action, frozen=True):
    """The session is over: close the link, if there is one."""

    error: HelloError


HELLO, DESCRIBE, RECONCILING, LINKING, WELCOME, UP, ENDED = (
    "hello",
    "describe",
    "reconciling",
    "linking",
    "welcome",
    "up",
    "ended",
)


class Session(StateMachine):
    """One session, seen from one side. Not thread-safe: one owner.

    Attributes:
        number: the session number in every message; the side that connects chose it.
        dials: whether this side connects.
        expected: name and generation that the peer has to have, if that is known beforehand.
        peer: the peer's `Hello`, once it came.
        state: where it is; `up` allows handoffs, `ended` is the last.
    """

    def __init__(
        self,
        hello: Hello,
        describe: Describe,
        timing: Timing,
        *,
        dials: bool,
        timeout_s: float,
        expected: tuple[str, int] | None = None,
    ) -> None:
        super().__init__(timing)
        self.number = hello.session
        self.dials = dials
        self.expected = expected
        self.peer: Hello | None = None
        self.state = HELLO
        self._hello = hello
        self._describe = describe
        self._timeout_s = timeout_s
        self._welcomed = False
        self._peer_describe: Describe | None = None

    @property
    def role(self) -> str:
        """This side's role."""
        return self._hello.role

    @property
    def name(self) -> str:
        """The peer's name, or "" before its `Hello`."""
        return self.peer.name if self.peer is not None else ""

    def start(self) -> list[Action]:
        """Return the first actions of either side."""
        self._set_timer("deadline", self._timeout_s)
        if self.dials:
            self._repeat(self._hello)
        return self._taken()

    def refuse(self, reason: Reason, detail: str) -> list[Action]:
        """End the session from this side, once it has a link or had one, and tell the peer why."""
        if self.state != ENDED:
            self._refuse(reason, detail, "link")
        return self._taken()

    def _hear_hello(self, hello: Hello) -> None:
        self.peer = hello
        ours = self._hello
        if hello.version != ours.version:
            detail = f"{ours.name} speaks version {ours.version}, {hello.name} {hello.version}"
            self._refuse("version", detail)
        elif hello.role == ours.role != "both":
            detail = f"{ours.name} and {hello.name} both are {ours.role}: nothing to hand over"
            self._refuse("role", detail)
        elif self.expected not in (None, (hello.name, hello.generation)):
            detail = f"{hello.name} answers, in another life than the one that was looked for"
            self._refuse("session", detail)
        else:
            self.state = DESCRIBE
            if self.dials:
                self._repeat(self._describe)
            else:
                self._do(Send(ours))

    def _hello_again(self, _: Hello) -> None:
        if not self.dials:
            self._do(Send(self._hello))

    def _hear_describe(self, describe: Describe) -> None:
        self.state = RECONCILING
        self._peer_describe = describe
        self._do(Reconcile(describe))

    def _describe_again(self, _: Describe) -> None:
        if not self.dials:  # an answer was lost
            self._do(Send(self._describe))
            if self.state == UP:
                self._do(Send(Welcome(self.number)))

    def _reconciled(self, event: Reconciled) -> None:
        assert self._peer_describe is not None
        if event.error:
            self._refuse("layout", event.error)
            return
        self.state = LINKING
        if not self.dials:
            self._do(Send(self._describe))
        self._do(OpenLink(self._peer_describe, self.dials))

    def _link_opened(self, event: LinkOpened) -> None:
        if event.error:
            self._refuse("link", f"no link: {event.error}")
        elif not self.dials:
            self._do(Send(Welcome(self.number)))
            self._up()
        elif self._welcomed:
            self._up()
        else:
            self.state = WELCOME

    def _early_welcome(self, _: Welcome) -> None:
        self._welcomed = True

    def _welcome(self, _: Welcome) -> None:
        self._up()

    def _refused(self, message: Refused) -> None:
        kind = REASONS.get(message.reason, HelloRefused)
        self._end(kind, f"the peer refused: {message.detail or message.reason}")

    def _left(self, message: Bye) -> None:
        self._end(HelloRefused, f"the peer left: {message.reason}")

    def _too_late(self, _: TimerFired) -> None:
        waited = f"not acquainted after {self._timeout_s} s (waited for {self.state})"
        self._end(HelloTimeout, waited)

    def _up(self) -> None:
        self.state = UP
        self._clear_timers()
        self._do(Up())

    def _refuse(self, reason: Reason, detail: str, operation: str = "connect") -> None:
        self._do(Send(Refused(self.number, reason, detail[:MAX_REASON_CHARS])))
        self._end(REASONS.get(reason, HelloRefused), detail, operation)

    def _end(self, kind: type[HelloError], message: str, operation: str = "connect") -> None:
        self.state = ENDED
        self._clear_timers()
        self._do(Ended(kind(message, peer=self.name, operation=operation)))

    _met: ClassVar[Reactions] = {Hello: _hello_again, Refused: _refused, Bye: _left}
    _meeting: ClassVar[Reactions] = {
        **_met,
        Welcome: _early_welcome,
        "retry": StateMachine._send_again,
        "deadline": _too_late,
    }
    reactions: ClassVar[Mapping[str, Reactions]] = {
        HELLO: {**_meeting, Hello: _hear_hello},
        DESCRIBE: {**_meeting, Describe: _hear_describe},
        RECONCILING: {**_meeting, Reconciled: _reconciled},
        LINKING: {**_meeting, LinkOpened: _link_opened, Describe: _describe_again},
        WELCOME: {**_meeting, Welcome: _welcome},
        UP: {**_met, Describe: _describe_again},
    }


def make_hello(name: str, role: str, generation: int, session: int) -> Hello:
    """This agent's `Hello`, checked.

    Raises:
        ValueError: a name or a role that no reader takes.
    """
    fields = {
        "type": "hello",
        "session": session,
        "version": VERSION,
        "name": name,
        "role": role,
        "generation": generation,
    }
    try:
        return msgspec.convert(fields, Hello)
    except msgspec.ValidationError as error:
        raise ValueError(f"an agent cannot introduce itself like that: {error}") from error
