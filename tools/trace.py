"""`kvferry trace`: what `Agent.write_trace` wrote, for chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvferry.control.errors import ConfigError
from kvferry.control.recorder import chrome_trace, read


def trace(
    files: Annotated[list[Path], typer.Argument(help="Files of one or more agents of one host.")],
    out: Annotated[Path, typer.Option(help="Where the trace goes.")] = Path("trace.json"),
) -> None:
    """Turn agents' timelines into one trace: a process each agent, a row each handoff."""
    try:
        timelines = [timeline for file in files for timeline in read(file)]
        out.write_bytes(msgspec.json.encode(chrome_trace(timelines)))
    except (ConfigError, OSError) as error:
        print(f"kvferry trace: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(f"{len(timelines)} handoffs in {out}: open it in ui.perfetto.dev or chrome://tracing")
