"""Fuzz: what comes from outside decodes into something that keeps its promises, or is a named error.

100,000 seeded cases: random bytes, and honest bytes that were cut, extended, spliced or flipped.
"""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import pytest

from kvferry.engine.connect import handshake
from kvferry.engine.connect.handshake import (
    Challenge,
    Confirm,
    Hello,
    Introduction,
    Proof,
    Welcome,
)
from kvferry.engine.errors import EngineError, LayoutError, PeerLost, ProtocolError
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory.descriptors import KEY_NBYTES, CacheDescriptor
from kvferry.engine.memory.regions import RegionTable
from kvferry.engine.plan.block_plan import BlockPlan
from kvferry.engine.plan.token_plan import TokenPlan
from kvferry.engine.wire import frames as frames
from kvferry.engine.wire import messages as wire
from kvferry.engine.wire import tables
from kvferry.engine.wire.identity import EngineAddress, Identity

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

CASES = 14_000  # of each of the seven families
ME = Identity("e" * 32, "fuzz", "host", 4711)
INTERESTING = (0, 1, 2, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32)
HUGE = (2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(honest: list[bytes], seed: int, cases: int = CASES) -> Iterator[bytes]:
    """Seeded cases: a tenth pure noise, the rest honest bytes with one to four injuries."""
    rng = random.Random(seed)
    for _ in range(cases):
        if rng.random() < 0.1:
            yield rng.randbytes(rng.choice((0, 1, 4, 16, 44, 100, 300)))
            continue
        data = bytearray(rng.choice(honest))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            injury = rng.randrange(7)
            if injury == 0:
                del data[at:]
            elif injury == 1:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            elif injury == 2:
                other = rng.choice(honest)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            elif injury == 3:
                del data[at : at + rng.randint(1, 8)]
            elif data and injury == 4:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            elif data and injury == 5:
                data[at % len(data)] = rng.choice((0, 0x7F, 0x80, 0xC0, 0xC1, 0xCF, 0xD3, 0xFF))
            else:
                value = rng.choice(INTERESTING + HUGE)
                data[at : at + 8] = value.to_bytes(8, rng.choice(("little", "big")))
        yield bytes(data)


def test_frame_headers() -> None:
    honest = [
        frames.encode(frames.Header(frames.WRITE, frames.HAS_IMM, 7, 3, 9, 1 << 20, 40, 0)),
        frames.encode(frames.Header(frames.DATA, frames.HAS_CRC, 0, 2**31, 9, 12, 1, 2**32 - 1)),
    ]
    rng = random.Random(1)
    accepted = 0
    for data in mutated(honest, seed=1):
        # A wrong checksum hides everything behind it: mend it in half of the cases.
        if len(data) == frames.HEADER_NBYTES and rng.random() < 0.5:
            data = data[:-4] + frames._CRC.pack(zlib.crc32(data[:-4]))
        try:
            header = frames.decode(data)
        except ProtocolError:
            continue
        accepted += 1
        assert header.kind in (frames.WRITE, frames.DATA)
        assert 0 <= header.nbytes <= frames.MAX_FRAME_NBYTES
        assert 0 <= header.num_pieces <= tables.MAX_PIECES
        assert header.kind == frames.DATA or header.table <= tables.MAX_REGIONS
        assert 0 <= header.imm < 1 << 32
    assert accepted > 100  # the mutations also reach what lies behind the checks


MESSAGES: list[wire.LinkMessage] = [
    wire.Heartbeat(),
    wire.Arrived(7, 1 << 20, 1),
    wire.Acknowledge(3, 8 << 20),
    wire.Refuse(3, "RegionGone", "because", 2),
    wire.ReadRequest(3, 0, bytes(24), bytes(48), True),
    wire.Check(3, 1, bytes(24), bytes(48), True, 12, 7),
    wire.Checked(3, 1, 12),
    wire.Abort(7, "because"),
    wire.Claim(1, 2, bytes(16), 1 << 40, 1 << 20),
    wire.Granted(1, "NotRegistered", "because"),
    wire.Revoke(2),
    wire.Revoked(2),
    wire.Bye("because"),
    wire.ByeToo(),
]


def test_control_messages() -> None:
    honest = [wire.encode(message) for message in MESSAGES]
    for message, data in zip(MESSAGES, honest, strict=True):
        assert wire.decode_all(bytearray(data)) == [message]
    assert wire.decode_all(bytearray(b"".join(honest))) == MESSAGES
    honest.append(b"".join(honest))
    accepted = 0
    for data in mutated(honest, seed=2):
        buffer = bytearray(data)
        try:
            messages = wire.decode_all(buffer)
        except ProtocolError:
            continue
        accepted += len(messages)
        assert len(buffer) <= wire.MAX_MESSAGE_NBYTES + wire.LENGTH_NBYTES
        for message in messages:
            for name, value in msgspec.structs.asdict(message).items():
                assert not isinstance(value, int) or 0 <= value < 1 << 63, (name, value)
            assert wire.decode_all(bytearray(wire.encode(message))) == [message]
    assert accepted > 1000


class Bytes:
    """As much of a socket as the handshake reads from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def settimeout(self, _: float) -> None:
        pass

    def recv(self, nbytes: int) -> bytes:
        part, self._data = self._data[:nbytes], self._data[nbytes:]
        return part


INTRODUCTION = Introduction(ME, "tcp", "x" * 32, -1, 2, 1 << 46, bytes(16))
GREETINGS: list[msgspec.Struct] = [
    Hello(1, "e" * 32, bytes(32)),
    Challenge("", bytes(32), bytes(32)),
    INTRODUCTION,
    Proof(bytes(32), msgspec.msgpack.encode(INTRODUCTION)),
    Welcome("because", ME, 1 << 46, bytes(16)),
    Confirm("because"),
]


def test_handshakes() -> None:
    kinds: list[type[Any]] = [type(greeting) for greeting in GREETINGS]
    honest = []
    for greeting in GREETINGS:
        body = msgspec.msgpack.encode(greeting)
        honest.append(len(body).to_bytes(4, "little") + body)
    for number, data in enumerate(mutated(honest, seed=3)):
        kind = kinds[number % len(kinds)]
        try:
            got = handshake._receive(cast("socket.socket", Bytes(data)), kind, "", 1e18)
        except (ProtocolError, PeerLost):
            continue
        assert isinstance(got, kind)
        if isinstance(got, Hello | Challenge):
            assert len(got.nonce) == 32
        if isinstance(got, Introduction | Welcome):
            assert got.identity is None or 1 <= got.identity.pid < 1 << 31
            assert 0 <= got.probe < 1 << 63


def test_nesting_without_end_is_refused_like_any_other_nonsense() -> None:
    deep = b"\x91" * 9000
    with pytest.raises(ProtocolError):
        wire.decode_all(bytearray(len(deep).to_bytes(4, "little") + deep))
    with pytest.raises(ProtocolError):
        EngineAddress.decode(deep)
    with pytest.raises(LayoutError):
        CacheDescriptor.decode(deep)
    # An unknown field is passed over, but not for ever.
    named = b"\x85\xa9engine_id\xa1a\xa4name\xa1a\xa7host_id\xa1a\xa3pid\x01\xa1x" + deep + b"\0"
    sock = cast("socket.socket", Bytes(len(named).to_bytes(4, "little") + named))
    with pytest.raises(ProtocolError):
        handshake._receive(sock, Identity, "", 1e18)


def test_engine_addresses() -> None:
    honest = [EngineAddress(ME, bytes(32), "127.0.0.1", 4711, "kvferry-x").encode()]
    for data in mutated(honest, seed=4):
        try:
            address = EngineAddress.decode(data)
        except ProtocolError:
            continue
        assert 0 <= address.tcp_port < 1 << 16
        assert EngineAddress.decode(address.encode()) == address


DIMS = "plane block token head dim"


def a_cache(dims: str = DIMS, shape: tuple[int, ...] = (2, 6, 4, 2, 8)) -> CacheDescriptor:
    arrays = [np.zeros(shape, np.uint8) for _ in range(2)]
    layout = KVLayout.from_tensors(arrays, dims)
    return RegionTable("peer").register_cache(layout, arrays).descriptor


def test_cache_descriptors_and_the_plans_made_of_them() -> None:
    """What decodes either cannot be planned, or its pieces lie inside both ends' regions."""
    mine = a_cache().layout
    theirs = [a_cache(), a_cache("plane block head token dim", (2, 6, 2, 4, 8))]
    decoded = planned = 0
    for data in mutated([cache.encode() for cache in theirs], seed=5):
        try:
            cache = CacheDescriptor.decode(data)
        except LayoutError:
            continue
        decoded += 1
        planned += check_plan(mine, cache.layout)
        for region, shape in zip(cache.regions, cache.layout.regions, strict=True):
            assert len(region.key) == KEY_NBYTES
            assert shape.nbytes <= region.nbytes < 1 << 63
    assert decoded > 50
    assert planned > 20


def check_plan(mine: KVLayout, theirs: KVLayout) -> bool:
    for src, dst in ((mine, theirs), (theirs, mine)):
        try:
            plan = BlockPlan(TokenPlan(src, dst))
        except LayoutError:
            return False
        blocks = min(src.num_blocks, dst.num_blocks, 100)
        for ids in ([0], [blocks - 1], list(range(blocks))):
            pieces = plan.pieces(ids, ids)
            for layout, region, offset in (
                (src, pieces.src_region, pieces.src_offset),
                (dst, pieces.dst_region, pieces.dst_offset),
            ):
                limits = np.array([shape.nbytes for shape in layout.regions])[region]
                assert (offset >= 0).all()
                assert (offset + pieces.nbytes <= limits).all()
            assert pieces.total_nbytes == plan.nbytes(len(ids))
    return True


@pytest.mark.parametrize("direction", ["read", "write"])
def test_layouts_with_injured_numbers(direction: str) -> None:
    """Bytes seldom decode once they are injured; numbers do."""
    rng = random.Random(6)
    mine = a_cache().layout
    honest = msgspec.to_builtins(a_cache().layout)
    planned = 0
    for _ in range(CASES // 2):
        injured = msgspec.msgpack.decode(msgspec.msgpack.encode(honest))
        for _ in range(rng.randint(1, 3)):
            region = rng.choice(injured["regions"])
            field = rng.choice([*region, "axis", "head_start", "head_stop", "stretch"])
            value = rng.choice((*INTERESTING, *HUGE, -1, 3, 4, 6, 8, 16, 64, 384, 768, 10**6))
            if field == "axis":
                rng.choice(region["axes"])[rng.choice((1, 2))] = value
            elif field == "stretch":  # a consistent lie: more of everything
                region["nbytes"], region["num_slots"] = 10**9, value
            elif field in ("head_start", "head_stop"):
                injured[field] = value
            elif field == "layers":
                region[field] = rng.choice(([value], [], [0, 1], [0, 0]))
            elif field == "planes":
                region[field] = rng.choice((["k"], [], ["v", "k"], ["k", "k"], ["k", "v", "x"]))
            elif field != "axes":
                region[field] = value
        try:
            theirs = msgspec.convert(injured, KVLayout)
            theirs.check()
            pair = (theirs, mine) if direction == "read" else (mine, theirs)
            planned += check_plan(*pair)
        except (LayoutError, msgspec.ValidationError):
            continue
    assert planned > 100


def test_region_and_piece_tables() -> None:
    """What is admitted lies inside the region that it names, and every use is given back."""
    table = RegionTable("me")
    array = np.zeros(4096, np.uint8)
    region = table.register(array)
    rng = random.Random(7)
    rows = np.zeros(1, tables.REGION_ROW)
    rows["region"], rows["key"] = region.region_id, np.frombuffer(region.descriptor.key, np.uint8)
    honest_rows = rows.tobytes()
    injured_rows = mutated([honest_rows], seed=8)
    numbers = (*INTERESTING, *HUGE, 100, 4095, 4096, 4097, 2**64 - 4096)
    admitted = 0
    for _ in range(CASES):
        pieces = np.zeros(rng.randint(0, 3), tables.PIECE_ROW)
        for row in pieces:
            row["region"] = rng.choice((0, 0, 0, 1, 2**32 - 1))
            row["offset"] = rng.choice((rng.randrange(4096), rng.choice(numbers) % 2**64))
            row["nbytes"] = rng.choice((rng.randrange(4096), rng.choice(numbers) % 2**64))
        data = pieces.tobytes()
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data) + 1)]
        injured = next(injured_rows)
        try:
            got = tables.admit(table, injured if rng.random() < 0.2 else honest_rows, data)
        except EngineError:
            continue
        admitted += 1
        starts, sizes = got.iov[:, 0].astype(np.int64), got.iov[:, 1].astype(np.int64)
        assert (starts >= region.address).all()
        assert (starts + sizes <= region.address + region.nbytes).all()
        assert got.nbytes == int(sizes.sum())
        assert region._uses == len(got.regions)
        got.release()
    assert admitted > 1000
    assert region._uses == 0
