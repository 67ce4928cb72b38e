"""A report of `kvferry bench transfer` for people: tables, and a picture."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvferry.tools.bench import pictures
from kvferry.tools.bench.transfer.driver import READ, WRITE
from kvferry.tools.bench.transfer.roster import MEMCPY

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from kvferry.tools.bench.idle_memory import IdleMemory
    from kvferry.tools.bench.machine import Machine
    from kvferry.tools.bench.transfer.report import Report, Result

MIB = 1 << 20
OTHERS = "#b0b7bf"
_MARKS = {True: "[green]met[/]", False: "[bold red]missed[/]", None: "not measured"}


def show(console: Console, report: Report) -> None:
    """Print everything."""
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    for line in _head(report.machine):
        say(line)
    for shape in report.shapes:
        say(_results(report, shape))
    idle = _table("Connected and idle", "", "CPU of both ends, % of a core")
    for each in report.idle_cpu:
        idle.add_row(each.label, f"{each.percent:.1f}")
    say(idle)
    for memory in report.idle_memory:
        say(_memory(memory))
    targets = _table("Targets", "", "wanted", "here", "")
    for target in report.targets:
        value = "" if target.value is None else f"{target.value:.2f}"
        targets.add_row(target.name, target.wanted, value, _MARKS[target.met])
    say(targets)
    for left in report.left_out:
        where = f" ({left.shape})" if left.shape else ""
        say(f"left out: {left.engine}{where}: {escape(left.reason)}")
    console.print(
        f"latency: from before the request is built until the receiver has it; one request in "
        f"flight; {report.settings.rounds} rounds of bursts in turn; medians; "
        f"{report.wall_s:.0f} s in all",
        highlight=False,
    )


def _table(title: str, *headings: str, **options: Any) -> Table:
    """Return a table whose first column is text, all others figures."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, **options)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _head(machine: Machine) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return [
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_nbytes / 2**30:.0f} GiB, "
        f"{machine.system}, huge pages: {machine.huge_pages}, load before: {machine.load:.2f}",
        versions,
    ]


def name_of(result: Result) -> str:
    """Return the label of a result, with its operation where that is not a write."""
    if result.operation == WRITE:
        return result.label
    return f"{result.label} {'READ' if result.operation == READ else '(' + result.operation + ')'}"


def _results(report: Report, shape: str) -> Table:
    results = [result for result in report.results if result.shape == shape]
    one = results[0]
    title = f"{shape}: {one.num_pieces:,} pieces of {one.piece_nbytes:,} bytes, {one.nbytes / MIB:g} MiB"
    headings = ("", "GB/s", "p50 ms", "p99 ms", "CPU\ns/GiB", "of\nmem-\ncpy", "veri-\nfied", "n")
    table = _table(title, *headings, padding=(0, 1, 0, 0), pad_edge=False)
    for result in results:
        table.add_row(
            name_of(result),
            f"{result.gb_per_s:.2f}",
            f"{result.p50_ms:.2f}",
            f"{result.p99_ms:.2f}",
            f"{result.cpu_s_per_gib:.2f}",
            f"{result.ratio_to_memcpy:.2f}",
            "yes" if result.verified else "[bold red]NO[/]",
            str(result.samples),
        )
    return table


def _memory(memory: IdleMemory) -> str:
    if memory.reason:
        return f"idle {memory.name}: not measured: {escape(memory.reason)}"
    return (
        f"idle {memory.name}: {(memory.imports_nbytes + memory.object_nbytes) / MIB:.1f} MiB "
        f"resident beside torch, {memory.imports_nbytes / MIB:.1f} MiB of it its imports"
    )


def draw(report: Report, path: Path) -> None:
    """Draw GB/s as bars, memcpy as the line to reach, as PNG."""
    ours = [result for result in report.results if result.engine != MEMCPY]
    rows = {  # bars are drawn from the bottom
        shape: [result for result in ours if result.shape == shape][::-1] for shape in report.shapes
    }
    inches = [0.28 * (len(each) + 1.5) for each in rows.values()]
    machine = report.machine
    pictures.save(
        path,
        f"{machine.cpu}, {machine.cores} cores, {machine.system}",
        [
            functools.partial(_draw, shape=shape, results=results, report=report)
            for shape, results in rows.items()
        ],
        [*inches[:-1], inches[-1] + 0.6],
    )


def _draw(panel: Any, shape: str, results: list[Result], report: Report) -> None:
    if shape == report.shapes[-1]:
        panel.set_xlabel("GB/s at the median latency")
    colors = [
        pictures.COLORS[0] if result.engine.startswith(("cma", "tcp")) else OTHERS
        for result in results
    ]
    speeds = [result.gb_per_s for result in results]
    bars = panel.barh([name_of(result) for result in results], speeds, color=colors)
    panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    ceiling = max(
        (r.gb_per_s for r in report.results if r.shape == shape and r.engine == MEMCPY), default=0.0
    )
    panel.axvline(ceiling, color=pictures.CEILING, linewidth=1.2)
    panel.set_xlim(0, max([*speeds, ceiling]) * 1.1)
    nbytes = results[0].nbytes / (1 << 20) if results else 0
    panel.set_title(
        f"{shape}, {nbytes:g} MiB (line: memcpy, {ceiling:.2f})", fontsize=9, loc="left"
    )
