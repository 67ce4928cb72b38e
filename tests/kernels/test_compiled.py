"""The kernel compiled for a GPU that need not be there: it compiles, and its accesses are wide."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.kernels.copy import copy_kernel, kernel_constants
from kvferry.kernels.tiles import LARGE, SMALL, Tuning
from tests.kernels.conftest import cache_of, entries_of

if TYPE_CHECKING:
    from pathlib import Path

    from kvferry.kernels.paged import PagedCache

compiler = pytest.importorskip("triton.compiler", reason="Triton exists for Linux alone")
backend = pytest.importorskip("triton.backends.compiler")

OPERATIONS = {
    "gather": {"dst_bases": "i64", "dst_ids": None, "finished": None},
    "scatter": {"src_bases": "i64", "src_ids": None, "finished": None},
    "push": {},
    "graph push": {"order": "*i64", "gate": "*i64", "log": "*i64", "bad_ids": None},
}


def compile_to_ptx(operation: str, cache: PagedCache, tuning: Tuning, *, loop: bool) -> str:
    """Runs the whole compiler for an H200; its assembler checks the result."""
    geometry = cache.geometry
    constants = kernel_constants(
        None if operation == "scatter" else geometry,
        None if operation == "gather" else geometry,
        16,
        tuning,
    )
    values = dict(
        zip(
            [param.name for param in copy_kernel.params if param.is_constexpr],
            [*constants.arguments, loop, 1 << 16, 1 << 14],
            strict=True,
        )
    )
    types: dict[str, str | None] = {
        "src_bases": "*i64",
        "dst_bases": "*i64",
        "src_ids": "*i32",
        "dst_ids": "*i64",
        "bad_ids": "*i32",
        "finished": "*i64",
        "order": None,
        "gate": None,
        "log": None,
        **OPERATIONS[operation],
    }
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = dict(values)
    for param in copy_kernel.params:
        kind = types.get(param.name, "i64")
        if kind is None:
            constexprs[param.name] = None
        signature[param.name] = "constexpr" if param.name in constexprs else str(kind)
    source = compiler.ASTSource(fn=copy_kernel, signature=signature, constexprs=constexprs)
    target = backend.GPUTarget("cuda", 90, 32)
    done = compiler.compile(source, target=target, options={"num_warps": tuning.num_warps})
    return str(done.asm["ptx"])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("loop", [False, True], ids=["grid", "capped"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("heads", "dim", "tuning"), [(8, 128, LARGE), (2, 64, SMALL), (1, 576, LARGE)]
)
def test_aligned_words_move_16_bytes_at_a_time(
    operation: str, heads: int, dim: int, tuning: Tuning, loop: bool
) -> None:
    layer = torch.empty(2, 4, 16, heads, dim, dtype=torch.bfloat16)
    cache = cache_of(entries_of([layer], "plane block token head dim"))
    ptx = compile_to_ptx(operation, cache, tuning, loop=loop)
    wide_loads = re.findall(r"ld\.global\.v2\.b64|ld\.global\.v4\.b32", ptx)
    wide_stores = re.findall(r"st\.global\.v2\.b64|st\.global\.v4\.b32", ptx)
    wanted = tuning.tile_nbytes // (tuning.num_warps * 32 * 16)
    assert (len(wide_loads), len(wide_stores)) == (wanted, wanted)


def test_only_the_last_program_touches_the_counter_of_the_peer() -> None:
    cache = cache_of(entries_of([torch.empty(2, 4, 16, 8)], "plane block token dim"))
    ptx = compile_to_ptx("push", cache, LARGE, loop=False)
    assert len(re.findall(r"(?:atom|red)\.global\.sys\.release\.add\.u64", ptx)) == 1
    assert len(re.findall(r"atom\.global\.gpu\.acq_rel\.add\.u64", ptx)) == 1


def test_nothing_of_an_unused_feature_is_compiled() -> None:
    cache = cache_of(entries_of([torch.empty(2, 4, 16, 8)], "plane block token dim"))
    ptx = compile_to_ptx("gather", cache, LARGE, loop=False)
    assert "atom" not in ptx
