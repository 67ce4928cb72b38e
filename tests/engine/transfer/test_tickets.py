"""Tickets end once, wake everybody, and survive what their callbacks do."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from kvferry.engine.errors import Cancelled, DeadlineExceeded, EngineError, PeerLost
from kvferry.engine.transfer.ticket import Ticket, all_of


def test_a_ticket_ends_once() -> None:
    ticket = Ticket("write", peer="p", imm=3)
    assert not ticket.done()
    assert ticket.exception() is None
    assert ticket.nbytes == 0
    assert "pending" in repr(ticket)
    assert ticket._finish(5)
    assert not ticket._finish(6)
    assert not ticket._fail(PeerLost("late"))
    assert not ticket.cancel()
    assert not ticket._expire()
    assert (ticket.done(), ticket.wait(), ticket.nbytes, ticket.exception()) == (True, 5, 5, None)
    assert "done" in repr(ticket)


def test_a_failed_ticket_raises_the_same_error_to_everybody() -> None:
    ticket = Ticket("read")
    error = PeerLost("gone", operation="read")
    ticket._fail(error)
    for _ in range(2):
        with pytest.raises(PeerLost) as caught:
            ticket.wait(0)
        assert caught.value is error
    assert ticket.nbytes == 0


def test_many_threads_wait_for_one_ticket() -> None:
    ticket = Ticket("write")
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(ticket.wait(15.0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    ticket._finish(9)
    for thread in threads:
        thread.join()
    assert results == [9] * 8


def test_a_wait_that_is_too_short_leaves_the_ticket_alone() -> None:
    ticket = Ticket("expect", peer="p", imm=4)
    with pytest.raises(DeadlineExceeded, match="still pending after waiting 0 s") as caught:
        ticket.wait(0)
    assert (caught.value.operation, caught.value.peer, caught.value.imm) == ("expect", "p", 4)
    assert not ticket.done()
    ticket._finish(1)
    assert ticket.wait(0) == 1


@pytest.mark.parametrize("ended", [True, False])
def test_coroutines_await_tickets(ended: bool) -> None:
    async def both() -> tuple[int, int]:
        good, bad = Ticket("write"), Ticket("write")
        if ended:
            good._finish(4)
            bad._fail(PeerLost("gone"))
        waiting = [asyncio.ensure_future(_await(ticket)) for ticket in (good, good, bad)]
        await asyncio.sleep(0)
        if not ended:
            threading.Thread(target=good._finish, args=(4,)).start()
            threading.Thread(target=bad._fail, args=(PeerLost("gone"),)).start()
        with pytest.raises(PeerLost):
            await waiting[2]
        return await waiting[0], await waiting[1]

    assert asyncio.run(both()) == (4, 4)


async def _await(ticket: Ticket) -> int:
    return await ticket


def test_a_coroutine_may_give_up_and_its_loop_may_close() -> None:
    ticket = Ticket("write")

    async def impatient() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_await(ticket), 0.01)

    asyncio.run(impatient())
    assert ticket._finish(1)  # nobody listens any more, and nothing breaks
    assert ticket.wait(0) == 1


def test_callbacks_run_once_in_order_and_at_once_when_it_is_over() -> None:
    ticket = Ticket("write")
    calls: list[int] = []
    ticket.add_done_callback(lambda _: calls.append(1))
    ticket.add_done_callback(lambda _: calls.append(2))
    ticket._finish(1)
    ticket.add_done_callback(lambda it: calls.append(3 if it is ticket else 0))
    assert calls == [1, 2, 3]


def test_a_callback_that_fails_is_reported_and_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ticket = Ticket("write")
    calls: list[Ticket] = []

    def fail(_: Ticket) -> None:
        raise RuntimeError("a bug in the caller's code")

    ticket.add_done_callback(fail)
    ticket.add_done_callback(calls.append)
    with caplog.at_level(logging.ERROR):
        assert ticket._finish(1)
        ticket.add_done_callback(fail)
    assert calls == [ticket]
    assert caplog.text.count("RuntimeError: a bug in the caller's code") == 2


def test_cancel_and_deadline_go_through_the_hook() -> None:
    """A transfer decides when its ticket may end: its memory may still be in use."""
    asked: list[EngineError] = []
    ticket = Ticket("write", stop_hook=asked.append)
    assert ticket.cancel()
    assert ticket._expire()
    assert [type(error) for error in asked] == [Cancelled, DeadlineExceeded]
    assert not ticket.done()
    ticket._fail(asked[0])
    assert not ticket.cancel()
    assert len(asked) == 2
    plain = Ticket("expect", imm=1)
    assert plain.cancel()
    with pytest.raises(Cancelled, match="cancelled by this side"):
        plain.wait()


def test_several_tickets_as_one() -> None:
    assert all_of([]).wait(0) == 0
    good = [Ticket("write") for _ in range(3)]
    whole = all_of(good)
    for ticket in good:
        assert not whole.done()
        ticket._finish(2)
    assert whole.wait(0) == 6
    mixed = [Ticket("write") for _ in range(3)]
    whole = all_of(mixed)
    mixed[2]._fail(PeerLost("third"))
    mixed[1]._fail(PeerLost("second"))
    assert not whole.done()  # memory of the first is still in use
    mixed[0]._finish(1)
    with pytest.raises(PeerLost, match="second"):  # the first in order, not in time
        whole.wait(0)
