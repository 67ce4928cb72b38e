"""Counters: bytes in any order, before or after they are expected, and late ones that count for nothing."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kvferry.engine.errors import (
    Cancelled,
    EngineError,
    ImmInUse,
    OutOfRange,
    PeerAborted,
    PeerLost,
    UnknownImmOverflow,
)
from kvferry.engine.transfer.counters import CounterTable


def expect(table: CounterTable, imm: int, **options: Any) -> Any:
    defaults: dict[str, Any] = {"nbytes": None, "writes": None, "sources": (), "timeout_s": 60.0}
    return table.expect(imm, **(defaults | options))


@pytest.mark.parametrize("total", [-1, 1.5, [98304], "7", np.int64(-1)])
@pytest.mark.parametrize("name", ["nbytes", "writes"])
def test_what_is_no_total_is_refused(name: str, total: Any) -> None:
    table = CounterTable()
    with pytest.raises(OutOfRange, match=f"{name} must be an integer from 0, not"):
        expect(table, 7, **{name: total})
    assert table.pending == 0
    assert expect(table, 7, **{name: np.int64(0)}).wait(0) == 0


@pytest.mark.parametrize("early", range(4))
def test_it_does_not_matter_when_it_is_expected(early: int) -> None:
    table = CounterTable()
    arrivals = [(100, 0), (50, 0), (1, 1)]
    for nbytes, writes in arrivals[:early]:
        table.arrived(7, nbytes, writes, "link")
    ticket = expect(table, 7, nbytes=151, writes=1)
    for nbytes, writes in arrivals[early:]:
        assert not ticket.done()
        table.arrived(7, nbytes, writes, "link")
    assert ticket.wait(0) == 151
    assert table.pending == 0


def test_bytes_and_writes_must_both_be_reached() -> None:
    table = CounterTable()
    ticket = expect(table, 1, nbytes=10, writes=2)
    table.arrived(1, 10, 1, "link")
    assert not ticket.done()
    table.arrived(1, 0, 1, "link")
    assert ticket.done()


@pytest.mark.parametrize("early", range(4))
def test_a_write_counts_when_its_bytes_do(early: int) -> None:
    """On devices without order, word of a write may come before word of its bytes."""
    table = CounterTable()
    arrivals = [
        (0, 1, "rails", 300),
        (200, 0, "rails", 0),
        (100, 1, "another", 0),
        (100, 0, "rails", 0),
    ]
    for nbytes, writes, link, more in arrivals[:early]:
        table.arrived(7, nbytes, writes, link, write_nbytes=more)
    ticket = expect(table, 7, writes=2)
    for nbytes, writes, link, more in arrivals[early:]:
        assert not ticket.done()
        table.arrived(7, nbytes, writes, link, write_nbytes=more)
    assert ticket.wait(0) == 400
    assert table.late_writes == table.late_nbytes == 0


def test_an_imm_in_use_is_refused_and_free_afterwards() -> None:
    table = CounterTable()
    first = expect(table, 3, nbytes=1)
    with pytest.raises(ImmInUse):
        expect(table, 3, nbytes=1)
    first.cancel()
    assert isinstance(first.exception(), Cancelled)
    assert not expect(table, 3, nbytes=1).done()


def test_word_of_a_write_whose_bytes_were_in_time_is_not_late() -> None:
    table = CounterTable()
    ticket = expect(table, 7, nbytes=300)
    table.arrived(7, 300, 0, "link")
    assert ticket.wait(0) == 300
    table.arrived(7, 0, 1, "link", write_nbytes=300)
    assert table.late_writes == table.late_nbytes == 0
    table.arrived(7, 0, 1, "link", write_nbytes=300)  # one that nobody asked for
    assert table.late_writes == 1


def test_a_late_write_completes_nothing() -> None:
    table = CounterTable()
    expect(table, 3, nbytes=10).cancel()
    table.arrived(3, 10, 1, "link")
    assert (table.late_nbytes, table.late_writes) == (10, 1)
    assert not expect(table, 3, nbytes=10).done()


def test_news_of_bytes_that_were_seen_before_is_no_late_write() -> None:
    """A thread that looks at GPU memory ends the ticket before the peer's message comes."""
    table = CounterTable()
    ticket = expect(table, 7, nbytes=150)
    table.arrived(7, 50, 1, "link")
    ticket._finish(150)
    table.arrived(7, 100, 1, "link")
    assert table.late_writes == 0
    table.arrived(7, 1, 1, "link")  # more than was seen
    assert table.late_writes == 1


