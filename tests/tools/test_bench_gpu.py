"""`kvferry bench transfer --gpu`: what it says without a GPU, and the pictures of a report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from kvferry.tools.bench import gpu, gpu_plot
from kvferry.tools.bench.cli import app

if TYPE_CHECKING:
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
