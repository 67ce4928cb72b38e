"""A picture of a report of `kvferry bench transfer`: GB/s as bars, memcpy as the line to reach."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvferry.tools.bench.transfer.roster import MEMCPY
from kvferry.tools.bench.transfer.tables import name_of

if TYPE_CHECKING:
    from pathlib import Path

    from kvferry.tools.bench.transfer.report import Report, Result

OURS, OTHERS, CEILING = "#1f6f8b", "#b0b7bf", "#c8553d"


def check() -> None:
    """Imports what plotting needs: better before a run than after it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    importlib.import_module("matplotlib")


def save(report: Report, path: Path) -> None:
    """Writes the picture as PNG."""
    figures: Any = importlib.import_module("matplotlib.figure")
    rows = {shape: _rows(report, shape) for shape in report.shapes}
    heights = [len(each) + 1.5 for each in rows.values()]
    figure = figures.Figure(figsize=(8, 0.28 * sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (shape, results) in zip(panels, rows.items(), strict=True):
        _draw(panel, shape, results, report)
    panels[-1].set_xlabel("GB/s at the median latency")
    machine = report.machine
    figure.suptitle(f"{machine.cpu}, {machine.cores} cores, {machine.system}", fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _rows(report: Report, shape: str) -> list[Result]:
    found = [r for r in report.results if r.shape == shape and r.engine != MEMCPY]
    return found[::-1]  # bars are drawn from the bottom


def _draw(panel: Any, shape: str, results: list[Result], report: Report) -> None:
    colors = [OURS if result.engine.startswith(("cma", "tcp")) else OTHERS for result in results]
    speeds = [result.gb_per_s for result in results]
    bars = panel.barh([name_of(result) for result in results], speeds, color=colors)
    panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    ceiling = max(
        (r.gb_per_s for r in report.results if r.shape == shape and r.engine == MEMCPY), default=0.0
    )
    panel.axvline(ceiling, color=CEILING, linewidth=1.2)
    panel.set_xlim(0, max([*speeds, ceiling]) * 1.1)
    nbytes = results[0].nbytes / (1 << 20) if results else 0
    panel.set_title(
        f"{shape}, {nbytes:g} MiB (line: memcpy, {ceiling:.2f})", fontsize=9, loc="left"
    )
    panel.tick_params(labelsize=7)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
