"""One link of several in an engine: what goes wrong on it is its own affair, and is told where it belongs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry import KVLayout
from kvferry.engine.convert import conversion
from kvferry.engine.errors import Cancelled, LinkError, PeerAborted
from kvferry.engine.memory import iovec
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.wire import messages as wire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer.plan import TransferPlan

PATIENCE_S = 15.0


class Ends:
    """Two engines, and a third one, each with a link to the second."""

    def __init__(self, engines: list[TransferEngine]) -> None:
        self.first, self.hub, self.other = engines
        self.link, self.back = self._connect(self.first)
        self.other_link, self.other_back = self._connect(self.other)

    def _connect(self, engine: TransferEngine) -> tuple[Link, Link]:
        link = engine.connect(self.hub.address)
        return link, self.hub.accept_link(engine.engine_id, PATIENCE_S)


@pytest.fixture
def ends() -> Iterator[Ends]:
    engines = [TransferEngine(transports=["cma"], name=name) for name in ("first", "hub", "other")]
    yield Ends(engines)
    for engine in engines:
        engine.close()


def breaks(*_: Any) -> None:
    raise MemoryError("no memory for this")


def test_a_handler_that_fails_takes_its_link_down_and_loses_no_other_message(ends: Ends) -> None:
    ends.back._handlers[wire.Abort] = breaks
    counted = ends.hub.expect(5, writes=1)
    waiting = ends.hub.expect(6, writes=1, links=[ends.back])
    elsewhere = ends.hub.expect(7, writes=1, links=[ends.other_back])
    said = (wire.Abort(99, "x"), wire.Arrived(5, 0, 1))
    ends.link._channel._sock.send(b"".join(wire.encode(message) for message in said))
    counted.wait(PATIENCE_S)
    with pytest.raises(LinkError, match=r"handling Abort failed: MemoryError"):
        waiting.wait(PATIENCE_S)
    with pytest.raises(LinkError, match="handling Abort failed"):
        ends.link.down.wait(PATIENCE_S)  # the peer is told why
    ends.other_link.signal(7)
    elsewhere.wait(PATIENCE_S)


def test_a_link_whose_tick_fails_leaves_others_their_deadlines(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends.back._submitter, "expire", breaks)
    with pytest.raises(LinkError, match="a link's tick failed"):
        ends.back.down.wait(PATIENCE_S)
    assert ends.other_back.error is None
    ends.other_link.signal(7)
    ends.hub.expect(7, writes=1).wait(PATIENCE_S)


def test_a_reason_that_is_no_text_is_refused_where_it_is_given(ends: Ends) -> None:
    reason: Any = b"bytes"
    with pytest.raises(TypeError, match="reason as text, not as bytes"):
        ends.link.abort(3, reason)
    waiting = ends.hub.expect(3, writes=1)
    ends.link.abort(3, "given up")
    with pytest.raises(PeerAborted, match="given up"):
        waiting.wait(PATIENCE_S)
    assert ends.link.error is None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wait_that_a_signal_interrupts_ends_its_transfer_and_not_the_link(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], when: str
) -> None:
    mine = ends.first.register(np.ones(4096, np.uint8))
    theirs = ends.hub.register(np.zeros(4096, np.uint8))
    ends.link.write(mine, 0, theirs.descriptor, 0, 1).wait(PATIENCE_S)
    copy, here = iovec.process_vm, threading.get_ident()

    def interrupted(*arguments: Any, **options: Any) -> None:
        if threading.get_ident() != here:
            copy(*arguments, **options)
            return
        if when == "after":
            copy(*arguments, **options)
        raise kind("of a signal's handler")

    monkeypatch.setattr(iovec, "process_vm", interrupted)
    # Copiers leave it to the thread that waits.
    monkeypatch.setattr(ends.first._core.copiers, "run", lambda task: None)
    expected = ends.hub.expect(5, nbytes=4096)
    ticket = ends.link.write(mine, 0, theirs.descriptor, 0, 4096, imm=5)
    with pytest.raises(kind, match="of a signal"):
        ticket.wait()
    monkeypatch.undo()
    assert isinstance(ticket.exception(), Cancelled)
    with pytest.raises(PeerAborted, match="interrupted by a"):
        expected.wait(PATIENCE_S)
    assert ends.link.error is None
    assert ends.link.write(mine, 0, theirs.descriptor, 0, 4096).wait() == 4096
    mine.deregister()
    ends.link.close()
    ends.link.quiesced.wait(PATIENCE_S)


def converting_plan(ends: Ends) -> TransferPlan:
    """Between a cache of float32 at the first engine and one of float16 at the hub."""
    caches = [np.zeros((2, 4, 8, 1, 8), kind) for kind in (np.float32, np.float16)]
    mine, theirs = (
        engine.register_cache(KVLayout.from_tensors([cache], "plane block token head dim"), [cache])
        for engine, cache in zip((ends.first, ends.hub), caches, strict=True)
    )
    return ends.first.plan(mine, theirs.descriptor)


def test_a_conversion_is_stopped_while_a_chunk_of_it_is_made(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, go_on, stopped = (threading.Event() for _ in range(3))
    cut = conversion.chunks_of

    def slowly(*arguments: Any) -> Any:
        making.set()
        assert go_on.wait(PATIENCE_S)
        yield from cut(*arguments)

    monkeypatch.setattr(conversion, "chunks_of", slowly)
    plan = converting_plan(ends)
    ticket = ends.link.write_tokens(plan, [0], [1], stop=8, imm=5)
    assert making.wait(PATIENCE_S)

    def stop() -> None:
        ticket.cancel()
        stopped.set()

    ends.first._core.progress.call_soon(stop)
    assert stopped.wait(PATIENCE_S / 3)
    go_on.set()
    with pytest.raises(Cancelled):
        ticket.wait(PATIENCE_S)


def test_a_conversion_that_ends_before_its_first_chunk_is_told_of(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends.first._core.copiers, "run", lambda task: None)
    expected = ends.hub.expect(5, nbytes=1 << 20)
    plan = converting_plan(ends)
    ticket = ends.link.write_tokens(plan, [0], [1], stop=8, imm=5)
    ticket.cancel()
    with pytest.raises(PeerAborted, match="cancelled"):
        expected.wait(PATIENCE_S)
