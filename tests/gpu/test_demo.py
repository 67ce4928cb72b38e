"""The demo's two processes on one GPU, or on one each: every token is the reference's."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.slow
@pytest.mark.parametrize("corrupt", [False, True])
def test_every_token_is_the_references_over_every_transport(
    peer_device: int, monkeypatch: pytest.MonkeyPatch, corrupt: bool
) -> None:
    for needed in ("transformers", "typer", "rich", "zmq"):
        pytest.importorskip(needed, reason=f"the demo needs {needed}")
    if not peer_device:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible.split(",")[0])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-m", "kvferry.tools.cli", "demo", "--device", "cuda", "--json"]
    done = subprocess.run(
        [*command, "--prompts", "5", "--tokens", "8", *(["--corrupt"] if corrupt else [])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == int(corrupt), done.stderr
    report = json.loads(done.stdout)
    assert {row["transport"] for row in report["transports"]} == {"cuda_ipc", "cma", "tcp"}
    for row in report["transports"]:
        assert (row["requests"], row["tokens_compared"]) == (5, 40)
        assert bool(row["mismatches"]) == corrupt
    for pool in report["pools"].values():
        assert pool["num_free"] == pool["num_blocks"]
        assert pool["stray_blocks"] == 0
