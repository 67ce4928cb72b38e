"""`kvferry bench kernels`: gather, scatter and push on one GPU, beside a copy of the same bytes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvferry.tools.bench import pictures
from kvferry.tools.bench.cli import JsonPath, PlotPath, check_plot, fail
from kvferry.tools.bench.figures import WrongBytes, write_json
from kvferry.tools.bench.kernels import measure as kernels_measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from kvferry.tools.bench.kernels.measure import Report, Row


def kernels(
    total_mib: Annotated[
        int, typer.Option("--mib", min=1, help="MiB that a launch moves; needs 16 times as much.")
    ] = 1024,
    repeats: Annotated[int, typer.Option(min=3, help="Repetitions, of which the median.")] = 20,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also every tile size and number of warps.")
    ] = False,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
) -> None:
    """Gather, scatter and push blocks on one GPU, beside a device-to-device copy.

    Blocks are random and scattered, layers are allocations of their own, L2 is cold. Every result is
    compared with its reference first. Exits 1 if one is wrong.
    """
    check_plot(plot_path)
    options = kernels_measure.Options(total_mib << 20, repeats, sweep)
    try:
        with Console(stderr=True).status("measuring") as status:
            report = kernels_measure.measure(options, status.update)
    except (RuntimeError, WrongBytes) as error:
        fail("kernels", error)
    show(Console(), report)
    write_json(json_path, report)
    if plot_path is not None:
        draw(report, plot_path)


def show(console: Console, report: Report) -> None:
    """Print the report as tables."""
    console.print(
        f"{report.device}, {report.num_multiprocessors} multiprocessors; {_versions(report)}"
    )
    console.print(f"device-to-device memcpy: {report.memcpy_gb_per_s:.0f} GB/s of payload")
    console.print(_table("scattered pieces, the whole GPU", report.rows))
    if report.curves:
        console.print(_table("a bounded number of programs", report.curves))
    if report.sweep:
        console.print(_table("best of every tile and number of warps", _best(report.sweep)))
    host = Table("operation", "eager p50 us", "p99", "CUDA graph p50 us", title="host, per launch")
    for cost in report.host:
        host.add_row(
            cost.operation,
            f"{cost.eager_p50_us:.1f}",
            f"{cost.eager_p99_us:.1f}",
            f"{cost.graph_p50_us:.1f}",
        )
    console.print(host)


def _table(title: str, rows: Iterable[Row]) -> Table:
    table = Table("operation", "piece", title=title, title_justify="left")
    for column in ("programs", "tile, warps", "MiB", "us", "GB/s", "of memcpy"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.operation,
            f"{row.piece_nbytes >> 10} KiB",
            "any" if row.max_programs is None else str(row.max_programs),
            "default"
            if row.tile_nbytes is None
            else f"{row.tile_nbytes >> 10} KiB, {row.num_warps}",
            f"{row.nbytes >> 20}",
            f"{row.gpu_us:.1f}",
            f"{row.gb_per_s:.1f}",
            f"{row.of_memcpy:.2f}",
        )
    return table


def _best(sweep: Iterable[Row]) -> list[Row]:
    """Return the fastest tuning for each operation, piece and bound."""
    best: dict[tuple[str, int, int | None], Row] = {}
    for row in sweep:
        key = (row.operation, row.piece_nbytes, row.max_programs)
        if key not in best or row.gb_per_s > best[key].gb_per_s:
            best[key] = row
    return list(best.values())


def draw(report: Report, path: Path) -> None:
    """Draw GB/s by size of a piece, and by programs if that was measured, as PNG."""
    sizes = functools.partial(
        _draw,
        report,
        report.rows,
        lambda row: row.piece_nbytes / 1024,
        ("Scattered pieces, the whole GPU", "piece, KiB", "GB/s"),
    )
    programs = functools.partial(
        _draw,
        report,
        report.curves,
        lambda row: float(row.max_programs or 0),
        ("A bounded number of programs", "programs", "GB/s"),
    )
    panels = [sizes, programs] if report.curves else [sizes]
    pictures.save(path, f"{report.device}; {_versions(report)}", panels)


def _draw(
    report: Report, rows: list[Row], x: Callable[[Row], float], words: tuple[str, ...], panel: Any
) -> None:
    for color, (operation, part) in zip(pictures.COLORS, _by_operation(rows), strict=False):
        speeds = [row.gb_per_s for row in part]
        pictures.line(panel, [x(row) for row in part], speeds, operation, color)
    top = report.memcpy_gb_per_s
    pictures.ceiling(panel, top, f"memcpy, {top:.0f}")
    panel.set_ylim(0, 1.1 * top)
    pictures.finish(panel, *words)


def _versions(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _by_operation(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        pieces = {each.piece_nbytes for each in rows if each.max_programs is not None}
        size = f", {row.piece_nbytes >> 10} KiB" if len(pieces) > 1 else ""
        found.setdefault(f"{row.operation}{size}", []).append(row)
    return list(found.items())
