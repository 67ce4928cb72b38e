"""Measures GPU memory over the host transports, between two processes: staged through pinned memory.

PYTHONPATH=src python3 -m kvferry.tools.bench.gpu.staged

Needs torch, Triton, NumPy and msgspec. With one GPU both processes use it, and take turns on it.
Times are the host's, from the call until the ticket has ended: everything is placed at the peer then.
Ceilings are measured in the same run: a copy of as many bytes to and from pinned memory, and tcp
between host buffers.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.engine.memory import iovec
from kvferry.engine.staging.gpu_mover import GpuMover
from kvferry.engine.staging.ring import Ring, StagingMeter
from kvferry.engine.staging.thresholds import NEVER_DIRECT, DirectThresholds
from kvferry.tools.bench import figures
from kvferry.tools.bench.gpu.ends import Receiver, Sender

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine

POOL_FACTOR = 2
GIB = 1 << 30
REPEATS = 7
BURST_NBYTES = 32 << 20
CAPS = (4, 8, 16, 32, 64, 132)


@dataclasses.dataclass(frozen=True)
class Row:
    """One path and shape: medians by the host's clock."""

    path: str
    total_nbytes: int
    piece_nbytes: int
    gb_per_s: float
    milliseconds: float
    ceiling: str
    of_ceiling: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What the staged paths reach."""

    devices: list[str]
    ceilings_gb_per_s: dict[str, float]
    rows: list[Row]
    movers_gb_per_s: list[tuple[str, int, int, float]]  # operation, piece, programs, GB/s


class StagedReceiver(Receiver):
    """The receiving process."""

    def write_back(self, remote: Any, src_ids: Any, dst_ids: Any, times: int) -> Iterator[None]:
        """Write as often as told while the other end does: both ways at once."""
        assert self.cache is not None
        plan = self.engine.plan(self.cache, remote)
        self.link.write_blocks(plan, src_ids, dst_ids).wait(60)
        yield
        for _ in range(times):
            self.link.write_blocks(plan, src_ids, dst_ids).wait(60)
        yield


class Bench(Sender):
    """The sending process."""

    def __init__(self) -> None:
        super().__init__(StagedReceiver, figures.far_gpu())

    def staged(self, transport: str, rails: int = 2) -> Any:
        """Return a link on which GPU memory is staged."""
        paths = DirectThresholds(direct_from_nbytes={"cuda_ipc": NEVER_DIRECT})
        return self.link(transport, paths=paths, rails=rails)

    def times(
        self,
        engine: TransferEngine,
        link: Link,
        shape: tuple[int, int],
        on_gpu: tuple[bool, bool] = (True, True),
        *,
        both_ways: bool = False,
        in_flight: int = 1,
    ) -> list[float]:
        """Seconds of each handoff, after one that is checked; of several in flight, their share."""
        tensors, local, plan, ids = self.caches(engine, shape, POOL_FACTOR, on_gpu)
        num_ids = len(ids[0])
        link.prepare(plan)
        link.write_blocks(plan, *ids).wait(60)
        self.check(tensors, ids)
        if both_ways:
            unused = [np.setdiff1d(np.arange(POOL_FACTOR * num_ids), one)[:num_ids] for one in ids]
            times = REPEATS + 2
            self.peer.call("write_back", local.descriptor, unused[1], unused[0], times)
        seconds = []
        for _ in range(REPEATS):
            start_s = time.perf_counter()
            for ticket in [link.write_blocks(plan, *ids) for _ in range(in_flight)]:
                ticket.wait(60)
            seconds.append((time.perf_counter() - start_s) / in_flight)
        if both_ways:
            self.peer.answer()
        local.deregister()
        return seconds


def pinned_copies(nbytes: int = GIB) -> dict[str, float]:
    """GB/s of one contiguous copy from a GPU to pinned memory and back."""
    here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0").random_()
    copies = {
        "copy to pinned memory": lambda: here.copy_(there, non_blocking=True),
        "copy from pinned memory": lambda: there.copy_(here, non_blocking=True),
    }
    return {
        name: nbytes / figures.gpu_median_s(copy, REPEATS) / 1e9 for name, copy in copies.items()
    }


def movers(
    pieces_nbytes: tuple[int, ...] = (4 << 10, 32 << 10),
) -> list[tuple[str, int, int, float]]:
    """GB/s of gather into pinned memory and scatter out of it, by programs at a time."""
    results = []
    pool = torch.empty(GIB, dtype=torch.uint8, device="cuda:0").random_()
    torch.cuda.synchronize()
    for cap in CAPS:
        mover = GpuMover(0, cap)
        ring = Ring(mover, 1, BURST_NBYTES, StagingMeter())
        buffer = ring.take(BURST_NBYTES)
        for piece in pieces_nbytes:
            count = BURST_NBYTES // piece
            offsets = np.random.default_rng(piece).permutation(GIB // piece)[:count] * piece
            pieces = iovec.make(pool.data_ptr() + offsets, np.full(count, piece))
            into = functools.partial(mover.gather, pieces, buffer.address)
            out = functools.partial(mover.scatter, buffer.address, pieces)
            for name, work in (("gather", into), ("scatter", out)):
                work().wait()
                start_s = time.perf_counter()
                for flight in [work() for _ in range(10)]:
                    flight.wait()
                seconds = (time.perf_counter() - start_s) / 10
                results.append((name, piece, cap, BURST_NBYTES / seconds / 1e9))
        ring.give(buffer)
        ring.close()
    return results


def measure(*, quick: bool = False) -> Report:
    """Run everything. Raises WrongBytes."""
    ceilings = pinned_copies()
    print({name: round(speed, 1) for name, speed in ceilings.items()}, flush=True)
    kernels = movers()
    for name, piece, programs, speed in kernels:
        print(f"{name} of {piece} B pieces, {programs} programs: {speed:.1f} GB/s", flush=True)
    rows: list[Row] = []
    to_pinned = "copy to pinned memory"
    large, middle = (GIB, 32 << 10), (256 << 20, 32 << 10)
    more = [] if quick else [(GIB, 4 << 10), (64 << 20, 32 << 10)]
    with Bench() as bench:

        def note(path: str, ends: Any, shape: tuple[int, int], ceiling: str, **how: Any) -> None:
            median_s = statistics.median(bench.times(*ends, shape, **how))
            speed = shape[0] / median_s / 1e9
            of = speed / ceilings.setdefault(ceiling, speed) if ceiling else 0.0
            rows.append(Row(path, *shape, speed, median_s * 1e3, ceiling, of))
            print(rows[-1], flush=True)

        with bench.staged("cuda_ipc") as ends:
            for shape in [large, *more, *([] if quick else [middle, (1 << 20, 32 << 10)])]:
                note("shared staging", ends, shape, to_pinned)
            note("shared staging, 4 in flight", ends, large, to_pinned, in_flight=4)
            note("shared staging, both ways, each", ends, large, to_pinned, both_ways=True)
            note("shared staging, GPU to host memory", ends, middle, "", on_gpu=(True, False))
            note("shared staging, host memory to GPU", ends, middle, "", on_gpu=(False, True))
        for rails in (2,) if quick else (2, 4):
            with bench.staged("tcp", rails) as ends:
                host = f"tcp, {rails} rails, host memory"
                note(host, ends, large, host, on_gpu=(False, False))
                for shape in [large, *more]:
                    note(f"tcp, {rails} rails, GPU memory", ends, shape, host)
    return Report(figures.device_names(), ceilings, rows, kernels)


def show(report: Report) -> None:
    """Print the report as a table."""
    print(" and ".join(report.devices))
    for name, speed in report.ceilings_gb_per_s.items():
        print(f"ceiling, {name}: {speed:.2f} GB/s")
    print(f"{'path':<36} {'MiB':>6} {'piece':>7} {'GB/s':>7} {'ms':>9} {'of ceiling':>10}")
    for row in report.rows:
        print(
            f"{row.path:<36} {row.total_nbytes >> 20:>6} {row.piece_nbytes >> 10:>4} KiB "
            f"{row.gb_per_s:7.2f} {row.milliseconds:9.2f} {row.of_ceiling:10.2f}"
        )


def main() -> None:
    options = figures.options(__doc__, quick=None)
    report = measure(quick=options.quick)
    show(report)
    figures.write_json(options.json, report)


if __name__ == "__main__":
    main()
