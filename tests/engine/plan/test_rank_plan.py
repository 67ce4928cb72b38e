"""Between two sets of ranks every byte has one sender, the load is even, and the counts are right."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.engine.errors import LayoutError
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.plan.rank_plan import RankPlan
from tests.support.caches import PagedPool

NHD = ("layer", "plane", "block", "token", "head", "dim")
HND = ("layer", "plane", "block", "head", "token", "dim")
NUM_LAYERS = 4
DEGREES = (1, 2, 3, 5, 6, 8, 11, 13, 16)


def heads_of(rank: int, degree: int, num_heads: int) -> tuple[int, int]:
    """The usual split: heads in shares as equal as can be, or each head on several ranks."""
    if degree <= num_heads:
        return rank * num_heads // degree, (rank + 1) * num_heads // degree
    head = rank * num_heads // degree
    return head, head + 1


def make_ranks(
    tp: int, pp: int, num_heads: int, order: tuple[str, ...], tokens: int, seed: int | None
) -> list[PagedPool]:
    """`tp * pp` ranks; equal heads hold equal numbers, as replicas do."""
    pools = []
    for stage in range(pp):
        layers = tuple(range(NUM_LAYERS)[stage * NUM_LAYERS // pp : (stage + 1) * NUM_LAYERS // pp])
        for rank in range(tp):
            pool = PagedPool.make(
                order,
                layers=layers,
                heads=heads_of(rank, tp, num_heads),
                num_blocks=8,
                tokens=tokens,
                dim=2,
                tp_mode="replicate" if tp > num_heads else "split",
            )
            if seed is not None:
                for layer in layers:
                    view = pool.logical(layer)
                    for number, head in enumerate(range(*pool.heads)):
                        generator = torch.Generator().manual_seed(seed + 100 * layer + head)
                        shape = view[:, :, :, number].shape
                        content = torch.randint(
                            0, 256, shape, dtype=torch.uint8, generator=generator
                        )
                        view[:, :, :, number] = content
            pools.append(pool)
    return pools


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    degrees=st.tuples(*[st.integers(1, 16)] * 2),
    stages=st.tuples(*[st.sampled_from([1, 2, 3])] * 2),
    num_heads=st.sampled_from([1, 2, 8, 12]),
    span=st.tuples(st.integers(0, 8), st.integers(8, 12)),
)
def test_any_degrees_to_any_degrees(
    degrees: tuple[int, int], stages: tuple[int, int], num_heads: int, span: tuple[int, int]
) -> None:
    src = make_ranks(degrees[0], stages[0], num_heads, NHD, 2, seed=1)
    dst = make_ranks(degrees[1], stages[1], num_heads, HND, 3, seed=None)
    plan = RankPlan([pool.layout for pool in src], [pool.layout for pool in dst])
    src_table, dst_table = [5, 2, 0, 7, 1, 3], [6, 1, 4, 2]
    for target, pool in enumerate(dst):
        counted: Counter[int] = Counter()
        touched = [np.zeros(len(array), np.int64) for array in pool.arrays()]
        for route in plan.to(target):
            pieces = route.plan.pieces([src_table], [dst_table], *span)
            counted[route.src] += pieces.total_nbytes
            here, there = src[route.src].arrays(), pool.arrays()
            for a, begin, b, end, nbytes in zip(*pieces, strict=True):
                there[b][end : end + nbytes] = here[a][begin : begin + nbytes]
                touched[b][end : end + nbytes] += 1
        assert dict(counted) == plan.nbytes(target, *span)
        assert max(int(times.max()) for times in touched) == (span[0] < span[1])  # one sender
        for layer in pool.layers:
            for head in range(*pool.heads):
                source = next(
                    p for p in src if layer in p.layers and p.heads[0] <= head < p.heads[1]
                )
                sent = source.logical(layer)[:, src_table, :, head - source.heads[0]]
                came = pool.logical(layer)[:, dst_table, :, head - pool.heads[0]]
                tokens = slice(*span)
                assert torch.equal(came.flatten(1, 2)[:, tokens], sent.flatten(1, 2)[:, tokens])


def least_busy(degrees: tuple[int, int], num_heads: int) -> int:
    """The planes of layers and heads that the busiest source has to send, however they are chosen:
    of what equal sources hold, all that is wanted, divided by them in whole layers."""
    sides = [[heads_of(rank, tp, num_heads) for rank in range(tp)] for tp in degrees]
    return max(
        -(
            -sum(NUM_LAYERS for wanted in sides[1] if wanted[0] < held[1] and held[0] < wanted[1])
            // sides[0].count(held)
        )
        for held in sides[0]
    )


@pytest.mark.parametrize("num_heads", [2, 8, 12])
def test_no_source_rank_is_busier_than_it_has_to_be(num_heads: int) -> None:
    """Powers of two or not. Where one rank alone holds what two want, it sends it to both."""
    layouts = {
        tp: [pool.layout for pool in make_ranks(tp, 1, num_heads, NHD, 2, None)] for tp in DEGREES
    }
    for degrees in itertools.product(DEGREES, DEGREES):
        plan = RankPlan(layouts[degrees[0]], layouts[degrees[1]])
        sent = [
            sum(len({layer for layer, _ in route.keys}) for route in plan.of(rank))
            for rank in range(degrees[0])
        ]
        assert max(sent) == least_busy(degrees, num_heads), degrees


def latent(**options: Any) -> KVLayout:
    pool = np.zeros((8, 4, 16), np.int16)
    return KVLayout.from_tensors(
        [pool] * NUM_LAYERS, "block token dim", kind="mla", tp_mode="replicate", **options
    )


def test_a_replicated_latent_has_one_sender_a_layer_and_all_ranks_share_the_load() -> None:
    layout = latent()
    for degrees in itertools.product(DEGREES, DEGREES):
        plan = RankPlan([layout] * degrees[0], [layout] * degrees[1])
        for target in range(degrees[1]):
            layers = [layer for route in plan.to(target) for layer, _ in route.keys]
            assert sorted(layers) == list(range(NUM_LAYERS))
        sent = [sum(len(route.keys) for route in plan.of(rank)) for rank in range(degrees[0])]
        assert max(sent) - min(sent) <= 1
        # Nobody talks to more ranks than it takes: only neighbours share a target.
        assert len(plan.routes) < sum(degrees) or NUM_LAYERS * degrees[1] < degrees[0]


def test_each_rank_talks_to_just_the_ranks_that_it_needs() -> None:
    src, dst = ([p.layout for p in make_ranks(tp, 1, 8, NHD, 2, None)] for tp in (4, 8))
    plan = RankPlan(src, dst)
    assert [[route.src for route in plan.to(rank)] for rank in range(8)] == [
        [rank // 2] for rank in range(8)
    ]
    back = RankPlan(dst, src)
    assert [[route.src for route in back.to(rank)] for rank in range(4)] == [
        [2 * rank, 2 * rank + 1] for rank in range(4)
    ]


@pytest.mark.parametrize(
    ("src_heads", "dst_heads", "says"),
    [
        ([(0, 2), (3, 4)], [(0, 4)], r"rank 0 holds \[0, 2\), which leaves a gap to \[3, 4\) of rank 1"),
        ([(0, 3), (2, 4)], [(0, 4)], r"rank 0 holds \[0, 3\), which overlaps \[2, 4\) of rank 1"),
        ([(0, 4), (0, 4)], [(0, 4)], r"source ranks 0 and 1 both hold \[0, 4\)"),
        ([(0, 4)], [(0, 2)], r"source ranks hold \[0, 4\), the destination ranks \[0, 2\)"),
    ],
)  # fmt: skip
def test_heads_that_do_not_make_one_model_are_refused(
    src_heads: list[tuple[int, int]], dst_heads: list[tuple[int, int]], says: str
) -> None:
    sides = [
        [
            PagedPool.make(NHD, layers=(0,), heads=held, num_blocks=2, tokens=2, dim=2).layout
            for held in side
        ]
        for side in (src_heads, dst_heads)
    ]
    with pytest.raises(LayoutError, match=says):
        RankPlan(*sides)


def test_layers_that_one_side_lacks_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"layer 3 is held by the source ranks \[0\] and by no"):
        RankPlan([latent()], [latent(layers=[0, 1, 2, 4])])
