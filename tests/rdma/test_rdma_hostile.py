"""A peer that shook hands as it should and then sends what it likes: refused, bounded, no byte astray.

The messages that every transport has are fuzzed in `tests/faults/`, and so are frames, whose format
is that of `tcp`; here are those that only `verbs` has, and frames that come by a device.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.engine.errors import EngineError, ProtocolError
from kvferry.engine.transports.verbs import queue_pair as verbs_qp
from kvferry.engine.transports.verbs.cards import Offer
from kvferry.engine.transports.verbs.slots import NUM_SLOTS
from kvferry.engine.wire import frames as tcp_frames
from kvferry.engine.wire import messages as wire

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 120.0
MIB = 1 << 20


def serves(pair: Any, memory: Any) -> None:
    """A new link between the same engines moves bytes, direct and staged."""
    link = pair.connect()
    for piece in (0, 4096):
        memory.clear()
        memory.write(link, piece=piece).wait()
        memory.arrived()
    link.close()


@pytest.mark.parametrize(
    "message",
    [
        wire.SlotFree(0),
        wire.SlotFree(NUM_SLOTS),
        wire.Acknowledge(1, 1, 0),
        wire.Acknowledge(1, 1, 1 << 20),
        wire.RailClosed(63, 0),
        wire.RailOpen(0, b"no offer"),
        wire.RailOpen(63, b""),
        wire.RailReady(63, 0),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_that_make_no_sense_end_the_link(pair: Any, message: wire.LinkMessage) -> None:
    memory = pair.memory(MIB // 4)
    memory.write(piece=4096).wait()
    memory.arrived()
    pair.back.send(message)
    assert isinstance(pair.failure(pair.link.down), ProtocolError)
    memory.unharmed()
    serves(pair, memory)


def test_messages_about_lives_that_are_over_change_nothing(pair: Any) -> None:
    memory = pair.memory(MIB // 4)
    for message in (
        wire.RailDown(0, 7, "never mind"),
        wire.RailDown(63, 0, "never mind"),
        wire.RailClosed(0, 7),
        wire.RailReady(0, 7),
        wire.RailOpened(0, 7, b"no offer"),
        wire.RailOpened(0, 0, b"no offer"),
        wire.Credits(1, 4_000_000_000),
    ):
        pair.back.send(message)
    for piece in (0, 4096):
        memory.clear()
        memory.write(piece=piece).wait()
        memory.arrived()
    assert pair.link.error is None


def test_a_rail_is_not_opened_out_of_turn(pair: Any) -> None:
    memory = pair.memory(MIB // 4)
    pair.link._channel.send(wire.RailOpen(0, Offer((pair.link._path.rails[0].card(),)).encode()))
    assert isinstance(pair.failure(pair.back.down), ProtocolError)
    memory.unharmed()
    serves(pair, memory)


def test_credits_that_a_peer_makes_up_are_no_more_than_its_receives(pair: Any) -> None:
    memory = pair.memory(MIB // 4)
    memory.write().wait()
    memory.arrived()
    path = pair.link._path
    for queue in path.rails[0].direct:
        pair.back.send(wire.Credits(queue.peer_number, 4_000_000_000))
    memory.write().wait()
    memory.arrived()
    assert all(q.credits <= verbs_qp.RECEIVE_DEPTH for q in path.rails[0].direct)


@pytest.mark.parametrize("seed", range(4))
def test_injured_frames_reach_nothing_else(
    pair: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """One byte of a frame's header is another one: the frame is refused, or ends the link."""
    memory = pair.memory(MIB // 4)
    chance = random.Random(seed)
    encode: Callable[[Any], bytes] = tcp_frames.encode

    def injured(header: Any) -> bytes:
        data = bytearray(encode(header))
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        return bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(tcp_frames, "encode", injured)
        for _ in range(3):
            try:
                memory.write(piece=4096, timeout_s=5.0).wait(30.0)
            except EngineError as error:
                print(f"{type(error).__name__}: {error}")
            if pair.link.error is not None:
                break
    memory.unharmed()
    serves(pair, memory)
