"""An intruder: it knows the secret, shakes hands as it should, and then sends what it likes."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.connect import handshake
from kvferry.engine.connect.handshake import Introduction
from kvferry.engine.memory.descriptors import RegionDescriptor
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.wire import frames as frames
from kvferry.engine.wire import messages as wire
from kvferry.engine.wire import tables
from kvferry.engine.wire.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SENTINEL = 0xA5
PATIENCE_S = 15.0


class Victim:
    """An engine with one region between two strips of sentinels."""

    def __init__(self) -> None:
        self.engine = TransferEngine(name="victim")
        self.memory = np.full(3 * 4096, SENTINEL, np.uint8)
        self.region = self.engine.register(self.memory[4096:8192])

    def unharmed(self, *, inside: bool = True) -> None:
        """No byte outside the region has changed, nor, unless it may have, inside."""
        assert (self.memory[:4096] == SENTINEL).all()
        assert (self.memory[8192:] == SENTINEL).all()
        assert not inside or (self.memory[4096:8192] == SENTINEL).all()

    def serves(self, transport: str) -> None:
        """Its progress thread lives, and a good peer is served."""
        with TransferEngine(name="good") as good:
            link = good.connect(self.engine.address, transport=transport)
            mine = good.register(np.full(4096, SENTINEL, np.uint8))
            imm = self.engine.new_imm()
            ticket = self.engine.expect(imm, nbytes=4096, writes=1)
            assert link.write(mine, 0, self.region.descriptor, 0, 4096, imm=imm).wait(PATIENCE_S)
            assert ticket.wait(PATIENCE_S) == 4096
            assert link.read(mine, 0, self.region.descriptor, 0, 4096).wait(PATIENCE_S) == 4096


class Intruder:
    """An authenticated client without an engine behind it: sockets and nothing else."""

    def __init__(self, victim: Victim, transport: str, number: int = 0) -> None:
        self.victim = victim
        self.transport = transport
        self.engine_id = f"intruder-{number}"
        word = np.arange(2, dtype=np.uint64)
        host = handshake.host_id() if transport == "cma" else "mars"  # whose process is not here
        self._introduction: dict[str, Any] = {
            "identity": Identity(self.engine_id, "intruder", host, os.getpid()),
            "transport": transport,
            "link_id": self.engine_id,
            "num_rails": 1,
            "probe": word.ctypes.data,
            "probe_word": word.tobytes(),
        }
        self.control = self._greet(-1)
        self.rail = self._greet(0) if transport == "tcp" else self.control
        self.link = victim.engine.accept_link(self.engine_id, PATIENCE_S)
        self._received = bytearray()
        self._heard: list[wire.LinkMessage] = []

    def _greet(self, rail: int) -> socket.socket:
        sock = connection(self.victim.engine, self.transport)
        handshake.connect(
            sock,
            self.victim.engine.address,
            Introduction(rail=rail, **self._introduction),
            lambda _: "",
        )
        sock.settimeout(PATIENCE_S)
        return sock

    def descriptor(self, nbytes: int = 1 << 30) -> RegionDescriptor:
        """Memory that it pretends to have."""
        return RegionDescriptor(self.engine_id, 1, bytes(16), 1 << 40, nbytes)

    def say(self, *messages: wire.LinkMessage) -> None:
        self.control.sendall(b"".join(wire.encode(message) for message in messages))

    def hear(self, *kinds: type[Any]) -> Any:
        """The next message of these kinds; others are passed over."""
        while True:
            while self._heard:
                message = self._heard.pop(0)
                if isinstance(message, kinds):
                    return message
            data = self.control.recv(1 << 16)
            assert data, f"the connection ended before one of {kinds} came"
            self._received += data
            self._heard += wire.decode_all(self._received)

    def frame(self, header: frames.Header, body: bytes = b"") -> None:
        self.rail.sendall(frames.encode(header) + body)

    def cut_off(self) -> None:
        """Returns once the victim has hung up on every socket."""
        for sock in {self.control, self.rail}:
            with contextlib.suppress(OSError):
                while sock.recv(1 << 16):
                    pass

    def leave(self) -> None:
        """Says goodbye where it still can, and hangs up."""
        with contextlib.suppress(OSError):
            self.say(wire.Bye(""))
        for sock in {self.control, self.rail}:
            sock.close()


def connection(engine: TransferEngine, transport: str) -> socket.socket:
    """A bare connection to an engine's listener."""
    if transport == "tcp":
        address = (engine.address.tcp_host, engine.address.tcp_port)
        return socket.create_connection(address, PATIENCE_S)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE_S)
    sock.connect(f"\0{engine.address.unix_name}")
    return sock


def write_frame(into: RegionDescriptor, offset: int, data: bytes, **changes: Any) -> bytes:
    """A write frame of one piece, as an honest peer would send it, or with changes.

    `key`, `region`, `piece_region`, `piece_nbytes` change the tables; the rest the header.
    """
    rows = np.zeros(1, tables.REGION_ROW)
    rows["region"] = changes.pop("region", into.region_id)
    rows["key"] = np.frombuffer(changes.pop("key", into.key), np.uint8)
    pieces = np.zeros(1, tables.PIECE_ROW)
    pieces["region"] = changes.pop("piece_region", 0)
    pieces["offset"] = offset
    pieces["nbytes"] = changes.pop("piece_nbytes", len(data))
    header = frames.Header(frames.WRITE, 0, 0, 1, 1, len(data), 1, 0)._replace(**changes)
    return frames.encode(header) + rows.tobytes() + pieces.tobytes() + data


@pytest.fixture(autouse=True)
def nothing_to_report(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An exception that was not foreseen is logged by the thread that survives it: here it fails."""
    yield
    reports = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
    assert reports == []


@pytest.fixture
def victim() -> Iterator[Victim]:
    target = Victim()
    yield target
    target.engine.close(timeout_s=0.5)


@pytest.fixture
def new_intruder() -> Iterator[Callable[..., Intruder]]:
    """Makes intruders."""
    visitors: list[Intruder] = []

    def make(victim: Victim, transport: str) -> Intruder:
        visitors.append(Intruder(victim, transport, len(visitors)))
        return visitors[-1]

    yield make
    for visitor in visitors:
        visitor.leave()


@pytest.fixture
def intruder(victim: Victim, transport: str, new_intruder: Callable[..., Intruder]) -> Intruder:
    return new_intruder(victim, transport)


@pytest.fixture(name="connection")
def _connection() -> Callable[[TransferEngine, str], socket.socket]:
    return connection


@pytest.fixture
def make_frame() -> Callable[..., bytes]:
    return write_frame
