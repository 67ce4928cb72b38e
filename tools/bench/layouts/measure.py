"""Measures moves between caches that differ, from GPU to GPU, beside a push of equal ones.

PYTHONPATH=src python3 -m kvferry.tools.bench.layouts.measure

The kernels run in one process that reaches both GPUs: what is measured is what a link launches.
Blocks are random and scattered on both sides, in pools of twice what moves. Results are compared
first; every figure is the median of several launches, by CUDA events.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.plan.token_plan import TokenPlan
from kvferry.engine.transports.cuda_ipc.tokens import compile_tokens, span_of
from kvferry.kernels.paged import Geometry, PagedCache
from kvferry.kernels.relayout import relayout
from kvferry.tools.bench import figures
from kvferry.tools.bench.kernels.operations import Side, copy_blocks
from kvferry.tools.bench.layouts.caches import HND, NHD, Cache, Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    Int64s = np.ndarray[tuple[int], np.dtype[np.int64]]

NUM_LAYERS = 16
REPEATS = 11
PLAN_TOKENS, PLAN_LAYERS = 131072, 80


@dataclasses.dataclass(frozen=True)
class Row:
    """One move: source bytes a second, against the plain push of the same run."""

    name: str
    src_nbytes: int
    gb_per_s: float
    of_plain: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What `--json` writes."""

    device: str
    versions: dict[str, str]
    rows: list[Row]
    permute_gb_per_s: float
    permute_extra_nbytes: int
    plan_first_ms: float
    plan_cached_ms: float


def on_gpu(shape: Shape, num_tokens: int, *, far: bool = False) -> Cache:
    """Return a cache of twice the blocks of its request: empty at the far end, else of random
    numbers."""
    device = figures.far_gpu() if far else 0
    cache = Cache(shape, num_tokens, layers=NUM_LAYERS, spare=2, device=device)
    for pool in () if far else cache.pools:
        pool.copy_(torch.randn(pool.shape, device=pool.device, dtype=torch.float16))
    return cache


def addresses(cache: Cache) -> Int64s:
    """Return where each tensor of a cache lies."""
    return np.array([tensor.data_ptr() for tensor in cache.tensors], np.int64)


def timed(launch: Callable[[], object]) -> float:
    """Seconds of one launch on the current GPU, with everything that the other still does for it."""
    launch()
    return figures.gpu_median_s(launch, REPEATS, figures.sleep)


def mover(src: Cache, dst: Cache, num_tokens: int) -> Callable[[], object]:
    """Return a launch that moves the request; check it once."""
    plan = TokenPlan(src.layout, dst.layout)
    device = torch.device("cuda", 0)
    launches = compile_tokens(plan, None, addresses(src), addresses(dst), device)
    tables = src.ids, dst.ids.to(device)

    def run() -> None:
        for launch in launches:
            start, stop = span_of(launch, 0, num_tokens, 0)
            relayout(launch.move, tables[0], tables[1], start, stop)

    run()
    torch.cuda.synchronize()
    check(src, dst)
    return run


def check(src: Cache, dst: Cache) -> None:
    """Raise WrongBytes unless the heads that both hold are the source's, cast as PyTorch does."""
    low, high = _common_heads(src.shape, dst.shape)
    mine, theirs = (
        slice(low - cache.shape.heads[0], high - cache.shape.heads[0]) for cache in (src, dst)
    )
    for layer in (0, NUM_LAYERS - 1):
        dst.check(layer, src.request(layer)[:, :, mine], theirs)


def _common_heads(src: Shape, dst: Shape) -> tuple[int, int]:
    return max(src.heads[0], dst.heads[0]), min(src.heads[1], dst.heads[1])


