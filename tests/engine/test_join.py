"""Hybrid models, latents with a rotary part, and slices of a latent: groups and planes put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvferry.engine.errors import LayoutError
from kvferry.engine.join import join_groups, join_planes
from kvferry.engine.layout import KVLayout
from kvferry.engine.ranks import RankPlan
from kvferry.engine.reblock import TokenPlan

NUM_LAYERS = 2


def filled(*shape: int, seed: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    nbytes = int(torch.Size(shape).numel()) * dtype.itemsize
    raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def move(pieces: Any, src: list[torch.Tensor], dst: list[torch.Tensor]) -> None:
    here, there = ([t.view(torch.uint8).reshape(-1) for t in side] for side in (src, dst))
    for a, begin, b, end, nbytes in zip(*pieces, strict=True):
        there[b][end : end + nbytes] = here[a][begin : begin + nbytes]


def hybrid(tokens: int, blocks: int, *, seed: int | None) -> tuple[KVLayout, list[torch.Tensor]]:
    """Layer 0 attends to all, layer 1 to a window of 6 tokens, layer 2 keeps a state."""
    shapes = [(2, blocks, tokens, 2, 4)] * 2 + [(blocks, 10)]
    dtypes = (torch.int16, torch.int16, torch.float32)
    tensors = [
        torch.zeros(shape, dtype=dtype)
        if seed is None
        else filled(*shape, seed=seed + i, dtype=dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    dims = "plane block token head dim"
    layout = join_groups(
        KVLayout.from_tensors([tensors[0]], dims, layers=[0]),
        KVLayout.from_tensors([tensors[1]], dims, layers=[1], kind="swa", window=6, null_slot=0),
        KVLayout.from_tensors(
            [tensors[2]], "block dim", layers=[2], planes=["state"], kind="ssm", null_slot=0
        ),
    )
    return layout, tensors


def test_each_group_sends_what_it_needs() -> None:
    (src_layout, src), (dst_layout, dst) = hybrid(4, 9, seed=1), hybrid(8, 5, seed=None)
    plan = TokenPlan(src_layout, dst_layout)
    src_tables = [[3, 8, 1, 6, 2], [0, 0, 0, 5, 7], [0, 0, 4]]
    dst_tables = [[4, 1, 2], [0, 3, 1], [0, 0, 2]]
    stop = 19
    pieces = plan.pieces(src_tables, dst_tables, 0, stop)
    move(pieces, src, dst)
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
    (layout, src), (other, dst) = hybrid(4, 9, seed=1), hybrid(4, 9, seed=None)
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
    move(TokenPlan(layout, swapped).pieces(tables, [tables[i] for i in order], 0, 12), src, dst)
    assert torch.equal(dst[0][:, [3, 8, 1]], src[0][:, [3, 8, 1]])
    assert torch.equal(dst[2][4].view(torch.uint8), src[2][4].view(torch.uint8))


LATENT, ROPE, SLICES = 32, 8, 4


def latent(
    slices: tuple[int, int], tokens: int, *, seed: int | None
) -> tuple[KVLayout, list[torch.Tensor]]:
    """`[latent slices | rotary part]` a token; the rotary part is on every rank."""
    width = LATENT // SLICES
    mine = slices[1] - slices[0]
    pool = torch.zeros(NUM_LAYERS, 6, tokens, mine * width + ROPE, dtype=torch.int16)
    if seed is not None:
        whole = filled(NUM_LAYERS, 6, tokens, LATENT + ROPE, seed=seed, dtype=torch.int16)
        pool[..., : mine * width] = whole[..., slices[0] * width : slices[1] * width]
        pool[..., mine * width :] = whole[..., LATENT:]
    parts = [pool[..., : mine * width].unflatten(-1, (mine, width)), pool[..., mine * width :]]  # type: ignore[no-untyped-call]
    layout = join_planes(
        KVLayout.from_tensors(
            parts[0],
            "layer block token head dim",
            planes=["latent"],
            head_start=slices[0],
            kind="mla",
            tp_mode="replicate",
        ),
        KVLayout.from_tensors(
            parts[1], "layer block token dim", planes=["k_pe"], kind="mla", tp_mode="replicate"
        ),
    )
    return layout, parts


@pytest.mark.parametrize(("degrees"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_slices_of_a_latent_are_plain_strided_sources(degrees: tuple[int, int]) -> None:
    sides = []
    for degree, tokens, seed in ((degrees[0], 4, 7), (degrees[1], 6, None)):
        share = SLICES // degree
        ranks = [latent((r * share, (r + 1) * share), tokens, seed=seed) for r in range(degree)]
        sides.append(ranks)
    plan = RankPlan(*([layout for layout, _ in side] for side in sides))
    src_table, dst_table = [5, 0, 3, 1], [2, 4, 1]
    truth, _ = latent((0, SLICES), 4, seed=7)[1], None
    for rank, (_, parts) in enumerate(sides[1]):
        counts = plan.nbytes(rank, 0, 15)
        for route in plan.to(rank):
            pieces = route.plan.pieces([src_table], [dst_table], 0, 15)
            assert pieces.total_nbytes == counts[route.src]
            here, there = (strided(p) for p in (sides[0][route.src][1], parts))
            for a, begin, b, end, nbytes in zip(*pieces, strict=True):
                there[b][end : end + nbytes] = here[a][begin : begin + nbytes]
        share = SLICES // degrees[1]
        for part, whole in zip(parts, truth, strict=True):
            sent = whole[:, src_table].flatten(1, 2)[:, :15]
            came = part[:, dst_table].flatten(1, 2)[:, :15]
            mine = slice(rank * share, (rank + 1) * share) if part.dim() == 5 else slice(None)
            assert torch.equal(came, sent[:, :, mine])


def strided(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The bytes that each region spans."""
    return [
        torch.as_strided(
            part, (part.untyped_storage().nbytes() // 2 - part.storage_offset(),), (1,)
        ).view(torch.uint8)
        for part in parts
    ]


def test_what_does_not_go_together_is_named() -> None:
    one, _ = latent((0, 4), 4, seed=None)
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
