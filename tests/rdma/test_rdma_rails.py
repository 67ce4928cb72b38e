"""Rails: even shares, unequal numbers of devices, credits, and registration once."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import RailError
from kvferry.engine.transports.verbs import device as verbs_device
from kvferry.engine.transports.verbs import loop as verbs_loop
from kvferry.engine.transports.verbs import queue_pair as verbs_qp
from kvferry.engine.wire import tables

from .conftest import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20


@pytest.mark.parametrize("piece", [0, 65536, 4096])
@pytest.mark.parametrize(
    ("here", "there"), [(("rxe0", "rxe1"), ("rxe1", "rxe0")), (("rxe0",), ("rxe1", "rxe0"))]
)
def test_two_rails_share_the_bytes_evenly(
    make_pair: Callable[..., Any], here: tuple[str, ...], there: tuple[str, ...], piece: int
) -> None:
    """Also where one end has two devices and the other one."""
    pair = make_pair(here=here, there=there)
    memory = pair.memory(4 * MIB)
    memory.write(piece=piece).wait()
    memory.arrived()
    for sent, received in zip(pair.link.rails, pair.back.rails, strict=True):
        print(sent, received)
        assert sent.sent_nbytes == received.received_nbytes
        assert abs(sent.sent_nbytes - memory.nbytes / 2) < 0.05 * memory.nbytes / 2
    assert [rail.device for rail in pair.link.rails] == [*here, *here][:2]


def test_rails_go_over_ipv6_where_there_is_no_ipv4(
    wire: Any, make_pair: Callable[..., Any]
) -> None:
    wire.forget_ipv4()
    pair = make_pair()
    for link in (pair.link, pair.back):
        gids = [gid for rail in link._path.rails for gid in rail.card().gids]
        assert {gid.family for gid in gids} == {"link-local"}
    memory = pair.memory(MIB)
    for piece in (0, 4096):
        memory.write(piece=piece).wait()
        memory.arrived()
        memory.clear()


def test_a_link_with_nothing_to_do_sleeps(pair: Any) -> None:
    """Once what it did is over, it looks at its queues twice between sleeps, and nothing wakes it."""
    pair.memory(MIB).write().wait()
    loop = pair.link._path.loop
    looks, sleeps = [0], []
    asleep = threading.Event()
    epoll, poll_all = loop._epoll, loop._poll_all

    class Epoll:
        """Notes each sleep: how long it may take, what ended it, and the looks before it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(epoll, name)

        def poll(self, timeout_s: float) -> Any:
            events = epoll.poll(timeout_s)
            sleeps.append((timeout_s, events, looks[0]))
            looks[0] = 0
            if sleeps[-3:] == [(verbs_loop.LOOK_AROUND_S, [], 2)] * 3:
                asleep.set()
            return events

    def poll_all_noted() -> bool:
        looks[0] += 1
        return bool(poll_all())

    loop._epoll, loop._poll_all = Epoll(), poll_all_noted
    assert asleep.wait(PATIENCE_S), sleeps[-10:]


def test_the_queue_pairs_of_a_rail_share_its_bytes_evenly(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listening end, which was told nothing, has as many; so has the rail that is opened again."""
    posted: dict[int, int] = {}
    post = verbs_qp.post

    def noted(queue: Any, kind: str, rows: Any, imm: int | None, number: int) -> None:
        nbytes = sum(sum(row[3::3]) for row in rows)
        posted[queue.number] = posted.get(queue.number, 0) + nbytes
        post(queue, kind, rows, imm, number)

    monkeypatch.setattr(verbs_qp, "post", noted)
    pair = make_pair(queues=3)
    memory = pair.memory(3 * MIB)
    for life in range(2):
        for link in (pair.link, pair.back):
            assert [len(rail.direct) for rail in link._path.rails] == [3]
        posted.clear()
        memory.write(piece=65536).wait()
        memory.arrived()
        assert sum(posted.values()) == memory.nbytes
        assert sorted(posted) == sorted(q.number for q in pair.link._path.rails[0].direct)
        assert all(abs(n - MIB) < 0.05 * MIB for n in posted.values())
        memory.clear()
        if not life:
            path = pair.back._path
            epoch = path.rails[0].epoch
            why = RailError("the test takes it out", rail="0")
            path.loop.soon(functools.partial(path.take_out, path.rails[0], why))
            pair.reopened(epoch)


def test_a_fast_sender_never_meets_a_receiver_without_receives(pair: Any) -> None:
    """More writes with an imm than receives are ever posted; without credits the rail would break."""
    memory = pair.memory(MIB)
    count = 3 * verbs_qp.RECEIVE_DEPTH
    offsets = np.arange(count) * 2
    imm = pair.there.new_imm()
    ticket = pair.there.expect(imm, nbytes=count, writes=count, timeout_s=120.0)
    for offset in offsets.tolist():
        pair.link.write(
            memory.here, offset, memory.there.descriptor, offset, 1, imm=imm, timeout_s=120.0
        )
    assert ticket.wait() == count
    assert (memory.dst[offsets] == memory.src[offsets]).all()
    memory.dst[offsets] = 0xA5
    assert (memory.dst == 0xA5).all()
    assert all(rail.up for rail in pair.link.rails)


def test_a_region_is_registered_once_whatever_the_links(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = []
    pin = verbs_device.Device.pin

    def noted(device: Any, address: int, nbytes: int) -> Any:
        pinned.append((address, nbytes))
        return pin(device, address, nbytes)

    monkeypatch.setattr(verbs_device.Device, "pin", noted)
    memory = pair.memory(65536)
    second = pair.connect()
    for link in (pair.link, second, pair.link):
        memory.write(link).wait()
        memory.arrived()
        memory.clear()
    ours = (memory.here.address, memory.nbytes)
    theirs = (memory.there.address, memory.nbytes)
    assert (pinned.count(ours), pinned.count(theirs)) == (1, 1)
    memory.there.deregister()
    memory.here.deregister()
    second.close()


def test_a_read_of_small_and_of_large_pieces(pair: Any) -> None:
    for piece in (4096, 65536):
        memory = pair.memory(MIB)
        memory.dst[:] = memory.src
        memory.src[:] = 0
        order = np.random.default_rng(1).permutation(MIB // piece) * piece
        ticket = pair.link.read(memory.here, order, memory.there.descriptor, order, piece)
        assert ticket.wait() == MIB
        assert np.array_equal(memory.src, memory.dst)
        memory.unharmed()


def test_a_lying_frame_reaches_nothing(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver believes no table: a wrong key is refused, and the link serves on."""
    memory = pair.memory(MIB)
    memory.write(piece=4096).wait()
    memory.arrived()
    memory.clear()
    rows = tables.region_rows

    def forged(regions: Any) -> Any:
        table = rows(regions)
        table["key"] = 0
        return table

    with monkeypatch.context() as patch:
        patch.setattr(tables, "region_rows", forged)
        error = pair.failure(memory.write(piece=4096))
    assert "not registered here under that key" in str(error)
    assert (memory.whole == 0xA5).all()
    memory.write(piece=4096).wait()
    memory.arrived()
