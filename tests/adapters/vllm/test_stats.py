"""The connector's figures in vLLM's log and metrics, by vLLM's own classes, in its environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .servers import run_nicely

SCRIPT = Path(__file__).parent / "engines" / "stats.py"

pytestmark = pytest.mark.slow


def test_figures_of_all_steps_are_added_up(vllm_python: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    run_nicely([vllm_python, str(SCRIPT), str(result)], tmp_path / "log.txt")
    found = json.loads(result.read_text())
    assert found["lines"] == [
        "KV Transfer metrics: Loads=3, Median load time (ms)=2.0, Slowest load (ms)=4.0, "
        "Loaded (MB)=0.003, Sends=4, Sent (MB)=0.002, Failed loads=1, Failed sends=1"
    ]
    metrics = found["metrics"]
    assert metrics.pop("vllm:kvferry_load_seconds_sum/1") == pytest.approx(0.008)
    nothing = {name: value for name, value in metrics.items() if name.endswith("/0")}
    assert set(nothing.values()) <= {0.0}, nothing
    assert {name: value for name, value in metrics.items() if name.endswith("/1")} == {
        "vllm:kvferry_load_seconds_count/1": 3,
        "vllm:kvferry_load_bytes_count/1": 3,
        "vllm:kvferry_load_bytes_sum/1": 3000,
        "vllm:kvferry_sent_bytes_count/1": 4,
        "vllm:kvferry_sent_bytes_sum/1": 2000,
        "vllm:kvferry_loads_failed_total/1": 1,
        "vllm:kvferry_sends_failed_total/1": 1,
    }
