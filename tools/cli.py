"""The `kvferry` command: each sub-command lives in a file of its own, imported when it is used."""

from __future__ import annotations

import typer

from kvferry.tools import lazy

app = lazy.new_app("Moves paged KV cache between inference engines, and proves it on this machine.")

lazy.add(
    app,
    "demo",
    "kvferry.tools.demo.command",
    "Hand a real model's KV cache from one process to another and compare the tokens.",
)
lazy.add(
    app,
    "doctor",
    "kvferry.tools.doctor",
    "Say which transports work on this machine, and why the others do not.",
)
lazy.add(
    app,
    "daemon",
    "kvferry.tools.daemon",
    "Run the daemon: who is there, and which pair takes a request.",
)
lazy.add(
    app,
    "router",
    "kvferry.tools.router.cli",
    "Serve the OpenAI API before prefill and decode servers of vLLM.",
)
lazy.add(app, "top", "kvferry.tools.top", "A live view of agents, handoffs and bandwidths.")
lazy.add(app, "trace", "kvferry.tools.trace", "Show recorded handoffs in Perfetto.")
lazy.add(app, "keys", "kvferry.tools.keys", "Make key pairs for agents and daemons.")
lazy.add(app, "agents", "kvferry.tools.agents", "List, drain, restore and flip agents.")
lazy.add(
    app,
    "bench",
    "kvferry.tools.bench.cli",
    "Measure transfers or kernels beside their baselines.",
)
lazy.add(
    app,
    "rdma-vm",
    "kvferry.tools.rdma_vm.cli",
    "Boot a virtual machine with real kernel RDMA devices and run a command inside.",
)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as version_of

    typer.echo(version_of("kvferry"))


def main() -> None:
    """Entry point of the `kvferry` console command."""
    app(prog_name="kvferry")


if __name__ == "__main__":
    main()
