"""Measures `cuda_ipc` between two processes, on two GPUs or on one. Needs torch, Triton, NumPy and msgspec:

PYTHONPATH=src python3 -m kvferry.tools.bench.gpu.measure --json report.json

Ratios are within one run: the ceiling is one contiguous copy of the same bytes in one process.
"""

from __future__ import annotations

import cProfile
import dataclasses
import io
import pstats
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.engine.memory.cuda_driver import driver
from kvferry.tools.bench import figures
from kvferry.tools.bench.gpu.ends import Receiver, Sender

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer.block_ids import UploadedIds
    from kvferry.engine.transfer.plan import TransferPlan
    from kvferry.engine.transfer.ticket import Ticket
    from kvferry.engine.transfer_engine import TransferEngine

POOL_FACTOR = 4  # the pool holds so many times the blocks that move: the L2 stays cold
TOTALS_NBYTES = (1 << 20, 64 << 20, 256 << 20, 1 << 30)
PIECES_NBYTES = (1 << 10, 4 << 10, 16 << 10, 32 << 10, 64 << 10)
CAPS = (8, 16, 24, 32, 48, 64, 132, 264, 528)
LATENCIES = ((4 << 10, 4 << 10), (1 << 20, 32 << 10), (8 << 20, 32 << 10), (64 << 20, 32 << 10))
SWEEP = ((4, 4), (8, 4), (8, 8), (16, 4), (16, 8), (16, 16), (32, 8), (32, 16), (64, 32))
REPEATS = 20
HOST_BLOCKS = (1, 32, 256, 1024)  # of 1 MiB each: 32 pieces
HOST_CALLS = 300
PING_PONGS = 60  # each of other blocks
BATCHES = 7  # of ping-pongs; the first compiles the peer's kernel
FLUSH_NBYTES = 256 << 20  # five times the L2 of an H200


@dataclasses.dataclass(frozen=True)
class Row:
    """One shape: medians.

    On the GPU, by events: one write, one of several in flight, one read of as many blocks, and one
    contiguous copy of as many bytes in one process. By the host's clock: one write
    until its ticket ends, until a thread of the peer that waits awake has seen its bytes and
    answered, and its call alone. Block ids are uploaded before.
    """

    total_nbytes: int
    piece_nbytes: int
    gb_per_s: float
    of_ceiling: float
    streamed_gb_per_s: float
    read_gb_per_s: float
    copy_gb_per_s: float
    alone_us: float
    arrived_us: float
    enqueue_us: float


@dataclasses.dataclass(frozen=True)
class HostCost:
    """What one call takes the host, after the one before has ended: microseconds."""

    ids: str
    num_blocks: int
    p50_us: float
    p99_us: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What `--json` writes."""

    devices: list[str]
    versions: dict[str, str]
    ceiling_gb_per_s: float
    mapped_gb_per_s: float  # one contiguous copy onto the other process's memory
    rows: list[Row]
    host: list[HostCost]
    caps: list[tuple[int, float]]
    one_way_us: list[tuple[int, float]]


def _flush() -> None:
    """Take everything else out of the current GPU's L2, on the current stream."""
    torch.empty(FLUSH_NBYTES, dtype=torch.uint8, device="cuda").zero_()


class DirectReceiver(Receiver):
    """The receiving process."""

    def __init__(self) -> None:
        super().__init__(figures.far_gpu(), transports=("cuda_ipc",))

    def expect(self, nbytes: int, count: int) -> Iterator[Any]:
        """Answer with so many imms, then once for each whose bytes have come."""
        engine = self.engine
        tickets = [engine.expect(engine.new_imm(), nbytes=nbytes) for _ in range(count)]
        yield [ticket.imm for ticket in tickets]
        for ticket in tickets:
            ticket.wait(spin=True)
            yield None

    def ping_pong(self, remote: Any, turns: Any, imms: list[int]) -> Iterator[Any]:
        """Answer with the imms to write to, then when all turns are over."""
        assert self.cache is not None
        engine, link = self.engine, self.link
        mine = [engine.new_imm() for _ in turns]
        plan = engine.plan(self.cache, remote)
        link.prepare(plan)
        uploaded = [link.upload_ids(plan, *ids) for ids in turns]
        nbytes = plan.nbytes(len(turns[0][0]))
        tickets = [engine.expect(imm, nbytes=nbytes) for imm in mine]
        yield mine
        _ping_pong(link, plan, uploaded, imms, tickets, first=False)
        yield None


