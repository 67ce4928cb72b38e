"""Scales that differ from block to block, made and used by kernels: as the CPU makes and uses them.

The interpreter truncates bf16 and rounds fp8 wrongly, so what becomes such numbers here is exact in
them: powers of two times the largest that fits. int8 and fp32 take any numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvferry.engine.plan.token_plan import TokenPlan
from kvferry.engine.transports.cuda_ipc.tokens import compile_tokens, span_of
from kvferry.kernels.errors import ShapeError
from kvferry.kernels.relayout import relayout
from kvferry.kernels.scaling import scales_reference
from kvferry.kernels.signal import Signal
from kvferry.kernels.tiles import Tuning
from tests.support.scaled_caches import NUM_BLOCKS, Scaled, expect, fill_exactly

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
PLANE_INSIDE = ("block", "head", "token", "plane", "dim")
FP8, INT8 = torch.float8_e4m3fn, torch.int8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = Tuning(tile_nbytes=1 << 10, num_warps=4)
CASES = [
    (NHD, 4, FP32, HND, 6, INT8, True),
    (NHD, 4, FP16, NHD, 8, INT8, False),
    (PLANE_INSIDE, 3, BF16, HND, 6, INT8, True),
    (NHD, 4, BF16, HND, 6, FP8, True),
    (HND, 8, BF16, PLANE_INSIDE, 4, FP8, False),
    (HND, 6, FP8, NHD, 4, FP32, True),
    (NHD, 4, INT8, HND, 8, FP32, False),
    (NHD, 4, FP8, HND, 6, INT8, True),
    (NHD, 4, INT8, NHD, 8, torch.float8_e5m2, True),
]


def launch(
    src: Scaled, dst: Scaled, tables: Any, span: tuple[int, int], device: str, **options: Any
) -> tuple[list[np.ndarray[Any, Any]], list[int]]:
    """Moves tokens on `device`; returns the destination's bytes, and what was counted and flagged."""
    plan = TokenPlan(src.layout, dst.layout)
    sides = [[torch.from_numpy(a).to(device, copy=True) for a in c.arrays()] for c in (src, dst)]
    addresses = [np.array([t.data_ptr() for t in side], np.int64) for side in sides]
    ids = [torch.tensor(table, device=device) for table in tables]
    state = torch.zeros(2, dtype=torch.int32, device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    signal = Signal(state, counter.data_ptr())
    moved = 0
    for one in compile_tokens(plan, None, addresses[0], addresses[1], torch.device(device)):
        start, stop = span_of(one, *span, 0)
        moved += relayout(one.move, ids[0], ids[1], start, stop, signal=signal, **options)
    bad = max(max(table) for table in tables) >= NUM_BLOCKS
    assert bad or moved == plan.nbytes(*span) == int(counter)
    return [t.cpu().numpy() for t in sides[1]], [int(counter), *state.tolist()]


@pytest.mark.parametrize("max_programs", [None, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]} to {case[5]}")
def test_scales_are_made_and_used_as_on_the_cpu(
    kernel_device: str, case: Any, max_programs: int | None
) -> None:
    src_order, src_tokens, src_type, dst_order, dst_tokens, dst_type, by_head = case
    src = Scaled(src_order, src_tokens, src_type, by_head=by_head, seed=3)
    dst = Scaled(dst_order, dst_tokens, dst_type, by_head=by_head)
    fill_exactly(src, dst)
    tables = [np.random.default_rng(i).permutation(NUM_BLOCKS).tolist() for i in (1, 2)]
    span = 2 * dst_tokens, 2 * dst_tokens + 17
    truth = expect(src, dst, tables, *span)
    options = {"max_programs": max_programs, "tuning": SMALL}
    got, flags = launch(src, dst, tables, span, kernel_device, **options)
    assert flags[1:] == [0, 0]
    for mine, theirs in zip(got, truth, strict=True):
        assert np.array_equal(mine, theirs)


def test_a_block_that_does_not_exist_is_flagged_and_not_counted(kernel_device: str) -> None:
    src, dst = Scaled(NHD, 4, FP32, seed=3), Scaled(HND, 4, INT8)
    before = [array.copy() for array in dst.arrays()]
    ids = list(range(NUM_BLOCKS))
    wrong = [ids, [NUM_BLOCKS, *ids[1:]]]
    got, flags = launch(src, dst, wrong, (0, 4), kernel_device, tuning=SMALL)
    assert flags == [0, 0, 1]
    for mine, theirs in zip(got, before, strict=True):
        assert np.array_equal(mine, theirs)


def test_blocks_with_one_scale_are_begun_at_their_beginning(kernel_device: str) -> None:
    src, dst = Scaled(NHD, 4, FP32, seed=3), Scaled(NHD, 8, INT8)
    ids = list(range(NUM_BLOCKS))
    with pytest.raises(ShapeError, match="token 4 is inside a block of 8 tokens"):
        launch(src, dst, [ids, ids], (4, 12), kernel_device)


def test_the_reference_makes_the_largest_of_the_largest() -> None:
    largest = torch.tensor([0.0, 127.0, 1e-45, 3.4e38])
    scales = scales_reference(largest, torch.int8)
    assert scales.tolist()[:3] == [1.0, float(127 * np.float32(1 / 127)), 1.0]
    assert torch.isfinite(scales).all()
