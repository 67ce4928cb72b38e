"""Makes `.venv` and installs kvferry into it; every `make` target starts here.

All that `.venv` gets is pinned in `constraints.txt`, so that a release elsewhere changes nothing here;
`bootstrap.py lock` (`make lock`) renews that file.

Standard library only, and no syntax newer than Python 3.6: it must run on whatever `python3` is, to
say in one line what is missing. A second run compares one stamp and ends at once. By the Python of
`.venv`, `bootstrap.py compare FILE` says what differs there from constraints, with pip's own parser.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pip._vendor.packaging.specifiers import SpecifierSet

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 8)
EXTRAS = ("demo", "router", "etcd")
GROUP = "dev"
UV = "uv==0.13.9"  # resolves the lock, in an environment of its own
NEWER_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.10")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "kvferry-stamp")
LOG = os.path.join(VENV, "kvferry-install.log")
PYPROJECT = os.path.join(ROOT, "pyproject.toml")
CONSTRAINTS = os.path.join(ROOT, "constraints.txt")
USED_CONSTRAINTS = os.path.join(VENV, "kvferry-constraints.txt")
ADDED = os.path.join(VENV, "kvferry-added.txt")

HEADER = """\
# Everything that `.venv` gets, at one version for each Python: written by `make lock`, not by hand.
# Lower bounds, and the versions that are chosen on purpose, are in pyproject.toml.
#
# Versions and no hashes: torch comes from PyPI with CUDA, or as a CPU build (2.13.0+cpu) from another
# index, which are different files of one version; and pip wants either a hash of everything or of
# nothing.
"""


def fail(message: str) -> "None":
    """End the set-up with one clear line."""
    sys.exit(f"kvferry set-up: {message}")


def output_of(python: str, code: str) -> str:
    """Return what `python -c code` prints, or an empty string if it cannot run."""
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
    """'2.13.0+cpu' -> (2, 13, 0); nothing is older than all."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def canonical(name: str) -> str:
    """'Typing_Extensions' -> 'typing-extensions', as package indexes have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def run_under_a_new_enough_python() -> None:
    """Return under Python 3.10 or newer; otherwise starts over under one from PATH, or fails."""
    if sys.version_info >= OLDEST_PYTHON:
        return
    for name in NEWER_PYTHONS:
        found = shutil.which(name)
        if found and output_of(found, "print(1)"):
            os.execv(found, [found, *sys.argv])
    have = ".".join(str(part) for part in sys.version_info[:3])
    fail(f"needs Python 3.10 or newer, {sys.executable} is {have}; set PYTHON=/path/to/python3")


def stamp_text() -> str:
    """Change whenever `.venv` has to be installed again, and not when a linter's setting does."""
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


def version_in(python: str, name: str) -> str:
    """Return the version of what `python` can import; read from metadata, it stays unloaded."""
    return output_of(python, f"import importlib.metadata as m; print(m.version('{name}'))")


