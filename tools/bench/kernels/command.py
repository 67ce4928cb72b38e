"""`kvferry bench kernels`: gather, scatter and push on one GPU, beside a copy of the same bytes."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path  # noqa: TC003 - typer reads it at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvferry.tools.bench import pictures
from kvferry.tools.bench.kernels import measure as kernels_measure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvferry.tools.bench.kernels.measure import Report, Row


def kernels(
    total_mib: Annotated[
        int, typer.Option("--mib", min=1, help="MiB that a launch moves; needs 16 times as much.")
    ] = 1024,
    repeats: Annotated[int, typer.Option(min=3, help="Repetitions, of which the median.")] = 20,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also every tile size and number of warps.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write a JSON report.")
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw a picture.")
    ] = None,
) -> None:
    """Gather, scatter and push blocks on one GPU, beside a device-to-device copy.

    Blocks are random and scattered, layers are allocations of their own, L2 is cold. Every result is
    compared with its reference first. Exits 1 if one is wrong.
    """
    console = Console(stderr=True)
    if plot_path is not None:
        try:
            pictures.check()
        except ImportError as error:
            raise typer.BadParameter(f"{error}; pip install kvferry[plot]") from error
    options = kernels_measure.Options(total_mib << 20, repeats, sweep)
    try:
        with console.status("measuring") as status:
            report = kernels_measure.measure(options, status.update)
    except (RuntimeError, kernels_measure.WrongBytes) as error:
        console.print(f"kvferry bench kernels: {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    show(Console(), report)
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(report), indent=1), encoding="utf-8")
    if plot_path is not None:
        draw(report, plot_path)


def show(console: Console, report: Report) -> None:
    """Prints the report as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    console.print(f"{report.device}, {report.num_multiprocessors} multiprocessors; {versions}")
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
    """The fastest tuning for each operation, piece and bound."""
    best: dict[tuple[str, int, int | None], Row] = {}
    for row in sweep:
        key = (row.operation, row.piece_nbytes, row.max_programs)
        if key not in best or row.gb_per_s > best[key].gb_per_s:
            best[key] = row
    return list(best.values())


def draw(report: Report, path: Path) -> None:
    """Draw GB/s by size of a piece, and by programs if that was measured, as PNG."""
    panels = [_by_pieces, _by_programs] if report.curves else [_by_pieces]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    pictures.save(
        path,
        f"{report.device}; {versions}",
        [functools.partial(panel, report=report) for panel in panels],
    )


def _by_pieces(panel: Any, report: Report) -> None:
    for color, (operation, rows) in zip(pictures.COLORS, _by_operation(report.rows), strict=False):
        sizes = [row.piece_nbytes / 1024 for row in rows]
        pictures.line(panel, sizes, [row.gb_per_s for row in rows], operation, color)
    top = report.memcpy_gb_per_s
    panel.axhline(top, color=pictures.CEILING, linewidth=1.2, label=f"memcpy, {top:.0f}")
    panel.set_ylim(0, 1.1 * top)
    pictures.finish(panel, "Scattered pieces, the whole GPU", "piece, KiB", "GB/s")


def _by_programs(panel: Any, report: Report) -> None:
    for color, (operation, rows) in zip(
        pictures.COLORS, _by_operation(report.curves), strict=False
    ):
        programs = [float(row.max_programs or 0) for row in rows]
        pictures.line(panel, programs, [row.gb_per_s for row in rows], operation, color)
    top = report.memcpy_gb_per_s
    panel.axhline(top, color=pictures.CEILING, linewidth=1.2, label=f"memcpy, {top:.0f}")
    panel.set_ylim(0, 1.1 * top)
    pictures.finish(panel, "A bounded number of programs", "programs", "GB/s")


def _by_operation(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        pieces = {each.piece_nbytes for each in rows if each.max_programs is not None}
        size = f", {row.piece_nbytes >> 10} KiB" if len(pieces) > 1 else ""
        found.setdefault(f"{row.operation}{size}", []).append(row)
    return list(found.items())
