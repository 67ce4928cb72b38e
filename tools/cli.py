"""The `kvferry` command: each sub-command lives in a file of its own, imported when it is used."""

from __future__ import annotations

import typer

from kvferry.tools import lazy

app = lazy.new_app(
    "Moves paged KV cache between inference engines, and proves it on this machine.",
    {
        "demo.command": "Hand a real model's KV cache from one process to another and compare the tokens.",
        "doctor": "Say which transports work on this machine, and why the others do not.",
        "daemon": "Run the daemon: who is there, and which pair takes a request.",
        "router.cli": "Serve the OpenAI API before prefill and decode servers of vLLM.",
        "top": "A live view of agents, handoffs and bandwidths.",
        "trace": "Show recorded handoffs in Perfetto.",
        "keys": "Make key pairs for agents and daemons.",
        "agents": "List, drain, restore and flip agents.",
        "bench.cli": "Measure transfers or kernels beside their baselines.",
        "rdma_vm.cli": "Boot a virtual machine with real kernel RDMA devices and run a command inside.",
    },
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
