"""`kvferry demo`: a model's KV cache goes from a prefill to a decode process; the tokens prove it."""

from __future__ import annotations

import enum
import importlib.metadata
import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kvferry.engine.errors import DeviceError
from kvferry.engine.memory import cuda_driver as cuda
from kvferry.tools.demo import run as demo_run
from kvferry.tools.demo.events import Event, Options
from kvferry.tools.demo.report import Collector, DemoProgress

TRANSPORTS = ("cma", "tcp")  # between host memories; with GPUs, cuda_ipc before them


# Enumerations, for typer, and dictionaries of literals, for mypy.
DeviceChoice = enum.Enum("DeviceChoice", {"auto": "auto", "cpu": "cpu", "cuda": "cuda"})
TransportChoice = enum.Enum(
    "TransportChoice", {"all": "all", "cuda_ipc": "cuda_ipc", "cma": "cma", "tcp": "tcp"}
)


class NoGpu(RuntimeError):
    """GPUs were asked for, and there are none; says why."""


def choose_devices(wanted: str) -> tuple[str, str]:
    """Choose the devices of prefill and decode, for `auto`, `cpu` or `cuda`.

    Without asking torch, which takes seconds.

    Raises:
        NoGpu: `cuda` is wanted, and cannot be had.
    """
    if wanted == "cpu":
        return "cpu", "cpu"
    reason, count = _gpus()
    if count:
        return "cuda:0", f"cuda:{min(1, count - 1)}"
    if wanted == "cuda":
        raise NoGpu(f"--device cuda: {reason}")
    return "cpu", "cpu"


def _gpus() -> tuple[str, int]:
    """Return why there are none, or how many there are."""
    reason = cuda.absence()
    if reason:
        return reason, 0
    if "+cpu" in importlib.metadata.version("torch"):
        return "torch is built without CUDA", 0
    try:
        count = cuda.driver().device_count()
    except DeviceError as error:
        return error.message, 0
    return "" if count else "no GPU is visible: look at CUDA_VISIBLE_DEVICES", count


def demo(
    transport: Annotated[
        TransportChoice, typer.Option(help="Which transports carry the handoffs.")
    ] = TransportChoice.all,
    device: Annotated[
        DeviceChoice,
        typer.Option(help="Where the models compute; by itself on GPUs, if there are any."),
    ] = DeviceChoice.auto,
    prompts: Annotated[int, typer.Option(min=1, max=1024, help="How many prompts.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Greedy tokens a prompt.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    corrupt: Annotated[
        bool,
        typer.Option(
            "--corrupt", help="Damage one received block a transport: tokens must differ."
        ),
    ] = False,
) -> None:
    """Hand a real model's KV cache from one process to another and compare the tokens.

    With one GPU both processes use it, with more each has its own.

    Exits 0 only if every token is that of the reference, which one process generates alone.
    """
    everything = transport is TransportChoice.all
    console = Console(stderr=True)
    try:
        devices = choose_devices(device.value)
    except NoGpu as error:
        _print_problem(console, str(error))
        raise typer.Exit(1) from None
    on_gpus = devices[0] != "cpu"
    options = Options(
        transports=(("cuda_ipc",) if on_gpus else ()) + TRANSPORTS
        if everything
        else (transport.value,),
        devices=devices,
        skip_unavailable=everything,
        num_prompts=prompts,
        num_tokens=tokens,
        corrupt=corrupt,
    )
    collector = Collector(options)
    started_s = time.monotonic()
    try:
        with DemoProgress(console, options) as progress:

            def on_event(event: Event) -> None:
                collector.add(event)
                progress.show(event)

            demo_run.run(options, on_event)
    except demo_run.DemoError as error:
        _print_problem(console, str(error))
        raise typer.Exit(1) from None
    wall_s = time.monotonic() - started_s
    if as_json:
        typer.echo(json.dumps(collector.to_json(wall_s), indent=2))
    else:
        stdout = Console()
        stdout.print(collector.table())
        for line in collector.lines(wall_s):
            stdout.print(line, highlight=False, soft_wrap=True)
    problems = collector.problems()
    for problem in problems:
        _print_problem(console, problem)
    if problems:
        raise typer.Exit(1)


def _print_problem(console: Console, problem: str) -> None:
    """One line on standard error; a message's own brackets are no markup."""
    console.print(Text.assemble(("kvferry demo: ", "bold red"), problem), soft_wrap=True)
