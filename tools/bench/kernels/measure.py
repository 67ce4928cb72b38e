"""Measures the kernels on one GPU. Needs torch and Triton alone, so that it runs on a bare machine:

PYTHONPATH=src python3 -m kvferry.tools.bench.kernels.measure
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvferry.kernels.paged import Geometry, PagedCache
from kvferry.kernels.signal import Signal
from kvferry.kernels.tiles import Tuning
from kvferry.tools.bench import figures
from kvferry.tools.bench.figures import WrongBytes
from kvferry.tools.bench.kernels.operations import (
    Side,
    copy_blocks,
    gather_reference,
    push_reference,
    scatter_reference,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PIECES_NBYTES = tuple(1 << power for power in range(10, 19))  # 1 KiB to 256 KiB
CAPS = (4, 8, 16, 24, 32, 48, 64, 96, 132)
CAP_PIECES_NBYTES = (4 << 10, 32 << 10)
TUNINGS = tuple(
    Tuning(tile_kib << 10, warps)
    for tile_kib, warps in (
        (4, 4),
        (8, 4),
        (8, 8),
        (16, 4),
        (16, 8),
        (16, 16),
        (32, 8),
        (32, 16),
        (64, 16),
        (64, 32),
    )
)
NUM_LAYERS, NUM_PLANES = 16, 2
POOL_FACTOR = 4  # the pool holds so many times the blocks that move
FLUSH_NBYTES = 512 << 20  # ten times the L2 of an H200; the host enqueues ahead while it is written
LAUNCHES = 300


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: medians over the repetitions, L2 cold before each."""

    operation: str
    piece_nbytes: int
    nbytes: int
    gpu_us: float
    gb_per_s: float
    of_memcpy: float
    max_programs: int | None = None
    tile_nbytes: int | None = None
    num_warps: int | None = None


@dataclasses.dataclass(frozen=True)
class HostCost:
    """What a launch costs the host that enqueues it."""

    operation: str
    eager_p50_us: float
    eager_p99_us: float
    graph_p50_us: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What `--json` writes."""

    device: str
    num_multiprocessors: int
    versions: dict[str, str]
    memcpy_gb_per_s: float
    rows: list[Row]
    curves: list[Row]
    sweep: list[Row]
    host: list[HostCost]


class Options(NamedTuple):
    """What to measure."""

    total_nbytes: int = 1 << 30
    repeats: int = 20
    sweep: bool = False
    pieces_nbytes: Sequence[int] = PIECES_NBYTES


class Workload:
    """A pool with scattered blocks of one piece each, staging, and a second pool to push into.

    Layers are allocations of their own. Ids are random, without repetition.
    """

    def __init__(self, piece_nbytes: int, total_nbytes: int) -> None:
        self.piece_nbytes = piece_nbytes
        self.num_ids = max(1, total_nbytes // (NUM_LAYERS * NUM_PLANES * piece_nbytes))
        num_blocks = POOL_FACTOR * self.num_ids
        self.shape = (NUM_PLANES, num_blocks, piece_nbytes // 8)
        self.src_views = _planes([_random(self.shape) for _ in range(NUM_LAYERS)])
        self.dst_views = _planes([_zeros(self.shape) for _ in range(NUM_LAYERS)])
        self.src, self.dst = _cache(self.src_views), _cache(self.dst_views)
        self.src_ids = torch.randperm(num_blocks, device="cuda")[: self.num_ids].to(torch.int32)
        self.dst_ids = torch.randperm(num_blocks, device="cuda")[: self.num_ids].to(torch.int32)
        self.staging = _zeros((self.src.num_entries, self.num_ids, self.shape[-1]))
        self.counter = torch.zeros(1, dtype=torch.int64, device="cuda")
        state = torch.zeros(2, dtype=torch.int32, device="cuda")
        self.signal = Signal(state, self.counter.data_ptr())
        self.nbytes = self.src.nbytes(self.num_ids)

    def operations(
        self, tuning: Tuning | None = None, max_programs: int | None = None
    ) -> dict[str, Callable[[], None]]:
        """Return one launch of each operation."""
        src, dst = Side(self.src, self.src_ids), Side(self.dst, self.dst_ids)
        staging, count = Side(self.staging, None), self.num_ids
        options: dict[str, Any] = {"tuning": tuning, "max_programs": max_programs}
        return {
            "gather": lambda: copy_blocks(src, staging, count, **options),
            "scatter": lambda: copy_blocks(staging, dst, count, **options),
            "push": lambda: copy_blocks(src, dst, count, signal=self.signal, **options),
        }

    def check(self, tuning: Tuning | None = None, max_programs: int | None = None) -> None:
        """Run each operation once and compare every byte with its reference.

        Raises:
            WrongBytes: names the operation.
        """
        run = self.operations(tuning, max_programs)
        truth = gather_reference(self.src_views, self.src_ids)
        expected = _planes([_zeros(self.shape) for _ in range(NUM_LAYERS)])
        wrong = []
        self.staging.fill_(-1)
        run["gather"]()
        wrong += ["gather"] * (not torch.equal(self.staging, truth))
        self._clear_dst()
        scatter_reference(truth, expected, self.dst_ids)
        run["scatter"]()
        wrong += ["scatter"] * (not self._dst_is(expected))
        self._clear_dst()
        push_reference(self.src_views, self.src_ids, expected, self.dst_ids)
        self.counter.zero_()
        run["push"]()
        wrong += ["push"] * (not self._dst_is(expected))
        wrong += ["push's count"] * (int(self.counter) != self.nbytes)
        if wrong:
            raise WrongBytes(
                f"{wrong[0]} of {self.piece_nbytes} B pieces, {tuning}, "
                f"max_programs={max_programs}: not what the reference gives"
            )

    def _clear_dst(self) -> None:
        for view in self.dst_views:
            view.zero_()

    def _dst_is(self, expected: list[torch.Tensor]) -> bool:
        return all(map(torch.equal, self.dst_views, expected))


class Clock:
    """Times work on the GPU by events, with a cold L2."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.flush = torch.empty(FLUSH_NBYTES, dtype=torch.uint8, device="cuda")

    def median_us(self, run: Callable[[], object]) -> float:
        """Return the median over the repetitions, after two that are not counted."""
        for _ in range(2):
            run()
        return figures.gpu_median_s(run, self.repeats, self.flush.zero_) * 1e6


