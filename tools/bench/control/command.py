"""`kvferry bench control`: handoffs' control overhead, and what a daemon of many agents needs."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it
from statistics import median
from typing import Annotated

import msgspec
import typer

from kvferry.tools.bench import machine
from kvferry.tools.bench.control.measure import (
    LEASE_S,
    DaemonProcess,
    measure_comebacks,
    measure_handoffs,
    measure_heartbeats,
    measure_placement,
)


def control(
    agents: Annotated[int, typer.Option(help="Agents that beat once a second.")] = 2000,
    seconds: Annotated[float, typer.Option(help="How long they beat.")] = 10.0,
    latencies: Annotated[int, typer.Option(help="Handoffs one after the other.")] = 2000,
    burst: Annotated[int, typer.Option(help="Handoffs at a time.")] = 500,
    bursts: Annotated[int, typer.Option(help="How many such bursts; the median counts.")] = 7,
    rounds: Annotated[int, typer.Option(help="Deaths of agents, and of the daemon.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    """Measure the control plane beside the project's own targets."""
    here = machine.describe({})
    print(f"{here.cpu}, {here.cores} cores, {here.system}, load {here.load} at the start\n")
    handoffs = measure_handoffs(latencies, burst, bursts)
    daemon = DaemonProcess()
    start_s, idle_mib = daemon.start_s, daemon.memory_mib()
    try:
        deaths, returns = measure_comebacks(daemon, rounds)
        beats = measure_heartbeats(daemon, agents, seconds)
    finally:
        daemon.kill()
    placed = measure_placement(1000, 5000)
    first, whole = handoffs.first_byte, handoffs.latency
    to_first, to_last = "receive() to prefill's first byte", "receive() to all bytes there"
    echo = "a ZeroMQ message there and back between two processes, p50"
    copy = "a handoff's messages and copy alone, all bytes there, p50"
    killed = f"agent killed until a watcher knows (lease {LEASE_S:g} s), median"
    rows = [
        (f"one-block handoff, {to_first}, p50", f"{first.p50_us:.0f} µs", "300 µs"),
        ("the same, p99", f"{first.p99_us:.0f} µs", "2000 µs"),
        (f"one-block handoff, {to_last}, p50", f"{whole.p50_us:.0f} µs", ""),
        ("the same, p99", f"{whole.p99_us:.0f} µs", ""),
        ("the same, processor time of both processes", f"{handoffs.cpu_us:.0f} µs", ""),
        (echo, f"{handoffs.round_trip.p50_us:.0f} µs", ""),
        (copy, f"{handoffs.floor.p50_us:.0f} µs", ""),
        (f"handoffs a second, {burst} at a time", f"{handoffs.per_s:.0f}", "2000"),
        ("processor time that the hypervisor took meanwhile", f"{handoffs.stolen:.0%}", ""),
        (f"daemon, {beats.agents} agents, 1 beat/s: cores", f"{beats.cores:.2f}", "0.5"),
        ("the same: leases lost", f"{beats.lost}", "0"),
        ("the same: resident memory", f"{beats.memory_mib:.0f} MiB", ""),
        ("daemon alone: started", f"{start_s:.2f} s", "0.5 s"),
        ("daemon alone: resident memory", f"{idle_mib:.0f} MiB", "60 MiB"),
        ("place over 1,000 agents, p50", f"{placed.p50_us:.0f} µs", ""),
        ("place over 1,000 agents, p99", f"{placed.p99_us:.0f} µs", "200 µs"),
        (killed, f"{median(deaths):.2f} s", f"{LEASE_S + 0.5:g} s"),
        ("daemon back until its view is complete, median", f"{median(returns):.2f} s", "2 s"),
    ]
    for what, figure, target in rows:
        print(f"{what:<66} {figure:>12}   {'target ' + target if target else ''}")
    if json is not None:
        report = {
            "handoffs": handoffs,
            "heartbeats": beats,
            "placement": placed,
            "deaths_s": deaths,
            "returns_s": returns,
            "start_s": start_s,
            "idle_mib": idle_mib,
        }
        json.write_bytes(msgspec.json.encode(report))
