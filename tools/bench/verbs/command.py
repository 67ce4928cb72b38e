"""`kvferry bench verbs`: RDMA between two devices of this machine, beside perftest's `ib_write_bw`."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 - typer reads it
from typing import Annotated

import typer

from kvferry.tools.bench.verbs import measure as verbs_measure


def verbs(
    near: Annotated[str, typer.Option(help="The device that sends.")] = "rxe0",
    far: Annotated[str, typer.Option(help="The device that receives.")] = "rxe1",
    rounds: Annotated[
        int, typer.Option(min=1, help="Measurements of each; the median counts.")
    ] = 5,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write a JSON report.")
    ] = None,
) -> None:
    """Write blocks from device to device, direct and staged, beside perftest and single writes.

    Where there is no RDMA device: `kvferry rdma-vm run -- kvferry bench verbs`. Software RDMA on an
    emulated processor says nothing about hardware: only the ratios within one run mean anything.
    Exits 1 if bytes arrived wrong, or something is missing.
    """
    try:
        report = verbs_measure.measure(near, far, rounds)
    except verbs_measure.BenchError as error:
        typer.echo(f"kvferry bench verbs: {error}", err=True)
        raise typer.Exit(1) from None
    for line in verbs_measure.lines(report):
        typer.echo(line)
    if json_path is not None:
        json_path.write_text(json.dumps(report._asdict(), indent=2) + "\n")
