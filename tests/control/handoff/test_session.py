"""Two agents get acquainted, or part with a named reason; messages may be lost or doubled."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec
import pytest

from kvferry.control.errors import (
    HelloRefused,
    HelloTimeout,
    LayoutMismatch,
    RoleMismatch,
    VersionMismatch,
)
from kvferry.control.handoff.events import ClearTimer, Received, Send, SetTimer, TimerFired
from kvferry.control.handoff.machine import Timing
from kvferry.control.handoff.messages import Bye, Describe, Hello, Refused, Welcome
from kvferry.control.handoff.session import (
    Ended,
    LinkOpened,
    OpenLink,
    Reconcile,
    Reconciled,
    Session,
    Up,
    make_hello,
)

if TYPE_CHECKING:
    from kvferry.control.handoff.events import Action
    from kvferry.control.handoff.messages import Message

NUMBER = 5


class Pair:
    """Both ends of one session, over a network that a test may spoil."""

    def __init__(self, caller: Hello | None = None, called: Hello | None = None) -> None:
        caller = caller or make_hello("decode-0", "decode", 11, NUMBER)
        called = called or make_hello("prefill-0", "prefill", 22, NUMBER)
        self.caller = _session(caller, dials=True)
        self.called = _session(called, dials=False)
        self.network: list[tuple[Session, Message]] = []
        self.timers: dict[Session, set[str]] = {self.caller: set(), self.called: set()}
        self.ended: dict[Session, Exception] = {}
        self.up: set[Session] = set()
        self.layouts_fit = True
        self.link_error = ""
        self.links: list[bool] = []
        self.run(self.caller, self.caller.start())
        self.run(self.called, self.called.start())

    def other(self, session: Session) -> NamedSession:
        return self.called if session is self.caller else self.caller

    def run(self, session: Session, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(message=message):
                    self.network.append((self.other(session), message))
                case SetTimer(kind=kind):
                    self.timers[session].add(kind)
                case ClearTimer(kind=kind):
                    self.timers[session].discard(kind)
                case Reconcile(describe=describe):
                    assert describe.cache == b"cache of " + self.other(session).name_bytes()
                    fits = Reconciled("" if self.layouts_fit else "axis 'head' differs")
                    self.run(session, session.handle(fits))
                case OpenLink(dial=dial):
                    self.links.append(dial)
                    self.run(session, session.handle(LinkOpened(self.link_error)))
                case Up():
                    self.up.add(session)
                case Ended(error=error):
                    self.ended[session] = error

    def hear(self) -> None:
        session, message = self.network.pop(0)
        self.run(session, session.handle(Received(message)))

    def settle(self) -> None:
        while self.network:
            self.hear()

    def fire(self, session: Session, kind: str) -> None:
        self.timers[session].discard(kind)
        self.run(session, session.handle(TimerFired(kind)))  # type: ignore[arg-type]


class NamedSession(Session):
    def name_bytes(self) -> bytes:
        return self._hello.name.encode()


def _session(hello: Hello, *, dials: bool) -> NamedSession:
    describe = Describe(hello.session, "digest", b"cache of " + hello.name.encode(), b"engine")
    return NamedSession(hello, describe, Timing(), dials=dials, timeout_s=5.0)


def test_two_agents_get_acquainted() -> None:
    pair = Pair()
    pair.settle()
    assert pair.up == {pair.caller, pair.called}
    assert (pair.caller.name, pair.called.name) == ("prefill-0", "decode-0")
    assert sorted(pair.links) == [False, True]  # one dials, the other awaits the call
    assert not any(pair.timers.values())
    assert not pair.ended


def test_a_newer_version_is_refused_by_name_on_both_sides() -> None:
    newer = msgspec.structs.replace(make_hello("decode-0", "decode", 11, NUMBER), version=9)
    pair = Pair(caller=newer)
    pair.settle()
    assert isinstance(pair.ended[pair.called], VersionMismatch)
    assert isinstance(pair.ended[pair.caller], VersionMismatch)
    assert "prefill-0 speaks version 4, decode-0 9" in str(pair.ended[pair.caller])
    assert not pair.links


def test_two_of_one_role_are_refused_by_name() -> None:
    pair = Pair(called=make_hello("decode-1", "decode", 22, NUMBER))
    pair.settle()
    assert {type(error) for error in pair.ended.values()} == {RoleMismatch}
    assert len(pair.ended) == 2
    assert not pair.links
    both = Pair(make_hello("a", "both", 11, NUMBER), called=make_hello("b", "both", 22, NUMBER))
    both.settle()
    assert len(both.up) == 2


def test_layouts_that_do_not_fit_are_refused_before_there_is_a_link() -> None:
    pair = Pair()
    pair.layouts_fit = False
    pair.settle()
    for session in (pair.caller, pair.called):
        assert isinstance(pair.ended[session], LayoutMismatch)
        assert "axis 'head' differs" in str(pair.ended[session])
        assert not pair.ended[session].retryable  # type: ignore[attr-defined]
    assert not pair.links


def test_a_link_that_does_not_open_ends_both_sides() -> None:
    pair = Pair()
    pair.link_error = "no transport that both have"
    pair.settle()
    for session in (pair.caller, pair.called):
        assert "no transport that both have" in str(pair.ended[session])
    assert not pair.up


def test_silence_ends_in_an_error_that_says_what_was_awaited() -> None:
    pair = Pair()
    pair.network.clear()
    for _ in range(3):
        pair.fire(pair.caller, "retry")
    assert [type(message) for _, message in pair.network] == [Hello] * 3
    pair.network.clear()
    pair.fire(pair.caller, "deadline")
    pair.fire(pair.called, "deadline")
    for session in (pair.caller, pair.called):
        assert isinstance(pair.ended[session], HelloTimeout)
        assert isinstance(pair.ended[session], TimeoutError)
        assert "waited for hello" in str(pair.ended[session])
    assert not any(pair.timers.values())


@pytest.mark.parametrize("farewell", [Bye(NUMBER, "closed"), Refused(NUMBER, "session")])
def test_a_farewell_ends_a_session_that_is_up(farewell: Message) -> None:
    pair = Pair()
    pair.settle()
    pair.run(pair.caller, pair.caller.handle(Received(farewell)))
    assert isinstance(pair.ended[pair.caller], HelloRefused)
    assert not pair.caller.handle(Received(Welcome(NUMBER)))  # nothing wakes it up again


@pytest.mark.parametrize("seed", range(100))
def test_lost_and_doubled_messages_only_delay(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair()
    for _ in range(40):
        if pair.network and rng.random() < 0.3:
            pair.network.pop(0)
        elif pair.network and rng.random() < 0.3:
            pair.network.insert(rng.randrange(len(pair.network)), pair.network[0])
        elif pair.network:
            pair.hear()
        else:
            for session in (pair.caller, pair.called):
                if "retry" in pair.timers[session]:
                    pair.fire(session, "retry")
    for _ in range(6):
        pair.settle()
        for session in (pair.caller, pair.called):
            if "retry" in pair.timers[session]:
                pair.fire(session, "retry")
    assert pair.up == {pair.caller, pair.called}
    assert sorted(pair.links) == [False, True]


@pytest.mark.parametrize(("name", "role"), [("", "decode"), ("x" * 257, "decode"), ("x", "cook")])
def test_an_agent_that_cannot_introduce_itself_is_told_so(name: str, role: str) -> None:
    with pytest.raises(ValueError, match="cannot introduce itself"):
        make_hello(name, role, 1, 1)
