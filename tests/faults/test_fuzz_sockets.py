"""Fuzz on live sockets: before, while and after an intruder proves that it knows the secret.

Nobody crashes, no byte lands outside a region, every ticket ends, and a good peer is served.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import zlib
from typing import TYPE_CHECKING

import msgspec
import pytest

from kvferry.engine.connect import handshake
from kvferry.engine.errors import EngineError
from kvferry.engine.wire import frames as frames
from kvferry.engine.wire import messages as wire
from kvferry.engine.wire.identity import Identity

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from kvferry.engine.transfer.ticket import Ticket
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.faults.conftest import Intruder, Victim

PATIENCE_S = 15.0
BATCH = 40


def injured(honest: list[bytes], rng: random.Random) -> bytes:
    """Noise, or honest bytes with an injury or two."""
    if rng.random() < 0.15:
        return rng.randbytes(rng.choice((1, 4, 44, 200, 3000)))
    data = bytearray(rng.choice(honest))
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(data) + 1)
        injury = rng.randrange(5)
        if injury == 0:
            del data[at:]
        elif injury == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif injury == 2:
            del data[at : at + rng.randint(1, 8)]
        elif data and injury == 3:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        else:
            data += rng.choice(honest)
    return bytes(data)


def framed(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


def hello(engine: TransferEngine) -> handshake.Hello:
    return handshake.Hello(wire.LINK_VERSION, engine.engine_id, bytes(32))


def introduction(transport: str) -> bytes:
    me = Identity("fuzz", "fuzz", "mars", 4711)
    return msgspec.msgpack.encode(handshake.Introduction(me, transport, "fuzz", -1, 1))


@pytest.mark.parametrize("greets", [False, True])
def test_strangers(
    victim: Victim,
    transport: str,
    connection: Callable[[TransferEngine, str], socket.socket],
    greets: bool,
) -> None:
    """Without the secret: injured hellos, and injured proofs after a good one."""
    rng = random.Random(f"{transport}{greets}")
    engine = victim.engine
    good = framed(hello(engine))
    honest = [framed(handshake.Proof(bytes(32), introduction(transport)))] if greets else [good]
    for _ in range(3):
        socks = []
        for _ in range(BATCH):
            sock = connection(engine, transport)
            socks.append(sock)
            with contextlib.suppress(OSError):
                if greets:
                    sock.sendall(good)
                sock.sendall(injured(honest, rng))
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(1)  # nothing more comes; what does the engine say?
                while sock.recv(1 << 16):
                    pass
            sock.close()
    assert engine.links == ()
    victim.unharmed()
    victim.serves(transport)


def test_introductions(
    victim: Victim,
    transport: str,
    connection: Callable[[TransferEngine, str], socket.socket],
) -> None:
    """With the secret: injured introductions under a proof that covers them."""
    rng = random.Random(f"introductions {transport}")
    engine = victim.engine
    nonce = bytes(32)
    for _ in range(BATCH):
        with connection(engine, transport) as sock:
            sock.sendall(framed(hello(engine)))
            deadline_s = time.monotonic() + PATIENCE_S
            theirs = handshake._receive(sock, handshake.Challenge, "", deadline_s).nonce
            said = injured([introduction(transport)], rng)
            proof = handshake._proof(engine.address.secret, b"client", nonce, theirs, said)
            with contextlib.suppress(OSError):
                sock.sendall(framed(handshake.Proof(proof, said)))
                sock.shutdown(1)
                while sock.recv(1 << 16):
                    pass
    assert engine.links == ()
    victim.unharmed()
    victim.serves(transport)


def pending(victim: Victim, intruder: Intruder) -> list[Ticket]:
    """One ticket of each kind that hangs on the intruder's link."""
    tickets = [victim.engine.expect(victim.engine.new_imm(), nbytes=1 << 40, links=[intruder.link])]
    with contextlib.suppress(EngineError):
        tickets.append(intruder.link.read(victim.region, 0, intruder.descriptor(), 0, 64))
        tickets.append(intruder.link.write(victim.region, 0, intruder.descriptor(), 0, 64, imm=5))
        tickets.append(intruder.link.signal(6))
    return tickets


