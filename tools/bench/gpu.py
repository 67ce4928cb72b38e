"""`kvferry bench gpu`: a cache's blocks from one GPU to another, between two processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path  # noqa: TC003 - typer reads it at run time
from typing import Annotated

import torch
import typer

from kvferry.tools.bench import gpu_measure


def gpu(
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes, no curve.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also where the time of a call goes.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Instead: several tunings of the kernel.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write a JSON report.")
    ] = None,
) -> None:
    """Move blocks from GPU 0 to GPU 1 between two processes, beside one contiguous copy.

    Blocks are random and scattered on both sides; the pool is four times what moves. Results are
    compared first. Exits 1 if bytes arrived wrong, or if there are no two GPUs.
    """
    if torch.cuda.device_count() < 2:
        typer.echo("kvferry bench gpu: two GPUs are needed", err=True)
        raise typer.Exit(1)
    if sweep:
        gpu_measure.sweep()
        return
    try:
        report = gpu_measure.measure(quick=quick, profile=profile)
    except gpu_measure.WrongBytes:
        typer.echo("kvferry bench gpu: bytes arrived wrong", err=True)
        raise typer.Exit(1) from None
    gpu_measure.show(report)
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(report), indent=1), encoding="utf-8")