def plain_push(src: Cache, dst: Cache) -> Callable[[], object]:
    """Return the same number of bytes between equal caches, by the kernel that moves whole
    blocks."""
    shape = src.shape
    block_nbytes = shape.tokens * shape.token_nbytes
    device = torch.device("cuda", 0)
    sides = []
    for cache in (src, dst):
        planes = [plane.data_ptr() for pool in cache.pools for plane in pool]
        geometry = Geometry(cache.pools[0].shape[1], 1, 1, *(block_nbytes,) * 4, 1)
        sides.append(PagedCache.from_addresses(planes, geometry, device))
    order = np.argsort(dst.table)  # as a plan of blocks orders them
    ids = [torch.from_numpy(cache.table[order]).to(device) for cache in (src, dst)]
    ends = [Side(side, each) for side, each in zip(sides, ids, strict=True)]
    return lambda: copy_blocks(ends[0], ends[1], len(order))


def permute(temporary: Cache, dst: Cache) -> Callable[[], object]:
    """Return what a receiver does that got the source's layout: gather, permute and scatter in
    PyTorch."""
    low = temporary.shape.heads[0] - dst.shape.heads[0]
    heads = slice(low, low + temporary.shape.num_heads)
    tokens = dst.shape.tokens

    def run() -> None:
        for layer in range(NUM_LAYERS):
            got = temporary.pools[layer][:, temporary.ids].flatten(1, 2)
            blocks = got.reshape(2, -1, tokens, *got.shape[2:]).transpose(2, 3)
            dst.pools[layer][:, dst.ids, heads] = blocks

    return run


def plan_ms() -> tuple[float, float]:
    """Host milliseconds for a long request: the first plan of a pair, and a cached one."""
    src = _imaginary(Shape(NHD, 16), 20_000)
    dst = _imaginary(Shape(HND, 64), 5_000)
    random = np.random.default_rng(0)
    tables = [[random.permutation(20_000)[:8192]], [random.permutation(5_000)[:2048]]]
    begin_s = time.perf_counter()
    plan = TokenPlan(src, dst)
    plan.template(0, 0, plan.pairs[0].unit, None)
    plan.check(plan.pairs[0], tables[0], tables[1], 0, PLAN_TOKENS)
    plan.nbytes(0, PLAN_TOKENS)
    first_s = time.perf_counter() - begin_s
    cached = []
    for _ in range(REPEATS):
        begin_s = time.perf_counter()
        plan.check(plan.pairs[0], tables[0], tables[1], 0, PLAN_TOKENS)
        plan.nbytes(0, PLAN_TOKENS)
        cached.append(time.perf_counter() - begin_s)
    return first_s * 1e3, statistics.median(cached) * 1e3


def _imaginary(shape: Shape, num_blocks: int) -> KVLayout:
    """Return a large cache that nobody allocates: 80 layers."""
    size = shape.sizes(num_blocks)
    tensors = [torch.empty(size, dtype=shape.dtype, device="meta")] * PLAN_LAYERS
    return KVLayout.from_tensors(tensors, shape.order)


