"""One launch from any layout to any other: compared with a reference that goes token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.engine.plan.token_plan import TokenPlan
from kvferry.engine.transports.cuda_ipc.tokens import compile_tokens, span_of
from kvferry.kernels.cast import cast_reference
from kvferry.kernels.errors import ShapeError
from kvferry.kernels.relayout import relayout
from kvferry.kernels.signal import Signal
from kvferry.kernels.tiles import Tuning
from kvferry.kernels.walk import walk_constants
from tests.support.caches import AXES, PagedPool, expect_tokens

from .conftest import need_cuda

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
BLOCKS_FIRST = ("block", "layer", "plane", "token", "head", "dim")
PLANE_INSIDE = ("block", "head", "token", "plane", "dim")
SMALL = Tuning(tile_nbytes=1 << 10, num_warps=4)
SHAPE: dict[str, Any] = {"layers": (0, 1), "num_blocks": 12}
CASES = [
    (NHD, 4, (0, 4), HND, 16, (0, 4), 8),
    (NHD, 4, (0, 4), HND, 16, (1, 3), 8),
    (HND, 16, (0, 4), NHD, 4, (0, 4), 8),
    (NHD, 4, (2, 4), NHD, 16, (0, 4), 64),
    (HND, 6, (0, 4), HND, 9, (0, 4), 7),
    (BLOCKS_FIRST, 4, (0, 3), PLANE_INSIDE, 4, (0, 3), 16),
    (PLANE_INSIDE, 8, (0, 2), NHD, 2, (1, 2), 5),
    (NHD, 1, (0, 2), HND, 8, (0, 2), 32),
    (HND, 16, (0, 1), NHD, 16, (0, 1), 64),
]


def pair_of(case: Any, **dtypes: Any) -> tuple[PagedPool, PagedPool]:
    src_order, src_tokens, src_heads, dst_order, dst_tokens, dst_heads, dim = case
    src_options, dst_options = dtypes.get("src", {}), dtypes.get("dst", {})
    sides = (
        (src_order, src_tokens, src_heads, {"seed": 3} | src_options),
        (dst_order, dst_tokens, dst_heads, dst_options),
    )
    made = [
        PagedPool.make(
            order,
            tokens=tokens,
            heads=heads,
            dim=dim,
            stacked="layer" in order,
            **(SHAPE | options),
        )
        for order, tokens, heads, options in sides
    ]
    return made[0], made[1]


def launch(
    src: PagedPool, dst: PagedPool, span: tuple[int, int], device: str, **options: Any
) -> tuple[int, PagedPool]:
    """Moves tokens on `device`; returns the bytes and the destination afterwards."""
    plan = TokenPlan(src.layout, dst.layout)
    here, there = ([t.to(device, copy=True) for t in pool.tensors] for pool in (src, dst))
    addresses = [np.array([t.data_ptr() for t in side], np.int64) for side in (here, there)]
    tables = [torch.from_numpy(shuffled(pool)).to(device) for pool in (src, dst)]
    moved = 0
    for one in compile_tokens(plan, None, addresses[0], addresses[1], torch.device(device)):
        start, stop = span_of(one, *span, 0)
        moved += relayout(one.move, tables[0], tables[1], start, stop, **options)
    after = dst.clone()
    after.tensors = [t.cpu() for t in there]
    assert moved == plan.nbytes(*span)
    return moved, after


def shuffled(pool: PagedPool) -> np.ndarray[Any, Any]:
    seed = 1 if pool.tensors[0].flatten()[0] == 0xA5 else 2
    return np.random.default_rng(seed).permutation(12)


def expected(src: PagedPool, dst: PagedPool, span: tuple[int, int], cast: Any = None) -> PagedPool:
    return expect_tokens(src, dst, shuffled(src).tolist(), shuffled(dst).tolist(), *span, cast=cast)


@pytest.mark.parametrize("max_programs", [None, 3])
@pytest.mark.parametrize("span", [(0, 8), (3, 11), (5, 6)])
@pytest.mark.parametrize("case", CASES)
def test_tokens_land_and_nothing_else(
    kernel_device: str, case: Any, span: tuple[int, int], max_programs: int | None
) -> None:
    src, dst = pair_of(case)
    _, after = launch(src, dst, span, kernel_device, max_programs=max_programs, tuning=SMALL)
    assert after.equals(expected(src, dst, span))


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    orders=st.tuples(*[st.permutations(AXES[:-1]).map(lambda order: (*order, "dim"))] * 2),
    tokens=st.tuples(*[st.sampled_from([1, 2, 3, 4, 6])] * 2),
    heads=st.tuples(*[st.sampled_from([(0, 4), (0, 2), (1, 3), (1, 2)])] * 2),
    dim=st.sampled_from([1, 4, 8, 20]),
    span=st.tuples(st.integers(0, 11), st.integers(0, 11)).map(sorted),
)
def test_any_layout_to_any_layout(
    kernel_device: str, orders: Any, tokens: Any, heads: Any, dim: int, span: list[int]
) -> None:
    src, dst = pair_of((orders[0], tokens[0], heads[0], orders[1], tokens[1], heads[1], dim))
    _, after = launch(src, dst, (span[0], span[1]), kernel_device, tuning=SMALL)
    assert after.equals(expected(src, dst, (span[0], span[1])))


EXACT = [
    ("float32", "float16"),
    ("float16", "float32"),
    ("bfloat16", "float8_e4m3fn"),
    ("float8_e4m3fn", "bfloat16"),
    ("float8_e5m2", "float16"),
    ("float32", "int8"),
    ("int8", "bfloat16"),
    ("bfloat16", "float8_e5m2"),
]


def scaled(dtype: str, per_head: bool, seed: int) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """Options of a pool with scales that are powers of two, and the scales by plane."""
    heads = 4 if per_head else 1
    drawn = np.exp2(np.random.default_rng(seed).integers(-1, 2, (2, 2, heads))).astype(np.float32)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if dtype not in ("float8_e4m3fn", "float8_e5m2", "int8"):
        return options, np.ones_like(drawn)
    return options | {"scales": {"k": drawn[0], "v": drawn[1]}}, drawn


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtypes", EXACT, ids=" to ".join)
@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_numbers_change_their_type_on_the_way(
    kernel_device: str, case: Any, dtypes: tuple[str, str], per_head: bool
) -> None:
    """Numbers that every type holds exactly: the interpreter rounds otherwise than a GPU."""
    src_options, src_scales = scaled(dtypes[0], per_head, 1)
    dst_options, dst_scales = scaled(dtypes[1], per_head, 2)
    src, dst = pair_of(case, src=src_options, dst=dst_options)
    for tensor in src.tensors:
        whole = torch.randint(-7, 8, tensor.shape, generator=torch.Generator().manual_seed(1)) * 2
        tensor.copy_(whole.to(tensor.dtype))

    def cast(numbers: torch.Tensor, layer: int) -> torch.Tensor:
        factor = torch.from_numpy(src_scales[:, layer] / dst_scales[:, layer])[:, :, None]
        return cast_reference(numbers, factor, dst.tensors[0].dtype)

    _, after = launch(src, dst, (3, 13), kernel_device, tuning=SMALL)
    assert after.equals(expected(src, dst, (3, 13), cast))


@pytest.mark.gpu
@pytest.mark.parametrize("src_dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("dst_dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_a_gpu_rounds_and_saturates_as_torch_does(src_dtype: str, dst_dtype: str) -> None:
    need_cuda()
    if src_dtype == dst_dtype:
        pytest.skip("equal types are moved bit for bit")
    sides = []
    for dtype, seed in ((src_dtype, 1), (dst_dtype, 2)):
        options, scales = scaled(dtype, True, seed)
        if "scales" in options:
            scales = scales * np.float32(0.0173)
            options["scales"] = {"k": scales[0], "v": scales[1]}
        sides.append((options, scales))
    src, dst = pair_of(CASES[0], src=sides[0][0], dst=sides[1][0])
    spread = torch.randn(src.tensors[0].shape, generator=torch.Generator().manual_seed(5))
    for tensor in src.tensors:
        if tensor.dtype.is_floating_point:
            tensor.copy_((spread * torch.exp(3 * spread)).clamp(-400, 400).to(tensor.dtype))

    def cast(numbers: torch.Tensor, layer: int) -> torch.Tensor:
        factor = torch.from_numpy(sides[0][1][:, layer] / sides[1][1][:, layer])[:, :, None]
        return cast_reference(numbers, factor, dst.tensors[0].dtype)

    _, after = launch(src, dst, (0, 48), "cuda")
    assert after.equals(expected(src, dst, (0, 48), cast))


def test_a_launch_tells_its_bytes_and_flags_what_does_not_exist(kernel_device: str) -> None:
    src, dst = pair_of(CASES[0])
    plan = TokenPlan(src.layout, dst.layout)
    here, there = ([t.to(kernel_device) for t in pool.tensors] for pool in (src, dst))
    addresses = [np.array([t.data_ptr() for t in side], np.int64) for side in (here, there)]
    (one,) = compile_tokens(plan, None, addresses[0], addresses[1], torch.device(kernel_device))
    state = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    counter = torch.zeros(1, dtype=torch.int64, device=kernel_device)
    signal = Signal(state, counter.data_ptr())
    good = torch.arange(12, device=kernel_device)
    nbytes = relayout(one.move, good, good, 0, 20, signal=signal, tuning=SMALL)
    assert int(counter) == nbytes == plan.nbytes(0, 20)
    assert state.tolist() == [0, 0]
    bad = good.clone()
    bad[1] = 12
    before = [t.clone() for t in there]
    relayout(one.move, bad, good, 4, 8, signal=signal, tuning=SMALL)
    assert state.tolist() == [0, 1]
    assert int(counter) == nbytes
    assert all(map(torch.equal, before, there))
    with pytest.raises(ShapeError, match="src_table has 2 blocks of 4 tokens, token 8 is asked"):
        relayout(one.move, good[:2], good, 0, 9)
    with pytest.raises(ShapeError, match="dst_table must be int32 or int64"):
        relayout(one.move, good, good.float(), 0, 4)


def test_units_beside_each_other_at_the_destination_are_walked_side_by_side() -> None:
    src, dst = pair_of(CASES[0])
    plan = TokenPlan(src.layout, dst.layout)
    nowhere = np.zeros(2, np.int64)
    (one,) = compile_tokens(plan, None, nowhere, nowhere, torch.device("cpu"))
    assert (one.move.walk.group, one.move.walk.tokens, one.move.walk.token_axis) == (4, 4, 2)
    assert walk_constants(one.move.walk, False, SMALL).unit_chunks == 16
