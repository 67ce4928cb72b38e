"""`kvferry bench layouts`: moves between caches that differ, beside a push of equal ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path  # noqa: TC003 - typer reads it at run time
from typing import Annotated

import torch
import typer

from kvferry.tools.bench.layouts import host as layouts_host
from kvferry.tools.bench.layouts import measure as layouts_measure


def layouts(
    plan: Annotated[
        bool, typer.Option("--plan", help="The host's planning alone: no GPU.")
    ] = False,
    host: Annotated[
        bool, typer.Option("--host", help="Host memory, two processes over cma: no GPU.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write a JSON report.")
    ] = None,
) -> None:
    """Move 1 GiB from GPU 0 to GPU 1 between caches of different layouts, in one pass each.

    With --host between two processes' host memory instead. Results are compared first. Exits 1 if bytes arrived wrong, or if there are no two GPUs.
    """
    if plan:
        first, cached = layouts_measure.plan_ms()
        typer.echo(f"131072 tokens, 80 layers: {first:.2f} ms the first time, {cached:.3f} ms then")
        return
    if host:
        try:
            rows = layouts_host.measure()
        except layouts_host.WrongBytes as error:
            typer.echo(f"kvferry bench layouts: bytes arrived wrong: {error}", err=True)
            raise typer.Exit(1) from None
        layouts_host.show(rows)
        if json_path is not None:
            report_text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
            json_path.write_text(report_text, encoding="utf-8")
        return
    if torch.cuda.device_count() < 2:
        typer.echo("kvferry bench layouts: two GPUs are needed", err=True)
        raise typer.Exit(1)
    try:
        report = layouts_measure.measure()
    except layouts_measure.WrongBytes:
        typer.echo("kvferry bench layouts: bytes arrived wrong", err=True)
        raise typer.Exit(1) from None
    layouts_measure.show(report)
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(report), indent=1), encoding="utf-8")