def measure(*, total_nbytes: int = 1 << 30) -> Report:
    """Run everything.

    Raises:
        WrongBytes: a move did not do what it should.
    """
    first, cached = plan_ms()
    print(f"planning 131072 tokens: first {first:.2f} ms, then {cached:.3f} ms", flush=True)
    torch.empty(1, device=figures.far_gpu()).copy_(
        torch.empty(1, device="cuda:0")
    )  # enables peer access
    bf16 = Shape(NHD, 16)
    rows: list[Row] = []

    def row(name: str, src: Shape, dst: Shape, plain_s_per_byte: float) -> None:
        num_tokens = total_nbytes // (2 * NUM_LAYERS * src.token_nbytes)
        low, high = _common_heads(src, dst)
        share = (high - low) / src.num_heads
        caches = on_gpu(src, num_tokens), on_gpu(dst, num_tokens, far=True)
        seconds = timed(mover(*caches, num_tokens))
        moved = int(2 * NUM_LAYERS * src.token_nbytes * num_tokens * share)
        speed = moved / seconds
        rows.append(Row(name, moved, speed / 1e9, speed * plain_s_per_byte))
        print(f"{name}: {speed / 1e9:.1f} GB/s, {rows[-1].of_plain:.2f} of plain", flush=True)

    num_tokens = total_nbytes // (2 * NUM_LAYERS * bf16.token_nbytes)
    equal = on_gpu(bf16, num_tokens), on_gpu(bf16, num_tokens, far=True)
    seconds = timed(plain_push(*equal))
    check(*equal)
    unit = seconds / total_nbytes
    rows.append(Row("plain push, NHD 16, 8 heads", total_nbytes, 1e-9 / unit, 1.0))
    print(f"plain push {1e-9 / unit:.1f} GB/s", flush=True)
    wide = on_gpu(Shape(HND, 64, (0, 16)), num_tokens, far=True)
    permuting = permute(equal[1], wide)
    permuting()
    torch.cuda.synchronize()
    check(equal[0], wide)
    with torch.cuda.device(figures.far_gpu()):
        permuted_s = seconds + timed(permuting)
    print(f"push, then permute: {total_nbytes / permuted_s / 1e9:.1f} GB/s", flush=True)
    del equal, wide, permuting
    torch.cuda.empty_cache()
    fp8 = torch.float8_e4m3fn
    for name, src, dst in (
        ("NHD 16 to NHD 16", bf16, bf16),
        ("TP4 to TP2, NHD 16 to HND 64", bf16, Shape(HND, 64, (0, 16), 128)),
        ("TP4 to TP8, NHD 16 to HND 64", bf16, Shape(HND, 64, (0, 4), 128)),
        ("HND 64 to NHD 16", Shape(HND, 64, (0, 8), 128), bf16),
        ("NHD 16 to HND 16", bf16, Shape(HND, 16, (0, 8), 128)),
        ("bf16 to fp8, a scale a tensor", bf16, Shape(NHD, 16, (0, 8), 128, fp8, 1)),
        ("bf16 to fp8, a scale a head", bf16, Shape(NHD, 16, (0, 8), 128, fp8, 8)),
        ("bf16 to fp8, a scale a head, HND 64", bf16, Shape(HND, 64, (0, 8), 128, fp8, 8)),
        ("bf16 to fp8, a scale a block and head", bf16, Shape(NHD, 16, (0, 8), 128, fp8, 8, True)),
        ("bf16 to fp8, a scale a block and head, HND 64", bf16, Shape(HND, 64, (0, 8), 128, fp8, 8, True)),
        ("one head of 64 out of 8, NHD", Shape(NHD, 16, (0, 8), 64), Shape(NHD, 16, (3, 4), 64)),
        ("one head of 64 into 8, NHD", Shape(NHD, 16, (3, 4), 64), Shape(NHD, 16, (0, 8), 64)),
        ("8 heads of 64, NHD 16 to HND 16", Shape(NHD, 16, (0, 8), 64), Shape(HND, 16, (0, 8), 64)),
    ):  # fmt: skip
        row(name, src, dst, unit)
        torch.cuda.empty_cache()
    versions = figures.gpu_versions()
    permute_speed = total_nbytes / permuted_s / 1e9
    name = torch.cuda.get_device_name(0)
    return Report(name, versions, rows, permute_speed, total_nbytes, first, cached)


def show(report: Report) -> None:
    """Print the report as a table."""
    print(f"{report.device}; {report.versions}")
    print(f"{'move':<46} {'MiB':>6} {'GB/s':>7} {'of plain':>8}")
    for row in report.rows:
        print(f"{row.name:<46} {row.src_nbytes >> 20:>6} {row.gb_per_s:7.1f} {row.of_plain:8.2f}")
    print(
        f"equal layout first, then permuted by PyTorch at the receiver: "
        f"{report.permute_gb_per_s:.1f} GB/s and {report.permute_extra_nbytes >> 20} MiB more memory"
    )
    print(
        f"planning {PLAN_TOKENS} tokens of {PLAN_LAYERS} layers: {report.plan_first_ms:.2f} ms the "
        f"first time, {report.plan_cached_ms:.3f} ms then"
    )


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    report = measure()
    show(report)
    figures.write_json(sys.argv[1] if len(sys.argv) > 1 else None, report)


if __name__ == "__main__":
    main()
