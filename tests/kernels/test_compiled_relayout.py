"""The kernel that changes layouts, compiled for a GPU that need not be there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.plan.token_plan import TokenPlan
from kvferry.engine.transports.cuda_ipc.tokens import compile_tokens
from kvferry.kernels.relayout import relayout_kernel, scale_constants
from kvferry.kernels.tiles import LARGE, SMALL, Tuning
from kvferry.kernels.walk import walk_constants
from tests.support.caches import PagedPool
from tests.support.scaled_caches import Scaled

if TYPE_CHECKING:
    from pathlib import Path

    from kvferry.kernels.relayout import Relayout

compiler = pytest.importorskip("triton.compiler", reason="Triton exists for Linux alone")
backend = pytest.importorskip("triton.backends.compiler")

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
TYPES = {
    "src_bases": "*i64",
    "src_table": "*i64",
    "dst_bases": "*i64",
    "dst_table": "*i64",
    "bad_ids": "*i32",
    "finished": "*i32",
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def move_of(src: str = "bfloat16", dst: str = "bfloat16") -> Relayout:
    pools = [
        PagedPool.make(
            order,
            tokens=tokens,
            heads=(0, 4),
            dim=128,
            layers=(0,),
            num_blocks=2,
            stacked=False,
            dtype=getattr(torch, dtype),
            scales={plane: np.ones((1, 4), np.float32) for plane in "kv"}
            if dtype in ("float8_e4m3fn", "int8")
            else None,
        )
        for order, tokens, dtype in ((NHD, 16, src), (HND, 64, dst))
    ]
    plan = TokenPlan(pools[0].layout, pools[1].layout)
    nowhere = np.zeros(1, np.int64)
    (one,) = compile_tokens(plan, None, nowhere, nowhere, torch.device("cpu"))
    return one.move


def compile_to_ptx(
    move: Relayout, tuning: Tuning, *, loop: bool, find: bool = False, **types: str
) -> str:
    """Runs the whole compiler for an H200; its assembler checks the result."""
    converts = move.factors is not None
    constants = walk_constants(move.walk, converts, tuning)
    named = [param.name for param in relayout_kernel.params if param.is_constexpr]
    constexprs: dict[str, Any] = dict(
        zip(named, [*constants.arguments, *scale_constants(move), find, loop], strict=True)
    )
    kinds = {**TYPES, **({"factors": "*fp32"} if converts else {}), **types}
    pointers = {"factors", "src_scales", "chosen"}
    signature: dict[str, str] = {}
    for param in relayout_kernel.params:
        if param.name in pointers and param.name not in kinds:
            constexprs[param.name] = None
        kind = "constexpr" if param.name in constexprs else kinds.get(param.name, "i64")
        signature[param.name] = kind
    source = compiler.ASTSource(fn=relayout_kernel, signature=signature, constexprs=constexprs)
    target = backend.GPUTarget("cuda", 90, 32)
    done = compiler.compile(source, target=target, options={"num_warps": tuning.num_warps})
    return str(done.asm["ptx"])


@pytest.mark.parametrize("loop", [False, True], ids=["grid", "capped"])
def test_bits_move_16_bytes_at_a_time(loop: bool) -> None:
    ptx = compile_to_ptx(move_of(), LARGE, loop=loop)
    wanted = LARGE.tile_nbytes // (LARGE.num_warps * 32 * 16)
    assert len(re.findall(r"ld\.global\.v2\.b64|ld\.global\.v4\.b32", ptx)) == wanted
    assert len(re.findall(r"st\.global\.v2\.b64|st\.global\.v4\.b32", ptx)) == wanted
    assert len(re.findall(r"(?:atom|red)\.global\.sys\.release\.add\.u64", ptx)) == 1


@pytest.mark.parametrize("types", [("bfloat16", "float8_e4m3fn"), ("int8", "bfloat16")])
def test_conversions_compile(types: tuple[str, str]) -> None:
    assert "cvt" in compile_to_ptx(move_of(*types), LARGE, loop=False)


@pytest.mark.parametrize("find", [False, True], ids=["convert", "find"])
def test_scales_of_blocks_compile(find: bool) -> None:
    src, dst = Scaled(NHD, 4, torch.int8, seed=3), Scaled(HND, 8, torch.float8_e4m3fn)
    plan = TokenPlan(src.layout, dst.layout)
    nowhere = np.zeros(4, np.int64)
    (one,) = compile_tokens(plan, None, nowhere, nowhere, torch.device("cpu"))
    more = {"src_scales": "*i64", "chosen": "*fp32"}
    ptx = compile_to_ptx(one.move, SMALL, loop=False, find=find, **more)
    assert ("div.rn.f32" in ptx) is not find
    assert ("atom.global.gpu" in ptx and ".max" in ptx) is find
