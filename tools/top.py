"""`kvferry top`: a live view of the cluster on a terminal, or one look at it elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvferry.control.cluster.client import DEFAULT_DAEMON, DaemonClient
from kvferry.control.cluster.messages import Load, Shown
from kvferry.control.errors import DaemonDenied, DaemonTimeout
from kvferry.tools.agents import DaemonOption, KeysOption, run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvferry.control.cluster.client import Watch
    from kvferry.control.cluster.messages import Member

REFRESH_S = 1.0  # agents beat once a second
ANSWER_S = 0.5  # of a daemon that shows what agents do; then the last is shown again
LINKS, HANDOFFS, FAILURES = 10, 10, 5  # rows of a live view; agents have the rest of the screen
FEWEST_AGENTS = 5
AROUND_A_TABLE = 5  # lines of its title and its frame
NUMBERS = [
    "handoffs",
    "in flight",
    "queued",
    "blocks",
    "GB/s",
    "at best",
    "bytes",
    "for",
    "ago",
]  # columns of them
NOTHING = Shown(0, (), 0, (), (), {})


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
    daemon: DaemonOption = DEFAULT_DAEMON,
    keys: KeysOption = None,
) -> None:
    """Agents, links, handoffs under way and failures, as the daemon knows them, live."""
    console = Console()

    def show(client: DaemonClient) -> None:
        with client.watch() as watch:
            picture = _Picture(client, watch)
            if once or not console.is_terminal:
                picture.look()
                console.print(picture.render(0))
                return
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    picture.look()
                    live.update(picture.render(console.size.height), refresh=True)
                    picture.wait(REFRESH_S)

    try:
        run(daemon, keys, show)
    except KeyboardInterrupt:
        return


class _Picture:
    """What was heard last: what a daemon that is away said is still worth seeing."""

    def __init__(self, client: DaemonClient, watch: Watch) -> None:
        self._client = client
        self._watch = watch
        self._shown = NOTHING
        self._trouble = ""
        self._silence = f"the daemon at {client.address} does not answer"

    def look(self) -> None:
        """Ask what the agents do."""
        try:
            self._shown = self._client.show(ANSWER_S)
            self._trouble = ""
        except DaemonTimeout:
            self._trouble = self._silence
        except DaemonDenied as error:
            self._trouble = f"the daemon does not tell what the agents do: {error}"

    def wait(self, seconds: float) -> None:
        """Follow who is there for so long."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            try:
                self._watch.poll(left_s)
            except DaemonTimeout:
                self._trouble = self._silence

    def render(self, height: int) -> Group:
        """Return the picture as tables; cut to a screen of that height, or whole if it is 0."""
        view, shown = self._watch.view, self._shown
        members = sorted(view.members.values(), key=lambda member: (member.role, member.name))
        loads = {member.name: view.loads.get(member.name, Load()) for member in members}
        most = (LINKS, HANDOFFS, FAILURES) if height else (None, None, None)
        tables = [
            *_links(shown, most[0]),
            *_handoffs(shown, most[1]),
            *_failures(shown, most[2]),
        ]
        rows = len(members)
        if height:
            used = sum(table.row_count + AROUND_A_TABLE for table in tables)
            rows = max(FEWEST_AGENTS, height - used - AROUND_A_TABLE - 1)
        trouble = [Text(self._trouble, style="bold red")] if self._trouble else []
        return Group(*trouble, _agents(members[:rows], len(members), loads), *tables)


def _agents(members: list[Member], count: int, loads: dict[str, Load]) -> Table:
    title = f"{count} agents" + (f", the first {len(members)}" if len(members) < count else "")
    table = _table(title, "agent|role|state|host|handoffs|in flight|queued|blocks")
    for member in members:
        load, there = loads[member.name], member.registration
        table.add_row(
            Text(member.name),
            member.role,
            member.state + (f" → {member.wanted_role}" if member.wanted_role else ""),
            Text(there.topology.host),
            str(load.handoffs),
            _mib(load.inflight_nbytes),
            f"{load.queued_tokens} tokens",
            f"{load.free_blocks}/{there.num_blocks} free",
        )
    return table


def _links(shown: Shown, most: int | None) -> Iterable[Table]:
    if not shown.links:
        return
    flow = sum(link.nbytes_per_s for link in shown.links) / 1e9
    title = f"{shown.num_links} links, {flow:.2f} GB/s"
    table = _table(title, "from|to|transport|GB/s|at best")
    for link in shown.links[:most]:
        best = f"{link.measured_nbytes_per_s / 1e9:.2f}" if link.measured_nbytes_per_s else ""
        texts = map(Text, (link.source, link.target, link.transport))
        table.add_row(*texts, f"{link.nbytes_per_s / 1e9:.2f}", best)
    yield table


def _handoffs(shown: Shown, most: int | None) -> Iterable[Table]:
    if not shown.live:
        return
    table = _table("oldest handoffs under way", "handoff|from|to|bytes|for")
    for row in shown.live[:most]:
        texts = map(Text, (row.handoff, row.prefill or "?", row.decode or "?"))
        table.add_row(*texts, _mib(row.nbytes) if row.nbytes else "", f"{row.age_s:.1f} s")
    yield table


def _failures(shown: Shown, most: int | None) -> Iterable[Table]:
    if not shown.errors and not shown.failures:
        return
    counts = ", ".join(f"{count} {error}" for error, count in shown.errors.items())
    title = "failures" + (f" since the daemon began: {counts}" if counts else "")
    table = _table(title, "handoff|agent|peer|error|ago")
    for row in shown.failures[:most]:
        texts = map(Text, (row.handoff, row.agent, row.peer, row.error))
        table.add_row(*texts, f"{row.age_s:.0f} s")
    yield table


def _table(title: str, headings: str) -> Table:
    """Return an empty table; its headings are parted by bars."""
    table = Table(title=Text(title), title_justify="left")
    for heading in headings.split("|"):
        justify: Literal["right", "left"] = "right" if heading in NUMBERS else "left"
        table.add_column(heading, justify=justify, no_wrap=True)
    return table


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
