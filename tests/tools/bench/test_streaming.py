"""`kvferry bench streaming` as far as that goes without GPUs: tiny models, host memory, over cma."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvferry.tools.bench.figures import WrongBytes
from kvferry.tools.bench.streaming import measure as streaming_measure
from kvferry.tools.bench.streaming.measure import Bench, Case
from kvferry.tools.bench.streaming.model import Shape
from kvferry.tools.cli import app

HEADS = Shape("tiny", 3, 64, 4, 2, 16, 96)
LATENT = Shape("tiny latent", 2, 64, 4, 1, 16, 96, 24, (32, 16))


def test_a_gpu_is_asked_for() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    result = CliRunner().invoke(app, ["bench", "streaming"])
    assert result.exit_code == 1
    assert "torch sees no CUDA device" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "nbytes"),
    [
        (Case(HEADS, 1, 60, "cpu", 1), 3 * 64 * 2 * 2 * 16 * 2),
        pytest.param(Case(LATENT, 1, 60, "cpu", 1), 2 * 64 * 24 * 2, marks=pytest.mark.soak),
        pytest.param(  # each rank has all of a latent
            Case(LATENT, 2, 60, "cpu", 1), 2 * 2 * 64 * 24 * 2, marks=pytest.mark.soak
        ),
    ],
)
def test_every_way_moves_a_prompt_and_is_timed(case: Case, nbytes: int) -> None:
    rows = streaming_measure.measure(case)
    assert [row.kind for row in rows] == list(streaming_measure.KINDS)
    for row in rows:
        assert row.forward_ms > row.tail_ms > 0
        assert row.nbytes == (0 if row.kind == "alone" else nbytes)
        assert row.noticed_ms >= row.visible_ms
    streaming_measure.show(rows)


@pytest.mark.soak
def test_wrong_bytes_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Bench.call

    def forged(bench: Bench, side: str, *command: Any) -> Any:
        answers = call(bench, side, *command)
        wrong = side == "decode" and command[0] == "digest"
        return [[*each[:-1], each[-1] + 1] for each in answers] if wrong else answers

    monkeypatch.setattr(Bench, "call", forged)
    with pytest.raises(WrongBytes, match="tiny, streamed"):
        streaming_measure.measure(Case(HEADS, 1, 60, "cpu", 1))
