"""CUDA graphs that one thread captures, in torch's mode, while others of its process move memory."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.engine.errors import DeadlineExceeded, DeviceError, PlanError, RegionGone
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory.cuda_driver import Driver, driver
from kvferry.engine.transfer_engine import TransferEngine
from tests.gpu.cuda_ipc.test_ipc import (
    HND,
    NHD,
    canonical,
    moved,
    new_tensors,
    register,
    some_ids,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

NBYTES = 1 << 20
PATIENCE_S = 120.0


class Calls:
    """What threads of an engine ask of the driver, one a method; each may raise DeviceError."""

    def __init__(self, cuda: Driver) -> None:
        self.cuda = cuda
        self.stream = cuda.new_stream(0)
        self.events = [cuda.new_event(0) for _ in range(2)]
        with cuda.current(0):
            for event in self.events:
                cuda.record(event, self.stream)
            cuda.synchronize_event(self.events[0])

    def query(self) -> None:
        """Of an event that has come."""
        self.cuda.call("cuEventQuery", self.events[0])

    def synchronize(self) -> None:
        """With an event that is recorded now."""
        self.cuda.record(self.events[1], self.stream)
        self.cuda.call("cuEventSynchronize", self.events[1])

    def synchronize_stream(self) -> None:
        self.cuda.call("cuStreamSynchronize", self.stream)

    def allocate(self) -> None:
        self.cuda.call("cuMemFree", self.cuda.call("cuMemAlloc", 1 << 21))

    def allocate_pinned(self) -> None:
        self.cuda.call("cuMemFreeHost", self.cuda.call("cuMemHostAlloc", 1 << 21, 0))

    def make_stream(self) -> None:
        self.cuda.call("cuStreamDestroy", self.cuda.call("cuStreamCreate", 1))

    def make_event(self) -> None:
        self.cuda.call("cuEventDestroy", self.cuda.call("cuEventCreate", 2))

    def record(self) -> None:
        self.cuda.record(self.events[1], self.stream)


CALLS = [name for name in vars(Calls) if not name.startswith("_")]


def captured_beside(call: Callable[[], None], mode: str) -> tuple[int, int]:
    """Captures on a stream while another thread makes a call: the code of either, 0 if it went well."""
    cuda = driver()
    codes = [-1]

    def other() -> None:
        with cuda.current(0):
            relaxed = cuda.beside_captures() if mode == "relaxed" else contextlib.nullcontext()
            try:
                with relaxed:
                    call()
                codes[0] = 0
            except DeviceError as error:
                codes[0] = error.code

    stream = cuda.new_stream(0)
    modes = cuda._cuda.CUstreamCaptureMode
    broken = 0
    with cuda.current(0):
        cuda.call("cuStreamBeginCapture", stream, modes.CU_STREAM_CAPTURE_MODE_GLOBAL)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(PATIENCE_S)
        try:
            graph = cuda.call("cuStreamEndCapture", stream)
        except DeviceError as error:
            broken = error.code
        else:
            cuda.call("cuGraphDestroy", graph)
    cuda.destroy_stream(0, stream)
    assert not thread.is_alive()
    return codes[0], broken


@pytest.mark.parametrize("name", CALLS)
def test_what_a_capture_forbids_others_is_allowed_in_the_relaxed_mode(name: str) -> None:
    """What it forbids depends on the driver, and is only told."""
    call = getattr(Calls(driver()), name)
    plain = captured_beside(call, "global")
    says = "is forbidden" if plain != (0, 0) else "is allowed"
    print(f"{name} beside a capture {says}: the call gives {plain[0]}, the capture {plain[1]}")
    assert captured_beside(call, "relaxed") == (0, 0)


def test_an_event_is_asked_for_and_waited_for_beside_a_capture() -> None:
    """As lanes, gates, senders and tickets do it."""
    cuda = driver()
    event = Calls(cuda).events[0]
    seen: list[bool] = []
    assert captured_beside(lambda: seen.append(cuda.query_event(event)), "global") == (0, 0)
    assert seen == [True]
    assert captured_beside(lambda: cuda.synchronize_event(event), "global") == (0, 0)


@pytest.fixture(params=["cuda_ipc", "cma", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def capture_beside(work: Callable[[], None]) -> None:
    """Captures a graph, as torch does it, while another thread does some work; both must end well."""
    number = torch.zeros(1, device="cuda")
    number += 1  # its kernel is loaded
    torch.cuda.synchronize()
    failed: list[BaseException] = []

    def other() -> None:
        try:
            work()
        except BaseException as error:  # raised below
            failed.append(error)

    graph = torch.cuda.CUDAGraph()
    thread = threading.Thread(target=other)
    with torch.cuda.graph(graph):
        number += 1
        thread.start()
        thread.join(PATIENCE_S)
        number += 1
    assert not thread.is_alive()
    for error in failed:
        raise error
    graph.replay()
    torch.cuda.synchronize()
    assert number.item() == 3


def test_memory_is_registered_linked_and_moved_beside_a_capture(
    peer: GpuPeer, transport: str
) -> None:
    """All of it for the first time: what takes memory, loads kernels and makes streams as well."""
    with TransferEngine(name="captured") as engine:
        tensors = [tensor.cuda() for tensor in new_tensors(NHD, seed=1)]
        remote = peer.call("cache", [each.numpy() for each in new_tensors(HND, seed=None)], HND)
        mine = torch.full((NBYTES,), 5, dtype=torch.uint8, device="cuda")
        theirs = peer.call("pool", bytes(NBYTES))
        src_ids, dst_ids = some_ids(11)
        imm = peer.call("new_imm")
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

        def work() -> None:
            region, local = engine.register(mine), register(engine, tensors, NHD)
            plan = engine.plan(local, remote)
            link = engine.connect(peer.address, transport=transport)
            peer.call("accept", engine.engine_id)
            ticket = peer.call("expect", imm, nbytes=plan.nbytes(11) + NBYTES)
            with torch.cuda.stream(stream):
                link.prepare(plan)
                written = link.write_blocks(plan, src_ids, dst_ids, imm=imm)
                pieces = link.write(region, 0, theirs, 0, NBYTES, imm=imm)
                assert (written.wait(60), pieces.wait(60)) == (plan.nbytes(11), NBYTES)
                assert peer.call("wait", ticket) == plan.nbytes(11) + NBYTES
                never = engine.expect(engine.new_imm(), nbytes=1, timeout_s=0.2)
                never.wait_on(stream)  # and is released by a thread of the engine
                with pytest.raises(DeadlineExceeded):
                    never.wait()
                if transport == "cuda_ipc":
                    ids = link.upload_ids(plan, src_ids, dst_ids)
                    assert link.write_blocks(plan, ids).wait(60) == plan.nbytes(11)
                tokens = link.write_tokens(plan, src_ids[:1], dst_ids[:1], stop=16)
                assert tokens.wait(60) == plan.tokens.nbytes(0, 16)
            region.deregister()

        capture_beside(work)
        src = canonical([tensor.cpu() for tensor in tensors], NHD)
        got = canonical(peer.call("peek_cache"), HND)
        assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))
        assert peer.call("peek", theirs.region_id) == bytes([5]) * NBYTES


def test_a_stream_that_a_graph_is_captured_from_is_refused(peer: GpuPeer, transport: str) -> None:
    """By every transport: what it would wait for never comes."""
    with TransferEngine(name="captured") as engine:
        mine = torch.full((NBYTES,), 5, dtype=torch.uint8, device="cuda")
        mine += 0  # its kernel is loaded
        region = engine.register(mine)
        theirs = peer.call("pool", bytes(NBYTES))
        link = engine.connect(peer.address, transport=transport)
        peer.call("accept", engine.engine_id)
        link.write(region, 0, theirs, 0, 1).wait(60)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mine += 1
            tickets = [
                link.write(region, 0, theirs, 0, NBYTES),
                link.read(region, 0, theirs, 0, NBYTES),
            ]
        for ticket in tickets:
            with pytest.raises(PlanError, match="a CUDA graph is being captured"):
                ticket.wait(20)
        graph.replay()
        torch.cuda.synchronize()
        assert int((mine == 6).sum()) == NBYTES
        link.write(region, 0, theirs, 0, NBYTES).wait(60)
        assert peer.call("peek", theirs.region_id) == bytes([6]) * NBYTES


def test_a_gpu_cache_that_was_freed_is_noticed_before_any_byte_moves(
    peer: GpuPeer, transport: str
) -> None:
    """A kernel that touched it would take the whole context with it."""
    with TransferEngine(name="freed") as engine:
        tensors = [torch.ones((2, 5, 4, 2, 64), dtype=torch.int16, device="cuda") for _ in range(2)]
        blank = [torch.zeros_like(tensor).cpu().numpy() for tensor in tensors]
        local = engine.register_cache(KVLayout.from_tensors(tensors, NHD), tensors)
        remote = peer.call("cache", blank, NHD)
        link = engine.connect(peer.address, transport=transport)
        peer.call("accept", engine.engine_id)
        plan = engine.plan(local, remote)
        back = engine.plan(remote, local)
        for _ in range(2):  # compiled with the first
            link.write_blocks(plan, [1], [2]).wait(60)
            link.read_blocks(back, [1], [2]).wait(60)
        torch.cuda.synchronize()
        tensors[1].untyped_storage().resize_(0)
        moves: list[Any] = [
            lambda: link.write_blocks(plan, [3], [4]),
            lambda: link.read_blocks(back, [3], [4]),
            lambda: link.write_tokens(plan, [3], [4], stop=4),
            lambda: link.write(local.regions[1], 0, remote.regions[1], 0, 64),
        ]
        for move in moves:
            with pytest.raises(RegionGone, match="freed or resized"):
                move()
        torch.cuda.synchronize()  # the GPU is well
        there = peer.call("peek_cache")
        assert int(there[0][:, 4].sum()) == int(there[1][:, 4].sum()) == 0
