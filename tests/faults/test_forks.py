"""A process forks: its child can do nothing with its engine, nothing to it, and hides nothing of it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.connect import handshake
from kvferry.engine.errors import ForkedProcess, PeerLost
from kvferry.engine.transfer_engine import TransferEngine
from tests.support.forks import PATIENCE_S, in_child, outcomes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.link.link import Link
    from tests.conftest import Peer

SENTINEL = 0xA5


@pytest.fixture
def own(transport: str) -> Iterator[TransferEngine]:
    """An engine of this test's."""
    with TransferEngine(name="own", transports=[transport]) as engine:
        yield engine


def test_what_a_child_has_inherited_refuses_by_name(
    own: TransferEngine, peer: Peer, transport: str
) -> None:
    link = own.connect(peer.address, transport=transport)
    mine, theirs = own.register(np.zeros(4096, np.uint8)), peer.call("pool", 4096, SENTINEL)
    pending = own.expect(own.new_imm(), nbytes=1, links=[link])
    calls: dict[str, Callable[[], Any]] = {
        "register": lambda: own.register(bytearray(10)),
        "expect": lambda: own.expect(1, nbytes=1),
        "new_imm": own.new_imm,
        "connect": lambda: own.connect(peer.address, transport=transport),
        "accept": lambda: own.accept_link(peer.engine_id),
        "links": lambda: own.links,
        "address": lambda: own.engine_id,
        "write": lambda: link.write(mine, 0, theirs, 0, 1),
        "read": lambda: link.read(mine, 0, theirs, 0, 1),
        "signal": lambda: link.signal(1),
        "abort": lambda: link.abort(1, "over"),
        "rails": lambda: link.rails,
        "wait": pending.wait,
        "wait a while": lambda: pending.wait(PATIENCE_S),
        "done": pending.done,
        "cancel": pending.cancel,
        "callback": lambda: pending.add_done_callback(print),
        "down": link.down.wait,
    }
    assert in_child(lambda: outcomes(calls)) == dict.fromkeys(calls, ForkedProcess.__name__)
    assert in_child(lambda: type(link.error)) is ForkedProcess
    assert pending.cancel()


def leave_the_block(engine: TransferEngine, link: Link) -> None:
    with engine:
        raise SystemExit(3)


def close_all(engine: TransferEngine, link: Link) -> int:
    link.close()
    engine.close()
    engine.close()
    return 3


def collect(engine: TransferEngine, link: Link) -> int:
    vars(link).clear()
    vars(engine).clear()
    gc.collect()
    return 3


@pytest.mark.parametrize("end", [leave_the_block, close_all, collect])
def test_a_childs_end_is_nothing_to_its_parent(
    own: TransferEngine,
    peer: Peer,
    transport: str,
    end: Callable[[TransferEngine, Link], int | None],
) -> None:
    link = own.connect(peer.address, transport=transport)
    peer.call("accept", own.engine_id)
    memory = np.arange(4096, dtype=np.uint8)
    mine, theirs = own.register(memory), peer.call("pool", 4096, SENTINEL)
    link.write(mine, 0, theirs, 0, 100).wait(PATIENCE_S)

    def last_words() -> int | None:
        mine.deregister()
        return end(own, link)

    assert in_child(last_words) == 3
    link.write(mine, 0, theirs, 0, 4096).wait(PATIENCE_S)
    assert np.array_equal(peer.contents(theirs), memory)
    imm = own.new_imm()
    arrived = own.expect(imm, writes=1)
    peer.call("wait", peer.call("signal", own.engine_id, imm))
    arrived.wait(PATIENCE_S)
    assert link.error is None
    mine.deregister()


def test_a_child_may_have_an_engine_of_its_own(
    own: TransferEngine, peer: Peer, transport: str
) -> None:
    own.connect(peer.address, transport=transport)
    theirs = peer.call("pool", 4096, SENTINEL)

    def moved() -> int:
        with TransferEngine(name="child", transports=[transport]) as engine:
            link = engine.connect(peer.address)
            return link.write(engine.register(bytearray(4096)), 0, theirs, 0, 4096).wait()

    assert in_child(moved) == 4096
    assert not peer.contents(theirs).any()


def test_a_killed_peer_is_not_kept_up_by_its_child(
    start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another host, where only the connection tells: the child had a copy of it."""
    monkeypatch.setattr(handshake, "host_id", lambda: "mars")
    victim = start_peer(name="victim")
    with TransferEngine(name="far", transports=["tcp"], peer_timeout_s=3600.0) as far:
        link = far.connect(victim.address)
        child = victim.call("fork")
        try:
            victim.kill()
            with pytest.raises(PeerLost, match="without a goodbye"):
                link.down.wait(PATIENCE_S)
            link.quiesced.wait(PATIENCE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_no_program_that_is_started_inherits_a_descriptor(peer: Peer, transport: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with TransferEngine(transports=[transport]) as engine:
        engine.connect(peer.address).signal(1).wait(PATIENCE_S)
        new = set(os.listdir("/proc/self/fd")) - before
        kept = []
        for fd in map(int, new):
            with contextlib.suppress(OSError):  # that of the listing
                kept += [os.readlink(f"/proc/self/fd/{fd}")] if os.get_inheritable(fd) else []
        assert not kept
