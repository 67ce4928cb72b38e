"""A plan bound to memory: the mean size of what it moves, by which a path is chosen."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.engine.transfer_engine import TransferEngine
from tests.support.caches import PagedPool
from tests.support.grouped_caches import hybrid

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
SHAPE: dict[str, Any] = {
    "layers": (0, 1),
    "heads": (0, 4),
    "num_blocks": 6,
    "dim": 8,
    "stacked": False,
}


@pytest.mark.parametrize(
    ("src", "dst", "nbytes"),
    [
        ((NHD, 4), (NHD, 4), 4 * 4 * 8),  # a plane of a block, all of it dense
        ((NHD, 4), (NHD, 16), 4 * 4 * 8),  # a unit of 4 tokens
        ((NHD, 4), (HND, 4), 8),  # one head of one token
        ((HND, 4), (HND, 16), 4 * 8),  # one head of a unit
    ],
)
def test_a_piece_is_what_lies_dense_on_both_sides(src: Any, dst: Any, nbytes: int) -> None:
    pools = [PagedPool.make(order, tokens=tokens, **SHAPE) for order, tokens in (src, dst)]
    with TransferEngine(transports=("cma",)) as engine:
        mine, theirs = (engine.register_cache(pool.layout, pool.tensors) for pool in pools)
        plan = engine.plan(mine, theirs.descriptor)
        assert plan.piece_nbytes == nbytes
        assert plan.blocks_pair == (src[1] == dst[1])


def test_of_several_groups_it_is_the_mean() -> None:
    """Two planes of attention twice, 64 bytes a unit each, and 40 bytes of state."""
    src, dst = hybrid(4, 9, seed=1), hybrid(8, 5, seed=2)
    with TransferEngine(transports=("cma",)) as engine:
        mine, theirs = (engine.register_cache(side.layout, side.tensors) for side in (src, dst))
        assert engine.plan(mine, theirs.descriptor).piece_nbytes == (4 * 4 * 16 + 40) / 5
