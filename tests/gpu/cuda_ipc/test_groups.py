"""Groups and slices between GPU caches in two processes: windows, null slots, state, indexers, ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.engine.plan.rank_plan import RankPlan
from kvferry.engine.plan.token_plan import TokenPlan
from tests.kernels.test_groups import HYBRID_TABLES, INDEXED_TABLES
from tests.support import grouped_caches
from tests.support.grouped_caches import Grouped, hybrid, indexed, latent_ranks

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize(
    ("make", "tables"), [(hybrid, HYBRID_TABLES), (indexed, INDEXED_TABLES)], ids=["hybrid", "mla"]
)
def test_each_group_sends_what_it_needs(
    engine: TransferEngine, link: Link, peer: GpuPeer, make: Any, tables: Any, write: bool
) -> None:
    src, dst = make(4, 9, seed=1), make(8, 5, seed=50)
    start, stop = 5, 19
    truth = dst.to("cpu")
    plan = TokenPlan(src.layout, dst.layout)
    grouped_caches.move(plan.pieces(tables[0], tables[1], start, stop), src, truth)
    mine, theirs = (src, dst) if write else (dst, src)
    here = mine.to("cuda")
    local = engine.register_cache(here.layout, here.tensors)
    arrays = [tensor.view(torch.uint8).flatten().numpy() for tensor in theirs.tensors]
    remote = peer.call("cache_of", arrays, theirs.layout)
    bound = engine.plan(local, remote) if write else engine.plan(remote, local)
    nbytes = plan.nbytes(start, stop)
    if write:
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=nbytes)
        assert link.write_tokens(bound, *tables, start=start, stop=stop, imm=imm).wait(60) == nbytes
        assert peer.call("wait", ticket) == nbytes
        got = [torch.from_numpy(array) for array in peer.call("peek_cache")]
    else:
        assert link.read_tokens(bound, *tables, start=start, stop=stop).wait(60) == nbytes
        got = here.to("cpu").tensors
    for came, wanted in zip(got, truth.tensors, strict=True):
        assert torch.equal(came.view(torch.uint8).flatten(), wanted.view(torch.uint8).flatten())


@pytest.mark.parametrize("degrees", [(1, 4), (4, 2)])
def test_slices_of_a_latent_come_from_several_ranks(
    engine: TransferEngine, link: Link, peer: GpuPeer, degrees: tuple[int, int]
) -> None:
    """All ranks of prefill are the peer's, all of decode are here; each pulls what is its own."""
    sides = [latent_ranks(degrees[0], 4, seed=7), latent_ranks(degrees[1], 6, seed=None)]
    layouts = [[rank.layout for rank in side] for side in sides]
    plan = RankPlan(*layouts)
    tables: Any = ([[5, 0, 3, 1]], [[2, 4, 1]])
    remotes = [
        peer.call("views", _whole(rank), [_place(part) for part in rank.tensors], rank.layout)
        for rank in sides[0]
    ]
    for target, dst in enumerate(sides[1]):
        truth, here = dst.to("cpu"), dst.to("cuda")
        torch.cuda.synchronize()
        local = engine.register_cache(here.layout, here.tensors)
        for route in plan.to(target):
            grouped_caches.move(
                route.plan.pieces(tables[0], tables[1], 0, 15), sides[0][route.src], truth
            )
            bound = engine.plan(remotes[route.src], local, keys=frozenset(route.keys))
            moved = link.read_tokens(bound, *tables, start=0, stop=15).wait(60)
            assert moved == plan.nbytes(target, 0, 15)[route.src]
        assert here.equals(truth)


def _whole(rank: Grouped) -> Any:
    """The memory of which a rank's tensors are views."""
    first = rank.tensors[0]
    count = first.untyped_storage().nbytes() // first.element_size()
    return torch.as_strided(first, (count,), (1,), 0).numpy()


def _place(part: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(part.size()), part.stride(), int(part.storage_offset())