def _ping_pong(
    link: Link,
    plan: TransferPlan,
    turns: list[UploadedIds],
    imms: list[int],
    tickets: list[Any],
    *,
    first: bool,
) -> float:
    """Enqueue all turns, each of blocks that no other turn touches, behind a sleeping kernel and
    out of a cold L2; microseconds of one way."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    begin, end = figures.events()
    last = None
    with torch.cuda.stream(stream):
        _flush()
        if first:
            # 0.1 s: both sides enqueue meanwhile.
            figures.sleep(200_000_000)
            begin.record()
        for ids, imm, ticket in zip(turns, imms, tickets, strict=True):
            if first:
                last = link.write_blocks(plan, ids, imm=imm, stream=stream)
            ticket.wait_on(stream)
            if not first:
                last = link.write_blocks(plan, ids, imm=imm, stream=stream)
        end.record()
    stream.synchronize()
    if last is not None:
        last.wait(30)
    return float(begin.elapsed_time(end)) * 1e3 / len(imms) / 2 if first else 0.0


def _enqueued(move: Callable[..., Ticket], plan: TransferPlan, ids: Any, count: int) -> float:
    """Seconds that transfers take on the GPU, all enqueued while it sleeps, by CUDA events."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    tickets: list[Ticket] = []

    def enqueue() -> None:
        tickets.extend(move(plan, *ids, stream=stream) for _ in range(count))
        tickets[-1].wait_on(stream)

    with torch.cuda.stream(stream):
        cycles = 4_000_000 + 1_000_000 * count
        seconds = figures.gpu_median_s(enqueue, 1, lambda: figures.sleep(cycles))
    for ticket in tickets:
        ticket.wait()
    return seconds


def ceiling(total_nbytes: int) -> float:
    """GB/s of one contiguous copy from GPU to GPU, or within the only one, in one process."""
    src = torch.empty(total_nbytes, dtype=torch.uint8, device="cuda:0").random_()
    dst = torch.empty(total_nbytes, dtype=torch.uint8, device=figures.far_gpu())
    seconds = figures.gpu_median_s(
        lambda: dst.copy_(src, non_blocking=True), REPEATS, figures.sleep
    )
    return total_nbytes / seconds / 1e9


