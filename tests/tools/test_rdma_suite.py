"""The verbs suite, in the machine of `kvferry rdma-vm`: rails, faults, conformance, agents, lost peers.

Its core takes minutes and runs wherever the machine does. All of it, with every fault and the
conformance suite in order and shuffled, is `make test-rdma`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kvferry.tools.rdma_vm import missing
from tests.needs import lack

ROOT = Path(__file__).parent.parent.parent
ENGINE = ROOT / "tests" / "engine"
CONFORMANCE = sorted(ENGINE.glob("test_conformance*.py"))
RDMA = ROOT / "tests" / "rdma"
LOST_PEER = ROOT / "tests" / "faults" / "test_lost_peer.py"
AGENT = ROOT / "tests" / "adapters" / "test_agent.py"
SHUFFLED = "KVFERRY_TEST_SHUFFLE=1"
# What the core has: each kind of fault once, two rails, unequal ends, and bytes both ways.
CHOSEN = [
    "loses_and_reorders",
    "goes_down",
    "one_rail_of_two",
    "wrong_remote_key",
    "taken_back",
    "(larger and v0)",
    "without_receives_is",
    "removed",
    "stopped_while_it_is_closed",
    "killed_at_any_moment",
    "lying_frame",
    "(share_the_bytes and here0-there0-0)",
    "(share_the_bytes and here1-there1-4096)",
    "places_its_pieces",
    "goodbye",
    "(blocks_are_written and ids4-dims3)",
    "(where_a_transfer_is_cut and types0-True)",
    "(a_handoff_goes and push)",
]


class Part(NamedTuple):
    """Tests that one machine runs.

    Attributes:
        paths: their files.
        choice: pytest's options that choose among them.
        timeout_s: the machine is ended then.
        variables: set for it.
    """

    paths: list[Path]
    choice: list[str]
    timeout_s: int
    variables: tuple[str, ...] = ()


CORE = Part(
    [
        RDMA,
        ENGINE / "test_conformance.py",
        ENGINE / "test_conformance_blocks.py",
        ENGINE / "test_conformance_conversion.py",
        ENGINE / "test_conformance_endings.py",
    ],
    ["-m", "not soak", "-k", " or ".join(CHOSEN)],
    2400,
)
ALL = {
    "all-faults": Part([RDMA], ["-m", "soak or not soak"], 7200),
    "all-conformance": Part(CONFORMANCE, [], 7200),
    "all-shuffled": Part(CONFORMANCE, [], 7200, (SHUFFLED,)),
    "gpu-memory": Part([ENGINE / "test_gpu_over_hosts.py"], [], 7200),
    "agents": Part([AGENT, ENGINE / "test_admission.py"], [], 7200),
    "lost-peers": Part([LOST_PEER], ["-m", "not soak"], 7200),
}


def run(part: Part) -> None:
    """Runs tests in a machine, and fails if they do."""
    reason = missing.missing()
    if reason:
        lack(f"needs the virtual machine with RDMA devices; {reason}")
    variables = ["KVFERRY_TEST_TRANSPORTS=verbs", *part.variables]
    there = ["env", *variables, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "kvferry.tools.cli", "rdma-vm", "run"]
        + [f"--timeout-s={part.timeout_s}", "--", *there, "--color=no", "--durations=8"]
        + part.choice
        + [str(path) for path in part.paths],
        cwd=ROOT,
        # Plugins would take a minute to import there.
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout[-6000:])
    assert done.returncode == 0
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


@pytest.mark.first
@pytest.mark.rdma
@pytest.mark.slow
def test_the_core_of_the_verbs_suite_passes_on_rdma_devices() -> None:
    run(CORE)


@pytest.mark.rdma
@pytest.mark.soak
@pytest.mark.parametrize("name", ALL)
def test_the_verbs_suite_passes_on_rdma_devices(name: str) -> None:
    run(ALL[name])
