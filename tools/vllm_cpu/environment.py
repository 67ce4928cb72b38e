"""A pinned vLLM for CPUs in a virtual environment of its own, made once and kept in a cache.

kvferry is imported from this checkout, by `PYTHONPATH`: one environment serves all checkouts.

    python -m kvferry.tools.vllm_cpu.environment     installs it if needed, prints its Python
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PINS = (HERE / "requirements.txt", HERE / "engines.txt")
VARIABLE = "KVFERRY_VLLM_ENV"
NEEDED_BYTES = 6 << 30  # 3.4 GB installed, as much again while pip unpacks


class CannotInstall(Exception):
    """The environment is not there and cannot be made here; says why."""


def folder() -> Path:
    """Where the environment is: `$KVFERRY_VLLM_ENV`, or in the user's cache folder by its pins."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in PINS))
    digest.update(f"{sys.version_info[:2]}".encode())
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kvferry" / f"vllm-{digest.hexdigest()[:12]}"


def ensure() -> Path:
    """Makes the environment unless it is there; returns its Python. Processes wait for each other.

    Raises:
        CannotInstall: no disk, no package index, or pip failed.
    """
    home = folder()
    python, stamp = home / "bin" / "python", home / "kvferry-ready"
    if stamp.exists():
        return python
    home.parent.mkdir(parents=True, exist_ok=True)
    with open(home.parent / f"{home.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists():
            _make(home, python)
            stamp.touch()
    return python


def environ() -> dict[str, str]:
    """What a process in the environment needs to import kvferry from this checkout."""
    paths = [str(HERE.parents[1] / "src"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    clean = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    return clean | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _make(home: Path, python: Path) -> None:
    free = shutil.disk_usage(home.parent).free
    if free < NEEDED_BYTES:
        raise CannotInstall(f"{home.parent} has {free >> 30} GiB free, {NEEDED_BYTES >> 30} needed")
    print(f"kvferry: vLLM for CPUs in {home} (minutes, once)", file=sys.stderr, flush=True)
    venv.create(home, with_pip=True)  # what a run that was cut short has installed stays
    log = home / "kvferry-install.log"
    for extra in (["-r", str(PINS[0])], ["--no-deps", "-r", str(PINS[1])]):
        with open(log, "ab") as output:
            command = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar=off"]
            done = subprocess.run([*command, *extra], stdout=output, stderr=subprocess.STDOUT)
        if done.returncode:
            lines = log.read_text(errors="replace").splitlines()
            errors = [line for line in lines if line.startswith("ERROR:")] or ["pip failed"]
            raise CannotInstall(f"{errors[-1]} (all of pip's output: {log})")


def main() -> None:
    """Installs, and prints the environment's Python."""
    try:
        print(ensure())
    except CannotInstall as error:
        sys.exit(f"kvferry: vLLM cannot be installed: {error}")


if __name__ == "__main__":
    main()
