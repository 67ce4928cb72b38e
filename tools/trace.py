"""`kvferry trace`: recorded handoffs, for chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import msgspec
import typer

from kvferry.control.errors import ConfigError
from kvferry.control.handoff.timeline import chrome_trace, decode, read
from kvferry.tools.lazy import fail

if TYPE_CHECKING:
    from kvferry.control.handoff.timeline import Timeline

ANSWER_S = 5.0


def trace(
    files: Annotated[
        Optional[list[Path]],  # noqa: UP045 - typer evaluates it
        typer.Argument(help="Files of `Agent.write_trace`, of agents of one host."),
    ] = None,
    from_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--from",
            help="Agents that run, by where they serve metrics (http://host:port); as often as needed.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the trace goes.")] = Path("trace.json"),
) -> None:
    """Turn agents' timelines into one trace: a process each agent, a row each handoff."""
    try:
        if not files and not from_:
            raise ConfigError("nothing to show: give files, or agents that run with --from")  # noqa: TRY301
        timelines = [timeline for file in files or () for timeline in read(file)]
        timelines += [timeline for address in from_ or () for timeline in _fetch(address)]
        out.write_bytes(msgspec.json.encode(chrome_trace(timelines)))
    except (ConfigError, OSError) as error:
        fail("kvferry trace", error)
    print(f"{len(timelines)} handoffs in {out}: open it in ui.perfetto.dev or chrome://tracing")


def _fetch(address: str) -> list[Timeline]:
    """Return what an agent that runs has recorded.

    Raises:
        ConfigError: it does not say; names the address and what to look at.
    """
    if "://" not in address:
        address = f"http://{address}"
    url = f"{address.rstrip('/')}/trace"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # proxies are for the web
    try:
        with opener.open(url, timeout=ANSWER_S) as answer:
            data = answer.read()
    except urllib.error.HTTPError as error:
        raise ConfigError(
            f"{url} is no agent that can be traced: {error.read().decode(errors='replace').strip()}"
        ) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise ConfigError(
            f"{url} does not answer ({why}): is this where the agent serves metrics?"
        ) from error
    return decode(data, url)
