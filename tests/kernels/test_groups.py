"""Groups, slices of a latent and ranks by the kernel: windows, null slots, state, indexers.

The truth is what the same plan's pieces do in host memory (`tests/engine/layout/test_join.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.plan.rank_plan import RankPlan
from kvferry.engine.plan.token_plan import TokenPlan
from kvferry.engine.transports.cuda_ipc.tokens import compile_tokens, span_of
from kvferry.kernels.relayout import relayout
from kvferry.kernels.signal import Signal
from kvferry.kernels.tiles import Tuning
from tests.support import grouped_caches
from tests.support.grouped_caches import hybrid, indexed, latent_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.grouped_caches import Grouped

SMALL = Tuning(tile_nbytes=1 << 10, num_warps=4)
HYBRID_TABLES = ([[3, 8, 1, 6, 2], [0, 0, 0, 5, 7], [0, 0, 4]], [[4, 1, 2], [0, 3, 1], [0, 0, 2]])
INDEXED_TABLES = ([[3, 8, 1, 6, 2], [4, 0, 7, 5, 1]], [[4, 1, 2], [0, 3, 4]])


def move(
    plan: TokenPlan, src: Grouped, dst: Grouped, tables: Any, span: tuple[int, int], device: str
) -> None:
    """Moves tokens, and a page of state for each that the tables name, by the kernel on `device`."""
    addresses = [np.array([t.data_ptr() for t in side.tensors], np.int64) for side in (src, dst)]
    state = torch.zeros(2, dtype=torch.int32, device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    moved = 0
    for one in compile_tokens(plan, None, addresses[0], addresses[1], torch.device(device)):
        here, there = plan.check(one.pair, tables[0], tables[1], *span)
        rows = [torch.from_numpy(table).to(device) for table in (here, there)]
        signal = Signal(state, counter.data_ptr())
        where = span_of(one, *span, len(there))
        moved += relayout(one.move, rows[0], rows[1], *where, signal=signal, tuning=SMALL)
    assert moved == int(counter) == plan.nbytes(*span)
    assert state.tolist() == [0, 0]  # counted down, and no bad id


@pytest.mark.parametrize("span", [(0, 19), (5, 19), (16, 17)])
@pytest.mark.parametrize(
    ("make", "tables"), [(hybrid, HYBRID_TABLES), (indexed, INDEXED_TABLES)], ids=["hybrid", "mla"]
)
def test_each_group_sends_what_it_needs(
    kernel_device: str, make: Any, tables: Any, span: tuple[int, int]
) -> None:
    src, dst = make(4, 9, seed=1), make(8, 5, seed=50)
    plan = TokenPlan(src.layout, dst.layout)
    truth = dst.to("cpu")
    grouped_caches.move(plan.pieces(tables[0], tables[1], *span), src, truth)
    there = dst.to(kernel_device)
    move(plan, src.to(kernel_device), there, tables, span, kernel_device)
    assert there.equals(truth)


@pytest.mark.parametrize("degrees", [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_slices_of_a_latent_go_between_ranks(kernel_device: str, degrees: tuple[int, int]) -> None:
    sides = [latent_ranks(degrees[0], 4, seed=7), latent_ranks(degrees[1], 6, seed=None)]
    plan = RankPlan(*([rank.layout for rank in side] for side in sides))
    tables: Sequence[Any] = ([[5, 0, 3, 1]], [[2, 4, 1]])
    here = [rank.to(kernel_device) for rank in sides[0]]
    for target, dst in enumerate(sides[1]):
        truth, there = dst.to("cpu"), dst.to(kernel_device)
        for route in plan.to(target):
            pieces = route.plan.pieces(tables[0], tables[1], 0, 15)
            grouped_caches.move(pieces, sides[0][route.src], truth)
            move(route.plan, here[route.src], there, tables, (0, 15), kernel_device)
        assert there.equals(truth)
        assert not truth.equals(dst)
