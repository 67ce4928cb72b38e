"""`kvferry bench control` with tiny numbers: it measures, reports, and says nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests import ROOT

if TYPE_CHECKING:
    from pathlib import Path

WAIT_S = 240.0
TINY = {"agents": 5, "seconds": 0.5, "latencies": 100, "burst": 10, "bursts": 1, "rounds": 1}


@pytest.mark.slow
def test_it_runs_and_writes_what_it_prints(tmp_path: Path) -> None:
    options = [f"--{name}={value}" for name, value in TINY.items()]
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvferry.tools.cli", "bench", "control"),
            *(*options, f"--json={report}"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(report.read_text())
    assert found["heartbeats"]["agents"] == TINY["agents"]
    assert found["handoffs"]["latency"]["count"] == TINY["latencies"]
    assert len(found["deaths_s"]) == len(found["returns_s"]) == TINY["rounds"]
    p50_us = found["handoffs"]["latency"]["p50_us"]
    assert f"{p50_us:.0f} µs" in done.stdout
