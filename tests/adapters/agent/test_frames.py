"""An agent against frames from anybody: it answers or ignores them, and goes on working."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from kvferry.adapters.agent.messaging import QUEUE_MESSAGES, Messaging, ReplyTo
from kvferry.control.handoff.messages import (
    MAX_FRAME_NBYTES,
    VERSION,
    Cancel,
    Cancelled,
    Done,
    HandoffId,
    Hello,
    Refused,
    Request,
    Welcome,
    decode,
    encode,
)
from tests.support.agent_process import WAIT_S
from tests.support.huge_frames import is_cut_off, peak_mib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.agents import Local, Remote

SRC, DST = [9, 2, 11], [1, 0, 7]
MIB_OF_A_HANDOFF = 64  # what meeting somebody and a first handoff take, and more


class Stranger:
    """A bare ZeroMQ socket that speaks to an agent."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def ask(self, frame: bytes) -> Any:
        self.socket.send(frame)
        return self.hear()

    def hear(self) -> Any:
        return decode(self.socket.recv())


@pytest.fixture
def stranger(new_agent: Callable[..., Local]) -> Iterator[tuple[Local, Stranger]]:
    local = new_agent("prefill-0", "prefill")
    with zmq.Context() as context:
        speaker = Stranger(context, local.agent.address)
        yield local, speaker
        speaker.socket.close()


def works(local: Local, new_agent: Callable[..., Local]) -> bool:
    """Whether the agent still hands over."""
    decode_agent = new_agent("decode-0", "decode")
    decode_agent.agent.connect(local.agent.address)
    local.cache.fill(SRC, 1)
    local.agent.send("r", SRC)
    decode_agent.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    return decode_agent.cache.holds(DST, 1)


@pytest.mark.parametrize(
    "frame",
    [b"", b"\x00", b"GET / HTTP/1.1", b"\x91" * 5000, encode(Welcome(1))[:-1]],
    ids=["empty", "zero", "text", "deep", "truncated"],
)
def test_frames_that_are_no_message_are_refused(
    stranger: tuple[Local, Stranger], new_agent: Callable[..., Local], frame: bytes
) -> None:
    local, speaker = stranger
    answer = speaker.ask(frame)
    assert isinstance(answer, Refused)
    assert answer.reason == "protocol"
    assert local.agent.frames_refused == 1
    assert works(local, new_agent)


def test_messages_of_no_session_are_refused(stranger: tuple[Local, Stranger]) -> None:
    local, speaker = stranger
    handoff = HandoffId("r", 1, 1)
    for message in (
        Welcome(5),
        Request(5, handoff, "pull", 1, 64, 1.0),
        Cancel(5, handoff, "decode"),
        Cancelled(5, handoff, "decode"),
        Done(5, handoff, 64),
    ):
        answer = speaker.ask(encode(message))
        assert answer == Refused(5, "session", answer.detail)
    assert local.agent.frames_refused == 5
    # Refusals are never answered: two agents would refuse each other for ever.
    speaker.socket.send(encode(Refused(5, "session")))
    assert speaker.ask(encode(Welcome(6))).session == 6


def test_another_version_is_refused_by_name(stranger: tuple[Local, Stranger]) -> None:
    _, speaker = stranger
    answer = speaker.ask(encode(Hello(5, 99, "decode-9", "decode", 1)))
    assert isinstance(answer, Refused)
    assert answer.reason == "version"
    assert "prefill-0 speaks version 4, decode-9 99" in answer.detail


def test_nobody_can_speak_for_another_session(
    stranger: tuple[Local, Stranger], new_agent: Callable[..., Local]
) -> None:
    local, speaker = stranger
    here = new_agent("decode-0", "decode")
    here.agent.connect(local.agent.address)
    (number,) = local.agent._core.sessions._all
    sending = local.agent.open_send("r", SRC)
    receiving = here.agent.receive("r", "prefill-0", DST)
    answer = speaker.ask(encode(Cancel(number, HandoffId("r", 1, 1), "decode")))
    assert answer == Refused(number, "session", answer.detail)
    sending.finish()
    receiving.wait(WAIT_S)


