"""Conformance: scales that differ from block to block are chosen, written and used on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.errors import LayoutError, PlanError
from kvferry.engine.plan.rank_plan import RankPlan
from kvferry.engine.plan.token_plan import TokenPlan
from tests.support.scaled_caches import NUM_BLOCKS, Scaled, expect

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.conftest import Peer

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")


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
