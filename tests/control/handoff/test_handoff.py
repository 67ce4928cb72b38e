"""Single steps of the handoff machines: what a side says, asks for and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.errors import (
    BlocksMismatch,
    HandoffCancelled,
    HandoffTimeout,
    LinkLost,
    PeerFailed,
    SendFailed,
    TransferFailed,
)
from kvferry.control.handoff.events import (
    CounterEnded,
    Expect,
    Fail,
    OperationEnded,
    Quarantine,
    ReleaseBlocks,
    RetireCounter,
    Send,
    SendRefused,
    SetTimer,
    SourceFinished,
    SourceOffered,
    SourceReady,
    StartRead,
    StartWrite,
    Succeed,
    TearDownLink,
    TimerFired,
    UserCancelled,
)
from kvferry.control.handoff.ledger import Ledger
from kvferry.control.handoff.messages import (
    Accepted,
    Cancel,
    Cancelled,
    Done,
    Failed,
    HandoffId,
    Ready,
    Request,
    Sent,
)
from kvferry.control.handoff.registry import DecodeHandoffs, PrefillHandoffs
from tests.control.examples import pack_block_ids

if TYPE_CHECKING:
    from kvferry.control.errors import ControlError
    from kvferry.control.handoff.registry import Steps

SESSION = 3
DST = (pack_block_ids([7, 8]),)
SRC = (pack_block_ids([1, 2]),)
FIRST = HandoffId("r", 1, 1)


def only(steps: Steps, kind: type) -> Any:
    """The one action of this kind."""
    (found,) = [action for _, action in steps if isinstance(action, kind)]
    return found


def sent(steps: Steps) -> list[object]:
    return [action.message for _, action in steps if isinstance(action, Send)]


def error_of(steps: Steps) -> ControlError:
    error: ControlError = only(steps, Fail).error
    return error


def kinds(steps: Steps) -> set[type]:
    return {type(action) for _, action in steps}


def decoding(mode: str, **options: Any) -> tuple[DecodeHandoffs, int, Steps]:
    registry = DecodeHandoffs()
    registry.open_session(SESSION, "prefill-0")
    fields: dict[str, Any] = {
        "attempt": 1,
        "mode": mode,
        "imm": 9,
        "num_blocks": 2,
        "nbytes": 64,
        "timeout_s": 30.0,
        "tables": DST,
    }
    return registry, *registry.begin(SESSION, "r", **(fields | options))


def request(mode: str = "push", serial: int = 1, **options: Any) -> Request:
    tables = DST if mode == "push" else ()
    fields: dict[str, Any] = {"num_blocks": 2, "nbytes": 64, "timeout_s": 30.0, "tables": tables}
    return Request(SESSION, HandoffId("r", 1, serial), mode, **(fields | options))  # type: ignore[arg-type]


def prefilling() -> PrefillHandoffs:
    registry = PrefillHandoffs()
    registry.open_session(SESSION, "decode-0")
    return registry


def test_decode_counts_before_it_asks() -> None:
    _, _, steps = decoding("push")
    actions = [type(action) for _, action in steps]
    assert actions.index(Expect) < actions.index(Send)
    assert sent(steps) == [request("push", imm=9)]


def test_push_ends_when_the_counter_does() -> None:
    registry, key, _ = decoding("push")
    registry.receive(Accepted(SESSION, FIRST))
    steps = registry.handle(key, CounterEnded(64))
    assert only(steps, Succeed).nbytes == 64
    kinds = [type(action) for _, action in steps]
    assert (kinds[0], kinds[-1]) == (ReleaseBlocks, Succeed)  # who waits finds its blocks free
    assert not registry.machines


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_a_final_answer_that_is_lost_is_asked_for_again(mode: str) -> None:
    decode, key, steps = decoding(mode)
    prefill = prefilling()
    prefill.offer("r", SourceOffered((pack_block_ids([1, 2, 3]),), 1, 30.0))
    (asked,) = sent(steps)
    accepted, lost = sent(prefill.receive(asked))  # type: ignore[arg-type]
    decode.receive(accepted)  # type: ignore[arg-type]
    steps = decode.handle(key, TimerFired("retry"))
    assert only(steps, SetTimer).seconds == decode.timing.retry_max_s
    assert sent(steps) == [asked]
    assert sent(prefill.receive(asked)) == [lost]  # type: ignore[arg-type]
    assert isinstance(error_of(decode.receive(lost)), BlocksMismatch)  # type: ignore[arg-type]


def test_sent_before_the_last_byte_is_counted_waits_a_little() -> None:
    registry, key, _ = decoding("push")
    assert not kinds(registry.receive(Sent(SESSION, FIRST, 64))) & {Fail, ReleaseBlocks}
    steps = registry.handle(key, TimerFired("settle"))
    assert isinstance(error_of(steps), HandoffTimeout)
    assert {RetireCounter, ReleaseBlocks} <= kinds(steps)  # prefill writes no more


def test_a_wrong_total_is_an_error() -> None:
    registry, _, _ = decoding("push")
    steps = registry.receive(Sent(SESSION, FIRST, 65))
    assert isinstance(error_of(steps), BlocksMismatch)
    assert "65 bytes, 64 were asked for" in str(error_of(steps))


def test_the_error_names_everything() -> None:
    registry, key, _ = decoding("push")
    error = error_of(registry.handle(key, UserCancelled("the client hung up")))
    assert isinstance(error, HandoffCancelled)
    assert (error.handoff, error.peer, error.operation) == ("r#1", "prefill-0", "receive")
    assert not error.retryable
    assert str(error) == "the client hung up [operation=receive, handoff=r#1, peer=prefill-0]"


def test_a_failed_push_keeps_the_blocks_until_the_peer_confirms() -> None:
    registry, key, _ = decoding("push")
    cause = OSError("boom")
    steps = registry.handle(key, CounterEnded(error=cause))
    error = error_of(steps)
    assert isinstance(error, TransferFailed)
    assert error.__cause__ is cause
    assert ReleaseBlocks not in kinds(steps)
    (cancel,) = sent(steps)
    assert isinstance(cancel, Cancel)
    steps = registry.receive(Cancelled(SESSION, FIRST, "prefill"))
    assert kinds(steps) >= {RetireCounter, ReleaseBlocks}
    assert Fail not in kinds(steps)


def test_silence_after_cancel_tears_the_link_down_then_quarantines() -> None:
    registry, key, _ = decoding("push")
    registry.handle(key, UserCancelled())
    assert only(registry.handle(key, TimerFired("recall")), TearDownLink).session == SESSION
    steps = registry.link_down(SESSION, "torn down", quiesced=False)
    assert kinds(steps) >= {Quarantine}
    assert ReleaseBlocks not in kinds(steps)
    assert sent(registry.handle(key, TimerFired("retry")))  # in case the peer wakes up
    assert ReleaseBlocks in kinds(registry.quiesced(SESSION))
    assert not registry.machines


def test_a_peer_that_wakes_up_can_still_confirm_out_of_quarantine() -> None:
    registry, _, _ = decoding("push")
    assert isinstance(error_of(registry.link_down(SESSION, "frozen", quiesced=False)), LinkLost)
    assert ReleaseBlocks in kinds(registry.receive(Cancelled(SESSION, FIRST, "prefill")))


def test_a_link_that_is_down_begins_nothing() -> None:
    registry, _, _ = decoding("push")
    registry.link_down(SESSION, "gone", quiesced=True)
    with pytest.raises(LinkLost, match="connect again"):
        registry.begin(
            SESSION, "r", attempt=2, mode="pull", imm=0, num_blocks=0, nbytes=0, timeout_s=1.0
        )
    other = prefilling()
    other.link_down(SESSION, "gone", quiesced=True)
    (answer,) = sent(other.receive(request()))
    assert isinstance(answer, Failed)
    assert answer.error == "LinkLost"


def test_a_full_queue_is_an_error() -> None:
    registry, key, _ = decoding("push")
    assert isinstance(error_of(registry.handle(key, SendRefused("full"))), SendFailed)


def test_prefill_writes_layers_as_they_come_and_then_says_so() -> None:
    registry = prefilling()
    registry.receive(request())
    key, steps = registry.offer("r", SourceOffered(SRC, 4, 30.0))
    assert StartWrite not in kinds(steps)
    first = only(registry.handle(key, SourceReady((0, 1))), StartWrite)
    assert (first.layers, first.tables, first.request) == ((0, 1), SRC, request())
    rest = only(registry.handle(key, SourceFinished()), StartWrite)
    assert rest.layers == (1, 4)
    assert ReleaseBlocks not in kinds(registry.handle(key, OperationEnded(rest.op, 48)))
    steps = registry.handle(key, OperationEnded(first.op, 16))
    assert sent(steps) == [Sent(SESSION, FIRST, 64)]
    assert {ReleaseBlocks, Succeed} <= kinds(steps)


def test_the_layers_of_an_early_source_wait_for_the_request_and_go_at_once() -> None:
    registry = prefilling()
    key, _ = registry.offer("r", SourceOffered(SRC, 2, 30.0))
    registry.handle(key, SourceReady((0, 1)))
    registry.handle(key, SourceFinished())
    writes = [a for _, a in registry.receive(request()) if isinstance(a, StartWrite)]
    assert [write.layers for write in writes] == [(0, 2)]


def test_skipped_blocks_are_not_written() -> None:
    registry = prefilling()
    key, _ = registry.offer("r", SourceOffered(SRC, 1, 30.0))
    registry.handle(key, SourceFinished())
    dst = (pack_block_ids([7]),)
    steps = registry.receive(request(num_blocks=1, skip_blocks=1, tables=dst))
    assert only(steps, StartWrite).tables == (pack_block_ids([2]),)


def test_different_numbers_of_blocks_are_refused_before_any_byte() -> None:
    registry = prefilling()
    registry.offer("r", SourceOffered((pack_block_ids([1, 2, 3]),), 1, 30.0))
    steps = registry.receive(request())
    assert "asks for 2, prefill has 3" in str(error_of(steps))
    answer = sent(steps)[-1]
    assert isinstance(answer, Failed)
    assert answer.error == "BlocksMismatch"
    assert StartWrite not in kinds(steps)


def test_a_repeated_request_moves_bytes_once() -> None:
    registry = prefilling()
    key, _ = registry.offer("r", SourceOffered(SRC, 1, 30.0))
    registry.handle(key, SourceFinished())
    write = only(registry.receive(request()), StartWrite)
    assert sent(registry.receive(request())) == [Accepted(SESSION, FIRST)]
    registry.handle(key, OperationEnded(write.op, 64))
    assert sent(registry.receive(request())) == [Sent(SESSION, FIRST, 64)]
    assert sent(registry.receive(Cancel(SESSION, FIRST, "decode"))) == [Sent(SESSION, FIRST, 64)]


def test_cancelled_is_said_after_the_last_write_ended() -> None:
    registry = prefilling()
    key, _ = registry.offer("r", SourceOffered(SRC, 1, 30.0))
    registry.handle(key, SourceFinished())
    write = only(registry.receive(request()), StartWrite)
    steps = registry.receive(Cancel(SESSION, FIRST, "decode", "timeout"))
    assert not sent(steps)
    assert not kinds(steps) & {ReleaseBlocks, Fail}
    steps = registry.handle(key, OperationEnded(write.op, error=OSError("cancelled")))
    assert sent(steps) == [Cancelled(SESSION, FIRST, "prefill")]
    assert "the peer cancelled: timeout" in str(error_of(steps))


def test_one_offer_serves_one_request_and_the_newest_first() -> None:
    registry = prefilling()
    registry.receive(request(serial=1))
    registry.receive(request(serial=2))
    key, _ = registry.offer("r", SourceOffered(SRC, 1, 30.0))
    assert only(registry.handle(key, SourceFinished()), StartWrite).request.handoff.serial == 2
    key, _ = registry.offer("r", SourceOffered(SRC, 1, 30.0))
    assert only(registry.handle(key, SourceFinished()), StartWrite).request.handoff.serial == 1


def test_an_offer_that_nobody_wants_comes_back() -> None:
    registry = prefilling()
    key, _ = registry.offer("r", SourceOffered(SRC, 1, 30.0))
    steps = registry.handle(key, TimerFired("source"))
    assert "nobody asked" in str(error_of(steps))
    assert ReleaseBlocks in kinds(steps)
    assert sent(registry.receive(request()))  # a request begins anew
    assert len(registry.machines) == 1


def test_pull_announces_reads_and_frees() -> None:
    prefill = prefilling()
    decode, decode_key, steps = decoding("pull")
    assert sent(steps) == [request("pull")]  # neither tables nor imm
    key, _ = prefill.offer("r", SourceOffered(SRC, 1, 30.0))
    assert sent(prefill.receive(request("pull"))) == [Accepted(SESSION, FIRST)]
    (ready,) = sent(prefill.handle(key, SourceFinished()))
    assert ready == Ready(SESSION, FIRST, 2, SRC)
    read = only(decode.receive(ready), StartRead)
    assert read.ready.tables == SRC
    assert not kinds(decode.receive(ready))  # announced twice, read once
    steps = decode.handle(decode_key, OperationEnded(read.op, 64))
    assert {ReleaseBlocks, Succeed} <= kinds(steps)
    (done,) = sent(steps)
    assert sent(decode.receive(ready)) == [done]  # `Done` was lost: it is said again
    assert isinstance(done, Done)
    assert {ReleaseBlocks, Succeed} <= kinds(prefill.receive(done))


def test_a_source_that_is_being_read_waits_for_the_reader() -> None:
    registry = prefilling()
    key, _ = registry.offer("r", SourceOffered(SRC, 1, 30.0))
    registry.handle(key, SourceFinished())
    registry.receive(request("pull"))
    steps = registry.handle(key, UserCancelled())
    assert ReleaseBlocks not in kinds(steps)
    assert sent(steps) == [Cancel(SESSION, FIRST, "prefill", "cancelled")]
    assert ReleaseBlocks in kinds(
        registry.receive(Failed(SESSION, FIRST, "decode", "x", "y", True))
    )


def test_the_peers_failure_is_told_with_its_reason() -> None:
    for mode in ("push", "pull"):
        registry, _, _ = decoding(mode)
        steps = registry.receive(Failed(SESSION, FIRST, "prefill", "OutOfMemory", "no room", True))
        error = error_of(steps)
        assert isinstance(error, PeerFailed)
        assert error.retryable
        assert "no room (OutOfMemory)" in str(error)
        assert ReleaseBlocks in kinds(steps)


@pytest.mark.parametrize(
    "kind", [BlocksMismatch, HandoffCancelled, HandoffTimeout, LinkLost], ids=lambda k: k.__name__
)
def test_a_failure_of_the_whole_has_one_name_on_both_sides(kind: type[ControlError]) -> None:
    registry, _, _ = decoding("push")
    told = Failed(SESSION, FIRST, "prefill", kind.__name__, "why", kind.retryable)
    assert type(error_of(registry.receive(told))) is kind


def test_sessions_that_are_down_are_forgotten_at_last() -> None:
    registry = prefilling()
    for session in range(10, 200):
        registry.open_session(session, "decode-0")
        registry.link_down(session, "gone", quiesced=True)
    assert not registry.knows(10)
    assert registry.knows(199)
    assert registry.knows(SESSION)


def test_the_ledger_forgets_in_order() -> None:
    ledger = Ledger("decode-0", remembered=2)
    for serial in (5, 3, 9):
        ledger.settle(serial, Cancelled(SESSION, HandoffId("r", 1, serial), "prefill"))
    assert ledger.answer(5) is None
    assert all(ledger.over(serial) for serial in (1, 3, 4, 5, 9))
    assert not ledger.over(6)
