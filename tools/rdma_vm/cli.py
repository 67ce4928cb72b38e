"""`kvferry rdma-vm …`: a virtual machine with real kernel RDMA devices, on a host without any."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from kvferry.tools import lazy
from kvferry.tools.rdma_vm import image, machine
from kvferry.tools.rdma_vm.missing import PACKAGES, missing

NAME = "kvferry rdma-vm"
CANNOT = 69  # EX_UNAVAILABLE: the machine cannot run here; a command's own status is its own
BROKEN = 70  # EX_SOFTWARE: the machine ended without the command's status

app = lazy.new_app(
    "A QEMU machine with Soft-RoCE devices: a real kernel RDMA stack without RDMA hardware."
)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    command: Annotated[list[str], typer.Argument(help="The command, after `--`.")],
    pairs: Annotated[
        int,
        typer.Option(min=1, max=8, help="Pairs of RDMA devices: rxe0 and rxe1 reach each other."),
    ] = 1,
    mtu: Annotated[
        int, typer.Option(min=512, max=machine.MAX_MTU, help="Bytes a packet of their wires.")
    ] = machine.MAX_MTU,
    timeout_s: Annotated[float, typer.Option(min=1, help="The machine is ended then.")] = 600.0,
) -> None:
    """Boot the machine, run a command inside, return its output and its exit status.

    The command sees this host's files read-only, under an overlay in memory.
    """
    _check()
    started_s = time.monotonic()
    try:
        status = machine.run(command, pairs=pairs, mtu=mtu, timeout_s=timeout_s)
    except (machine.MachineError, image.ImageError) as error:
        lazy.fail(NAME, error, BROKEN)
    _say(f"status {status} after {time.monotonic() - started_s:.1f} s")
    raise typer.Exit(status)


@app.command()
def check() -> None:
    """Say whether the machine can run here; exits 69 if not."""
    _check()
    _say("can run here")


@app.command()
def packages() -> None:
    """Print the Debian packages that it needs."""
    print(" ".join(PACKAGES))


def _check() -> None:
    reason = missing()
    if reason:
        lazy.fail(NAME, reason, CANNOT)


def _say(text: str) -> None:
    print(f"{NAME}: {text}", file=sys.stderr, flush=True)
