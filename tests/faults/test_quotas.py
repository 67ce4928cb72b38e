"""What one admitted peer may have a process do and keep for it: so much, and never at others' cost."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import EngineError, LinkError, PeerLost, ProtocolError, QuotaExceeded
from kvferry.engine.memory import iovec
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.transports import segments
from kvferry.engine.transports.cma import path as cma
from kvferry.engine.transports.cma import shared_staging
from kvferry.engine.transports.tcp import rail as tcp_rail
from kvferry.engine.wire import messages as wire
from kvferry.engine.wire import tables
from tests.conftest import Gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.memory.descriptors import RegionDescriptor
    from kvferry.engine.memory.regions import MemoryRegion
    from tests.faults.conftest import Intruder, Victim

PATIENCE_S = 15.0


def rows(region: RegionDescriptor, count: int = 1, nbytes: int = -1) -> tuple[bytes, bytes]:
    """Tables that name the beginning of a region, or all of it, so many times."""
    pieces = np.zeros(count, tables.PIECE_ROW)
    pieces["nbytes"] = region.nbytes if nbytes < 0 else nbytes
    return tables.region_rows((region,)).tobytes(), pieces.tobytes()


def read(
    number: int, region: RegionDescriptor, count: int = 1, nbytes: int = -1
) -> wire.LinkMessage:
    return wire.ReadRequest(1, number, *rows(region, count, nbytes))


def check(number: int, region: RegionDescriptor, count: int = 1) -> wire.LinkMessage:
    return wire.Check(1, number, *rows(region, count), count=False, crc=0, imm=None)


def failure(intruder: Intruder) -> EngineError:
    """Why the victim took the link down."""
    with pytest.raises(LinkError):
        intruder.link.down.wait(PATIENCE_S)
    assert intruder.link.error is not None
    return intruder.link.error


@pytest.fixture
def large(victim: Victim, transport: str) -> MemoryRegion:
    """A region that is the largest part of a read."""
    nbytes = {"tcp": tcp_rail.BUFFER_NBYTES, "cma": shared_staging.SLOT_NBYTES}[transport]
    return victim.engine.register(np.zeros(nbytes, np.uint8))


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Checksums do not end before the gate is open."""
    gate, checksum = Gate(), iovec.checksum
    guarded = gate.guard(lambda _: None)

    def slow(iov: iovec.Iovec) -> int:
        guarded(iov)
        return checksum(iov)

    monkeypatch.setattr(iovec, "checksum", slow)
    yield gate
    gate.open()


def test_a_peer_that_reads_and_takes_nothing_does_not_keep_memory(
    victim: Victim,
    intruder: Intruder,
    large: MemoryRegion,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "TAKE_BACK_S", 0.1)
    intruder.say(*(read(number, large.descriptor) for number in range(12)))
    if transport == "cma":
        for _ in range(shared_staging.NUM_SLOTS):
            intruder.hear(wire.Staged)
        owner = threading.Thread(target=large.deregister, args=(PATIENCE_S,))
        owner.start()
        error = failure(intruder)
        owner.join()
        assert isinstance(error, PeerLost)
        assert "taken nothing" in error.message
    else:
        assert intruder.rail.recv(1)
    large.deregister(PATIENCE_S)
    victim.serves(transport)


def test_a_peer_that_takes_nothing_is_given_up(
    victim: Victim, intruder: Intruder, large: MemoryRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "TAKE_S", 0.1)
    intruder.say(*(read(number, large.descriptor) for number in range(12)))
    assert "taken nothing" in failure(intruder).message
    large.deregister(PATIENCE_S)
    victim.unharmed()


