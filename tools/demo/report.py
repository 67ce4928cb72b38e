"""What people see of the demo: its progress, then tokens compared, bytes moved, and how long it took."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvferry.tools.demo.events import (
    Finished,
    Generated,
    Prefilled,
    Ready,
    Received,
    Skipped,
    Started,
    Step,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from kvferry.tools.demo.events import Event, Options


class DemoProgress:
    """Shows each event on `console`; a context manager."""

    def __init__(self, console: Console, options: Options) -> None:
        self._console = console
        self._options = options
        self._done: dict[str, int] = {}
        self._bars: Progress | None = None
        prompts, tokens = options.num_prompts, options.num_prompts * options.num_tokens
        self._totals = {
            "load the model twice": 2,
            "prefill prompts": prompts,
            **{f"{name} handoffs": prompts for name in options.transports},
            "reference tokens": tokens,
            **{f"{name} tokens": tokens for name in options.transports},
        }
        if console.is_terminal:
            text, count = TextColumn("{task.description:22}"), MofNCompleteColumn()
            self._bars = Progress(text, BarColumn(), count, TimeElapsedColumn(), console=console)
            self._tasks = {
                what: self._bars.add_task(what, total=total, start=number == 0)
                for number, (what, total) in enumerate(self._totals.items())
            }

    def __enter__(self) -> DemoProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Started(role, pid) if not self._bars:
                self._print(f"{role} is process {pid}")
            case Ready():
                self._advance("load the model twice", 1)
            case Prefilled():
                self._advance("prefill prompts", 1)
            case Received(transport):
                self._advance(f"{transport} handoffs", 1)
            case Step(path, num_prompts):
                self._advance(f"{path} tokens", num_prompts)
            case Generated(path) if not self._bars:
                self._line(f"{path} tokens")
            case Skipped(transport, reason):
                self._print(f"{transport} is left out: {reason}")
                for what in ("handoffs", "tokens"):
                    if self._bars:
                        self._bars.remove_task(self._tasks[f"{transport} {what}"])

    def _advance(self, what: str, count: int) -> None:
        self._done[what] = self._done.get(what, 0) + count
        if self._bars:
            self._bars.start_task(self._tasks[what])
            self._bars.advance(self._tasks[what], count)
        elif not what.endswith("tokens") and self._done[what] % 16 in (0, self._totals[what]):
            self._line(what)

    def _line(self, what: str) -> None:
        self._print(f"{what}: {self._done[what]} of {self._totals[what]}")

    def _print(self, line: str) -> None:
        # A transport's reason may hold brackets, which rich would read as markup.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class TransportResult(NamedTuple):
    """One row of the table."""

    transport: str
    requests: int
    tokens_compared: int
    mismatches: int
    nbytes: int
    gb_per_s: float
    p50_ms: float
    p99_ms: float
    share_of_prefill: float


@dataclass
class Collector:
    """Keeps the events that the results are made of."""

    options: Options
    prefill_s: dict[int, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    received: dict[str, list[Received]] = field(default_factory=dict)
    tokens: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        match event:
            case Prefilled(prompt, num_tokens, prefill_s):
                self.prefill_s[prompt] = prefill_s
                self.prompt_tokens += num_tokens
            case Received(transport):
                self.received.setdefault(transport, []).append(event)
            case Generated(path, tokens):
                self.tokens.setdefault(path, {}).update(tokens)
            case Finished(role):
                self.finished[role] = event
            case Skipped(transport, reason):
                self.skipped[transport] = reason

    def results(self) -> list[TransportResult]:
        """Return one result a transport that ran, in the order of the options."""
        return [
            self._result(name, self.received[name])
            for name in self.options.transports
            if name in self.received
        ]

    def _result(self, transport: str, received: Sequence[Received]) -> TransportResult:
        reference, decoded = self.tokens["reference"], self.tokens[transport]
        latencies_s = sorted(one.latency_s for one in received)
        nbytes, transfer_s = sum(one.nbytes for one in received), sum(latencies_s)
        return TransportResult(
            transport=transport,
            requests=len(received),
            tokens_compared=sum(len(tokens) for tokens in reference.values()),
            mismatches=sum(
                mismatches(tokens, decoded.get(prompt, [])) for prompt, tokens in reference.items()
            ),
            nbytes=nbytes,
            gb_per_s=nbytes / transfer_s / 1e9,
            p50_ms=percentile(latencies_s, 50) * 1e3,
            p99_ms=percentile(latencies_s, 99) * 1e3,
            share_of_prefill=transfer_s / sum(self.prefill_s.values()),
        )

    @property
    def distinct_tokens(self) -> float:
        """Distinct tokens of a reference answer, on average: one repeated token proves little."""
        answers = self.tokens["reference"].values()
        return sum(len(set(tokens)) for tokens in answers) / len(answers)

    def problems(self) -> list[str]:
        """Return why the demo has to fail; empty when all is well."""
        found = []
        note = " (a block was damaged on purpose)" if self.options.corrupt else ""
        results = self.results()
        for result in results:
            if result.mismatches:
                found.append(
                    f"{result.mismatches} of {result.tokens_compared} tokens over "
                    f"{result.transport} differ from the reference{note}"
                )
            if result.requests != self.options.num_prompts:
                found.append(
                    f"{result.requests} of {self.options.num_prompts} requests arrived over "
                    f"{result.transport}"
                )
            if self.options.corrupt and not result.mismatches:
                found.append(f"the damage done on purpose went unnoticed over {result.transport}")
        if not results:
            found.append("no transport ran")
        for role, pool in self.finished.items():
            if pool.num_free != pool.num_blocks:
                found.append(
                    f"{role} leaked {pool.num_blocks - pool.num_free} of {pool.num_blocks} blocks"
                )
            if pool.stray_blocks:
                found.append(f"{pool.stray_blocks} free blocks of {role} were written to")
        return found

    def to_json(self, wall_s: float) -> dict[str, Any]:
        """Everything in plain types, times in the units of the names."""
        return {
            "transports": [result._asdict() for result in self.results()],
            "skipped": self.skipped,
            "prompts": self.options.num_prompts,
            "prompt_tokens": self.prompt_tokens,
            "prefill_s": sum(self.prefill_s.values()),
            "distinct_tokens_an_answer": self.distinct_tokens,
            "pools": {role: pool._asdict() for role, pool in self.finished.items()},
            "devices": list(self.options.devices),
            "corrupted_on_purpose": self.options.corrupt,
            "problems": self.problems(),
            "wall_s": wall_s,
        }

    def table(self) -> Table:
        """Return a row a transport, for people."""
        table = Table(
            title="KV cache handed from process to process; p50 and p99 of one handoff",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("transport", no_wrap=True)
        columns = (
            "requests|tokens\ncompared|mis-\nmatches|MB|GB/s|p50\nms|p99\nms|share of\nprefill"
        )
        for heading in columns.split("|"):
            table.add_column(heading, justify="right", no_wrap=True)
        for result in self.results():
            table.add_row(
                result.transport,
                str(result.requests),
                f"{result.tokens_compared:,}",
                f"[bold red]{result.mismatches:,}[/]" if result.mismatches else "[green]0[/]",
                f"{result.nbytes / 1e6:,.1f}",
                f"{result.gb_per_s:.2f}",
                f"{result.p50_ms:.2f}",
                f"{result.p99_ms:.2f}",
                f"{result.share_of_prefill:.1%}",
            )
        return table

    def lines(self, wall_s: float) -> list[str]:
        """Return what the table leaves out, a sentence each."""
        pools = ", ".join(
            f"{role} {pool.num_free} of {pool.num_blocks}" for role, pool in self.finished.items()
        )
        strays = sum(pool.stray_blocks for pool in self.finished.values())
        prefill, decode = self.options.devices
        return [
            f"prefill on {prefill}, decode on {decode}",
            f"prefill: {len(self.prefill_s)} prompts, {self.prompt_tokens:,} tokens in "
            f"{sum(self.prefill_s.values()):.1f} s",
            f"answers: {self.options.num_tokens} tokens, {self.distinct_tokens:.1f} of them "
            "distinct, on average",
            f"blocks free at the end: {pools}; free blocks written to: {strays}",
            f"total: {wall_s:.1f} s",
        ]


def mismatches(reference: Sequence[int], decoded: Sequence[int]) -> int:
    """Positions at which two answers differ; a missing token differs."""
    return sum(
        position >= len(decoded) or token != decoded[position]
        for position, token in enumerate(reference)
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of sorted values."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
