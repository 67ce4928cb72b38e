"""`kvferry bench …`: one file a benchmark, imported when it is used."""

from __future__ import annotations

from kvferry.tools import lazy

app = lazy.new_app(
    "Benchmarks. Each checks its results and prints its baselines from the same run."
)

lazy.add(
    app,
    "transfer",
    "kvferry.tools.bench.transfer.command",
    "Move a request's blocks between two processes over every transport, beside the baselines.",
)
lazy.add(
    app,
    "kernels",
    "kvferry.tools.bench.kernels.command",
    "Gather and scatter blocks on one GPU, beside a device-to-device copy of the same bytes.",
)
lazy.add(
    app,
    "layouts",
    "kvferry.tools.bench.layouts.command",
    "Move blocks from GPU to GPU between caches that differ in layout or type, in one pass.",
)
lazy.add(
    app,
    "streaming",
    "kvferry.tools.bench.streaming.command",
    "Stream a prompt's layers from GPU to GPU beside a forward pass, as the vLLM connector does.",
)
lazy.add(
    app,
    "control",
    "kvferry.tools.bench.control.command",
    "Hand over small requests between two agents, and load a daemon with many.",
)
lazy.add(
    app,
    "paths",
    "kvferry.tools.bench.paths",
    "From which piece size a transport is faster without staging; can save that for engines.",
)
lazy.add(
    app,
    "verbs",
    "kvferry.tools.bench.verbs.command",
    "Write blocks between two RDMA devices, direct and staged, beside perftest.",
)
