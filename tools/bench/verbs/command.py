"""`kvferry bench verbs`: RDMA between two devices of this machine, beside perftest's `ib_write_bw`."""

from __future__ import annotations

from typing import Annotated

import typer

from kvferry.tools.bench.cli import JsonPath, fail
from kvferry.tools.bench.figures import write_json
from kvferry.tools.bench.verbs import measure as verbs_measure


def verbs(
    near: Annotated[str, typer.Option(help="The device that sends.")] = "rxe0",
    far: Annotated[str, typer.Option(help="The device that receives.")] = "rxe1",
    rounds: Annotated[
        int, typer.Option(min=1, help="Measurements of each; the median counts.")
    ] = 5,
    json_path: JsonPath = None,
) -> None:
    """Write blocks from device to device, direct and staged, beside perftest and single writes.

    Where there is no RDMA device: `kvferry rdma-vm run -- kvferry bench verbs`. Software RDMA on an
    emulated processor says nothing about hardware: only the ratios within one run mean anything.
    Exits 1 if bytes arrived wrong, or something is missing.
    """
    try:
        report = verbs_measure.measure(near, far, rounds)
    except verbs_measure.BenchError as error:
        fail("verbs", error)
    for line in verbs_measure.lines(report):
        typer.echo(line)
    write_json(json_path, report._asdict())
