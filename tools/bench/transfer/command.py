"""`kvferry bench transfer`: one request's blocks from process to process, beside its baselines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvferry.tools.bench.cli import JsonPath, PlotPath, check_plot, fail
from kvferry.tools.bench.transfer import measure as transfer_measure
from kvferry.tools.bench.transfer import report as transfer_report
from kvferry.tools.bench.transfer import tables as transfer_tables
from kvferry.tools.bench.transfer.report import Settings
from kvferry.tools.bench.transfer.roster import PEERS, installed_peers

SECONDS, ROUNDS = 130.0, 6
QUICK_SECONDS, QUICK_ROUNDS = 12.0, 2


def transfer(
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute at most; rough figures.")
    ] = False,
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Between GPUs instead: direct, and staged through host memory."),
    ] = False,
    compare: Annotated[
        str,
        typer.Option(
            help="Peers to compare with: nixl,mooncake, or none. Those installed, if not given.",
            show_default=False,
        ),
    ] = "",
    peer_python: Annotated[
        Path,
        typer.Option(help="The Python of an environment that has the peers."),
    ] = Path(sys.executable),
    rails: Annotated[str, typer.Option(help="How many rails tcp is measured with.")] = "1,2,4",
    seconds: Annotated[
        float | None,
        typer.Option(min=1.0, help="How long to measure.", show_default=f"{SECONDS:g}"),
    ] = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
) -> None:
    """Move a request's blocks between two processes over every transport, beside the baselines.

    A request is 128 MiB of scattered blocks. Baselines, measured in the same run: memcpy of the
    same pieces within one process, a plain Python socket, and NIXL and Mooncake where they are
    installed. Exits 1 if bytes arrived wrong.
    """
    check_plot(plot_path)
    if gpu:
        _between_gpus(quick, compare, peer_python, json_path, plot_path)
        return
    options = transfer_measure.Options(
        settings=Settings(
            seconds=seconds or (QUICK_SECONDS if quick else SECONDS),
            rounds=QUICK_ROUNDS if quick else ROUNDS,
            rails=_rails(rails),
            peers=_peers(compare, peer_python),
        ),
        peer_python=str(peer_python),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=1.0)
            report = transfer_measure.measure(
                options, lambda text, done: bar.update(task, description=text, completed=done)
            )
    except transfer_measure.BenchError as error:
        fail("transfer", error)
    transfer_tables.show(Console(), report)
    if json_path is not None:
        json_path.write_bytes(transfer_report.encode(report))
    if plot_path is not None:
        transfer_tables.draw(report, plot_path)
    if report.wrong:
        where = (f"{each.shape}, {transfer_tables.name_of(each)}" for each in report.wrong)
        fail("transfer", f"bytes arrived wrong: {'; '.join(where)}")


def _between_gpus(
    quick: bool, compare: str, python: Path, json_path: Path | None, plot_path: Path | None
) -> None:
    from kvferry.tools.bench.gpu import command as gpu

    peers = _peers(compare, python)
    if "mooncake" in peers and compare:
        raise typer.BadParameter("--compare mooncake: between GPUs there is nixl alone")
    nixl_python = str(python) if "nixl" in peers else None
    try:
        gpu.run(quick=quick, nixl_python=nixl_python, json_path=json_path, plot=plot_path)
    except gpu.GpuBenchError as error:
        fail("transfer --gpu", error)


def _rails(text: str) -> tuple[int, ...]:
    try:
        rails = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        rails = ()
    if not rails or rails[0] < 1 or rails[-1] > 64:
        raise typer.BadParameter(f"--rails {text}: give numbers from 1 to 64, as in 1,2,4")
    return rails


def _peers(text: str, python: Path) -> tuple[str, ...]:
    """Return the peers asked for, or those installed."""
    wanted = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = set(wanted) - set(PEERS) - {"none"}
    if unknown:
        raise typer.BadParameter(f"--compare {text}: {min(unknown)} is none of {', '.join(PEERS)}")
    try:
        installed = installed_peers(str(python))
    except OSError as error:
        raise typer.BadParameter(f"--peer-python {python}: {error.strerror}") from error
    return tuple(peer for peer in PEERS if peer in (wanted or installed))