def test_new_imms_avoid_what_is_live_waiting_or_lately_retired() -> None:
    table = CounterTable()
    live = table.new_imm()
    expect(table, live, nbytes=1)
    expect(table, live + 2, nbytes=1).cancel()
    table.arrived(live + 1, 1, 0, "link")
    assert table.new_imm() == live + 3


def test_unexpected_imms_are_kept_up_to_a_bound_of_each_link() -> None:
    table = CounterTable(max_unknown=4)
    for imm in range(1, 5):
        table.arrived(imm, 1, 0, "bad")
    with pytest.raises(UnknownImmOverflow):
        table.arrived(5, 1, 0, "bad")
    table.arrived(4, 1, 0, "bad")  # one that is known already
    for imm in range(3, 7):
        table.arrived(imm, 1, 0, "good")  # has nothing to do with it
    assert expect(table, 4, nbytes=3).done()
    assert expect(table, 5, nbytes=1).done()
    table.arrived(7, 1, 0, "bad")  # there is room again
    with pytest.raises(UnknownImmOverflow):
        table.arrived(8, 1, 0, "bad")


def test_a_link_that_gives_up_much_makes_others_forget_nothing() -> None:
    table = CounterTable(max_unknown=4)
    table.fail(1, PeerAborted("good"), source="good")
    for imm in range(10, 20):
        table.fail(imm, PeerAborted("bad"), source="bad")
    with pytest.raises(PeerAborted, match="good"):
        expect(table, 1, nbytes=1).wait(0)
    assert not expect(table, 15, nbytes=1).done()
    with pytest.raises(PeerAborted, match="bad"):
        expect(table, 16, nbytes=1).wait(0)


def test_links_that_come_and_go_leave_no_more_than_a_bound() -> None:
    table = CounterTable(max_unknown=4)
    table.arrived(1, 1, 0, "good")
    for link in range(5):
        for imm in range(10 * link + 10, 10 * link + 13):
            table.arrived(imm, 1, 0, link)
            table.fail(imm + 5, PeerAborted("no"), source=link)
        table.source_lost(link, lambda imm: PeerLost("gone", imm=imm))
    assert len(table._unknown) + len(table._aborted) == 5
    assert not any((table._kept.keys() | table._given_up.keys()) - {("good", "")})
    for imm in list(table._unknown) + list(table._aborted):
        expect(table, imm, nbytes=1)
    assert not table._orphans
    assert expect(table, 1, nbytes=2).exception() is None


def test_what_a_lost_source_left_behind_makes_room_first() -> None:
    table = CounterTable(max_unknown=2)
    table.arrived(1, 1, 0, "dead")
    table.arrived(2, 1, 0, "alive")
    table.source_lost("dead", lambda imm: PeerLost("gone", imm=imm))
    table.arrived(3, 1, 0, "alive")
    assert expect(table, 2, nbytes=1).done()


def test_losing_a_source_fails_what_it_writes_to_and_nothing_else() -> None:
    table = CounterTable()
    named = expect(table, 1, nbytes=10, sources=("a", "b"))
    written = expect(table, 2, nbytes=10)
    other = expect(table, 3, nbytes=10, sources=("b",))
    table.arrived(2, 5, 0, "a")
    table.source_lost("a", lambda imm: PeerLost("gone", imm=imm))
    for ticket, imm in ((named, 1), (written, 2)):
        with pytest.raises(PeerLost) as lost:
            ticket.wait(0)
        assert lost.value.imm == imm
    assert not other.done()


def test_a_peer_may_write_everything_and_go_before_it_is_expected() -> None:
    table = CounterTable()
    table.arrived(1, 10, 1, "a")
    table.arrived(2, 5, 0, "a")
    table.source_lost("a", lambda imm: PeerLost("gone", imm=imm))
    assert expect(table, 1, nbytes=10).wait(0) == 10
    with pytest.raises(PeerLost):
        expect(table, 2, nbytes=10).wait(0)


