"""`kvferry bench paths`: the crossover, and a whole run that an engine then reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kvferry.engine.staging.thresholds import NEVER_DIRECT, load
from kvferry.tools.bench import paths
from kvferry.tools.bench.cli import app

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("direct", "limit"),
    [
        ((1.0, 1.0, 1.0), 0),  # never worse
        ((0.5, 1.0, 1.0), 128),
        ((0.5, 0.98, 1.0), 128),  # within noise
        ((1.0, 0.5, 1.0), 256),  # one size is not enough
        ((1.0, 1.0, 0.5), NEVER_DIRECT),
    ],
)
def test_direct_begins_where_it_stays_as_fast(direct: tuple[float, ...], limit: int) -> None:
    speeds = {size: (one, 1.0) for size, one in zip((64, 128, 256), direct, strict=True)}
    assert paths.crossover(speeds) == limit


@pytest.mark.slow
def test_a_run_is_saved_for_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "SIZES_NBYTES", (128, 4096))
    monkeypatch.setattr(paths, "TOTAL_NBYTES", 1 << 18)
    monkeypatch.setattr(paths, "REPEATS", 2)
    monkeypatch.setattr(paths, "TRANSPORTS", ("cma", "tcp"))
    file = tmp_path / "paths.json"
    result = CliRunner().invoke(app, ["paths", "--file", str(file)])
    assert result.exit_code == 0, result.output
    assert set(load(file).direct_from_nbytes) == {"cma", "tcp"}
    assert "direct from" in result.output
