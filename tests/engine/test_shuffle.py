"""The conformance suite and the handoffs again, over transports that tell of arrivals late, out of
order and in bursts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.shuffle import VARIABLE, Shuffler
else:
    from shuffle import VARIABLE, Shuffler

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 400.0


def test_the_shuffler_loses_nothing_and_does_shuffle() -> None:
    seen: list[int] = []
    shuffler = Shuffler(seed=3)
    for number in range(500):
        shuffler.add(lambda number=number: seen.append(number))  # type: ignore[misc]
    shuffler.drain()
    assert sorted(seen) == list(range(500))
    assert seen != sorted(seen)
    shuffler.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_nothing_depends_on_the_order_of_arrivals(seed: int) -> None:
    suites = sorted((ROOT / "tests" / "engine").glob("test_conformance*.py"))
    handoffs = ROOT / "tests" / "adapters" / "test_agent.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not soak"]
        + [str(path) for path in (*suites, handoffs)],
        env=os.environ | {VARIABLE: str(seed)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
