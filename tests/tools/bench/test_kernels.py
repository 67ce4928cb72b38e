"""`kvferry bench kernels`: without a GPU one clear line; with one, a small run; its tables anywhere."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kvferry.tools.bench.figures import WrongBytes
from kvferry.tools.bench.kernels import command as bench_kernels
from kvferry.tools.bench.kernels import measure as kernels_measure
from kvferry.tools.bench.kernels.measure import HostCost, Report, Row
from kvferry.tools.cli import app

if TYPE_CHECKING:
    from pathlib import Path


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert result.exit_code == 1
    assert "kvferry bench kernels: needs a CUDA device" in result.output


def test_a_wrong_kernel_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> Report:
        raise WrongBytes("gather of 1024 B pieces")

    monkeypatch.setattr(kernels_measure, "measure", measure)
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert result.exit_code == 1
    assert "kvferry bench kernels: gather of 1024 B pieces" in result.output


@pytest.fixture
def report() -> Report:
    slow = Row("gather", 4096, 1 << 30, 600.0, 1789.6, 0.84, tile_nbytes=4096, num_warps=4)
    fast = Row("gather", 4096, 1 << 30, 500.0, 2147.5, 0.99, tile_nbytes=16384, num_warps=8)
    capped = Row("gather", 4096, 1 << 30, 900.0, 1193.0, 0.56, max_programs=24)
    return Report(
        device="H200",
        num_multiprocessors=132,
        versions={"torch": "2.11"},
        memcpy_gb_per_s=2150.0,
        rows=[slow],
        curves=[capped],
        sweep=[slow, fast],
        host=[HostCost("gather", 12.0, 19.0, 2.1)],
    )


def test_the_tables_show_the_best_of_a_sweep(report: Report) -> None:
    text = io.StringIO()
    bench_kernels.show(Console(file=text, width=100), report)
    shown = text.getvalue()
    for words in ("H200", "torch 2.11", "2150 GB/s", "1193.0", "16 KiB, 8", "12.0"):
        assert words in shown
    assert "4 KiB, 4" not in shown.partition("best of every tile")[2]


@pytest.mark.parametrize("curves", [True, False])
def test_a_report_is_drawn_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: Report, curves: bool
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    report = report if curves else dataclasses.replace(report, curves=[])
    monkeypatch.setattr(kernels_measure, "measure", lambda *_: report)
    path = tmp_path / "kernels.png"
    result = CliRunner().invoke(app, ["bench", "kernels", "--plot", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.gpu
def test_a_small_run(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch sees none")
    path = tmp_path / "report.json"
    arguments = ["bench", "kernels", "--mib", "8", "--repeats", "3", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    pieces = {row["piece_nbytes"] for row in report["rows"]}
    assert pieces == set(kernels_measure.PIECES_NBYTES)
    assert {row["operation"] for row in report["rows"]} == {"gather", "scatter", "push"}
