"""The wheel and the source distribution: all of the library is in them, and what is installed runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvferry.control.keys import read_toml
from tests import ROOT
from tests.support.requirements import lack

WINGS = ("adapters", "control", "engine", "kernels", "tools")
# Imports every module but those that need an optional package which is not here.
IMPORT_ALL = """
import importlib, pathlib, sys
import kvferry
folder = pathlib.Path(kvferry.__file__).parent
assert folder.is_relative_to(sys.prefix), f"kvferry of {folder}"
always = {"kvferry", "msgpack", "msgspec", "numpy", "prometheus_client", "rich", "torch", "typer", "zmq"}
for path in sorted(folder.rglob("*.py")):
    name = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] in always:
            raise
        print(name)
"""


def library() -> set[str]:
    """List the files of the library, data included, as an installed package has them."""
    paths = [path for wing in WINGS for path in (ROOT / wing).rglob("*")]
    own = [path.name for path in (ROOT / "src" / "kvferry").iterdir() if path.is_file()]
    return {f"kvferry/{name}" for name in own} | {
        f"kvferry/{path.relative_to(ROOT)}"
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    }


def run(folder: Path, *command: str | Path) -> str:
    """Run a command in a folder, where it finds nothing of this checkout; return what it prints."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build both from a copy of the checkout."""
    for module in ("setuptools", "pip"):
        if importlib.util.find_spec(module) is None:
            lack(f"needs {module}: {sys.executable} has none")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", *WINGS):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=left_out)
    found = {}
    for kind in ("sdist", "wheel"):
        folder = tmp_path_factory.mktemp(kind)
        code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
        run(checkout, sys.executable, "-c", code, folder)
        (found[kind],) = folder.iterdir()
    return found


def test_every_folder_with_modules_is_listed() -> None:
    listed = read_toml(ROOT / "pyproject.toml")["tool"]["setuptools"]["packages"]
    folders = {Path(name).parent for name in library() if name.endswith(".py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


@pytest.mark.slow
def test_both_hold_every_module_and_data_file(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("kvferry/")}
    assert sorted(held ^ library()) == []
    with tarfile.open(built["sdist"]) as sdist:
        names = [member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()]
    assert {name.removeprefix("src/") for name in names if name.startswith("src/kvferry/")} == held
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_installed_runs(kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    """In a fresh environment, which sees the other packages of this one."""
    others = [
        path
        for path in filter(os.path.isdir, sys.path)
        if Path(path) != ROOT and not Path(path, "kvferry").exists()
    ]
    fresh = tmp_path / "fresh"
    venv.create(fresh, symlinks=True)
    python = fresh / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    alone = ("--no-deps", "--no-index", "--no-build-isolation")
    wheel = built["wheel"]
    if kind == "sdist":
        run(tmp_path, *pip, "wheel", *alone, "--wheel-dir", tmp_path, built["sdist"])
        (wheel,) = tmp_path.glob("*.whl")
    run(tmp_path, *pip, "--python", python, "install", *alone, wheel)
    (packages,) = fresh.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(others))
    skipped = run(tmp_path, python, "-I", "-c", IMPORT_ALL).split()
    assert all(name.startswith(("kvferry.adapters", "kvferry.tools")) for name in skipped), skipped
    report: dict[str, Any] = json.loads(
        run(tmp_path, fresh / "bin" / "kvferry", "doctor", "--json")
    )
    assert any(check["ok"] for check in report["transports"])
