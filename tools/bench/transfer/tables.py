"""A report of `kvferry bench transfer` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvferry.tools.bench.transfer.driver import READ, WRITE

if TYPE_CHECKING:
    from rich.console import Console

    from kvferry.tools.bench.transfer.report import IdleMemory, Machine, Report, Result

MIB = 1 << 20
_MARKS = {True: "[green]met[/]", False: "[bold red]missed[/]", None: "not measured"}


def show(console: Console, report: Report) -> None:
    """Prints everything."""
    for line in _head(report.machine):
        console.print(line, highlight=False, soft_wrap=True)
    for shape in report.shapes:
        console.print(_results(report, shape))
    console.print(_idle(report))
    for memory in report.idle_memory:
        console.print(_memory(memory), highlight=False, soft_wrap=True)
    console.print(_targets(report))
    for left in report.left_out:
        where = f" ({left.shape})" if left.shape else ""
        console.print(
            f"left out: {left.engine}{where}: {escape(left.reason)}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"latency: from before the request is built until the receiver has it; one request in "
        f"flight; {report.settings.rounds} rounds of bursts in turn; medians; "
        f"{report.wall_s:.0f} s in all",
        highlight=False,
    )


def _head(machine: Machine) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return [
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_nbytes / 2**30:.0f} GiB, "
        f"{machine.system}, huge pages: {machine.huge_pages}, load before: {machine.load:.2f}",
        versions,
    ]


def name_of(result: Result) -> str:
    """The label of a result, with its operation where that is not a write."""
    if result.operation == WRITE:
        return result.label
    return f"{result.label} {'READ' if result.operation == READ else '(' + result.operation + ')'}"


def _results(report: Report, shape: str) -> Table:
    results = [result for result in report.results if result.shape == shape]
    one = results[0]
    table = Table(
        title=f"{shape}: {one.num_pieces:,} pieces of {one.piece_nbytes:,} bytes, "
        f"{one.nbytes / MIB:g} MiB",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in ("GB/s", "p50 ms", "p99 ms", "CPU\ns/GiB", "of\nmem-\ncpy", "veri-\nfied", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
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


def _idle(report: Report) -> Table:
    table = Table(title="Connected and idle", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    table.add_column("CPU of both ends, % of a core", justify="right")
    for idle in report.idle_cpu:
        table.add_row(idle.label, f"{idle.percent:.1f}")
    return table


def _memory(memory: IdleMemory) -> str:
    if memory.reason:
        return f"idle {memory.name}: not measured: {escape(memory.reason)}"
    return (
        f"idle {memory.name}: {(memory.imports_nbytes + memory.object_nbytes) / MIB:.1f} MiB "
        f"resident beside torch, {memory.imports_nbytes / MIB:.1f} MiB of it its imports"
    )


def _targets(report: Report) -> Table:
    table = Table(title="Targets", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("wanted", "here", ""):
        table.add_column(heading, justify="right")
    for target in report.targets:
        value = "" if target.value is None else f"{target.value:.2f}"
        table.add_row(target.name, target.wanted, value, _MARKS[target.met])
    return table
