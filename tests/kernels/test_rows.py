"""Rows that change their type: what becomes of them, of what lies between them, and how wide they go.

The interpreter truncates bf16 and rounds fp8 wrongly, so the numbers here are exact in both types; a
GPU, where there is one, takes any.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.kernels import rows as rows_module
from kvferry.kernels.cast import cast_reference
from kvferry.kernels.errors import ShapeError
from kvferry.kernels.rows import (
    NARROW_WORDS,
    WIDE_WORDS,
    RowTypes,
    find_maxima,
    move_rows,
    row_constants,
    row_types,
    rows_kernel,
)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

compiler = pytest.importorskip("triton.compiler", reason="Triton exists for Linux alone")
backend = pytest.importorskip("triton.backends.compiler")

SENTINEL = 0x5A
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
PAIRS = [
    (BF16, FP8),
    (FP8, BF16),
    (FP16, INT8),
    (INT8, FP32),
    (FP32, E5M2),
    (FP8, INT8),
    (FP32, FP16),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter goes number by number where it reduces."""
    monkeypatch.setattr(rows_module, "TILE_WORDS", 256)
    monkeypatch.setattr(rows_module, "WIDE_WORDS", 256)


class Rows:
    """Rows at random places, at both ends, and all memory around them."""

    def __init__(
        self,
        count: int,
        elements: int,
        types: tuple[torch.dtype, torch.dtype],
        device: str,
        seed: int,
    ) -> None:
        draw = np.random.default_rng(seed)
        self.elements, self.types, self.device = elements, types, device
        spans = [elements * dtype.itemsize + 16 for dtype in types]
        self.memory = [
            torch.full((span * (count + 1) + 16,), SENTINEL, dtype=torch.uint8, device=device)
            for span in spans
        ]
        self.offsets = []
        for memory, span, dtype in zip(self.memory, spans, types, strict=True):
            places = draw.permutation(count + 1)[:count] * span
            slack = draw.integers(0, 16 // dtype.itemsize, count) * dtype.itemsize
            base = -memory.data_ptr() % dtype.itemsize
            self.offsets.append(
                (base + (places + slack) // dtype.itemsize * dtype.itemsize).tolist()
            )
        self.factors = torch.from_numpy(np.exp2(draw.integers(-1, 2, count)).astype(np.float32))
        self.numbers = torch.from_numpy(draw.integers(-7, 8, (count, elements)) * 2.0).to(types[0])
        for offset, row in zip(self.offsets[0], self.numbers, strict=True):
            raw = row.view(torch.uint8).to(device)
            self.memory[0][offset : offset + len(raw)] = raw

    def addresses(self, side: int) -> npt.NDArray[np.int64]:
        return self.memory[side].data_ptr() + np.array(self.offsets[side], np.int64)

    def table(self, dst: npt.NDArray[np.int64]) -> torch.Tensor:
        both = np.concatenate([self.addresses(0), dst])
        return torch.from_numpy(both).to(self.device)

    def expected(self) -> torch.Tensor:
        after = self.memory[1].cpu().clone()
        rows = cast_reference(self.numbers, self.factors[:, None], self.types[1])
        for offset, row in zip(self.offsets[1], rows, strict=True):
            raw = row.view(torch.uint8)
            after[offset : offset + len(raw)] = raw
        return after


def convert(rows: Rows, max_programs: int) -> torch.Tensor:
    expected = rows.expected()
    src, dst = rows.addresses(0), rows.addresses(1)
    types = row_types(src, dst, rows.elements, *rows.types)
    table, factors = rows.table(dst), rows.factors.to(rows.device)
    move_rows(
        types,
        table.data_ptr(),
        factors.data_ptr(),
        len(src),
        rows.elements,
        max_programs=max_programs,
    )
    assert torch.equal(rows.memory[1].cpu(), expected)
    return expected


@pytest.mark.parametrize("max_programs", [1, 64])
@pytest.mark.parametrize(
    ("count", "elements"), [(1, 1), (63, 16), (5, NARROW_WORDS), (3, 700), (9, 256)]
)
@pytest.mark.parametrize("types", PAIRS[:2])
def test_rows_are_converted_and_nothing_else(
    kernel_device: str, types: Any, count: int, elements: int, max_programs: int
) -> None:
    convert(Rows(count, elements, types, kernel_device, 1), max_programs)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    types=st.sampled_from(PAIRS),
    count=st.integers(1, 40),
    elements=st.integers(1, 300),
    max_programs=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_rows_of_any_types(
    kernel_device: str, types: Any, count: int, elements: int, max_programs: int, seed: int
) -> None:
    convert(Rows(count, elements, types, kernel_device, seed), max_programs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_bits_are_moved_as_they_are(kernel_device: str, dtype: torch.dtype) -> None:
    rows = Rows(20, 40, (dtype, dtype), kernel_device, 2)
    rows.factors = torch.ones(20)
    table = rows.table(rows.addresses(1))
    types = row_types(rows.addresses(0), rows.addresses(1), 40, dtype, dtype)
    expected = rows.expected()
    move_rows(types, table.data_ptr(), None, 20, 40, max_programs=3)
    assert torch.equal(rows.memory[1].cpu(), expected)


@pytest.mark.parametrize("elements", [1, 100, 700])
@pytest.mark.parametrize("dtype", [BF16, FP32, INT8, FP8])
def test_the_largest_magnitude_of_each_row(
    kernel_device: str, dtype: torch.dtype, elements: int
) -> None:
    rows = Rows(37, elements, (dtype, FP32), kernel_device, 4)
    if dtype == FP32:
        for row, value in ((3, float("nan")), (5, float("inf")), (7, float("-inf"))):
            at = rows.offsets[0][row]
            rows.numbers[row, -1] = value
            rows.memory[0][at : at + 4 * elements] = rows.numbers[row].view(torch.uint8)
    out = torch.full((39,), -1.0, device=kernel_device)
    found = out.data_ptr() + 4 * np.arange(1, 38)
    table, factors = rows.table(found), rows.factors.to(kernel_device)
    types = row_types(rows.addresses(0), rows.addresses(0), elements, dtype, dtype)
    find_maxima(types, table.data_ptr(), factors.data_ptr(), 37, elements, max_programs=3)
    real = (rows.numbers.float() * rows.factors[:, None]).abs()
    assert torch.equal(out[1:-1].cpu(), torch.nan_to_num(real, nan=0.0).amax(dim=1))
    assert out[0] == out[-1] == -1


@pytest.mark.gpu
@pytest.mark.parametrize("types", PAIRS)
def test_a_gpu_rounds_and_saturates_as_torch_does(types: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch sees none")
    rows = Rows(200, 333, types, "cuda", 3)
    draw = torch.Generator().manual_seed(9)
    numbers = torch.randn(rows.numbers.shape, generator=draw)
    rows.numbers = (numbers * torch.exp(3 * numbers)).clamp(-400, 400).to(types[0])
    rows.factors *= 0.0173
    for offset, row in zip(rows.offsets[0], rows.numbers, strict=True):
        raw = row.view(torch.uint8)
        rows.memory[0][offset : offset + len(raw)] = raw.cuda()
    convert(rows, 32)


def test_what_no_kernel_could_read_is_refused() -> None:
    even, odd = np.array([16, 32]), np.array([16, 33])
    assert row_types(even, even, 8, BF16, BF16) == RowTypes(BF16, BF16, 16, 16)
    assert row_types(even, even, 9, BF16, BF16) == RowTypes(BF16, BF16, 2, 2)
    assert row_types(even, even + 8, 8, BF16, FP32) == RowTypes(BF16, FP32, 16, 4)
    with pytest.raises(ShapeError, match="destination do not lie at multiples of 2 bytes"):
        row_types(even, odd, 8, FP8, BF16)
    with pytest.raises(ShapeError, match="sources, but"):
        row_types(even, odd[:1], 8, FP8, FP8)


@pytest.mark.parametrize("elements", [NARROW_WORDS, WIDE_WORDS])
@pytest.mark.parametrize("types", PAIRS)
def test_rows_compile_and_go_16_bytes_at_a_time(
    types: Any, elements: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()  # the tiles that are used
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    aligned = np.array([16])
    rows = row_types(aligned, aligned, elements, *types)
    named = [param.name for param in rows_kernel.params if param.is_constexpr]
    constants = row_constants(rows, elements, converts=True)
    constexprs: dict[str, Any] = dict(zip(named, constants, strict=True))
    signature = {
        param.name: "constexpr" if param.is_constexpr else "i64" for param in rows_kernel.params
    }
    source = compiler.ASTSource(fn=rows_kernel, signature=signature, constexprs=constexprs)
    done = compiler.compile(
        source, target=backend.GPUTarget("cuda", 90, 32), options={"num_warps": 8}
    )
    ptx = str(done.asm["ptx"])
    assert re.search(r"ld\.global\.(v4\.b32|v2\.b64)", ptx)
    assert re.search(r"st\.global\.(v4\.b32|v2\.b64)", ptx)
