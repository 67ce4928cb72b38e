"""Measures moves between caches that differ, from GPU 0 to GPU 1, beside a push of equal ones.

PYTHONPATH=src python3 -m kvferry.tools.bench.layouts.measure

The kernels run in one process that reaches both GPUs: what is measured is what a link launches.
Blocks are random and scattered on both sides, in pools of twice what moves. Results are compared
first; every figure is the median of several launches, by CUDA events.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvferry.engine.layout.join import join_planes
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.plan.token_plan import TokenPlan
from kvferry.engine.transports.cuda_ipc.tokens import compile_tokens, span_of
from kvferry.kernels.cast import LIMITS, cast_reference
from kvferry.kernels.paged import Geometry, PagedCache
from kvferry.kernels.relayout import relayout
from kvferry.tools.bench.kernels.operations import Side, copy_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

NHD, HND = "plane block token head dim", "plane block head token dim"
NUM_LAYERS = 16
REPEATS = 11
PLAN_TOKENS, PLAN_LAYERS = 131072, 80


@dataclasses.dataclass(frozen=True)
class Shape:
    """One rank's cache.

    Attributes:
        heads: range of the model's heads.
        scales: numbers a plane of a layer has: 0, 1, or one a head.
        by_block: these lie beside the cache, as many for each block, and a transfer makes them.
    """

    order: str
    tokens: int
    heads: tuple[int, int]
    dim: int
    dtype: torch.dtype = torch.bfloat16
    scales: int = 0
    by_block: bool = False

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token of one plane."""
        return (self.heads[1] - self.heads[0]) * self.dim * self.dtype.itemsize


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


class WrongBytes(Exception):
    """Bytes arrived wrong: no figure is worth printing."""


