"""The tests; every process finds what they share under this name, `tests.support`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the checkout
