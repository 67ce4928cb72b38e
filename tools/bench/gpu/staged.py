"""Measures GPU memory over the host transports, between two processes: staged through pinned memory.

PYTHONPATH=src python3 -m kvferry.tools.bench.gpu.staged

Needs torch, Triton, NumPy and msgspec. With one GPU both processes use it, and take turns on it.
Times are the host's, from the call until the ticket has ended: everything is placed at the peer then.
Ceilings are measured in the same run: a copy of as many bytes to and from pinned memory, and tcp
between host buffers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory import iovec
from kvferry.engine.staging.gpu_mover import GpuMover
from kvferry.engine.staging.ring import Ring, StagingMeter
from kvferry.engine.staging.thresholds import NEVER_DIRECT, DirectThresholds
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.tools.bench.gpu.receiver import DIMS, Receiver, WrongBytes, make_pool
from kvferry.tools.bench.peers import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.link.link import Link

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

    def blocks(self, block_ids: Any) -> list[Any]:
        """What these blocks hold, by layer."""
        ids = torch.from_numpy(block_ids).to(self.tensors[0].device)
        return [tensor[:, ids].cpu().numpy() for tensor in self.tensors]

    def write_back(self, remote: Any, src_ids: Any, dst_ids: Any, times: int) -> Iterator[None]:
        """Write as often as told while the other end does: both ways at once."""
        assert self.cache is not None
        plan = self.engine.plan(self.cache, remote)
        self.link.write_blocks(plan, src_ids, dst_ids).wait(60)
        yield
        for _ in range(times):
            self.link.write_blocks(plan, src_ids, dst_ids).wait(60)
        yield


class Bench:
    """The sending process."""

    def __init__(self) -> None:
        self._peer = Peer(StagedReceiver, int(torch.cuda.device_count() > 1))
        self._address = self._peer.call("address")

    def close(self) -> None:
        """Ends the peer."""
        self._peer.close()

    @contextlib.contextmanager
    def link(self, transport: str, rails: int = 2) -> Iterator[tuple[TransferEngine, Link]]:
        """A link on which GPU memory is staged."""
        paths = DirectThresholds(direct_from_nbytes={"cuda_ipc": NEVER_DIRECT})
        with TransferEngine(name="prefill", paths=paths, rails=rails) as engine:
            # The warm-up of a link prepares the GPUs whose memory is registered by then.
            anchor = engine.register(torch.zeros(64, device="cuda:0"))
            link = engine.connect(self._address, transport=transport)
            self._peer.call("accept", engine.engine_id)
            yield engine, link
            link.close()
            anchor.deregister()

    def times(
        self,
        engine: TransferEngine,
        link: Link,
        shape: tuple[int, int],
        ends: tuple[bool, bool] = (True, True),
        *,
        both_ways: bool = False,
        in_flight: int = 1,
    ) -> list[float]:
        """Seconds of each handoff, after one that is checked; of several in flight, their share."""
        total, piece = shape
        remote = self._peer.call("make_cache", total, piece, POOL_FACTOR, ends[1])
        where = "cuda:0" if ends[0] else "cpu"
        tensors, num_ids = make_pool(total, piece, where, random=True, factor=POOL_FACTOR)
        local = engine.register_cache(KVLayout.from_tensors(tensors, DIMS), tensors)
        random = np.random.default_rng(total + piece)
        ids = [random.permutation(POOL_FACTOR * num_ids)[:num_ids] for _ in range(2)]
        plan = engine.plan(local, remote)
        link.prepare(plan)
        link.write_blocks(plan, *ids).wait(60)
        self._check(tensors, ids)
        if both_ways:
            unused = [np.setdiff1d(np.arange(POOL_FACTOR * num_ids), one)[:num_ids] for one in ids]
            times = REPEATS + 2
            self._peer.call("write_back", local.descriptor, unused[1], unused[0], times)
        seconds = []
        for _ in range(REPEATS):
            start_s = time.perf_counter()
            for ticket in [link.write_blocks(plan, *ids) for _ in range(in_flight)]:
                ticket.wait(60)
            seconds.append((time.perf_counter() - start_s) / in_flight)
        if both_ways:
            self._peer.answer()
        local.deregister()
        return seconds

    def _check(self, tensors: list[torch.Tensor], ids: Any) -> None:
        step = max(1, len(ids[0]) // 64)
        src, dst = (np.ascontiguousarray(side[::step]) for side in ids)
        there = self._peer.call("blocks", dst)
        for mine, theirs in zip(tensors, there, strict=True):
            sent = mine[:, torch.from_numpy(src).to(mine.device)].cpu()
            if not torch.equal(sent, torch.from_numpy(theirs)):
                raise WrongBytes


def pinned_copies(nbytes: int = GIB) -> dict[str, float]:
    """GB/s of one contiguous copy from a GPU to pinned memory and back."""
    here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0").random_()
    return {
        "copy to pinned memory": nbytes
        / _on_gpu(lambda: here.copy_(there, non_blocking=True))
        / 1e9,
        "copy from pinned memory": nbytes
        / _on_gpu(lambda: there.copy_(here, non_blocking=True))
        / 1e9,
    }


def _on_gpu(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    median_s: float = statistics.median(seconds)
    return median_s


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
    """Runs everything. Raises WrongBytes."""
    ceilings = pinned_copies()
    print({name: round(speed, 1) for name, speed in ceilings.items()}, flush=True)
    kernels = movers()
    for name, piece, programs, speed in kernels:
        print(f"{name} of {piece} B pieces, {programs} programs: {speed:.1f} GB/s", flush=True)
    rows: list[Row] = []
    bench = Bench()

    def note(path: str, shape: tuple[int, int], seconds: list[float], ceiling: str) -> None:
        median_s = statistics.median(seconds)
        speed = shape[0] / median_s / 1e9
        of = speed / ceilings[ceiling] if ceiling else 0.0
        rows.append(Row(path, *shape, speed, median_s * 1e3, ceiling, of))
        print(rows[-1], flush=True)

    to_pinned = "copy to pinned memory"
    large = (GIB, 32 << 10)
    with bench.link("cuda_ipc") as (engine, link):
        shapes = [(GIB, 4 << 10), (256 << 20, 32 << 10), (64 << 20, 32 << 10), (1 << 20, 32 << 10)]
        for shape in [large, *([] if quick else shapes)]:
            note("shared staging", shape, bench.times(engine, link, shape), to_pinned)
        seconds = bench.times(engine, link, large, in_flight=4)
        note("shared staging, 4 in flight", large, seconds, to_pinned)
        seconds = bench.times(engine, link, large, both_ways=True)
        note("shared staging, both ways, each", large, seconds, to_pinned)
        seconds = bench.times(engine, link, (256 << 20, 32 << 10), (True, False))
        note("shared staging, GPU to host memory", (256 << 20, 32 << 10), seconds, "")
        seconds = bench.times(engine, link, (256 << 20, 32 << 10), (False, True))
        note("shared staging, host memory to GPU", (256 << 20, 32 << 10), seconds, "")
    for rails in (2,) if quick else (2, 4):
        with bench.link("tcp", rails) as (engine, link):
            name = f"tcp, {rails} rails"
            seconds = bench.times(engine, link, large, (False, False))
            ceilings[f"{name}, host memory"] = GIB / statistics.median(seconds) / 1e9
            note(f"{name}, host memory", large, seconds, f"{name}, host memory")
            for shape in [large, *([] if quick else [(GIB, 4 << 10), (64 << 20, 32 << 10)])]:
                seconds = bench.times(engine, link, shape)
                note(f"{name}, GPU memory", shape, seconds, f"{name}, host memory")
    bench.close()
    count = torch.cuda.device_count()
    devices = [torch.cuda.get_device_name(i) for i in range(min(2, count))]
    return Report(devices, ceilings, rows, kernels)


def show(report: Report) -> None:
    """Prints the report as a table."""
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    report = measure(quick=options.quick)
    show(report)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dataclasses.asdict(report), file, indent=1)


if __name__ == "__main__":
    main()
