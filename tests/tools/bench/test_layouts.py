"""`kvferry bench layouts` as its users run it, as far as that goes without GPUs."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from kvferry.tools.bench.layouts import host as layouts_host
from kvferry.tools.cli import app


def test_planning_is_measured_without_a_gpu() -> None:
    result = CliRunner().invoke(app, ["bench", "layouts", "--plan"])
    assert result.exit_code == 0, result.output
    assert re.search(r"131072 tokens, 80 layers: [\d.]+ ms the first time", result.output)


def test_a_gpu_is_asked_for() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    result = CliRunner().invoke(app, ["bench", "layouts"])
    assert result.exit_code == 1
    assert "torch sees no CUDA device" in result.output


@pytest.mark.slow
def test_host_memory_is_compared_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = layouts_host.measure
    monkeypatch.setattr(layouts_host, "measure", lambda: measure(total_nbytes=1 << 20, rounds=2))
    result = CliRunner().invoke(app, ["bench", "layouts", "--host"])
    assert result.exit_code == 0, result.output
    for case in layouts_host.CASES:
        assert case.name in result.output
