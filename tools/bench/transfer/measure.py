"""Runs the contenders of `kvferry bench transfer` against each other.

Every shape is measured in rounds; in each round every contender has one burst, so that a machine
that drifts drifts for all of them. All have the same time: a slow one moves fewer requests, and
sits out rounds once it has used its share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvferry.tools.bench import idle_memory, machine
from kvferry.tools.bench.transfer.pairs import Burst, Pair, WorkerFailed
from kvferry.tools.bench.transfer.report import (
    IdleCpu,
    LeftOut,
    Report,
    Result,
    Settings,
    judge,
)
from kvferry.tools.bench.transfer.roster import MEMCPY, Contender, Shapes, roster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.tools.bench.transfer.workload import Shape

    Progress = Callable[[str, float], None]

DRIVERS = "kvferry.tools.bench.transfer.drivers"
SHARES = (0.45, 0.25, 0.15, 0.15)  # of the time, in the order of `Shapes`
REST_S = 1.0
PROCESS_NBYTES = 100 << 20  # what a worker takes beside its pool


class BenchError(Exception):
    """The benchmark cannot run; the text says why and what helps."""


class Entry(NamedTuple):
    """One row of one table."""

    contender: Contender
    operation: str


@dataclasses.dataclass
class Options:
    """What one run does. `shapes` is there for tests."""

    settings: Settings
    peer_python: str
    shapes: Shapes = dataclasses.field(default_factory=Shapes)


def measure(options: Options, progress: Progress) -> Report:
    """Measure everything; `progress` is told what runs, and what share of the time is over.

    Raises:
        BenchError: there is too little memory.
    """
    started_s = time.monotonic()
    settings, shapes = options.settings, options.shapes
    contenders = roster(settings.rails, settings.peers, options.peer_python)
    _check_memory(contenders, shapes)
    progress("starting processes", 0.0)
    idle_memory_of = idle_memory.start()
    with contextlib.ExitStack() as stack:
        field = _Field(stack, contenders, shapes)
        memory = idle_memory_of()
        idle_cpu = field.rest(REST_S)
        results: list[Result] = []
        begin = 0.0
        for shape, share in zip(shapes, SHARES, strict=True):
            for fraction, text in field.run(shape, settings.seconds * share, settings.rounds):
                progress(text, begin + share * fraction)
            results += field.results(shape)
            begin += share
        versions = field.versions
    report = Report(
        machine=machine.describe(versions),
        settings=settings,
        results=tuple(results),
        left_out=tuple(field.left_out),
        idle_cpu=idle_cpu,
        idle_memory=memory,
        targets=(),
        wall_s=round(time.monotonic() - started_s, 1),
    )
    return judge(report, shapes)


class _Field:
    """The pairs that are running, and what they have done."""

    def __init__(
        self, stack: contextlib.ExitStack, contenders: list[Contender], shapes: Shapes
    ) -> None:
        self.left_out: list[LeftOut] = []
        self.versions: dict[str, str] = {}
        self._shapes = shapes
        self._pairs: dict[Contender, Pair] = {}
        self._bursts: dict[Entry, list[Burst]] = {}
        for contender in contenders:
            self._pairs[contender] = stack.enter_context(
                Pair(
                    f"{DRIVERS}.{contender.driver}",
                    contender.options,
                    python=contender.python,
                    packages=contender.packages,
                    alone=contender.alone,
                )
            )
        for contender, pair in list(self._pairs.items()):
            with self._or_leave_out(contender):
                pair.start_opening(shapes)
        for contender, pair in list(self._pairs.items()):
            with self._or_leave_out(contender):
                pair.finish_opening()
                self.versions |= pair.versions

    def rest(self, duration_s: float) -> tuple[IdleCpu, ...]:
        """Measure what everybody takes while nobody asks anything; then freezes the peers."""
        for pair in self._pairs.values():
            pair.start_resting(duration_s)
        idle = []
        for contender, pair in list(self._pairs.items()):
            with self._or_leave_out(contender):
                percent = 100 * pair.finish_resting() / duration_s
                idle.append(IdleCpu(contender.key, contender.label, round(percent, 1)))
            if contender.peer:
                pair.freeze()
        return tuple(idle)

    def run(self, shape: Shape, seconds: float, rounds: int) -> Iterator[tuple[float, str]]:
        """Measure one shape; yields the share that is done, and who is next."""
        first = shape is self._shapes.large_blocks
        entries = [
            Entry(contender, operation)
            for contender in self._pairs
            for operation in (contender.operations if first else contender.elsewhere)
        ]
        self._bursts = {entry: [] for entry in entries}
        spent_s = dict.fromkeys(entries, 0.0)
        slot_s = seconds / rounds / max(1, len(entries))
        for number in range(rounds):
            turn = number * len(entries) // rounds  # everybody gets to be first and last
            for position, entry in enumerate(entries[turn:] + entries[:turn]):
                if entry not in self._bursts or spent_s[entry] >= (number + 1) * slot_s:
                    continue
                done = (number * len(entries) + position) / (rounds * len(entries))
                yield done, f"{shape.name}: {entry.contender.label} {entry.operation}"
                started_s = time.monotonic()
                self._burst(entry, shape, slot_s)
                spent_s[entry] += time.monotonic() - started_s

    def results(self, shape: Shape) -> list[Result]:
        """Return the rows of the shape that ran last, the fastest memcpy being the measure."""
        p50_ms = {
            entry: statistics.median(_latencies_ms(bursts))
            for entry, bursts in self._bursts.items()
            if bursts
        }
        ceiling_ms = min(
            (value for entry, value in p50_ms.items() if entry.contender.key == MEMCPY),
            default=0.0,
        )
        return [
            _result(shape, entry, self._bursts[entry], ceiling_ms / p50)
            for entry, p50 in p50_ms.items()
        ]

    def _burst(self, entry: Entry, shape: Shape, slot_s: float) -> None:
        pair = self._pairs.get(entry.contender)
        if pair is None:
            return  # it has failed in another operation
        if entry.contender.peer:
            pair.thaw()
        with self._or_leave_out(entry.contender, shape, entry):
            self._bursts[entry].append(pair.burst(shape, entry.operation, slot_s=slot_s))
        if entry.contender.peer:
            pair.freeze()

    @contextlib.contextmanager
    def _or_leave_out(
        self, contender: Contender, shape: Shape | None = None, entry: Entry | None = None
    ) -> Iterator[None]:
        """Return a failure leaves a contender out: of one shape if it can go on, else
        altogether."""
        try:
            yield
        except WorkerFailed as failure:
            self.left_out.append(
                LeftOut(contender.key, shape.name if shape is not None else "", str(failure))
            )
            if entry is not None:
                del self._bursts[entry]
            if entry is None or not failure.usable:
                self._pairs.pop(contender).close()


def _result(shape: Shape, entry: Entry, bursts: list[Burst], ratio: float) -> Result:
    latencies_ms = _latencies_ms(bursts)
    p50_ms = statistics.median(latencies_ms)
    moved_gib = shape.nbytes * len(latencies_ms) / (1 << 30)
    return Result(
        shape=shape.name,
        engine=entry.contender.key,
        operation=entry.operation,
        label=entry.contender.label,
        num_pieces=shape.num_pieces,
        piece_nbytes=shape.block_nbytes,
        nbytes=shape.nbytes,
        samples=len(latencies_ms),
        gb_per_s=round(shape.nbytes / p50_ms / 1e6, 3),
        p50_ms=round(p50_ms, 4),
        p99_ms=round(float(np.percentile(latencies_ms, 99)), 4),
        min_ms=round(min(latencies_ms), 4),
        cpu_s_per_gib=round(sum(burst.cpu_s for burst in bursts) / moved_gib, 3),
        ratio_to_memcpy=round(ratio, 6),
        verified=all(burst.verified for burst in bursts),
        burst_p50_ms=tuple(round(statistics.median(_latencies_ms([b])), 4) for b in bursts),
    )


def _latencies_ms(bursts: list[Burst]) -> list[float]:
    return [latency_ns / 1e6 for burst in bursts for latency_ns in burst.latencies_ns]


def _check_memory(contenders: list[Contender], shapes: Shapes) -> None:
    pool_nbytes = max(shape.pool_nbytes for shape in shapes)
    needed = 2 * len(contenders) * (pool_nbytes + PROCESS_NBYTES)
    available = machine.memory_nbytes("MemAvailable")
    if available and needed > available:
        raise BenchError(
            f"{len(contenders)} pairs of processes need {needed / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB are free: compare fewer (--rails 2, --compare none)"
        )
