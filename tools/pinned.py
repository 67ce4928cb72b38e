"""Pinned packages of other projects, installed once for all checkouts, in the user's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STAMP = "kvferry-ready"
LOG = "kvferry-install.log"


class CannotInstall(Exception):
    """The packages are not there and cannot be installed here; says why."""


def folder(name: str, pins: Sequence[Path], variable: str) -> Path:
    """Return where they are: what `variable` of the environment says, or a folder named by their
    pins."""
    named = os.environ.get(variable)
    if named:
        return Path(named)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in pins))
    digest.update(f"{sys.version_info[:2]}".encode())
    return cache_folder() / f"{name}-{digest.hexdigest()[:12]}"


def cache_folder() -> Path:
    """Return where kvferry keeps what is made once: `$XDG_CACHE_HOME/kvferry`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvferry"


def make_once(home: Path, make: Callable[[Path], None]) -> Path:
    """Fill a folder unless it is filled, and return it. Processes wait for each other.

    Raises:
        CannotInstall: as `make` says.
    """
    if (home / STAMP).exists():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with open(home.parent / f"{home.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / STAMP).exists():
            make(home)
            (home / STAMP).touch()
    return home


def pip_install(home: Path, python: Path, arguments: Sequence[str]) -> None:
    """Run pip; what it says is kept in the folder.

    Raises:
        CannotInstall: with pip's own last error.
    """
    log = home / LOG
    with open(log, "ab") as output:
        command = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar=off"]
        done = subprocess.run([*command, *arguments], stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("ERROR:")] or ["pip failed"]
        raise CannotInstall(f"{errors[-1]} (all of pip's output: {log})")


def main(name: str, ensure: Callable[[], Path]) -> None:
    """Install, and prints where it is."""
    try:
        print(ensure())
    except CannotInstall as error:
        sys.exit(f"kvferry: {name} cannot be installed: {error}")
