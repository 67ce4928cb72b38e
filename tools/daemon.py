"""`kvferry daemon`: the same as `python -m kvferry.control`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvferry.control.__main__ import main

if TYPE_CHECKING:
    from collections.abc import Sequence


def app(args: Sequence[str], prog_name: str) -> None:
    """Run a daemon until it is told to end."""
    sys.exit(main(args))
