"""`kvferry bench …`: one file a benchmark, imported when it is used; and what these commands share."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, NoReturn, Optional

import typer

from kvferry.tools import lazy

app = lazy.new_app(
    "Benchmarks. Each checks its results and prints its baselines from the same run.",
    {
        "bench.transfer.command": "Move a request's blocks between two processes over every transport, beside the baselines.",
        "bench.kernels.command": "Gather and scatter blocks on one GPU, beside a device-to-device copy of the same bytes.",
        "bench.layouts.command": "Move blocks from GPU to GPU between caches that differ in layout or type, in one pass.",
        "bench.streaming.command": "Stream a prompt's layers from GPU to GPU beside a forward pass, as the vLLM connector does.",
        "bench.control.command": "Hand over small requests between two agents, and load a daemon with many.",
        "bench.paths": "From which piece size a transport is faster without staging; can save that for engines.",
        "bench.verbs.command": "Write blocks between two RDMA devices, direct and staged, beside perftest.",
    },
)

JsonPath = Annotated[
    Optional[Path],  # noqa: UP045 - typer evaluates it
    typer.Option("--json", metavar="FILE", help="Also write a JSON report."),
]
PlotPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--plot", metavar="FILE.png", help="Also draw a picture."),
]


def check_plot(path: Path | None) -> None:
    """Refuse `--plot` where nothing can draw: better before a run than after it."""
    try:
        if path is not None:
            importlib.import_module("matplotlib")
    except ImportError as error:
        raise typer.BadParameter(f"{error}; pip install kvferry[plot]") from error


def fail(name: str, why: object) -> NoReturn:
    """End `kvferry bench NAME` with one line on standard error."""
    lazy.fail(f"kvferry bench {name}", why)