def measure(options: Options, progress: Callable[[str], None]) -> Report:
    """Check, then measure. Uses about sixteen times `options.total_nbytes` of GPU memory.

    Raises:
        RuntimeError: torch sees no CUDA device.
        WrongBytes: a kernel is wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA device; torch sees none (see kvferry doctor)")
    clock = Clock(options.repeats)
    memcpy = memcpy_gb_per_s(clock, options.total_nbytes)
    rows: list[Row] = []
    curves: list[Row] = []
    sweep: list[Row] = []
    for piece_nbytes in options.pieces_nbytes:
        progress(f"pieces of {piece_nbytes >> 10} KiB")
        work = Workload(piece_nbytes, options.total_nbytes)
        work.check()
        rows += _time_all(work, clock, memcpy)
        if piece_nbytes in CAP_PIECES_NBYTES:
            for cap in CAPS:
                work.check(None, cap)
                curves += _time_all(work, clock, memcpy, max_programs=cap)
        for tuning in TUNINGS if options.sweep else ():
            work.check(tuning)
            sweep += _time_all(work, clock, memcpy, tuning=tuning)
            if piece_nbytes in CAP_PIECES_NBYTES:
                for cap in (16, 24, 32):
                    sweep += _time_all(work, clock, memcpy, tuning=tuning, max_programs=cap)
        del work
    progress("the host's share")
    return Report(
        device=torch.cuda.get_device_name(),
        num_multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count,
        versions=figures.gpu_versions(),
        memcpy_gb_per_s=memcpy,
        rows=rows,
        curves=curves,
        sweep=sweep,
        host=host_costs(),
    )


def memcpy_gb_per_s(clock: Clock, nbytes: int) -> float:
    """Return the ceiling: one device-to-device copy of the same bytes, contiguous."""
    src = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    dst = torch.empty_like(src)
    return nbytes / clock.median_us(lambda: dst.copy_(src)) / 1000


def host_costs() -> list[HostCost]:
    """Return what enqueuing a small launch takes the host: by itself, and as a CUDA graph."""
    work = Workload(32 << 10, 8 << 20)
    found = []
    for name, run in work.operations().items():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        eager, replay = _enqueue_us(run), _enqueue_us(graph.replay)
        found.append(
            HostCost(
                operation=name,
                eager_p50_us=statistics.median(eager),
                eager_p99_us=figures.p99(eager),
                graph_p50_us=statistics.median(replay),
            )
        )
    return found


def _enqueue_us(run: Callable[[], None]) -> list[float]:
    taken = []
    for number in range(LAUNCHES):
        begin_s = time.perf_counter()
        run()
        taken.append((time.perf_counter() - begin_s) * 1e6)
        if number % 50 == 49:
            torch.cuda.synchronize()  # a full launch queue would be what we time
    return taken


def _time_all(
    work: Workload,
    clock: Clock,
    memcpy: float,
    *,
    tuning: Tuning | None = None,
    max_programs: int | None = None,
) -> list[Row]:
    rows = []
    for name, run in work.operations(tuning, max_programs).items():
        gpu_us = clock.median_us(run)
        speed = work.nbytes / gpu_us / 1000
        rows.append(
            Row(
                operation=name,
                piece_nbytes=work.piece_nbytes,
                nbytes=work.nbytes,
                gpu_us=gpu_us,
                gb_per_s=speed,
                of_memcpy=speed / memcpy,
                max_programs=max_programs,
                tile_nbytes=tuning.tile_nbytes if tuning else None,
                num_warps=tuning.num_warps if tuning else None,
            )
        )
    return rows


def _planes(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the entries `[block, word]` of layers `[plane, block, word]`."""
    return [plane for layer in layers for plane in layer]


def _cache(planes: list[torch.Tensor]) -> PagedCache:
    num_blocks, words = planes[0].shape
    nbytes = 8 * words
    geometry = Geometry(num_blocks, 1, 1, nbytes, nbytes, nbytes, nbytes, 1)
    return PagedCache.from_addresses([plane.data_ptr() for plane in planes], geometry, "cuda")


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="cuda").random_()


def _zeros(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device="cuda")


def main(arguments: list[str]) -> None:
    """Print the report as JSON: `[--sweep] [TOTAL_MIB]`."""
    numbers = [int(argument) for argument in arguments if argument.isdigit()]
    options = Options(
        total_nbytes=(numbers[0] if numbers else 1024) << 20, sweep="--sweep" in arguments
    )
    report = measure(options, lambda text: print(text, file=sys.stderr, flush=True))
    json.dump(dataclasses.asdict(report), sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
