"""`kvferry bench streaming`: what streaming a prompt's layers costs the forward pass, and hides."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path  # noqa: TC003 - typer reads it at run time
from typing import Annotated

import torch
import typer

from kvferry.tools.bench.streaming import measure as streaming_measure


def streaming(
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write a JSON report.")
    ] = None,
) -> None:
    """Stream layers of Llama 70B's and DeepSeek V3's shapes while a stand-in for them computes.

    Two GPUs for one rank at each end, four for two. Beside it the same prompt is moved when all of it is computed, pushed and pulled. Exits 1 if bytes arrived wrong, or if there are no two GPUs.
    """
    if torch.cuda.device_count() < 2:
        typer.echo("kvferry bench streaming: two GPUs are needed", err=True)
        raise typer.Exit(1)
    rows: list[streaming_measure.Row] = []
    for case in streaming_measure.cases(torch.cuda.device_count()):
        try:
            found = streaming_measure.measure(case)
        except streaming_measure.WrongBytes as error:
            typer.echo(f"kvferry bench streaming: bytes arrived wrong: {error}", err=True)
            raise typer.Exit(1) from None
        streaming_measure.show(found)
        rows += found
    if json_path is not None:
        report_text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
        json_path.write_text(report_text, encoding="utf-8")