def end(victim: Victim, visitors: list[Intruder], tickets: list[Ticket]) -> None:
    """The intruders hang up; every ticket must end, and the region must be free again."""
    for visitor in visitors:
        visitor.leave()
    for ticket in tickets:
        with contextlib.suppress(EngineError):
            ticket.wait(PATIENCE_S)
        assert ticket.done()
    for visitor in visitors:
        # Over cma, only a goodbye that was understood, or its death, clears a live process.
        if visitor.transport == "tcp":
            visitor.link.quiesced.wait(PATIENCE_S)
    assert any(thread.name == "victim-progress" for thread in threading.enumerate())
    victim.unharmed(inside=False)


def test_control_messages(
    victim: Victim, transport: str, new_intruder: Callable[..., Intruder]
) -> None:
    rng = random.Random(f"control {transport}")
    region = victim.region.descriptor
    honest = [
        wire.encode(message)
        for message in (
            wire.Heartbeat(),
            wire.Arrived(7, 100, 1),
            wire.Acknowledge(1, 64),
            wire.Refuse(2, "RegionGone", "because", 0),
            wire.ReadRequest(3, 0, bytes(24), bytes(24), True),
            wire.Check(3, 1, bytes(24), bytes(24), True, 12, 7),
            wire.Checked(1, 0, 12),
            wire.Abort(7, "because"),
            wire.Claim(1, region.region_id, region.key, region.address, region.nbytes),
            wire.Granted(1, "NotRegistered", "because"),
            wire.Revoke(1),
            wire.Revoked(1),
            wire.ByeToo(),
        )
    ]
    for _ in range(2):
        visitors, tickets = [], []
        for _ in range(BATCH):
            visitor = new_intruder(victim, transport)
            visitors.append(visitor)
            tickets += pending(victim, visitor)
            with contextlib.suppress(OSError):
                visitor.control.sendall(b"".join(injured(honest, rng) for _ in range(3)))
        end(victim, visitors, tickets)
    victim.unharmed()
    victim.serves(transport)


def test_frames(
    victim: Victim, new_intruder: Callable[..., Intruder], make_frame: Callable[..., bytes]
) -> None:
    """Injured frames with and without a header whose own checksum is right again."""
    rng = random.Random("frames")
    region = victim.region.descriptor
    honest = [
        make_frame(region, 0, b"x" * 64),
        make_frame(region, 4000, b"x" * 96, flags=frames.HAS_IMM, imm=7),
        make_frame(region, 64, b"x" * 2000, flags=frames.HAS_CRC, crc=1),
        frames.encode(frames.Header(frames.DATA, 0, 0, 0, 1, 64, 1, 0)) + b"x" * 64,
    ]
    for _ in range(4):
        visitors, tickets = [], []
        for _ in range(BATCH):
            visitor = new_intruder(victim, "tcp")
            visitors.append(visitor)
            tickets += pending(victim, visitor)
            data = bytearray(injured(honest, rng))
            if len(data) >= frames.HEADER_NBYTES and rng.random() < 0.7:
                body = data[: frames.HEADER_NBYTES - 4]
                body[:4] = frames.MAGIC
                data[: frames.HEADER_NBYTES] = body + frames._CRC.pack(zlib.crc32(body))
            with contextlib.suppress(OSError):
                visitor.rail.sendall(bytes(data) + rng.choice(honest))
        end(victim, visitors, tickets)
    assert victim.engine.links == ()
    victim.memory[4096:8192] = 0xA5
    victim.serves("tcp")
    victim.region.deregister()
    victim.unharmed()


def test_tables_with_true_headers_and_false_rows(
    victim: Victim, new_intruder: Callable[..., Intruder], make_frame: Callable[..., bytes]
) -> None:
    """Right key and right region; offsets and sizes drawn from what overflows, wraps and touches."""
    rng = random.Random("tables")
    region = victim.region.descriptor
    edges = [
        0,
        1,
        63,
        4095,
        4096,
        4097,
        2**31,
        2**32,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 4096,
        2**64 - 1,
    ]
    visitor = new_intruder(victim, "tcp")
    answers = 0
    for transfer in range(300):
        offset, size = rng.choice(edges), rng.randrange(4200)
        visitor.rail.sendall(make_frame(region, offset, bytes([0xA5]) * size, transfer=transfer))
        answers += 1
    refused = taken = 0
    while refused + taken < answers:
        message = visitor.hear(wire.Refuse, wire.Acknowledge)
        refused += isinstance(message, wire.Refuse)
        taken += isinstance(message, wire.Acknowledge)
    assert refused > 100
    assert taken > 10
    assert visitor.link.error is None
    victim.unharmed()
