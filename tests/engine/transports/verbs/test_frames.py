"""Frames from slot to slot, with a GPU at either end: a copy stands where an RDMA device would write.

`test_gpu_over_hosts.py` has the same over devices, in the machine of `kvferry rdma-vm`.
"""

from __future__ import annotations

import ctypes
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import EngineError
from kvferry.engine.memory.regions import RegionTable
from kvferry.engine.transfer.moves import PieceMove
from kvferry.engine.transfer.pieces import bind
from kvferry.engine.transfer.ticket import Ticket
from kvferry.engine.transfer.transfer import Transfer
from kvferry.engine.transports.verbs.frames import Frames
from kvferry.engine.transports.verbs.slots import BYTES_ALIGN_NBYTES, Slots
from kvferry.engine.wire import messages as wire
from tests.support.interpreted_gpu import StandIn

if TYPE_CHECKING:
    from collections.abc import Callable

SENTINEL = 0xA5
SIZES = np.array([1, 63, 4097, 16, 0, 30_000])


class Device:
    def pin(self, address: int, nbytes: int) -> Any:
        return SimpleNamespace(lkey=1, rkey=2)


class End:
    """One end of a link, all of whose work waits in `tasks` for whoever runs them."""

    def __init__(self, name: str, tasks: deque[Callable[[], None]], *, verify: bool) -> None:
        self.peer: End
        self.tasks = tasks
        self.counted = 0
        self.regions = RegionTable(name)
        self.slots = Slots()
        queues = SimpleNamespace(room=1, credits=1)
        self.rail: Any = SimpleNamespace(
            number=0, up=True, peer_slots=(0, 0), device=Device(), staged=queues
        )
        self.transfers: dict[int, Transfer] = {}
        self.core = SimpleNamespace(regions=self.regions, verify=verify, max_programs=None)
        self.link: Any = SimpleNamespace(
            core=self.core,
            peer=SimpleNamespace(name="peer"),
            send=lambda message: tasks.append(lambda: self.peer.take(message)),
            reject=self.reject,
            count=self.count,
        )
        loop: Any = SimpleNamespace(rails=[self.rail], soon=tasks.append, post=self.post)
        self.frames = Frames(
            self.link, loop, self.slots, copy=tasks.append, taken_apart=lambda rail: None
        )

    def count(self, imm: int, nbytes: int, writes: int, *, staged: bool) -> None:
        self.counted += nbytes

    def reject(self, number: int, imm: int | None, error: EngineError, *, first: int) -> None:
        self.link.send(wire.Refuse(number, type(error).__name__, error.message))

    def post(
        self, rail: Any, pair: Any, kind: str, rows: Any, imm: int, batch: tuple[Any, ...]
    ) -> None:
        _, nbytes, _, slot = batch
        assert (pair, kind, imm, len(rows)) == (rail.staged, "write", slot, 1)
        there = self.peer.slots.incoming(slot)
        ctypes.memmove(there.ctypes.data, self.slots.outgoing(slot).ctypes.data, nbytes)
        self.tasks.append(lambda: self.frames.left(slot))
        self.tasks.append(lambda: self.peer.frames.arrived(self.peer.rail, slot, nbytes))

    def take(self, message: wire.LinkMessage) -> None:
        if isinstance(message, wire.Acknowledge):
            self.frames.acknowledged(message)
        elif isinstance(message, wire.SlotFree):
            self.frames.freed(message)
        elif isinstance(message, wire.ReadRequest):
            self.frames.serve(message)
        else:
            assert isinstance(message, wire.Refuse)
            assert self.frames.expects_refusal(message)
            error = EngineError(message.reason, operation="move")
            self.transfers[message.transfer].stop(error)
            self.transfers[message.transfer].end(0)


