"""`kvferry bench transfer --gpu`: what it says without a GPU, and the pictures of a report."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from kvferry.tools.bench.cli import app
from kvferry.tools.bench.gpu import command as gpu
from kvferry.tools.bench.gpu import plot as gpu_plot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REPORT: dict[str, Any] = {
    "schema": gpu.SCHEMA,
    "devices": ["GPU A", "GPU B"],
    "versions": {"torch": "1"},
    "left_out": {},
    "direct": {
        "ceiling_gb_per_s": 395.0,
        "rows": [
            {
                "total_nbytes": total,
                "piece_nbytes": piece,
                "gb_per_s": 300.0,
                "alone_us": 900.0,
            }
            for total in (1 << 20, 1 << 30)
            for piece in (1 << 10, 32 << 10)
        ],
        "caps": [[8, 344.0], [24, 349.0]],
        "one_way_us": [[4096, 9.0], [1 << 20, 12.0]],
    },
    "staged": {
        "ceilings_gb_per_s": {"copy to pinned memory": 55.0, "tcp, host memory": 8.0},
        "rows": [
            {
                "path": "shared staging",
                "total_nbytes": 1 << 30,
                "piece_nbytes": 4096,
                "gb_per_s": 1.0,
            }
        ],
    },
    "nixl": [{"total_nbytes": 1 << 20, "piece_nbytes": 32 << 10, "us": 159.0, "right": True}],
}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["transfer", "--gpu", "--quick"])
    assert result.exit_code == 1
    assert "torch sees no CUDA device" in result.output


@pytest.mark.parametrize("missing", ["", "direct", "nixl"])
def test_a_report_is_drawn_with_what_it_has(missing: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    report = {key: part for key, part in json.loads(json.dumps(REPORT)).items() if key != missing}
    gpu_plot.save(report, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG\r\n")


ROW = {"total_nbytes": 1 << 20, "piece_nbytes": 32 << 10, "us": 150.0, "right": True}


@pytest.fixture
def interpreter(tmp_path: Path) -> Callable[[str], str]:
    """Makes an interpreter that does what a line of shell says, if it finds kvferry alone."""

    def make(line: str) -> str:
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\n[ "$(ls "$PYTHONPATH")" = kvferry ] || exit 7\n{line}\n')
        script.chmod(0o755)
        return str(script)

    return make


def test_rows_of_nixl_are_taken(
    interpreter: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    report: dict[str, Any] = {"left_out": {}}
    gpu.add_nixl(report, interpreter(f"echo UCX says this; echo '{json.dumps(ROW)}'"))
    assert report == {"left_out": {}, "nixl": [ROW]}
    assert "NIXL, 1 MiB of 32 KiB: 150 us, 7.0 GB/s" in capsys.readouterr().out


def test_wrong_bytes_of_nixl_are_an_error(interpreter: Callable[[str], str]) -> None:
    report: dict[str, Any] = {"left_out": {}}
    with pytest.raises(gpu.GpuBenchError, match="NIXL moved arrived wrong"):
        gpu.add_nixl(report, interpreter(f"echo '{json.dumps(ROW | {'right': False})}'"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("""echo '{"left_out": "no NIXL here"}'""", "no NIXL here"),
        ("echo a wheel is broken >&2; exit 3", "exit status 3: a wheel is broken"),
        ("exit 3", "exit status 3"),
        ("exit 0", "it measured nothing"),
    ],
)
def test_why_nixl_is_left_out_is_said(
    interpreter: Callable[[str], str], line: str, reason: str
) -> None:
    report: dict[str, Any] = {"left_out": {}}
    gpu.add_nixl(report, interpreter(line))
    assert report == {"left_out": {"nixl": reason}}


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    report: dict[str, Any] = {"left_out": {}}
    gpu.add_nixl(report, str(tmp_path / "python"))
    assert report["left_out"]["nixl"].endswith("python cannot be run: No such file or directory")


def test_nixl_needs_neither_torch_nor_msgspec_and_says_what_it_needs() -> None:
    """In an environment of its own there is NumPy alone beside it."""
    code = (
        "import sys\n"
        "for name in ('torch', 'msgspec', 'nixl', 'nixl_cu12', 'nixl_cu13'):\n"
        "    sys.modules[name] = None\n"
        "from kvferry.tools.bench.gpu import nixl as gpu_nixl\n"
        "gpu_nixl.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)["left_out"]
    assert "nixl-cu12 or nixl-cu13" in said
    assert "--peer-python" in said


def test_between_gpus_nixl_is_the_one_peer() -> None:
    result = CliRunner().invoke(app, ["transfer", "--gpu", "--compare", "mooncake"])
    assert result.exit_code == 2
    assert "nixl alone" in result.output
