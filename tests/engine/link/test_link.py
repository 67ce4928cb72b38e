"""One link of several in an engine: what goes wrong on it is its own affair, and is told where it belongs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvferry.engine.errors import LinkError
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.wire import messages as wire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvferry.engine.link.link import Link

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