def test_oversized_frames_cost_the_sender_its_connection(
    stranger: tuple[Local, Stranger], new_agent: Callable[..., Local]
) -> None:
    local, speaker = stranger
    assert speaker.ask(encode(Welcome(1))).reason == "session"
    speaker.socket.send(bytes(MAX_FRAME_NBYTES + 1))
    assert works(local, new_agent)


def test_a_message_of_a_gibibyte_costs_its_connection_and_no_memory(
    start_agent: Callable[..., Remote], new_agent: Callable[..., Local]
) -> None:
    remote = start_agent("prefill-0", "prefill")
    before = peak_mib(remote.process.pid)
    with zmq.Context() as context:
        speaker = Stranger(context, remote.address)
        assert speaker.ask(encode(Welcome(1))).reason == "session"
        assert is_cut_off(speaker.socket, WAIT_S), "the agent did not hang up"
        speaker.socket.close()
    here = new_agent("decode-0", "decode")
    here.agent.connect(remote.address)
    remote.call("fill", SRC, 1)
    remote.call("send", "r", SRC)
    here.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    assert here.cache.holds(DST, 1)
    assert peak_mib(remote.process.pid) - before < MIB_OF_A_HANDOFF


def test_a_flood_of_random_frames(
    stranger: tuple[Local, Stranger], new_agent: Callable[..., Local]
) -> None:
    local, speaker = stranger
    rng = random.Random(1)
    for _ in range(2_000):
        answer = speaker.ask(rng.randbytes(rng.randrange(1, 100)))
        assert isinstance(answer, Refused)
    assert works(local, new_agent)


def test_strangers_cannot_fill_the_memory(
    stranger: tuple[Local, Stranger], new_agent: Callable[..., Local]
) -> None:
    _, speaker = stranger
    answers = [
        speaker.ask(encode(Hello(number, VERSION, f"d{number}", "decode", 1)))
        for number in range(1, 300)
    ]
    assert isinstance(answers[0], Hello)
    assert isinstance(answers[-1], Refused)


def test_a_queue_without_a_reader_fills_up_and_says_so() -> None:
    messaging = Messaging("tcp://127.0.0.1:*", lambda route, frame: None, "test")
    route = messaging.dial("tcp://127.0.0.1:1")
    reasons: list[str] = []

    def say(to: ReplyTo) -> list[str]:
        messaging.send(to, b"x", reasons.append)
        messaging.flush()
        while messaging.loop._calls:
            messaging.loop._calls.popleft()()
        return reasons

    for _ in range(QUEUE_MESSAGES):
        assert say(route) == []
    assert "does not read" in say(route).pop()
    messaging.hang_up(route)
    assert "closed" in say(route).pop()
    assert "not connected" in say(ReplyTo(0, b"nobody")).pop()
    messaging.start()
    messaging.close()
    messaging.call_soon(lambda: None)  # late callers are harmless


def test_who_hears_something_may_hang_up(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[bytes] = []
    over = threading.Event()
    server = Messaging("tcp://127.0.0.1:*", lambda route, _: answer(route), "server")
    client = Messaging("tcp://127.0.0.1:*", lambda route, frame: None, "client")

    def answer(route: ReplyTo) -> None:
        for number in range(3):
            server.send(route, b"answer %d" % number, lambda _: None)
            server.flush()  # a message each: two of them are still there when the first is heard

    def hang_up(route: ReplyTo, frame: bytes) -> None:
        heard.append(frame)
        client.hang_up(route)
        client.call_soon(over.set)

    server.start()
    client.start()
    client.call_soon(
        lambda: client.send(client.dial(server.endpoint, hang_up), b"question", lambda _: None)
    )
    assert over.wait(WAIT_S)
    client.close()
    server.close()
    assert heard == [b"answer 0"]
    assert not caplog.records