class Cache:
    """One rank's cache on one GPU, a tensor a layer."""

    def __init__(self, shape: Shape, num_tokens: int, device: int, *, random: bool) -> None:
        num_blocks = 2 * -(-num_tokens // shape.tokens)
        sizes = {
            "plane": 2,
            "block": num_blocks,
            "token": shape.tokens,
            "head": shape.heads[1] - shape.heads[0],
            "dim": shape.dim,
        }
        self.shape = shape
        size = [sizes[name] for name in shape.order.split()]
        self.tensors = []
        for _ in range(NUM_LAYERS):
            tensor = torch.zeros(size, dtype=shape.dtype, device=f"cuda:{device}")
            if random:
                tensor.copy_(torch.randn(size, device=f"cuda:{device}", dtype=torch.float16))
            self.tensors.append(tensor)
        drawn = np.random.default_rng(1).uniform(0.01, 0.05, (NUM_LAYERS, max(1, shape.scales)))
        self.scales = drawn.astype(np.float32)
        fixed = shape.scales and not shape.by_block
        self.layout = KVLayout.from_tensors(
            self.tensors,
            shape.order,
            head_start=shape.heads[0],
            scales={"k": self.scales, "v": self.scales} if fixed else None,
        )
        self.block_scales = []
        if shape.by_block:
            self.block_scales = [
                torch.zeros(2, num_blocks, shape.scales, 1, device=f"cuda:{device}")
                for _ in range(NUM_LAYERS)
            ]
            beside = KVLayout.from_tensors(
                self.block_scales,
                "plane block head dim",
                planes=["k_scale", "v_scale"],
                tokens_per_block=shape.tokens,
                head_start=shape.heads[0],
            )
            self.layout = join_planes(self.layout, beside)
        regions = self.tensors + self.block_scales
        self.addresses = np.array([tensor.data_ptr() for tensor in regions], np.int64)
        random_ids = np.random.default_rng(device + shape.tokens).permutation(num_blocks)
        self.table = random_ids[: -(-num_tokens // shape.tokens)].astype(np.int64)

    def logical(self, layer: int) -> torch.Tensor:
        """A view `[plane, block, token, head, dim]`."""
        view = self.tensors[layer]
        return view if self.shape.order == NHD else view.transpose(2, 3)

    def request(self, layer: int) -> torch.Tensor:
        """The request's numbers, `[plane, token, head, dim]`: a copy."""
        ids = torch.from_numpy(self.table).to(self.tensors[layer].device)
        return self.logical(layer)[:, ids].flatten(1, 2)


def timed(launch: Callable[[], object]) -> float:
    """Seconds of one launch on GPU 0, with everything that GPU 1 still does for it."""
    launch()
    seconds = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
        begin.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(seconds))


def mover(src: Cache, dst: Cache, num_tokens: int) -> Callable[[], object]:
    """A launch that moves the request; checks it once."""
    plan = TokenPlan(src.layout, dst.layout)
    device = torch.device("cuda", 0)
    launches = compile_tokens(plan, None, src.addresses, dst.addresses, device)
    tables = [torch.from_numpy(cache.table).to(device) for cache in (src, dst)]

    def run() -> None:
        for launch in launches:
            start, stop = span_of(launch, 0, num_tokens, 0)
            relayout(launch.move, tables[0], tables[1], start, stop)

    run()
    torch.cuda.synchronize()
    check(src, dst, num_tokens)
    return run


def check(src: Cache, dst: Cache, num_tokens: int) -> None:
    """Raises WrongBytes unless the heads that both hold are the source's, cast as PyTorch does."""
    low, high = max(src.shape.heads[0], dst.shape.heads[0]), min(src.shape.heads[1], dst.shape.heads[1])  # fmt: skip
    for layer in (0, NUM_LAYERS - 1):
        sent = src.request(layer)[:, :num_tokens, low - src.shape.heads[0] : high - src.shape.heads[0]]  # fmt: skip
        came = dst.request(layer)[:, :num_tokens, low - dst.shape.heads[0] : high - dst.shape.heads[0]]  # fmt: skip
        if dst.shape.by_block:
            sent = by_block(sent, dst, layer)
        elif dst.shape.dtype != src.shape.dtype:
            factor = torch.from_numpy(np.float32(1.0) / dst.scales[layer]).to(sent.device)[:, None]
            sent = cast_reference(sent, factor, dst.shape.dtype)
        if not torch.equal(
            sent.contiguous().view(torch.uint8).cpu(), came.contiguous().view(torch.uint8).cpu()
        ):
            raise WrongBytes


def by_block(sent: torch.Tensor, dst: Cache, layer: int) -> torch.Tensor:
    """Numbers `[plane, token, head, dim]` as `dst` should hold them; checks the scales it made."""
    planes, _, heads, dim = sent.shape
    blocks = sent.to(torch.float32).reshape(planes, -1, dst.shape.tokens, heads, dim)
    scales = blocks.abs().amax((2, 4)) * torch.tensor(1 / LIMITS[dst.shape.dtype])
    ids = torch.from_numpy(dst.table).to("cuda:1")
    if not torch.equal(dst.block_scales[layer][:, ids, :, 0].cpu(), scales.cpu()):
        raise WrongBytes
    return cast_reference(blocks, (1 / scales)[:, :, None, :, None], dst.shape.dtype).flatten(1, 2)


def plain_push(src: Cache, dst: Cache) -> Callable[[], object]:
    """The same number of bytes between equal caches, by the kernel that moves whole blocks."""
    shape = src.shape
    block_nbytes = shape.tokens * shape.token_nbytes
    device = torch.device("cuda", 0)
    sides = []
    for cache in (src, dst):
        plane = cache.tensors[0].stride(0) * shape.dtype.itemsize
        addresses = [int(base) + p * plane for base in cache.addresses for p in range(2)]
        geometry = Geometry(
            cache.tensors[0].shape[1], 1, 1, block_nbytes, block_nbytes, block_nbytes, block_nbytes, 1
        )  # fmt: skip
        sides.append(PagedCache.from_addresses(addresses, geometry, device))
    order = np.argsort(dst.table)  # as a plan of blocks orders them
    ids = [torch.from_numpy(cache.table[order]).to(device) for cache in (src, dst)]
    ends = [Side(side, each) for side, each in zip(sides, ids, strict=True)]
    return lambda: copy_blocks(ends[0], ends[1], len(order))


def permute(temporary: Cache, dst: Cache) -> Callable[[], object]:
    """What a receiver does that got the source's layout: gather, permute and scatter in PyTorch."""
    ids = [torch.from_numpy(cache.table).to("cuda:1") for cache in (temporary, dst)]
    low = temporary.shape.heads[0] - dst.shape.heads[0]
    heads = slice(low, low + temporary.shape.heads[1] - temporary.shape.heads[0])
    tokens = dst.shape.tokens

    def run() -> None:
        for layer in range(NUM_LAYERS):
            got = temporary.tensors[layer][:, ids[0]].flatten(1, 2)
            blocks = got.reshape(2, -1, tokens, *got.shape[2:]).transpose(2, 3)
            dst.tensors[layer][:, ids[1], heads] = blocks

    return run


def timed_on_1(launch: Callable[[], object]) -> float:
    """As `timed`, for work of GPU 1."""
    with torch.cuda.device(1):
        return timed(launch)


def plan_ms() -> tuple[float, float]:
    """Host milliseconds for a long request: the first plan of a pair, and a cached one."""
    src = _imaginary(NHD, 16, 20_000)
    dst = _imaginary(HND, 64, 5_000)
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


def _imaginary(dims: str, tokens: int, num_blocks: int) -> KVLayout:
    """A large cache that nobody allocates: 80 layers of 8 heads of 128."""
    sizes = {"plane": 2, "block": num_blocks, "token": tokens, "head": 8, "dim": 128}
    shape = [sizes[name] for name in dims.split()]
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta")] * PLAN_LAYERS
    return KVLayout.from_tensors(tensors, dims)


def measure(*, total_nbytes: int = 1 << 30) -> Report:
    """Runs everything.

    Raises:
        WrongBytes: a move did not do what it should.
    """
    first, cached = plan_ms()
    print(f"planning 131072 tokens: first {first:.2f} ms, then {cached:.3f} ms", flush=True)
    torch.empty(1, device="cuda:1").copy_(torch.empty(1, device="cuda:0"))  # enables peer access
    bf16 = Shape(NHD, 16, (0, 8), 128)
    rows: list[Row] = []

    def row(name: str, src: Shape, dst: Shape, plain_s_per_byte: float) -> None:
        num_tokens = total_nbytes // (2 * NUM_LAYERS * src.token_nbytes)
        both = max(src.heads[0], dst.heads[0]), min(src.heads[1], dst.heads[1])
        share = (both[1] - both[0]) / (src.heads[1] - src.heads[0])
        caches = Cache(src, num_tokens, 0, random=True), Cache(dst, num_tokens, 1, random=False)
        seconds = timed(mover(*caches, num_tokens))
        moved = int(2 * NUM_LAYERS * src.token_nbytes * num_tokens * share)
        speed = moved / seconds
        rows.append(Row(name, moved, speed / 1e9, speed * plain_s_per_byte))
        print(f"{name}: {speed / 1e9:.1f} GB/s, {rows[-1].of_plain:.2f} of plain", flush=True)

    num_tokens = total_nbytes // (2 * NUM_LAYERS * bf16.token_nbytes)
    equal = Cache(bf16, num_tokens, 0, random=True), Cache(bf16, num_tokens, 1, random=False)
    seconds = timed(plain_push(*equal))
    check(*equal, num_tokens)
    unit = seconds / total_nbytes
    rows.append(Row("plain push, NHD 16, 8 heads", total_nbytes, 1e-9 / unit, 1.0))
    print(f"plain push {1e-9 / unit:.1f} GB/s", flush=True)
    wide = Cache(Shape(HND, 64, (0, 16), 128), num_tokens, 1, random=False)
    permuting = permute(equal[1], wide)
    permuting()
    torch.cuda.synchronize()
    check(equal[0], wide, num_tokens)
    permuted_s = seconds + timed_on_1(permuting)
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
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    permute_speed = total_nbytes / permuted_s / 1e9
    name = torch.cuda.get_device_name(0)
    return Report(name, versions, rows, permute_speed, total_nbytes, first, cached)


def show(report: Report) -> None:
    """Prints the report as a table."""
    print(f"2 x {report.device}; {report.versions}")
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
    if torch.cuda.device_count() < 2:
        sys.exit("two GPUs are needed")
    report = measure()
    show(report)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(dataclasses.asdict(report), file, indent=1)


if __name__ == "__main__":
    main()