class Case:
    """Two ends, a transfer between them, and what lies where afterwards."""

    def __init__(self, gpu: StandIn, ends: str, *, write: bool, verify: bool = False) -> None:
        self.tasks: deque[Callable[[], None]] = deque()
        self.here, self.there = (End(n, self.tasks, verify=verify) for n in ("here", "there"))
        self.here.peer, self.there.peer = self.there, self.here
        self.write = write
        random = np.random.default_rng(4)
        self.src_at, self.dst_at = (
            np.cumsum(SIZES + gap) - SIZES for gap in random.integers(1, 70, (2, len(SIZES)))
        )
        span = int((SIZES + 70).sum())
        self.src = random.integers(0, 256, span, np.uint8)
        self.dst = np.full(span, SENTINEL, np.uint8)
        mine, theirs = (self.src, self.dst) if write else (self.dst, self.src)
        first, last = ends.split(" to ")
        gpu.registers = (first if write else last) == "gpu"
        self.mine = self.here.regions.register(mine)
        gpu.registers = (last if write else first) == "gpu"
        self.theirs = self.there.regions.register(theirs)

    def run(self) -> int:
        local, remote = (self.src_at, self.dst_at) if self.write else (self.dst_at, self.src_at)
        imm = 7 if self.write else None
        kind = "write" if self.write else "read"
        ticket = Ticket(kind, peer="there", imm=imm, timeout_s=60.0)
        zero = np.zeros(len(SIZES), np.int64)
        theirs = (self.theirs.descriptor,)
        pieces = bind(self.mine.address + local, SIZES, zero, remote, theirs)
        transfer = Transfer(
            len(self.here.transfers) + 1,
            PieceMove((self.mine,), theirs, pieces),
            write=self.write,
            ticket=ticket,
            on_end=lambda _: None,
        )
        self.here.transfers[transfer.id] = transfer
        self.here.frames.submit(transfer)
        while self.tasks:
            self.tasks.popleft()()
        assert not self.here.frames.busy
        assert not self.there.frames.busy
        return ticket.wait(0.0)

    def arrived(self) -> None:
        expected = np.full_like(self.dst, SENTINEL)
        for a, b, n in zip(self.src_at, self.dst_at, SIZES, strict=True):
            expected[b : b + n] = self.src[a : a + n]
        assert np.array_equal(self.dst, expected)

    def close(self) -> None:
        self.mine.deregister(0.0)  # nobody uses it any more
        self.theirs.deregister(0.0)
        self.here.frames.close()
        self.there.frames.close()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    pytest.importorskip("triton", reason="Triton exists for Linux alone")
    return StandIn(monkeypatch)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("ends", ["gpu to gpu", "gpu to host", "host to gpu", "host to host"])
def test_a_frame_goes_between_hosts_and_gpus(
    gpu: StandIn, ends: str, write: bool, verify: bool
) -> None:
    case = Case(gpu, ends, write=write, verify=verify)
    assert case.run() == SIZES.sum()
    case.arrived()
    assert case.there.counted == (SIZES.sum() if write else 0)
    assert gpu.moved == np.count_nonzero(SIZES) * ends.count("gpu")
    case.close()
    assert (gpu.movers, gpu.pinned) == (0, {})


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("ends", ["gpu to host", "host to gpu"])
def test_a_gpu_that_fails_ends_the_transfer_and_frees_the_slot(
    gpu: StandIn, ends: str, write: bool
) -> None:
    case = Case(gpu, ends, write=write)
    gpu.broken = True
    with pytest.raises(EngineError, match="it is broken"):
        case.run()
    assert (case.dst == SENTINEL).all()
    gpu.broken = False
    assert case.run() == SIZES.sum()
    case.arrived()
    case.close()
    assert (gpu.movers, gpu.pinned) == (0, {})


def test_bytes_begin_where_a_kernel_likes_it() -> None:
    slots = Slots()
    assert slots.outgoing(3).ctypes.data % BYTES_ALIGN_NBYTES == 0
    assert slots.incoming(3).ctypes.data % BYTES_ALIGN_NBYTES == 0
