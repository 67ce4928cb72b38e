"""Hybrid models, latents with a rotary part, and slices of a latent: groups and planes put together."""

from __future__ import annotations

import pytest
import torch

from kvferry.engine.errors import LayoutError
from kvferry.engine.layout.join import join_groups, join_planes
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.plan.block_plan import BlockPlan
from kvferry.engine.plan.rank_plan import RankPlan
from kvferry.engine.plan.token_plan import TokenPlan
from tests.support.grouped_caches import SLICES, Grouped, filled, hybrid, latent, latent_ranks, move


def test_each_group_sends_what_it_needs() -> None:
    here, there = hybrid(4, 9, seed=1), hybrid(8, 5, seed=None)
    plan = TokenPlan(here.layout, there.layout)
    src_tables = [[3, 8, 1, 6, 2], [0, 0, 0, 5, 7], [0, 0, 4]]
    dst_tables = [[4, 1, 2], [0, 3, 1], [0, 0, 2]]
    stop = 19
    pieces = plan.pieces(src_tables, dst_tables, 0, stop)
    move(pieces, here, there)
    src, dst = here.tensors, there.tensors
    assert pieces.total_nbytes == plan.nbytes(0, stop)
    for layer, first in ((0, 0), (1, stop - 6)):
        sent = src[layer][:, src_tables[layer]].flatten(1, 2)[:, first:stop]
        came = dst[layer][:, dst_tables[layer]].flatten(1, 2)
        assert torch.equal(came[:, first:stop], sent)
        assert int(came[:, :first].count_nonzero() + came[:, stop:].count_nonzero()) == 0
    assert torch.equal(dst[2][2].view(torch.uint8), src[2][4].view(torch.uint8))
    assert int(dst[2][[0, 1, 3, 4]].count_nonzero()) == 0
    assert pieces.total_nbytes == stop * 2 * 16 + 6 * 2 * 16 + 40


def test_groups_of_the_two_sides_may_come_in_another_order() -> None:
    here, there = hybrid(4, 9, seed=1), hybrid(4, 9, seed=None)
    other = there.layout
    order = [2, 0, 1]
    swapped = KVLayout(
        other.regions,
        tuple(other.groups[i] for i in order),
        other.dtype,
        0,
        2,
        version=other.version,
    )
    tables = [[3, 8, 1], [0, 5, 7], [4]]
    plan = TokenPlan(here.layout, swapped)
    move(plan.pieces(tables, [tables[i] for i in order], 0, 12), here, there)
    src, dst = here.tensors, there.tensors
    assert torch.equal(dst[0][:, [3, 8, 1]], src[0][:, [3, 8, 1]])
    assert torch.equal(dst[2][4].view(torch.uint8), src[2][4].view(torch.uint8))


@pytest.mark.parametrize("heads", [(2, 1), (1, 2), (2, 5)])
def test_layers_of_other_head_counts_behind_one_table_go_by_blocks_too(
    heads: tuple[int, int],
) -> None:
    """Each is moved whole, whatever the first one has."""
    dims = "plane block token head dim"
    shapes = [(2, 9, 4, count, 8) for count in heads]
    src = [filled(*shape, seed=i, dtype=torch.int16) for i, shape in enumerate(shapes)]
    dst = [torch.zeros(shape, dtype=torch.int16) for shape in shapes]
    here, there = (
        Grouped(
            join_planes(
                *(KVLayout.from_tensors([t], dims, layers=[i]) for i, t in enumerate(tensors))
            ),
            tensors,
        )
        for tensors in (src, dst)
    )
    plan = BlockPlan(TokenPlan(here.layout, there.layout))
    pieces = plan.pieces([3, 8, 1], [0, 5, 7])
    move(pieces, here, there)
    assert pieces.total_nbytes == plan.nbytes(3) == 3 * sum(heads) * 2 * 4 * 8 * 2
    for sent, came in zip(src, dst, strict=True):
        wanted = torch.zeros_like(came)
        wanted[:, [0, 5, 7]] = sent[:, [3, 8, 1]]
        assert torch.equal(came, wanted)


@pytest.mark.parametrize(("degrees"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_slices_of_a_latent_are_plain_strided_sources(degrees: tuple[int, int]) -> None:
    sides = [latent_ranks(degrees[0], 4, seed=7), latent_ranks(degrees[1], 6, seed=None)]
    plan = RankPlan(*([rank.layout for rank in side] for side in sides))
    src_table, dst_table = [5, 0, 3, 1], [2, 4, 1]
    truth = latent((0, SLICES), 4, seed=7).tensors
    for rank, there in enumerate(sides[1]):
        counts = plan.nbytes(rank, 0, 15)
        for route in plan.to(rank):
            pieces = route.plan.pieces([src_table], [dst_table], 0, 15)
            assert pieces.total_nbytes == counts[route.src]
            move(pieces, sides[0][route.src], there)
        share = SLICES // degrees[1]
        for part, whole in zip(there.tensors, truth, strict=True):
            sent = whole[:, src_table].flatten(1, 2)[:, :15]
            came = part[:, dst_table].flatten(1, 2)[:, :15]
            mine = slice(rank * share, (rank + 1) * share) if part.dim() == 5 else slice(None)
            assert torch.equal(came, sent[:, :, mine])


def test_what_does_not_go_together_is_named() -> None:
    one = latent((0, 4), 4, seed=None).layout
    layout = KVLayout.from_tensors([torch.zeros(2, 6, 4, 2, 8)], "plane block token head dim")
    with pytest.raises(LayoutError, match="differ in kind: 'mla' and 'full'"):
        join_planes(one, layout)
    with pytest.raises(LayoutError, match="no layouts"):
        join_groups()
    with pytest.raises(LayoutError, match="plane 'k' of layer 0 is held twice"):
        join_planes(layout, layout)
    other = KVLayout.from_tensors(
        [torch.zeros(2, 6, 8, 2, 8)], "plane block token head dim", layers=[1]
    )
    with pytest.raises(LayoutError, match=r"block sizes differ within a full group: \[4, 8\]"):
        join_planes(layout, other)
