"""The verbs suite, in the machine of `kvferry rdma-vm`: conformance, lost peers, rails and faults.

It takes many minutes, so it runs where `KVFERRY_REQUIRE_RDMA` is set (`make test-rdma`), and fails
there if the machine cannot run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvferry.tools.rdma_vm import missing

ROOT = Path(__file__).parent.parent.parent
SUITE = [
    *sorted((ROOT / "tests" / "engine").glob("test_conformance*.py")),
    ROOT / "tests" / "faults" / "test_lost_peer.py",
    ROOT / "tests" / "rdma",
]
TIMEOUT_S = 900  # of the machine; it takes a third of it on two idle cores


@pytest.mark.rdma
@pytest.mark.slow
def test_the_verbs_suite_passes_in_a_machine_with_rdma_devices() -> None:
    if not os.environ.get("KVFERRY_REQUIRE_RDMA"):
        pytest.skip("takes many minutes: make test-rdma")
    reason = missing.missing()
    if reason:
        pytest.fail(reason)
    pytest_there = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no"]
    done = subprocess.run(
        [sys.executable, "-m", "kvferry.tools.cli", "rdma-vm", "run", f"--timeout-s={TIMEOUT_S}"]
        + ["--", *pytest_there, "-m", "not soak", "-k", "verbs or rdma", "--durations=8"]
        + [str(path) for path in SUITE],
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
