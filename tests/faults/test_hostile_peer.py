"""A peer that knows the secret and lies: it gets an error or a closed connection, never memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from kvferry.engine.errors import (
    DeadlineExceeded,
    EngineError,
    LinkError,
    PeerAborted,
    ProtocolError,
    RegionRefused,
)
from kvferry.engine.transports.segments import Outstanding
from kvferry.engine.wire import frames as frames
from kvferry.engine.wire import messages as wire
from kvferry.engine.wire import tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.conftest import Intruder, Victim

SENTINEL = 0xA5
PATIENCE_S = 15.0


@pytest.fixture
def tcp_intruder(victim: Victim, new_intruder: Callable[..., Intruder]) -> Intruder:
    return new_intruder(victim, "tcp")


@pytest.fixture
def cma_intruder(victim: Victim, new_intruder: Callable[..., Intruder]) -> Intruder:
    return new_intruder(victim, "cma")


def down(intruder: Intruder) -> EngineError:
    """Why the victim took the link down."""
    ticket = intruder.victim.engine.expect(
        intruder.victim.engine.new_imm(), nbytes=1, links=[intruder.link]
    )
    with pytest.raises(LinkError):
        ticket.wait(PATIENCE_S)
    assert intruder.link.error is not None
    return intruder.link.error


def test_a_read_is_not_over_because_the_peer_acknowledges_it(
    victim: Victim, tcp_intruder: Intruder
) -> None:
    ticket = tcp_intruder.link.read(victim.region, 0, tcp_intruder.descriptor(), 0, 4096)
    ask = tcp_intruder.hear(wire.ReadRequest)
    tcp_intruder.say(wire.Acknowledge(ask.transfer, 4096))
    with pytest.raises(ProtocolError, match="was not asked"):
        ticket.wait(PATIENCE_S)
    assert tcp_intruder.link.quiesced.wait(PATIENCE_S) == 0
    victim.unharmed()


def test_a_read_that_is_refused_halfway_does_not_free_memory_under_its_thread(
    victim: Victim, tcp_intruder: Intruder, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, take = threading.Event(), Outstanding.take_read

    def take_read(*arguments: Any) -> Any:
        landing = take(*arguments)
        taken.set()
        return landing

    monkeypatch.setattr(Outstanding, "take_read", take_read)
    ticket = tcp_intruder.link.read(victim.region, 0, tcp_intruder.descriptor(), 0, 4096)
    ask = tcp_intruder.hear(wire.ReadRequest)
    header = frames.Header(frames.DATA, 0, 0, ask.first, ask.transfer, 4096, 1, 0)
    tcp_intruder.frame(header, b"x" * 1000)
    assert taken.wait(PATIENCE_S)  # a thread now waits for the rest
    tcp_intruder.say(wire.Refuse(ask.transfer, "RegionGone", "ha", ask.first))
    with pytest.raises((ProtocolError, LinkError)):
        ticket.wait(PATIENCE_S)
    assert tcp_intruder.link.quiesced.wait(PATIENCE_S) == 0
    victim.region.deregister()
    before = victim.memory.copy()
    tcp_intruder.cut_off()
    assert np.array_equal(victim.memory, before)
    victim.unharmed(inside=False)


def test_a_write_is_not_over_while_a_thread_reads_its_source(
    victim: Victim, tcp_intruder: Intruder
) -> None:
    """Acknowledged in full before a byte of it was taken from the socket."""
    nbytes = 32 << 20  # more than the socket takes without a reader
    source = victim.engine.register(np.ones(nbytes, np.uint8))
    ticket = tcp_intruder.link.write(source, 0, tcp_intruder.descriptor(), 0, nbytes)
    head = tcp_intruder.rail.recv(frames.HEADER_NBYTES)
    assert frames.decode(head).kind == frames.WRITE  # it is on its way
    tcp_intruder.say(wire.Acknowledge(1, nbytes))
    with pytest.raises(DeadlineExceeded):
        ticket.wait(0.2)
    with pytest.raises(DeadlineExceeded, match="used by 1 transfers"):
        source.deregister(timeout_s=0.05)
    tcp_intruder.say(wire.Acknowledge(1, nbytes))  # twice for one frame
    assert isinstance(down(tcp_intruder), ProtocolError)
    with pytest.raises(ProtocolError):
        ticket.wait(PATIENCE_S)
    source.deregister()


@pytest.mark.parametrize(
    "message",
    [
        wire.Acknowledge(1, 1),
        wire.Refuse(1, "RegionGone", "because"),
        wire.Checked(1, 0, 0),
        wire.ByeToo(),
    ],
)
def test_answers_to_nothing_end_the_link(
    victim: Victim, intruder: Intruder, transport: str, message: wire.LinkMessage
) -> None:
    intruder.say(message)
    assert isinstance(down(intruder), ProtocolError)
    assert intruder.hear(wire.Bye).reason  # it is told why
    intruder.leave()
    victim.unharmed()
    victim.serves(transport)


@pytest.mark.parametrize(
    "message",
    [
        wire.ReadRequest(1, 0, b"", b"", False),
        wire.ReadRequest(1, 0, b"broken", b"", False),
        wire.ReadRequest(1, 2**32 - 1, b"", b"broken", True),
        wire.Check(1, 0, b"broken", b"", True, 0, None),
        wire.Check(1, 0, b"", bytes(24), False, 0, 5),
        wire.Claim(1, 1, bytes(16), 0, 1),
        wire.Granted(7),
        wire.Granted(7, "NoSuchError", "because"),
        wire.Revoke(12345),
        wire.Revoked(12345),
        wire.Abort(99, "because" * 1000),
    ],
)
def test_messages_out_of_place_do_no_harm(
    victim: Victim, intruder: Intruder, transport: str, message: wire.LinkMessage
) -> None:
    imm = victim.engine.new_imm()
    ticket = victim.engine.expect(imm, writes=1, links=[intruder.link])
    intruder.say(message, wire.Arrived(imm, 0, 1))
    try:
        assert ticket.wait(PATIENCE_S) == 0
    except EngineError as error:
        assert isinstance(error, ProtocolError), error  # noqa: PT017
    intruder.leave()
    victim.unharmed()
    victim.serves(transport)


def test_what_a_peer_counts_is_never_less_than_nothing(victim: Victim, intruder: Intruder) -> None:
    """A negative count would take other links' bytes away."""
    imm = victim.engine.new_imm()
    body = msgspec.msgpack.encode({"t": "arrived", "imm": imm, "nbytes": -5, "writes": 1})
    intruder.control.sendall(len(body).to_bytes(4, "little") + body)
    assert isinstance(down(intruder), ProtocolError)
    ticket = victim.engine.expect(imm, writes=1, timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        ticket.wait(PATIENCE_S)


def test_bytes_that_never_passed_through_are_not_counted(
    victim: Victim, tcp_intruder: Intruder
) -> None:
    """A tcp peer places bytes only by frames; over cma its word is all there is."""
    imm = victim.engine.new_imm()
    ticket = victim.engine.expect(imm, nbytes=100)
    tcp_intruder.say(wire.Arrived(imm, 100, 1))
    assert isinstance(down(tcp_intruder), ProtocolError)
    assert ticket.cancel()


def test_secrets_and_keys_are_not_shown(victim: Victim) -> None:
    address, region = victim.engine.address, victim.region.descriptor
    shown = f"{address!r} {address} {region!r} {region} {[region]}"
    for secret in (address.secret, region.key):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown


REFUSED = [
    ({"key": bytes(16)}, "NotRegistered"),
    ({"region": 10**6}, "NotRegistered"),
    ({"offset": 4096 - 99}, "OutOfRange"),
    ({"offset": 2**63}, "OutOfRange"),
    ({"offset": 2**64 - 1}, "OutOfRange"),
]


@pytest.mark.parametrize(("lie", "name"), REFUSED)
def test_a_frame_into_memory_that_is_not_granted_is_refused_and_the_rail_goes_on(
    victim: Victim,
    tcp_intruder: Intruder,
    make_frame: Callable[..., bytes],
    lie: dict[str, Any],
    name: str,
) -> None:
    imm = victim.engine.new_imm()
    expected = victim.engine.expect(imm, nbytes=100)
    changes = {"transfer": 9, "flags": frames.HAS_IMM, "imm": imm, **lie}
    offset = changes.pop("offset", 0)
    bad = make_frame(victim.region.descriptor, offset, b"x" * 100, **changes)
    tcp_intruder.rail.sendall(bad)
    refused = tcp_intruder.hear(wire.Refuse)
    assert (refused.transfer, refused.error) == (9, name)
    with pytest.raises(EngineError) as caught:
        expected.wait(PATIENCE_S)
    assert type(caught.value).__name__ == name
    victim.unharmed()
    good = make_frame(victim.region.descriptor, 10, b"y" * 100, transfer=10)
    tcp_intruder.rail.sendall(good)
    assert tcp_intruder.hear(wire.Acknowledge) == wire.Acknowledge(10, 100)
    assert victim.memory[4096 + 10 : 4096 + 110].tobytes() == b"y" * 100
    assert tcp_intruder.link.error is None
    victim.unharmed(inside=False)


def test_a_frame_with_a_wrong_checksum_is_placed_but_not_counted(
    victim: Victim, tcp_intruder: Intruder, make_frame: Callable[..., bytes]
) -> None:
    imm = victim.engine.new_imm()
    expected = victim.engine.expect(imm, nbytes=100)
    flags = frames.HAS_IMM | frames.HAS_CRC
    tcp_intruder.rail.sendall(
        make_frame(victim.region.descriptor, 0, b"x" * 100, flags=flags, imm=imm, crc=1)
    )
    assert tcp_intruder.hear(wire.Refuse).error == "ChecksumMismatch"
    with pytest.raises(LinkError, match="not the bytes that were sent"):
        expected.wait(PATIENCE_S)


@pytest.mark.parametrize(
    "changes",
    [
        {"piece_region": 1},
        {"piece_nbytes": 99},
        {"piece_nbytes": 101},
        {"kind": frames.DATA},
        {"kind": 3},
        {"flags": 4},
        {"nbytes": frames.MAX_FRAME_NBYTES + 1},
        {"num_pieces": tables.MAX_PIECES + 1},
        {"table": tables.MAX_REGIONS + 1},
    ],
)
def test_a_frame_that_makes_no_sense_ends_the_link(
    victim: Victim,
    tcp_intruder: Intruder,
    make_frame: Callable[..., bytes],
    changes: dict[str, Any],
) -> None:
    tcp_intruder.rail.sendall(make_frame(victim.region.descriptor, 0, b"x" * 100, **changes))
    assert isinstance(down(tcp_intruder), ProtocolError)
    tcp_intruder.leave()
    assert tcp_intruder.link.quiesced.wait(PATIENCE_S) == 0
    victim.unharmed()
    victim.serves("tcp")


def test_data_of_another_size_than_asked_ends_the_link(
    victim: Victim, tcp_intruder: Intruder
) -> None:
    ticket = tcp_intruder.link.read(victim.region, 0, tcp_intruder.descriptor(), 0, 100)
    ask = tcp_intruder.hear(wire.ReadRequest)
    header = frames.Header(frames.DATA, 0, 0, ask.first, ask.transfer, 200, 1, 0)
    tcp_intruder.frame(header, b"x" * 200)
    with pytest.raises(ProtocolError, match="200 bytes"):
        ticket.wait(PATIENCE_S)
    victim.unharmed()


def test_a_frame_that_never_ends_holds_nothing_but_its_link(
    victim: Victim, tcp_intruder: Intruder, make_frame: Callable[..., bytes]
) -> None:
    whole = make_frame(victim.region.descriptor, 0, b"x" * 4096)
    tcp_intruder.rail.sendall(whole[:-1])
    tcp_intruder.hear(wire.Heartbeat)
    victim.serves("tcp")
    tcp_intruder.link.close()
    assert tcp_intruder.link.quiesced.wait(PATIENCE_S) == 0
    victim.region.deregister()
    victim.unharmed(inside=False)


def test_a_silent_claim_is_no_leave(victim: Victim, cma_intruder: Intruder) -> None:
    """Until the owner has answered, nothing is read or written; a refusal names the reason."""
    ticket = cma_intruder.link.write(victim.region, 0, cma_intruder.descriptor(), 0, 100)
    claim = cma_intruder.hear(wire.Claim)
    with pytest.raises(DeadlineExceeded):
        ticket.wait(0.05)
    cma_intruder.say(wire.Granted(claim.claim, "NotRegistered", "not yours"))
    with pytest.raises(RegionRefused, match="not yours"):
        ticket.wait(PATIENCE_S)
    again = cma_intruder.link.write(victim.region, 0, cma_intruder.descriptor(), 0, 100)
    claim = cma_intruder.hear(wire.Claim)
    cma_intruder.say(wire.Revoke(1), wire.Granted(claim.claim))
    with pytest.raises(EngineError, match="deregistered"):
        again.wait(PATIENCE_S)
    assert cma_intruder.hear(wire.Revoked).region == 1
    with pytest.raises(EngineError, match="deregistered"):
        cma_intruder.link.write(victim.region, 0, cma_intruder.descriptor(), 0, 100)
    victim.unharmed()


def test_an_abort_of_anything_is_only_that(victim: Victim, intruder: Intruder) -> None:
    imm = victim.engine.new_imm()
    ticket = victim.engine.expect(imm, nbytes=1)
    intruder.say(wire.Abort(imm, "ß" * 500))
    with pytest.raises(PeerAborted, match="ß"):
        ticket.wait(PATIENCE_S)
    assert intruder.link.error is None


@pytest.mark.parametrize("size", [0, wire.MAX_MESSAGE_NBYTES + 1, 2**32 - 1])
def test_a_message_of_impossible_size_ends_the_link_and_is_not_waited_for(
    victim: Victim, intruder: Intruder, transport: str, size: int
) -> None:
    intruder.control.sendall(size.to_bytes(4, "little"))
    assert isinstance(down(intruder), ProtocolError)
    for _ in range(20):  # what still comes is neither understood nor kept
        try:
            intruder.control.sendall(bytes(1 << 16))
        except OSError:
            break
    assert len(intruder.link._channel._received) < 1 << 20
    intruder.leave()
    victim.serves(transport)
