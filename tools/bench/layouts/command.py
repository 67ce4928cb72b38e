"""`kvferry bench layouts`: moves between caches that differ, beside a push of equal ones."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from kvferry.tools.bench.cli import JsonPath, fail
from kvferry.tools.bench.figures import WrongBytes, write_json
from kvferry.tools.bench.layouts import host as layouts_host
from kvferry.tools.bench.layouts import measure as layouts_measure


def layouts(
    plan: Annotated[
        bool, typer.Option("--plan", help="The host's planning alone: no GPU.")
    ] = False,
    host: Annotated[
        bool, typer.Option("--host", help="Host memory, two processes over cma: no GPU.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Move 1 GiB from GPU to GPU, or within the only one, between caches of different layouts, in one pass each.

    With --host between two processes' host memory instead. Results are compared first. Exits 1 if bytes arrived wrong, or if there is no GPU.
    """
    if plan:
        first, cached = layouts_measure.plan_ms()
        typer.echo(f"131072 tokens, 80 layers: {first:.2f} ms the first time, {cached:.3f} ms then")
        return
    if not host and not torch.cuda.is_available():
        fail("layouts", "torch sees no CUDA device; --host measures host memory")
    try:
        if host:
            rows = layouts_host.measure()
            layouts_host.show(rows)
            write_json(json_path, rows)
        else:
            report = layouts_measure.measure()
            layouts_measure.show(report)
            write_json(json_path, report)
    except WrongBytes as error:
        fail("layouts", f"bytes arrived wrong: {error}")