class Bench(Sender):
    """The sending process."""

    def __init__(self, *, profile: bool = False) -> None:
        super().__init__(DirectReceiver)
        self._profile = profile

    def engine(self, max_programs: int | None = None) -> Any:
        """Return an engine that moves blocks directly, and its link."""
        return self.link("cuda_ipc", transports=("cuda_ipc",), max_programs=max_programs)

    def shape(self, engine: TransferEngine, total: int, piece: int) -> Any:
        """Caches of which a part moves; see `Sender.caches`."""
        return self.caches(engine, (total, piece), POOL_FACTOR)

    def row(
        self,
        engine: TransferEngine,
        link: Link,
        total: int,
        piece: int,
        top: float,
        copy_speed: float,
    ) -> Row:
        tensors, local, plan, ids = self.shape(engine, total, piece)
        nbytes = plan.nbytes(len(ids[0]))
        link.prepare(plan)
        link.write_blocks(plan, *ids).wait()
        self.check(tensors, ids)
        lists, ids = ids, (link.upload_ids(plan, *ids),)
        in_flight = 8 if nbytes > 1 << 24 else 50
        streamed = [_enqueued(link.write_blocks, plan, ids, in_flight) for _ in range(5)]
        on_gpu = [_enqueued(link.write_blocks, plan, ids, 1) for _ in range(REPEATS)]
        alone, enqueue = [], []
        for _ in range(2 * REPEATS):
            start_s = time.perf_counter()
            ticket = link.write_blocks(plan, *ids)
            enqueue.append(time.perf_counter() - start_s)
            ticket.wait()
            alone.append(time.perf_counter() - start_s)
        arrived = []
        for imm in self.peer.call("expect", nbytes, REPEATS):
            start_s = time.perf_counter()
            link.write_blocks(plan, *ids, imm=imm)
            self.peer.answer()
            arrived.append(time.perf_counter() - start_s)
        if self._profile and total == 1 << 20 and piece == 32 << 10:
            self._show_profile(link, plan, ids)
        self.check(tensors, lists)
        read_s = self._read(engine, link, plan, tensors, lists)
        local.deregister()
        seconds = statistics.median(on_gpu), statistics.median(streamed) / in_flight, read_s
        speed, streamed_speed, read_speed = (nbytes / each / 1e9 for each in seconds)
        micros = [statistics.median(each) * 1e6 for each in (alone, arrived, enqueue)]
        speeds = (speed, speed / top, streamed_speed, read_speed, copy_speed)
        return Row(nbytes, piece, *speeds, *micros)

    def _read(
        self,
        engine: TransferEngine,
        link: Link,
        written: TransferPlan,
        tensors: list[torch.Tensor],
        ids: Any,
    ) -> float:
        """Seconds of reading the blocks that were written into others of the same cache."""
        there = ids[1]
        here = np.random.default_rng(len(there)).permutation(tensors[0].shape[1])[: len(there)]
        plan = engine.plan(written.remote, written.local)
        link.prepare(plan)
        uploaded = (link.upload_ids(plan, there, here),)
        link.read_blocks(plan, *uploaded).wait()
        self.check(tensors, (here, there))
        return statistics.median(
            _enqueued(link.read_blocks, plan, uploaded, 1) for _ in range(REPEATS)
        )

    def _show_profile(self, link: Link, plan: TransferPlan, ids: Any) -> None:
        profile = cProfile.Profile()
        for _ in range(200):
            profile.enable()
            ticket = link.write_blocks(plan, *ids)
            profile.disable()
            ticket.wait(60)
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(28)
        print(text.getvalue()[:4500])

    def one_way(self, engine: TransferEngine, link: Link, total: int, piece: int) -> float:
        """Microseconds from a stream here to one there, the median of several batches."""
        _, local, plan, ids = self.caches(engine, (total, piece), PING_PONGS)
        link.prepare(plan)
        num_ids = len(ids[0])
        random = np.random.default_rng(total)
        sides = [random.permutation(PING_PONGS * num_ids).reshape(-1, num_ids) for _ in range(4)]
        here, there = (list(zip(*sides[i : i + 2], strict=True)) for i in (0, 2))
        uploaded = [link.upload_ids(plan, *turn) for turn in here]
        link.write_blocks(plan, uploaded[0]).wait()
        nbytes = plan.nbytes(num_ids)
        results = []
        for _ in range(BATCHES):
            imms = [engine.new_imm() for _ in here]
            tickets = [engine.expect(imm, nbytes=nbytes) for imm in imms]
            theirs = self.peer.call("ping_pong", local.descriptor, there, imms)
            results.append(_ping_pong(link, plan, uploaded, theirs, tickets, first=True))
            self.peer.answer()
        local.deregister()
        return statistics.median(results[1:])

    def mapped(self, link: Link, engine: TransferEngine) -> float:
        """GB/s of one contiguous copy, by the copy engine, onto the other process's memory."""
        tensors, local, plan, _ = self.shape(engine, 256 << 20, 32 << 10)
        region = plan.remote.regions[0]
        there = link._path._mappings.address(0, region)  # type: ignore[attr-defined]
        stream = torch.cuda.current_stream().cuda_stream
        seconds = figures.gpu_median_s(
            lambda: driver().copy(0, there, tensors[0].data_ptr(), region.nbytes, stream), REPEATS
        )
        local.deregister()
        return float(region.nbytes / seconds / 1e9)

    def host(self, engine: TransferEngine, link: Link) -> list[HostCost]:
        """Return what calls take the host, by kind of ids, and the replay of a graph."""
        tensors, local, plan, _ = self.shape(engine, 1 << 30, 32 << 10)
        link.prepare(plan)
        num_blocks = int(tensors[0].shape[1])
        costs = []
        for count in HOST_BLOCKS:
            random = np.random.default_rng(count)
            lists = tuple(random.permutation(num_blocks)[:count] for _ in range(2))
            rows = tuple(torch.from_numpy(side).to(0) for side in lists)
            kinds: dict[str, Any] = {
                "NumPy": lists,
                "GPU": rows,
                "uploaded": (link.upload_ids(plan, *lists),),
            }
            for kind, ids in kinds.items():
                seconds = []
                for _ in range(HOST_CALLS):
                    imm = engine.new_imm()  # the peer expects none of them
                    start_s = time.perf_counter()
                    ticket = link.write_blocks(plan, *ids, imm=imm)
                    seconds.append(time.perf_counter() - start_s)
                    ticket.wait()
                costs.append(_cost(kind, count, seconds))
        order = torch.tensor([0, HOST_BLOCKS[-1]], device=0)
        with link.graph_write(plan, rows[0], rows[1], order) as write:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                write.launch()
            seconds = []
            for _ in range(HOST_CALLS):
                torch.cuda.synchronize()
                start_s = time.perf_counter()
                graph.replay()
                seconds.append(time.perf_counter() - start_s)
            torch.cuda.synchronize()
            costs.append(_cost("graph", HOST_BLOCKS[-1], seconds))
        local.deregister()
        return costs


