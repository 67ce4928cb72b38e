"""A pinned SGLang, unpacked once into a cache: its disaggregation classes, for tests.

Not to serve with: it comes without its dependencies, which need GPUs.

    python -m kvferry.tools.sglang_wheel.environment     installs it if needed, prints its folder
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvferry.tools import pinned

PINS = (Path(__file__).resolve().parent / "requirements.txt",)
VARIABLE = "KVFERRY_SGLANG_ENV"


def ensure() -> Path:
    """Unpack it unless it is there; return the folder to import from. Processes wait for each
    other.

    Raises:
        CannotInstall: no package index, or no wheel for this Python.
    """
    return pinned.make_once(pinned.folder("sglang", PINS, VARIABLE), _make) / "packages"


def _make(home: Path) -> None:
    print(f"kvferry: SGLang's Python code in {home} (40 MB, once)", file=sys.stderr, flush=True)
    home.mkdir(exist_ok=True)
    target = ["--no-compile", "--upgrade", "--target", str(home / "packages")]
    pinned.pip_install(home, Path(sys.executable), ["--no-deps", *target, "-r", str(PINS[0])])


if __name__ == "__main__":
    pinned.main("SGLang", ensure)
