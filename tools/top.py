"""`kvferry top`: a live view of the cluster on a terminal, or one look at it elsewhere."""

from __future__ import annotations

import time
from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from kvferry.control.client import DEFAULT_DAEMON, DaemonClient
from kvferry.control.daemon_messages import Load
from kvferry.control.errors import DaemonTimeout
from kvferry.tools.agents import run

if TYPE_CHECKING:
    from kvferry.control.view import View

REFRESH_S = 0.5
BUSIEST_PAIRS = 12


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
    daemon: Annotated[
        str, typer.Option(envvar="KVFERRY_DAEMON", help="Address, with #key if it has one.")
    ] = DEFAULT_DAEMON,
    keys: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates it
        typer.Option(envvar="KVFERRY_KEYS", help="Key file, from `kvferry keys new`."),
    ] = None,
) -> None:
    """Agents, their handoffs and the bandwidth of pairs, as the daemon knows them, live."""
    console = Console()

    def show(client: DaemonClient) -> None:
        with client.watch() as watch:
            if once or not console.is_terminal:
                console.print(render(watch.view, ""))
                return
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    trouble = ""
                    try:
                        watch.poll(REFRESH_S)
                    except DaemonTimeout:  # what was known last is still worth seeing
                        trouble = f"the daemon at {client.address} does not answer"
                        time.sleep(REFRESH_S)
                    live.update(render(watch.view, trouble), refresh=True)

    try:
        run(daemon, keys, show)
    except KeyboardInterrupt:
        return


def render(view: View, trouble: str) -> Group:
    """The picture as tables."""
    members = sorted(view.members.values(), key=lambda member: (member.role, member.name))
    loads = {member.name: view.loads.get(member.name, Load()) for member in members}
    agents = Table(title=trouble or f"{len(members)} agents", title_justify="left")
    for heading in ("agent", "role", "state", "host", "handoffs", "in flight", "queued", "blocks"):
        agents.add_column(heading, justify="left" if heading in ("agent", "role") else "right")
    for member in members:
        load, there = loads[member.name], member.registration
        agents.add_row(
            member.name,
            member.role,
            member.state + (f" → {member.wanted_role}" if member.wanted_role else ""),
            there.topology.host,
            str(load.handoffs),
            f"{load.inflight_nbytes / 2**20:.1f} MiB",
            f"{load.queued_tokens} tokens",
            f"{load.free_blocks}/{there.num_blocks} free",
        )
    pairs = Table(title="bandwidth of pairs", title_justify="left")
    for heading in ("from or to", "and", "GB/s"):
        pairs.add_column(heading)
    rates = [
        (rate, name, peer) for name, load in loads.items() for peer, rate in load.rates.items()
    ]
    for rate, name, peer in sorted(rates, reverse=True)[:BUSIEST_PAIRS]:
        pairs.add_row(name, peer, f"{rate / 1e9:.2f}")
    return Group(agents, pairs) if rates else Group(agents)
