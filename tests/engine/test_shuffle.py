"""The conformance suite and the handoffs again, over transports that tell of arrivals late, out of
order and in bursts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.support.shuffle import VARIABLE, Shuffler

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
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            "not soak",
            "tests/engine/conformance",
            "tests/adapters/agent/test_agent.py",
        ],
        env=os.environ | {VARIABLE: str(seed)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