def _cost(kind: str, count: int, seconds: list[float]) -> HostCost:
    micros = [second * 1e6 for second in seconds]
    return HostCost(kind, count, statistics.median(micros), figures.p99(micros))


def measure(*, quick: bool = False, profile: bool = False) -> Report:
    """Run everything.

    Raises:
        WrongBytes: a transfer did not move what it should.
    """
    top = ceiling(1 << 30)
    print(f"contiguous copy, one process: {top:.1f} GB/s", flush=True)
    torch.cuda.empty_cache()
    rows, caps, latencies = [], [], []
    with Bench(profile=profile) as bench:
        with bench.engine() as (engine, link):
            mapped = bench.mapped(link, engine)
            print(f"contiguous copy onto the other process's memory: {mapped:.1f} GB/s", flush=True)
            host = bench.host(engine, link)
            for total in TOTALS_NBYTES if not quick else (1 << 20, 256 << 20):
                copy_speed = ceiling(total)
                for piece in PIECES_NBYTES:
                    row = bench.row(engine, link, total, piece, top, copy_speed)
                    rows.append(row)
                    speeds = (row.gb_per_s, row.read_gb_per_s)
                    ratios = [row.of_ceiling, *(speed / copy_speed for speed in speeds)]
                    shown = [round(ratio, 3) for ratio in ratios]
                    print(total >> 20, piece >> 10, shown, flush=True)
            for total, piece in LATENCIES:
                latencies.append((total, bench.one_way(engine, link, total, piece)))
                print("one way", latencies[-1], flush=True)
        for cap in CAPS if not quick else ():
            with bench.engine(cap) as (engine, link):
                caps.append((cap, bench.row(engine, link, 256 << 20, 32 << 10, top, top).gb_per_s))
                print("cap", caps[-1], flush=True)
    devices, versions = figures.device_names(), figures.gpu_versions()
    return Report(devices, versions, top, mapped, rows, host, caps, latencies)


def sweep() -> None:
    """Print GB/s of 1 GiB and 256 MiB in 32 KiB blocks for several tunings of the kernel."""
    from kvferry.kernels import launch
    from kvferry.kernels.tiles import Tuning

    kernel: Any = launch
    default = kernel.default_tuning
    with Bench() as bench, bench.engine() as (engine, link):
        for total in (256 << 20, 1 << 30):
            for tile_kib, warps in SWEEP:
                tuning = Tuning(tile_kib << 10, warps)
                kernel.default_tuning = lambda *_, _tuning=tuning, **__: _tuning
                row = bench.row(engine, link, total, 32 << 10, 1.0, 1.0)
                print(f"{total >> 20} MiB, tile {tile_kib} KiB, {warps} warps: {row.gb_per_s:.1f}")
    kernel.default_tuning = default


def show(report: Report) -> None:
    """Print the report as tables."""
    print(f"{' and '.join(report.devices)}; {report.versions}")
    print(f"ceiling, contiguous copy in one process: {report.ceiling_gb_per_s:.1f} GB/s")
    print(f"the same onto the other process's memory: {report.mapped_gb_per_s:.1f} GB/s")
    for cost in report.host:
        print(
            f"a call, {cost.ids} ids, {cost.num_blocks} blocks: p50 {cost.p50_us:.1f} us, "
            f"p99 {cost.p99_us:.1f} us"
        )
    print(
        f"{'bytes':>10} {'piece':>6} {'GB/s':>7} {'of top':>6} {'streamed':>8} {'read':>7} "
        f"{'copy':>7} {'alone us':>9} {'arrived us':>10} {'enqueue us':>10}"
    )
    for row in report.rows:
        print(
            f"{row.total_nbytes >> 10:>8} K {row.piece_nbytes >> 10:>4} K {row.gb_per_s:7.1f} "
            f"{row.of_ceiling:6.3f} {row.streamed_gb_per_s:8.1f} {row.read_gb_per_s:7.1f} "
            f"{row.copy_gb_per_s:7.1f} {row.alone_us:9.1f} {row.arrived_us:10.1f} "
            f"{row.enqueue_us:10.1f}"
        )
    for total, micros in report.one_way_us:
        print(f"stream to stream, {total >> 10} KiB: {micros:.1f} us one way")
    for cap, speed in report.caps:
        print(f"at most {cap} programs: {speed:.1f} GB/s")


def main() -> None:
    options = figures.options(__doc__, gpu=True, quick=None, profile=None, sweep=None)
    if options.sweep:
        sweep()
        return
    report = measure(quick=options.quick, profile=options.profile)
    show(report)
    figures.write_json(options.json, report)


if __name__ == "__main__":
    main()