def test_an_abort_may_come_before_the_expect() -> None:
    table = CounterTable()
    table.arrived(1, 10, 0, "a")
    table.fail(1, PeerAborted("gave up", imm=1))
    with pytest.raises(PeerAborted):
        expect(table, 1, nbytes=10).wait(0)
    assert not expect(table, 1, nbytes=10).done()  # the next one is not concerned


def test_many_threads_count_right() -> None:
    table = CounterTable()
    ticket = expect(table, 9, nbytes=8 * 2_000 * 3, writes=8 * 2_000)
    failures: list[EngineError] = []

    def count() -> None:
        for _ in range(2_000):
            table.arrived(9, 3, 1, "link")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert ticket.wait(0) == 48_000
    assert table.late_writes == 0


class TestLinksThatCount:
    """An imm that certain links are expected to write: no other peer completes, or ends, it."""

    def test_only_they_count(self) -> None:
        table = CounterTable()
        ticket = expect(table, 5, nbytes=10, writes=1, sources=("a", "b"))
        table.arrived(5, 10, 1, "c")
        table.fail(5, PeerAborted("no"), source="c")
        table.source_lost("c", lambda imm: PeerLost("gone", imm=imm))
        assert not ticket.done()
        assert table.foreign_writes == 2
        table.arrived(5, 4, 0, "a")
        table.arrived(5, 6, 1, "b")
        assert ticket.wait(0) == 10

    def test_of_what_came_before_only_theirs_counts(self) -> None:
        table = CounterTable()
        table.fail(6, PeerAborted("no"), source="c")
        table.arrived(6, 100, 1, "c")
        table.arrived(6, 4, 1, "a")
        table.source_lost("c", lambda imm: PeerLost("gone", imm=imm))
        ticket = expect(table, 6, nbytes=10, sources=("a",))
        assert not ticket.done()
        table.arrived(6, 6, 1, "a")
        assert ticket.wait(0) == 10

    def test_their_own_aborts_and_ends_are_remembered(self) -> None:
        table = CounterTable()
        table.fail(1, PeerAborted("no"), source="a")
        table.arrived(2, 4, 1, "a")
        table.source_lost("a", lambda imm: PeerLost("gone", imm=imm))
        with pytest.raises(PeerAborted):
            expect(table, 1, nbytes=10, sources=("a",)).wait(0)
        with pytest.raises(PeerLost):
            expect(table, 2, nbytes=10, sources=("a",)).wait(0)


class TestABoundImm:
    """An imm that one engine is expected to write cannot be counted or aborted by another."""

    def test_only_its_writer_counts(self) -> None:
        table = CounterTable()
        ticket = expect(table, 5, nbytes=10, engine_id="writer")
        table.arrived(5, 10, 1, "link", "stranger")
        assert not ticket.done()
        assert table.foreign_writes == 1
        table.arrived(5, 10, 1, "link", "writer")
        assert ticket.wait(0) == 10

    def test_only_its_writer_aborts(self) -> None:
        table = CounterTable()
        ticket = expect(table, 5, nbytes=10, engine_id="writer")
        table.fail(5, PeerAborted("no"), origin="stranger")
        assert not ticket.done()
        table.fail(5, PeerAborted("no"), origin="writer")
        with pytest.raises(PeerAborted):
            ticket.wait(0)

    def test_what_strangers_did_before_does_not_matter(self) -> None:
        table = CounterTable()
        table.fail(6, PeerAborted("no"), origin="stranger")
        table.arrived(6, 100, 1, "link", "stranger")
        table.arrived(6, 4, 1, "link", "writer")
        table.fail(6, PeerAborted("no"), origin="stranger")
        ticket = expect(table, 6, nbytes=10, engine_id="writer")
        assert not ticket.done()
        table.arrived(6, 6, 1, "link", "writer")
        assert ticket.wait(0) == 10

    def test_what_its_writer_aborted_before_fails_it(self) -> None:
        table = CounterTable()
        table.fail(6, PeerAborted("stranger"), origin="stranger")
        table.fail(6, PeerAborted("writer"), origin="writer")
        with pytest.raises(PeerAborted, match="writer"):
            expect(table, 6, nbytes=10, engine_id="writer").wait(0)
