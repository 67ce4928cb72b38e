"""Words of GPU memory that imms own: failed ones are set aside, and come back once nobody adds to them.

The GPU's memory is a table here, which the driver's calls read and write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvferry.engine.errors import ImmInUse
from kvferry.engine.transfer import counters, device_counters
from kvferry.engine.transfer.counters import CounterTable
from kvferry.engine.transfer.device_counters import NUM_SLOTS, DeviceCounters, slot_offset

if TYPE_CHECKING:
    from kvferry.engine.transfer.ticket import Ticket

ADDRESS = 1 << 20


class Memory:
    """What a driver does with words, without a GPU."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}

    def allocate(self, device: int, nbytes: int) -> int:
        return ADDRESS

    def export(self, device: int, address: int) -> bytes:
        return b"handle"

    def new_stream(self, device: int) -> int:
        return 1

    def write_value(self, device: int, stream: int, address: int, value: int) -> None:
        self.words[address] = value

    def read_word(self, device: int, address: int) -> int:
        return self.words.get(address, 0)


class Engine:
    """The two tables of one engine, used as `TransferEngine` does."""

    def __init__(self) -> None:
        self.table = CounterTable()
        self.words = DeviceCounters()
        self.words.array(0)

    def expect(self, nbytes: int = 100, imm: int | None = None) -> Ticket:
        if imm is None:
            imm = self.table.new_imm(self.words.owned, self.words.dirty)
        ticket = self.table.expect(imm, nbytes=nbytes, writes=None, sources=(), timeout_s=60.0)
        self.words.claim(ticket, nbytes)
        return ticket

    def has_word(self, ticket: Ticket) -> bool:
        assert ticket.imm is not None
        return self.words._owners.get(ticket.imm % NUM_SLOTS, (None, 0))[0] == ticket.imm


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    monkeypatch.setattr(device_counters, "driver", lambda: memory)
    monkeypatch.setattr(device_counters, "NUM_SLOTS", 256)
    monkeypatch.setitem(globals(), "NUM_SLOTS", 256)
    monkeypatch.setattr(counters, "MAX_TAKEN", 256)
    return memory


def test_imms_do_not_run_out_when_as_many_expectations_have_failed(memory: Memory) -> None:
    engine = Engine()
    engine.words.link_opened("peer")
    for _ in range(NUM_SLOTS):
        ticket = engine.expect()
        assert engine.has_word(ticket)
        ticket.cancel()
    late = engine.expect()
    assert not engine.has_word(late)  # the host counts it
    engine.table.arrived(late.imm or 0, 100, 1, "peer")
    assert late.wait(0) == 100


def test_words_that_somebody_waits_for_are_given_to_nobody_else(memory: Memory) -> None:
    engine = Engine()
    tickets = [engine.expect() for _ in range(NUM_SLOTS)]
    with pytest.raises(ImmInUse, match="256 imms are waited for"):
        engine.expect()
    tickets[7].cancel()
    assert (engine.expect().imm or 0) % NUM_SLOTS == (tickets[7].imm or 0) % NUM_SLOTS


def test_a_word_is_read_anew_when_the_links_of_its_time_have_quiesced(memory: Memory) -> None:
    engine = Engine()
    for link in ("first", "second"):
        engine.words.link_opened(link)
    failed = engine.expect()
    imm = failed.imm or 0
    failed.cancel()
    assert not engine.words.link_quiesced("first")
    engine.words.link_opened("later")
    memory.words[ADDRESS + slot_offset(imm)] = 777  # a late write
    engine.words.cleanse()
    assert engine.words.dirty(imm)  # the second link could add to it still
    assert engine.words.link_quiesced("second")
    engine.words.cleanse()
    assert not engine.words.dirty(imm)
    again = engine.expect(imm=imm + NUM_SLOTS)
    assert engine.words._owners[imm % NUM_SLOTS] == (again.imm, 777 + 100)


def test_a_dirty_word_is_kept_while_an_imm_without_a_word_is_added_to_it(memory: Memory) -> None:
    engine = Engine()
    engine.words.link_opened("first")
    failed = engine.expect()
    imm = failed.imm or 0
    failed.cancel()
    wordless = engine.expect(imm=imm + NUM_SLOTS)
    engine.words.link_opened("second")
    assert not engine.words.link_quiesced("first")
    wordless.cancel()  # its writer may be the second link
    engine.words.cleanse()
    assert engine.words.dirty(imm)
    assert engine.words.link_quiesced("second")
    engine.words.cleanse()
    assert not engine.words.dirty(imm)
