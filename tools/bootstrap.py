"""Makes `.venv` and installs kvferry into it; every `make` target starts here.

Standard library only, and no syntax newer than Python 3.6: it must run on whatever `python3` is, to
say in one line what is missing. A second run compares one stamp and ends at once.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 8)
OLDEST_PIP = (25, 1)  # the first with `--group`, which reads [dependency-groups]
NEWER_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.10")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "kvferry-stamp")
LOG = os.path.join(VENV, "kvferry-install.log")
PYPROJECT = os.path.join(ROOT, "pyproject.toml")
CONSTRAINTS = os.path.join(ROOT, "constraints.txt")


def fail(message: str) -> "None":
    """Ends the set-up with one clear line."""
    sys.exit(f"kvferry set-up: {message}")


def output_of(python: str, code: str) -> str:
    """What `python -c code` prints, or an empty string if it cannot run."""
    try:
        done = subprocess.run(
            [python, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,  # noqa: UP021 - `text` is Python 3.7
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(text: str) -> "tuple[int, ...]":
    """'2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def run_under_a_new_enough_python() -> None:
    """Returns under Python 3.10 or newer; otherwise starts over under one from PATH, or fails."""
    if sys.version_info >= OLDEST_PYTHON:
        return
    for name in NEWER_PYTHONS:
        found = shutil.which(name)
        if found and output_of(found, "print(1)"):
            os.execv(found, [found, *sys.argv])
    have = ".".join(str(part) for part in sys.version_info[:3])
    fail(f"needs Python 3.10 or newer, {sys.executable} is {have}; set PYTHON=/path/to/python3")


def stamp_text() -> str:
    """Changes whenever `.venv` has to be installed again, and not when a linter's setting does."""
    with open(PYPROJECT, encoding="utf-8") as file:
        requirements = file.read().partition("[tool.ruff]")[0]
    with open(CONSTRAINTS, encoding="utf-8") as file:
        requirements += file.read()
    return hashlib.sha256((requirements + ROOT).encode()).hexdigest()


def is_ready() -> bool:
    try:
        with open(STAMP, encoding="utf-8") as file:
            return file.read() == stamp_text() and os.access(VENV_PYTHON, os.X_OK)
    except OSError:
        return False


def torch_version(python: str) -> str:
    """The version of the torch that `python` can import; read from metadata, torch stays unloaded."""
    return output_of(python, "import importlib.metadata as m; print(m.version('torch'))")


def make_venv() -> None:
    """Makes `.venv` unless one that works is there; it sees the outer packages if torch is there."""
    if output_of(VENV_PYTHON, "print(1)"):
        return
    for module in ("venv", "ensurepip"):
        if not output_of(sys.executable, f"import {module}; print(1)"):
            fail(
                f"{sys.executable} has no `{module}` module; "
                "on Debian and Ubuntu: apt install python3-venv"
            )
    args = [sys.executable, "-m", "venv", "--clear"]
    outer_torch = torch_version(sys.executable)
    if outer_torch and version_of(outer_torch) >= OLDEST_TORCH:
        args.append("--system-site-packages")
    done = subprocess.run([*args, VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        lines = done.stdout.decode(errors="replace").strip().splitlines() or ["no reason given"]
        fail(f"cannot make {VENV}: {lines[-1]}")


def write_constraints() -> str:
    """The pins for this `.venv`: without torch's where a good enough torch is there already."""
    with open(CONSTRAINTS, encoding="utf-8") as file:
        lines = file.read().splitlines()
    have = torch_version(VENV_PYTHON)
    if have and version_of(have) >= OLDEST_TORCH:
        print(f"  keeping torch {have}", flush=True)
        lines = [line for line in lines if not line.startswith("torch==")]
        lines.append(f"torch=={have}")
    path = os.path.join(VENV, "kvferry-constraints.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def explain(log: str) -> str:
    """One line that says why pip failed, from what it printed."""
    if "No space left on device" in log:
        return f"the disk of {VENV} is full"
    missing = re.findall(r"No matching distribution found for (\S+)", log)
    broken = "connection broken by" in log
    if missing or broken:
        what = missing[-1] if missing else "what it needs"
        version = ".".join(str(part) for part in sys.version_info[:2])
        if broken or "(from versions: none)" in log:
            return (
                f"cannot download {what}: no package index that can be reached has it for "
                f"Python {version}; go on line, or set PIP_INDEX_URL or PIP_FIND_LINKS"
            )
        return f"the package index has no {what} for Python {version} on this machine"
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")]
    return errors[-1][len("ERROR: ") :] if errors else "pip failed"


def pip_install(*args: str) -> None:
    """Runs `pip install`, shows what it fetches a line each, keeps the rest in the log."""
    command = [VENV_PYTHON, "-m", "pip", "install", "--progress-bar=off", "--no-input", *args]
    seen = []
    with open(LOG, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            seen.append(line)
            if re.match(r"\s*(Downloading \S+ \([\d.]+ [MG]B|Installing collected)", line):
                print("  " + line.strip()[:96], flush=True)
        process.wait()
    if process.returncode != 0:
        fail(f"{explain(''.join(seen))} (all of pip's output: {LOG})")


def install() -> None:
    """Installs the pinned tools, torch, and kvferry itself (editable) into `.venv`."""
    pip_version = output_of(VENV_PYTHON, "import importlib.metadata as m; print(m.version('pip'))")
    if not pip_version and subprocess.call([VENV_PYTHON, "-m", "ensurepip"]) != 0:
        fail(f"{VENV_PYTHON} has no pip and no ensurepip; remove {VENV} and try again")
    if version_of(pip_version or "0") < OLDEST_PIP:
        pip_install("--upgrade", "pip>=25.1")
    what = ".[demo,router,etcd]"
    pip_install("--constraint", write_constraints(), "--group", "dev", "--editable", what)


def main() -> None:
    """Leaves a `.venv` that is ready, or exits 1 with one line that says what is missing."""
    run_under_a_new_enough_python()
    with open(PYPROJECT, encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `make demo` and `make test` may be started together
        if is_ready():
            return
        started_s = time.monotonic()
        print("kvferry set-up: [1/2] a virtual environment in .venv", flush=True)
        make_venv()
        print("kvferry set-up: [2/2] torch, kvferry and its tools (minutes, once)", flush=True)
        install()
        with open(STAMP, "w", encoding="utf-8") as file:
            file.write(stamp_text())
        print(f"kvferry set-up: done in {time.monotonic() - started_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
