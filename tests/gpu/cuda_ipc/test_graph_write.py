"""Writes that a CUDA graph repeats: other ids and another imm each time, without the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.engine.errors import Cancelled, PeerAborted, PlanError, RegionGone
from tests.gpu.cuda_ipc.test_ipc import HND, NHD, NUM_BLOCKS, canonical, some_ids, two_caches

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine
    from kvferry.engine.transports.cuda_ipc.graph_write import GraphWrite
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

FAR = 1 << 40  # an id that would be an illegal access


class Repeated:
    """A forward pass that adds one to every layer and writes it, as a graph."""

    def __init__(
        self, engine: TransferEngine, link: Link, peer: GpuPeer, groups: Iterable[list[int] | None]
    ) -> None:
        self.peer = peer
        self.tensors, local, remote = two_caches(engine, peer, NHD, NHD)
        self.plan = engine.plan(local, remote)
        self.src, self.dst = (torch.full((NUM_BLOCKS,), FAR, device="cuda") for _ in range(2))
        self.order = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.writes: list[GraphWrite] = [
            link.graph_write(self.plan, self.src, self.dst, self.order, layers=layers)
            for layers in groups
        ]
        self.graph = torch.cuda.CUDAGraph()
        compute = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.graph(self.graph, stream=compute):
            if len(self.writes) == 1:
                for tensor in self.tensors:
                    tensor += 1
                self.writes[0].launch()
            else:
                # Layer by layer on a side stream: a layer goes while the next one is computed.
                side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                for tensor, write in zip(self.tensors, self.writes, strict=True):
                    torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
                    tensor += 1
                    side.wait_stream(compute)
                    write.launch(side)
                compute.wait_stream(side)

    def replay(self, imm: int, src_ids: list[int], dst_ids: list[int], count: int = -1) -> None:
        for row, ids in ((self.src, src_ids), (self.dst, dst_ids)):
            row.fill_(FAR)
            row[: len(ids)] = torch.tensor(ids).cuda()
        self.order.copy_(torch.tensor([imm, len(src_ids) if count < 0 else count]))
        self.graph.replay()

    def expected(
        self, before: torch.Tensor, src_ids: list[int], dst_ids: list[int]
    ) -> torch.Tensor:
        src = canonical([tensor.cpu() for tensor in self.tensors], NHD)
        after = before.clone()
        after[:, :, dst_ids] = src[:, :, src_ids]
        return after

    def there(self) -> torch.Tensor:
        return canonical(self.peer.call("peek_cache"), NHD)


@pytest.mark.parametrize("groups", [[None], [[0], [1], [2]]], ids=["whole", "layer by layer"])
def test_each_replay_takes_other_ids_and_another_imm(
    engine: TransferEngine, link: Link, peer: GpuPeer, groups: list[list[int] | None]
) -> None:
    work = Repeated(engine, link, peer, groups)
    for seed, count in enumerate((5, NUM_BLOCKS, 1, 12, 0, 7)):
        src_ids, dst_ids = some_ids(count, seed)
        before = work.there()
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=max(1, work.plan.nbytes(count)), timeout_s=5.0)
        work.replay(imm, src_ids, dst_ids)
        if count:
            wait = "spin" if seed % 2 else "wait"
            assert peer.call(wait, ticket) == work.plan.nbytes(count)
        torch.cuda.synchronize()
        assert torch.equal(work.there(), work.expected(before, src_ids, dst_ids))
    for write in work.writes:
        write.poll()
        assert (write.replays, write.failures) == (6, 0)
    assert peer.call("late_writes") == 0


def test_a_replay_without_an_imm_counts_nothing(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    work = Repeated(engine, link, peer, [None])
    before = work.there()
    work.replay(0, [1, 2], [3, 4])
    torch.cuda.synchronize()
    assert torch.equal(work.there(), work.expected(before, [1, 2], [3, 4]))


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "count"),
    [
        ([1, NUM_BLOCKS, 2], [4, 5, 6], 3),
        ([1, 3, 2], [4, -1, 6], 3),
        ([1, 3, 2], [4, FAR, 6], 3),
        ([1, 3, 2], [4, 5, 6], NUM_BLOCKS + 1),
        ([1, 3, 2], [4, 5, 6], FAR),
    ],
)
def test_what_is_out_of_range_is_left_alone_and_aborted(
    engine: TransferEngine,
    link: Link,
    peer: GpuPeer,
    src_ids: list[int],
    dst_ids: list[int],
    count: int,
) -> None:
    work = Repeated(engine, link, peer, [None])
    before = work.there()
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=work.plan.nbytes(3))
    work.replay(imm, src_ids, dst_ids, count)
    with pytest.raises(PeerAborted, match="out of range"):
        peer.call("wait", ticket)
    good = [0, 2] if count == 3 else []
    after = work.expected(before, [src_ids[i] for i in good], [dst_ids[i] for i in good])
    assert torch.equal(work.there(), after)
    assert work.writes[0].failures == 1
    # The next one is as good as any.
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=work.plan.nbytes(1))
    work.replay(imm, [7], [8])
    peer.call("wait", ticket)


def test_replays_move_nothing_once_it_is_closed(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    work = Repeated(engine, link, peer, [None])
    before = work.there()
    work.writes[0].close()
    work.replay(0, [1], [2])
    torch.cuda.synchronize()
    assert torch.equal(work.there(), before)
    with pytest.raises(Cancelled):
        work.writes[0].launch()
    work.plan.local.deregister()  # nothing uses the cache any more


def test_a_region_that_is_taken_back_ends_it(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    work = Repeated(engine, link, peer, [None])
    before = work.there()
    peer.call("deregister_cache")
    assert work.writes[0].closed  # or the peer would still wait
    assert isinstance(work.writes[0].error, RegionGone)
    work.replay(0, [1], [2])
    torch.cuda.synchronize()
    assert torch.equal(work.there(), before)


def test_a_link_that_goes_down_ends_it(engine: TransferEngine, link: Link, peer: GpuPeer) -> None:
    work = Repeated(engine, link, peer, [None])
    before = work.there()
    link.close()
    assert work.writes[0].closed
    work.replay(0, [1], [2])
    torch.cuda.synchronize()
    assert torch.equal(work.there(), before)


def test_what_cannot_be_repeated_is_refused(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    work = Repeated(engine, link, peer, [None])
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    x = torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph, stream=stream):
        x += 1
        region, theirs = work.plan.local.regions[0], work.plan.remote.regions[0]
        tickets = [
            link.write_blocks(work.plan, work.src, work.dst),
            link.write_blocks(work.plan, [1], [2]),
            link.write_tokens(work.plan, [1], [2], stop=16),
            link.write(region, 0, theirs, 0, 64),
            link.read(region, 0, theirs, 0, 64),
        ]
    for ticket in tickets:
        with pytest.raises(PlanError, match="graph_write"):
            ticket.wait(10)
    graph.replay()  # and the capture is none the worse
    torch.cuda.synchronize()
    assert x.tolist() == [1]
    bad: Any
    for bad in ([0, 1], work.src[:1], work.order.int(), work.order.cpu()):
        with pytest.raises(PlanError):
            link.graph_write(work.plan, work.src, work.dst, bad)
    _, local, remote = two_caches(engine, peer, NHD, HND, fill_here=None)
    with pytest.raises(PlanError, match="for writing"):
        link.graph_write(engine.plan(remote, local), work.src, work.dst, work.order)
