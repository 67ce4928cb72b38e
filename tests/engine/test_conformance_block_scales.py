"""Conformance: scales that differ from block to block are chosen, written and used on the way."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.errors import LayoutError, PlanError
from kvferry.engine.join import join_planes
from kvferry.engine.layout import KVLayout
from kvferry.engine.ranks import RankPlan
from kvferry.engine.reblock import TokenPlan
from kvferry.kernels.cast import LIMITS, cast_reference

from .caches import PagedPool

if TYPE_CHECKING:
    from kvferry.engine.link import Link
    from kvferry.engine.transfer import TransferEngine
    from tests.conftest import Peer

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
NUM_BLOCKS, LAYERS = 14, (0, 1)


class Scaled:
    """A cache with a plane of scales beside each of its planes, if its type needs them."""

    def __init__(
        self,
        order: tuple[str, ...],
        tokens: int,
        dtype: torch.dtype,
        *,
        by_head: bool = True,
        heads: tuple[int, int] = (0, 3),
        seed: int | None = None,
    ) -> None:
        self.pool = PagedPool.make(
            order,
            layers=LAYERS,
            heads=heads,
            num_blocks=NUM_BLOCKS,
            tokens=tokens,
            dim=8,
            stacked=False,
            dtype=dtype,
            seed=seed,
        )
        self.layout, self.scales = self.pool.layout, []
        if dtype in LIMITS:
            count = heads[1] - heads[0] if by_head else 1
            shape = (2, NUM_BLOCKS, count, 1)
            draw = np.random.default_rng(7)
            self.scales = [
                torch.from_numpy(draw.uniform(0.01, 0.3, shape).astype(np.float32)) for _ in LAYERS
            ]
            self.layout = join_planes(
                self.pool.layout,
                KVLayout.from_tensors(
                    [s if by_head else s[:, :, 0] for s in self.scales],
                    "plane block head dim" if by_head else "plane block dim",
                    planes=["k_scale", "v_scale"],
                    tokens_per_block=tokens,
                    head_start=heads[0],
                ),
            )

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        raw = [scale.view(torch.uint8).reshape(-1).numpy() for scale in self.scales]
        return self.pool.arrays() + raw


def expect(src: Scaled, dst: Scaled, tables: Any, start: int, stop: int) -> Any:
    """Both caches' tokens, block by block of the destination: numbers and scales afterwards."""
    after = dst.pool.clone()
    scales = [scale.clone() for scale in dst.scales]
    size = after.logical(0).shape[2]
    for layer, plane, block in itertools.product(
        LAYERS, range(2), range(start // size, -(-stop // size))
    ):
        here, there = src.pool.logical(layer)[plane], after.logical(layer)[plane]
        tokens = range(max(start, block * size), min(stop, (block + 1) * size))
        from_block = here.shape[1]
        rows = []
        for token in tokens:
            home = tables[0][token // from_block]
            number = here[home, token % from_block].to(torch.float32)
            if src.scales:
                number = number * src.scales[layer][plane, home]
            rows.append(number)
        real = torch.stack(rows)  # [token, head, dim]
        target = tables[1][block]
        if dst.scales:
            limit = np.float32(1 / LIMITS[after.tensors[0].dtype])
            largest = real.abs().amax(dim=(0, 2) if dst.scales[layer].shape[2] > 1 else (0, 1, 2))
            chosen = torch.where(largest > 0, largest * limit, 1.0).reshape(-1)
            scales[layer][plane, target, :, 0] = chosen
        for token in tokens:
            home = tables[0][token // from_block]
            factor = src.scales[layer][plane, home] if src.scales else torch.ones(1, 1)
            if dst.scales:
                factor = factor / scales[layer][plane, target]
            number = here[home, token % from_block]
            there[target, token % size] = cast_reference(number, factor, there.dtype)
    raw = [scale.view(torch.uint8).reshape(-1).numpy() for scale in scales]
    return after.arrays() + raw


FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
CASES = [
    (NHD, 4, BF16, HND, 6, FP8, True),
    (NHD, 4, BF16, NHD, 8, INT8, False),
    (HND, 6, FP8, NHD, 4, BF16, True),
    (NHD, 4, INT8, HND, 4, BF16, False),
    (NHD, 4, INT8, HND, 6, FP8, True),
]


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_scales_are_chosen_written_and_used(
    engine: TransferEngine, link: Link, peer: Peer, case: Any, write: bool
) -> None:
    src_order, src_tokens, src_type, dst_order, dst_tokens, dst_type, by_head = case
    src = Scaled(src_order, src_tokens, src_type, by_head=by_head, seed=3)
    dst = Scaled(dst_order, dst_tokens, dst_type, by_head=by_head)
    tables = [np.random.default_rng(i).permutation(NUM_BLOCKS).tolist() for i in (1, 2)]
    start, stop = 2 * dst_tokens, 2 * dst_tokens + 25
    truth = expect(src, dst, tables, start, stop)
    mine, theirs = (src, dst) if write else (dst, src)
    local = engine.register_cache(mine.layout, mine.arrays())
    remote = peer.call("cache_of", theirs.arrays(), theirs.layout)
    if write:
        plan = engine.plan(local, remote)
        imm, nbytes = peer.call("new_imm"), plan.tokens.nbytes(start, stop)
        ticket = peer.call("expect", imm, nbytes=nbytes)
        link.write_tokens(plan, *tables, start=start, stop=stop, imm=imm).wait()
        assert peer.call("wait", ticket) == nbytes
        got = peer.call("peek_cache")
    else:
        plan = engine.plan(remote, local)
        link.read_tokens(plan, *tables, start=start, stop=stop).wait()
        got = dst.arrays()
    for mine_now, then in zip(got, truth, strict=True):
        assert np.array_equal(mine_now, then)
    local.deregister()


def test_equal_types_move_numbers_and_scales_bit_for_bit() -> None:
    src, dst = (Scaled(order, 4, FP8, seed=seed) for order, seed in ((NHD, 3), (HND, None)))
    for scale in dst.scales:
        scale.zero_()
    pieces = TokenPlan(src.layout, dst.layout).pieces([[3, 1, 5]], [[2, 9, 0]], 0, 12)
    here, there = src.arrays(), dst.arrays()
    for a, begin, b, end, nbytes in zip(*pieces, strict=True):
        there[b][end : end + nbytes] = here[a][begin : begin + nbytes]
    for mine, theirs in zip(src.scales, dst.scales, strict=True):
        assert torch.equal(theirs[:, [2, 9, 0]], mine[:, [3, 1, 5]])
        assert int(theirs.count_nonzero()) == 2 * 3 * 3


def test_scales_that_cannot_be_are_refused_by_name() -> None:
    bits = Scaled(NHD, 4, FP8).layout
    with pytest.raises(LayoutError, match="a scale a block of 4 tokens at the source and of 8"):
        TokenPlan(bits, Scaled(NHD, 8, FP8).layout)
    with pytest.raises(LayoutError, match="whether plane 'k' has scales a block differs"):
        TokenPlan(bits, Scaled(NHD, 4, FP8).pool.layout)
    plan = TokenPlan(Scaled(NHD, 4, BF16).layout, bits)
    with pytest.raises(PlanError, match="token 2 is inside a block of 4 tokens"):
        list(plan.moves([[0, 1]], [[0, 1]], 2, 8))
    shared = Scaled(NHD, 4, FP8, by_head=False).layout
    part = Scaled(NHD, 4, BF16, heads=(0, 2)).layout
    with pytest.raises(LayoutError, match=r"one scale for heads \[0, 3\).*source has \[0, 2\)"):
        TokenPlan(part, shared)


def test_ranks_choose_scales_of_their_own_heads() -> None:
    src = [Scaled(NHD, 4, BF16, heads=held).layout for held in ((0, 1), (1, 3))]
    plan = RankPlan(src, [Scaled(HND, 8, FP8).layout])
    assert plan.nbytes(0, 0, 8) == {
        rank: 2 * 2 * heads * (8 * 8 + 4) for rank, heads in enumerate((1, 2))
    }
