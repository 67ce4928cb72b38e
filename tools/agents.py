"""`kvferry agents`: who is there, and drain, restore and flip."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, get_args

import typer

from kvferry.control.cluster.client import DEFAULT_DAEMON, DaemonClient
from kvferry.control.errors import ControlError
from kvferry.control.handoff.messages import Role
from kvferry.control.keys import Keys
from kvferry.tools.lazy import fail, new_app

if TYPE_CHECKING:
    from collections.abc import Callable

app = new_app("Who is there; drain, restore and flip agents.")

DaemonOption = Annotated[
    str, typer.Option("--daemon", envvar="KVFERRY_DAEMON", help="Address, with #key if it has one.")
]
KeysOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer evaluates it
    typer.Option("--keys", envvar="KVFERRY_KEYS", help="Key file, from `kvferry keys new`."),
]


def run(daemon: str, keys: Path | None, call: Callable[[DaemonClient], None]) -> None:
    """Run `call` with a client; a failure is one line and exit status 1."""
    try:
        with DaemonClient(daemon, Keys.load(keys) if keys is not None else None) as client:
            call(client)
    except ControlError as error:
        fail("kvferry", error)


@app.command("list")
def list_agents(daemon: DaemonOption = DEFAULT_DAEMON, keys: KeysOption = None) -> None:
    """Name, role, state, generation and load of every agent."""

    def show(client: DaemonClient) -> None:
        snapshot = client.look()
        for member in sorted(snapshot.members, key=lambda member: member.name):
            load = snapshot.loads[member.name]
            print(
                f"{member.name}\t{member.role}\t{member.state}\tgeneration {member.generation}\t"
                f"{load.handoffs} handoffs\t{load.free_blocks} of "
                f"{member.registration.num_blocks} blocks free"
            )

    run(daemon, keys, show)


@app.command()
def drain(
    name: str,
    wait_s: Annotated[float, typer.Option(help="Wait so long for its handoffs to end.")] = 0.0,
    daemon: DaemonOption = DEFAULT_DAEMON,
    keys: KeysOption = None,
) -> None:
    """Place nothing more on an agent; what is under way goes on."""

    def begin(client: DaemonClient) -> None:
        client.drain(name)
        end_s = time.monotonic() + wait_s
        while time.monotonic() < end_s and client.look().loads[name].handoffs:
            time.sleep(0.2)

    run(daemon, keys, begin)


@app.command()
def restore(name: str, daemon: DaemonOption = DEFAULT_DAEMON, keys: KeysOption = None) -> None:
    """Undo `drain`."""
    run(daemon, keys, lambda client: client.restore(name))


@app.command()
def flip(
    name: str,
    role: str,
    daemon: DaemonOption = DEFAULT_DAEMON,
    keys: KeysOption = None,
) -> None:
    """Drain an agent and give it another role: prefill, decode or both."""
    known: dict[str, Role] = {role: role for role in get_args(Role)}
    if role not in known:
        fail("kvferry", f"{role!r} is no role: use {', '.join(known)}", os.EX_USAGE)
    run(daemon, keys, lambda client: client.flip(name, known[role]))