def make_venv() -> None:
    """Make `.venv` unless one that works is there; it sees the outer packages if torch is there."""
    if output_of(VENV_PYTHON, "print(1)"):
        return
    for module in ("venv", "ensurepip"):
        if not output_of(sys.executable, f"import {module}; print(1)"):
            fail(
                f"{sys.executable} has no `{module}` module; "
                "on Debian and Ubuntu: apt install python3-venv"
            )
    args = [sys.executable, "-m", "venv", "--clear"]
    if version_of(version_in(sys.executable, "torch")) >= OLDEST_TORCH:
        args.append("--system-site-packages")
    done = subprocess.run([*args, VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        lines = done.stdout.decode(errors="replace").strip().splitlines() or ["no reason given"]
        fail(f"cannot make {VENV}: {lines[-1]}")


def outer_torch() -> str:
    """Return the version of a torch that `.venv` sees in the Python it was made from, if it is new
    enough."""
    have = output_of(
        VENV_PYTHON,
        "import importlib.metadata as m, sys; torch = m.distribution('torch');"
        "print('' if str(torch.locate_file('')).startswith(sys.prefix) else torch.version)",
    )
    return have if version_of(have) >= OLDEST_TORCH else ""


def constraints(lock: str, torch: str, torch_requires: "list[str]", has_triton: bool) -> str:
    """Return the pins for this `.venv`: all of the lock, or those that a kept torch has no say in.

    A name without a version stands for what torch, which comes with exact versions of Triton and
    CUDA, may want otherwise.

    Args:
        lock: what `constraints.txt` says.
        torch: the version of the torch that is kept, or "".
        torch_requires: its requirements, as its metadata has them.
        has_triton: whether a Triton came with it, required or not.
    """
    if not torch:
        return lock
    bounded = {"triton"} if has_triton else set()
    for requirement in torch_requires:
        wanted, _, marker = requirement.partition(";")
        name = re.match(r"[\w.-]+", wanted)
        if name and re.search("[=~]=|<", wanted.replace(">=", "")) and "extra" not in marker:
            bounded.add(canonical(name.group()))
    lines = []
    for line in lock.splitlines():
        name = re.match(r"[\w-]+(?===)", line)
        if name and name.group() == "torch":
            continue
        # A kept torch decides the versions of its own.
        if name and (name.group() in bounded or name.group().startswith(("nvidia-", "cuda-"))):
            bounded.add(name.group())
            continue
        lines.append(line)
    return "\n".join([*lines, f"torch=={torch}", *sorted(bounded)]) + "\n"


def write_constraints() -> None:
    """Write the pins for this `.venv` into it."""
    torch = outer_torch()
    requires, has_triton = [], False  # type: list[str], bool
    if torch:
        print(f"  keeping torch {torch}", flush=True)
        code = "import importlib.metadata as m; print(*m.requires('torch') or [], sep='\\n')"
        requires = output_of(VENV_PYTHON, code).splitlines()
        has_triton = bool(version_in(VENV_PYTHON, "triton"))
    with open(CONSTRAINTS, encoding="utf-8") as file:
        text = constraints(file.read(), torch, requires, has_triton)
    with open(USED_CONSTRAINTS, "w", encoding="utf-8") as file:
        file.write(text)


def compare(path: str) -> "list[str]":
    """Return what `differences` says of `.venv` and these constraints, a line each."""
    command = [VENV_PYTHON, "-I", os.path.abspath(__file__), "compare", path]
    done = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True)  # noqa: UP021
    if done.returncode != 0:
        fail(f"cannot compare {VENV} with constraints.txt; `make clean` and try again")
    return done.stdout.splitlines()


def pins(text: str, environment: "Mapping[str, str] | None" = None) -> "dict[str, SpecifierSet]":
    """Read constraints, as far as they are for this Python and platform (or for `environment`)."""
    from pip._vendor.packaging.requirements import Requirement

    found = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if line:
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(dict(environment or {})):
                found[canonical(pin.name)] = pin.specifier
    return found


def installed() -> "dict[str, str]":
    """Return what this environment's own folders hold: not what it sees in the Python it was made
    from."""
    import importlib.metadata  # Python 3.8

    folders = list({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    return {
        canonical(found.metadata["Name"]): found.version
        for found in importlib.metadata.distributions(path=folders)
    }


def differences(have: "Mapping[str, str]", pinned: "Mapping[str, SpecifierSet]") -> "Iterator[str]":
    """Yield `name version pin` for what is at another version, or `name version unpinned`.

    A build of a pinned version (2.13.0+cpu) is that version.
    """
    for name, version in sorted(have.items()):
        if name == "kvferry":
            continue
        if name not in pinned:
            yield f"{name} {version} unpinned"
        elif not pinned[name].contains(version, prereleases=True):
            yield f"{name} {version} {str(pinned[name]).lstrip('=')}"


def explain(log: str) -> str:
    """Return one line that says why pip failed, from what it printed."""
    if "No space left on device" in log:
        return f"the disk of {VENV} is full"
    pinned = re.findall(r"The user requested \(constraint\) (\S+)", log)
    if pinned:
        return (
            f"{', '.join(pinned)} of constraints.txt does not go with what pyproject.toml asks for; "
            "`make lock` renews constraints.txt"
        )
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


def pip(*args: str) -> None:
    """Run pip, show what it fetches a line each, keep the rest in the log."""
    command = [VENV_PYTHON, "-m", "pip", *args]
    seen = []
    with open(LOG, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout or ():
            log.write(line)
            seen.append(line)
            if re.match(r"\s*(Downloading \S+ \([\d.]+ [MG]B|Installing collected)", line):
                print("  " + line.strip()[:96], flush=True)
        process.wait()
    if process.returncode != 0:
        fail(f"{explain(''.join(seen))} (all of pip's output: {LOG})")


def install() -> None:
    """Install kvferry (editable), torch and the tools into `.venv`, each at its pinned version."""
    has_pip = output_of(VENV_PYTHON, "import pip; print(1)")
    if not has_pip and subprocess.call([VENV_PYTHON, "-m", "ensurepip"]) != 0:
        fail(f"{VENV_PYTHON} has no pip and no ensurepip; remove {VENV} and try again")
    note_what_was_added()
    write_constraints()
    options = ["install", "--progress-bar=off", "--no-input", "--constraint", USED_CONSTRAINTS]
    pip(*options, "pip", "setuptools")  # a new environment has others, `venv`'s own
    options += ["--build-constraint", CONSTRAINTS]
    pip(*options, "--group", GROUP, "--editable", f".[{','.join(EXTRAS)}]")
    check_locked()


def note_what_was_added() -> None:
    """Before a set-up that follows another: drops what only the older lock had pinned.

    What somebody has put into `.venv` between the two is noted, and left alone. A set-up that fails
    leaves no stamp, so what it brought never passes for that.
    """
    if not os.path.exists(STAMP) or not os.path.exists(USED_CONSTRAINTS):
        return
    added = [line.split()[0] for line in compare(USED_CONSTRAINTS) if line.endswith(" unpinned")]
    with open(ADDED, "w", encoding="utf-8") as file:
        file.write("\n".join(added))
    stale = {line.split()[0] for line in compare(CONSTRAINTS) if line.endswith(" unpinned")}
    os.remove(STAMP)
    stale -= set(added)
    if stale:
        pip("uninstall", "--yes", *sorted(stale))


def check_locked() -> None:
    """End the set-up if `.venv` got anything that is not in the lock, or at another version."""
    added = []  # type: list[str]
    if os.path.exists(ADDED):
        with open(ADDED, encoding="utf-8") as file:
            added = file.read().split()
    for line in compare(USED_CONSTRAINTS):
        name, have, pinned = line.split(" ", 2)
        if pinned == "unpinned" and name in added:
            continue
        what = "does not pin" if pinned == "unpinned" else f"pins at {pinned}"
        fail(
            f".venv has {name} {have}, which constraints.txt {what}; `make lock` renews "
            "constraints.txt, `make clean` drops what was installed by hand"
        )


def renew_lock() -> None:
    """Resolve everything anew, for every Python that kvferry runs on, into `constraints.txt`."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", scratch], check=True)
        there = os.path.join(scratch, "bin", "")
        subprocess.run([there + "python", "-m", "pip", "install", "--quiet", UV], check=True)
        command = [there + "uv", "pip", "compile", "pyproject.toml", "--universal", "--upgrade"]
        command += ["--quiet", "--no-header", "--annotation-style=line"]
        command += ["--python-version", ".".join(str(part) for part in OLDEST_PYTHON)]
        for extra in EXTRAS:
            command += ["--extra", extra]
        for group in (GROUP, "lock"):
            command += ["--group", group]
        lock = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode()
    with open(CONSTRAINTS, "w", encoding="utf-8") as file:
        file.write(HEADER + lock)


def main() -> None:
    """Leave a `.venv` that is ready, or exits 1 with one line that says what is missing."""
    if sys.argv[1:2] == ["compare"]:
        with open(sys.argv[2], encoding="utf-8") as file:
            for line in differences(installed(), pins(file.read())):
                print(line)
        return
    run_under_a_new_enough_python()
    if sys.argv[1:] == ["lock"]:
        try:
            renew_lock()
        except (OSError, subprocess.CalledProcessError) as error:
            fail(f"constraints.txt stays as it is: {error}")
        return
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