def test_reads_that_wait_are_charged_to_who_asks(
    victim: Victim,
    intruder: Intruder,
    large: MemoryRegion,
    transport: str,
    new_intruder: Callable[..., Intruder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "MAX_ASKED_NBYTES", 1 << 20)
    hungry, modest = new_intruder(victim, transport), intruder
    modest.say(read(0, large.descriptor, nbytes=1))
    one_nbytes = segments.REPLY_NBYTES + sum(map(len, rows(large.descriptor)))
    for number in range((1 << 20) // one_nbytes + 20):  # some are sent at once
        hungry.say(read(number, large.descriptor))
    error = failure(hungry)
    assert isinstance(error, QuotaExceeded)
    assert error.peer == "intruder"
    assert modest.link.error is None
    large.deregister(PATIENCE_S)


def test_a_read_is_of_one_part(
    victim: Victim, intruder: Intruder, large: MemoryRegion, transport: str
) -> None:
    intruder.say(read(0, large.descriptor, count=2))
    assert isinstance(failure(intruder), ProtocolError)
    large.deregister(PATIENCE_S)
    victim.serves(transport)


def test_regions_that_nobody_knows_are_taken_back_for_nothing(
    victim: Victim, intruder: Intruder
) -> None:
    count = 1000
    intruder.say(*(wire.Revoke(region) for region in range(count)))
    for region in range(count):
        assert intruder.hear(wire.Revoked).region == region
    assert not intruder.link._table.revoked
    victim.unharmed()


class TestChecksums:
    """They take long, so they are few, short, and nobody else waits for them."""

    @pytest.fixture
    def transport(self) -> str:
        return "cma"

    def test_one_is_of_a_chunk(self, victim: Victim, intruder: Intruder) -> None:
        count = cma.MAX_CHECK_NBYTES // 4096
        intruder.say(check(0, victim.region.descriptor, count))
        assert intruder.hear(wire.Checked).chunk == 0
        intruder.say(check(0, victim.region.descriptor, count + 1))
        assert isinstance(failure(intruder), ProtocolError)

    def test_they_hold_up_no_other_link(
        self, victim: Victim, intruder: Intruder, checking: Gate
    ) -> None:
        intruder.say(*(check(n, victim.region.descriptor) for n in range(cma.CHECKS_AT_ONCE)))
        assert checking.reached.wait(PATIENCE_S)
        victim.serves("cma")
        assert intruder.link.error is None
        checking.open()
        for _ in range(cma.CHECKS_AT_ONCE):
            intruder.hear(wire.Checked)

    def test_they_are_few_at_a_time(
        self, victim: Victim, intruder: Intruder, checking: Gate
    ) -> None:
        intruder.say(*(check(n, victim.region.descriptor) for n in range(cma.CHECKS_AT_ONCE + 1)))
        error = failure(intruder)
        assert isinstance(error, QuotaExceeded)
        assert "16 checksums" in error.message

    def test_an_engine_closes_in_time_for_all_that(
        self, victim: Victim, intruder: Intruder, checking: Gate
    ) -> None:
        intruder.say(*(check(n, victim.region.descriptor) for n in range(cma.CHECKS_AT_ONCE)))
        assert checking.reached.wait(PATIENCE_S)
        closing = threading.Thread(target=victim.engine.close, args=(0.1,))
        closing.start()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()

    def test_an_honest_peer_asks_for_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cma, "CHECKS_AT_ONCE", 1)
        nbytes = 4 * cma.CHUNK_NBYTES
        options: dict[str, Any] = {"transports": ("cma",), "verify": True}
        with TransferEngine(**options) as left, TransferEngine(**options) as right:
            mine = left.register(np.arange(nbytes // 8))
            theirs = right.register(np.zeros(nbytes // 8, np.int64))
            link = left.connect(right.address)
            imm = right.new_imm()
            expected = right.expect(imm, nbytes=nbytes, writes=1)
            write = link.write(mine, 0, theirs.descriptor, 0, nbytes, imm=imm)
            assert write.wait(PATIENCE_S) == expected.wait(PATIENCE_S) == nbytes
            assert link.read(mine, 0, theirs.descriptor, 0, nbytes).wait(PATIENCE_S) == nbytes
