"""Pictures of a report of `kvferry bench kernels`: GB/s by size of a piece, and by programs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvferry.tools.bench.gpu.plot import CEILING, COLORS, finish, line

if TYPE_CHECKING:
    from pathlib import Path

    from kvferry.tools.bench.kernels.measure import Report, Row


def check() -> None:
    """Raises ImportError if nothing can be drawn here."""
    importlib.import_module("matplotlib")


def save(report: Report, path: Path) -> None:
    """Draws the report as PNG: rows always, curves if there are any."""
    figures: Any = importlib.import_module("matplotlib.figure")
    panels = 1 + bool(report.curves)
    figure = figures.Figure(figsize=(8, 3.2 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    _by_pieces(axes[0], report)
    if report.curves:
        _by_programs(axes[1], report)
    for panel in axes:
        panel.tick_params(labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    figure.suptitle(f"{report.device}; {versions}", fontsize=7)
    figure.savefig(path, dpi=150, format="png")


def _by_pieces(panel: Any, report: Report) -> None:
    for color, (operation, rows) in zip(COLORS, _by_operation(report.rows), strict=False):
        sizes = [row.piece_nbytes / 1024 for row in rows]
        line(panel, sizes, [row.gb_per_s for row in rows], operation, color)
    top = report.memcpy_gb_per_s
    panel.axhline(top, color=CEILING, linewidth=1.2, label=f"memcpy, {top:.0f}")
    panel.set_ylim(0, 1.1 * top)
    finish(panel, "Scattered pieces, the whole GPU", "piece, KiB", "GB/s")


def _by_programs(panel: Any, report: Report) -> None:
    for color, (operation, rows) in zip(COLORS, _by_operation(report.curves), strict=False):
        programs = [float(row.max_programs or 0) for row in rows]
        line(panel, programs, [row.gb_per_s for row in rows], operation, color)
    top = report.memcpy_gb_per_s
    panel.axhline(top, color=CEILING, linewidth=1.2, label=f"memcpy, {top:.0f}")
    panel.set_ylim(0, 1.1 * top)
    finish(panel, "A bounded number of programs", "programs", "GB/s")


def _by_operation(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        pieces = {each.piece_nbytes for each in rows if each.max_programs is not None}
        size = f", {row.piece_nbytes >> 10} KiB" if len(pieces) > 1 else ""
        found.setdefault(f"{row.operation}{size}", []).append(row)
    return list(found.items())
