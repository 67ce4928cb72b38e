"""Pictures of a report of `kvferry bench transfer --gpu`.

GB/s against piece size with the ceilings drawn, GB/s against programs, and latency against bytes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from kvferry.tools.bench import pictures
from kvferry.tools.bench.pictures import CEILING, COLORS, ceiling, finish, line

if TYPE_CHECKING:
    from pathlib import Path


def save(report: dict[str, Any], path: Path) -> None:
    """Draw what the report (as `--json` writes it) holds, as PNG."""
    direct, staged = (report.get(key) or {} for key in ("direct", "staged"))
    drawn = (
        (_direct, direct.get("rows")),
        (_caps, direct.get("caps")),
        (_latency, direct.get("one_way_us")),
        (_staged, staged.get("rows")),
    )
    panels = [functools.partial(draw, report=report) for draw, rows in drawn if rows]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    pictures.save(path, f"{' and '.join(report['devices'])}; {versions}", panels)


def _direct(panel: Any, report: dict[str, Any]) -> None:
    direct = report["direct"]
    totals = sorted({row["total_nbytes"] >> 20 for row in direct["rows"]} - {0})
    for color, total in zip(COLORS, totals, strict=False):
        rows = [row for row in direct["rows"] if row["total_nbytes"] >> 20 == total]
        line(
            panel,
            [row["piece_nbytes"] / 1024 for row in rows],
            [row["gb_per_s"] for row in rows],
            f"cuda_ipc, {total} MiB",
            color,
        )
    top = direct["ceiling_gb_per_s"]
    ceiling(panel, top, f"one contiguous copy, {top:.0f}")
    finish(panel, "From GPU to GPU, scattered blocks", "block, KiB", "GB/s")


def _staged(panel: Any, report: dict[str, Any]) -> None:
    staged = report["staged"]
    rows = [row for row in staged["rows"] if row["total_nbytes"] == 1 << 30]
    labels = [f"{row['path']}, {row['piece_nbytes'] >> 10} KiB blocks" for row in rows][::-1]
    bars = panel.barh(labels, [row["gb_per_s"] for row in rows][::-1], color=COLORS[0])
    panel.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    for name, speed in staged["ceilings_gb_per_s"].items():
        if "pinned" in name:
            panel.axvline(speed, color=CEILING, linewidth=1.2, label=f"{name}, {speed:.1f}")
    finish(panel, "Staged through pinned host memory, 1 GiB", "GB/s", "")


def _caps(panel: Any, report: dict[str, Any]) -> None:
    caps = report["direct"]["caps"]
    line(panel, [cap for cap, _ in caps], [speed for _, speed in caps], "cuda_ipc", COLORS[0])
    best = max(speed for _, speed in caps)
    ceiling(panel, 0.9 * best, "0.9 of the best")
    panel.set_ylim(0, 1.1 * best)
    finish(panel, "256 MiB of 32 KiB blocks, by programs at a time", "programs", "GB/s")


def _latency(panel: Any, report: dict[str, Any]) -> None:
    one_way = report["direct"]["one_way_us"]
    sizes = [nbytes / 1024 for nbytes, _ in one_way]
    line(panel, sizes, [micros for _, micros in one_way], "stream to stream, one way", COLORS[0])
    rows = [row for row in report["direct"]["rows"] if row["piece_nbytes"] == 32 << 10]
    sizes = [row["total_nbytes"] / 1024 for row in rows]
    line(panel, sizes, [row["alone_us"] for row in rows], "the host's clock", COLORS[3])
    nixl = report.get("nixl") or []
    if nixl:
        sizes = [row["total_nbytes"] / 1024 for row in nixl]
        line(panel, sizes, [row["us"] for row in nixl], "NIXL, the host's clock", COLORS[5])
    panel.set_yscale("log")
    finish(panel, "Latency of one handoff", "KiB", "µs")
