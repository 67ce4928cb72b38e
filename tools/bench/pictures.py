"""Pictures of reports: panels one below the other, drawn by matplotlib where it is installed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

COLORS = ("#1f6f8b", "#4fa3a5", "#8fb339", "#d9a441", "#8a5a9e", "#5b6770")
CEILING = "#c8553d"
PANEL_INCHES = 3.2


def save(
    path: Path,
    title: str,
    panels: Sequence[Callable[[Any], None]],
    inches: Sequence[float] | None = None,
) -> None:
    """Write a PNG with these panels, each drawn by one of the functions.

    Args:
        inches: how high each is; alike if None.
    """
    figures: Any = importlib.import_module("matplotlib.figure")
    heights = inches or [PANEL_INCHES] * len(panels)
    figure = figures.Figure(figsize=(8, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, draw in zip(axes, panels, strict=True):
        draw(panel)
        panel.tick_params(labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=7)
    figure.savefig(path, dpi=150, format="png")


def line(panel: Any, x: list[float], y: list[float], label: str, color: str) -> None:
    """Draw a line with its points, over powers of two."""
    panel.plot(x, y, marker="o", markersize=3, linewidth=1.4, label=label, color=color)
    panel.set_xscale("log", base=2)


def ceiling(panel: Any, value: float, label: str) -> None:
    """Draw the line to reach."""
    panel.axhline(value, color=CEILING, linewidth=1.2, label=label)


def finish(panel: Any, title: str, x: str, y: str) -> None:
    """Say what a panel is of."""
    panel.set_title(title, fontsize=9, loc="left")
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
    panel.legend(fontsize=7, frameon=False)
