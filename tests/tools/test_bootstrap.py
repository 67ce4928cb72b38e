"""The set-up script: it must parse under an old Python, and say in one line what is missing."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pip
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvferry.tools import bootstrap

ROOT = Path(__file__).parent.parent.parent


def test_parses_under_the_oldest_python_that_it_must_turn_down() -> None:
    ast.parse(Path(bootstrap.__file__).read_text(encoding="utf-8"), feature_version=(3, 6))


def test_an_old_python_with_no_newer_one_on_path_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer.* is 3\.8\.10"):
        bootstrap.run_under_a_new_enough_python()


def test_a_missing_venv_module_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "VENV_PYTHON", str(tmp_path / "python"))
    monkeypatch.setattr(bootstrap, "output_of", lambda _python, _code: "")
    with pytest.raises(SystemExit, match=r"no `venv` module; .* apt install python3-venv"):
        bootstrap.make_venv()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "is full"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for msgspec>=0.19",
            "cannot download msgspec>=0.19: no package index that can be reached",
        ),
        (
            "ERROR: Could not find a version (from versions: 2.10.0, 2.11.0)\n"
            "ERROR: No matching distribution found for torch==2.13.0",
            "the package index has no torch==2.13.0 for Python 3.",
        ),
        (
            "    kvferry 0.1.0 depends on rich>=13\n"
            "    The user requested (constraint) rich==12.0.0\n"
            "ERROR: ResolutionImpossible: for help visit",
            "rich==12.0.0 of constraints.txt does not go with what pyproject.toml asks for",
        ),
        ("ERROR: Cannot uninstall TBB", "Cannot uninstall TBB"),
        ("", "pip failed"),
    ],
)
def test_a_failure_of_pip_is_explained_in_one_line(log: str, words: str) -> None:
    line = bootstrap.explain(log)
    assert words in line
    assert "\n" not in line


def test_local_versions_compare_by_their_public_part() -> None:
    assert bootstrap.version_of("2.13.0+cpu") == (2, 13, 0) >= bootstrap.OLDEST_TORCH
    assert bootstrap.version_of("2.7.1") < bootstrap.OLDEST_TORCH


def asked_for() -> list[Requirement]:
    """All that the set-up installs by name, and what the lock pins besides."""
    parsed = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())
    project, groups = parsed["project"], parsed["dependency-groups"]
    lists = [project["dependencies"], groups[bootstrap.GROUP], groups["lock"]]
    lists += [project["optional-dependencies"][extra] for extra in bootstrap.EXTRAS]
    lists.append(parsed["build-system"]["requires"])
    return [Requirement(line) for lines in lists for line in lines]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize(("system", "platform"), [("Linux", "linux"), ("Darwin", "darwin")])
def test_the_lock_pins_all_that_is_asked_for(python: str, system: str, platform: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_system": system,
        "sys_platform": platform,
    }
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = bootstrap.pins(text, environment)
    assert all(str(pin).startswith("==") for pin in pinned.values())
    for wanted in asked_for():
        if wanted.marker is None or wanted.marker.evaluate(environment):
            pin = str(pinned[canonicalize_name(wanted.name)]).removeprefix("==")
            assert wanted.specifier.contains(pin), f"{wanted}, `make lock` renews its pin {pin}"


def test_a_kept_torch_decides_its_own_triton_and_cuda_packages() -> None:
    lock = (
        "numpy==2.4.6 ; python_full_version == '3.11.*'  # via kvferry\n"
        "nvidia-nvtx==13.0.85 ; sys_platform == 'linux'  # via torch\n"
        "setuptools==84.2.1\nsympy==1.14.0\ntorch==2.13.0\ntriton==3.7.1\n"
    )
    requires = [
        "sympy>=1.13.3",
        'setuptools<82; python_version >= "3.12"',
        'triton==3.5.0; platform_system == "Linux"',
        'nvidia-cublas-cu12==12.8.4.1; platform_system == "Linux"',
        'numpy<9; extra == "numpy"',
    ]
    kept = bootstrap.constraints(lock, "2.9.0+cu128", requires, has_triton=True).splitlines()
    assert kept[:2] == [lock.splitlines()[0], "sympy==1.14.0"]
    assert kept[2] == "torch==2.9.0+cu128"
    assert kept[3:] == ["nvidia-cublas-cu12", "nvidia-nvtx", "setuptools", "triton"]
    assert bootstrap.constraints(lock, "", [], has_triton=False) == lock


def test_a_build_of_a_pinned_version_is_that_version() -> None:
    pinned = bootstrap.pins("torch==2.13.0\nnumpy==2.4.6 ; python_version < '3'\nTriton\n")
    have = {"torch": "2.13.0+cpu", "triton": "3.5.0", "kvferry": "0.1.0"}
    assert list(bootstrap.differences(have, pinned)) == []
    have = {"torch": "2.13.1", "numpy": "2.4.6"}
    assert list(bootstrap.differences(have, pinned)) == [
        "numpy 2.4.6 unpinned",
        "torch 2.13.1 2.13.0",
    ]


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with two distributions and no lock, which the set-up takes for `.venv`."""
    venv = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    for name, version in (("apple", "1.0"), ("pear", "2.0+cpu")):
        distribution(packages, name, version)
    # `bootstrap.py compare` needs pip; it does not look at what comes from elsewhere.
    outer = Path(pip.__file__).parent.parent
    (packages / "outer.pth").write_text(f"{outer}\n")
    for name in ("VENV", "VENV_PYTHON", "STAMP", "LOG", "USED_CONSTRAINTS", "ADDED"):
        path = Path(getattr(bootstrap, name))
        monkeypatch.setattr(
            bootstrap, name, str(venv / path.relative_to(bootstrap.ROOT + "/.venv"))
        )
    monkeypatch.setattr(bootstrap, "CONSTRAINTS", str(tmp_path / "constraints.txt"))
    return venv


def distribution(packages: Path, name: str, version: str) -> Path:
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def lock(*lines: str) -> None:
    """The lock of this set-up, and what `.venv` was made by."""
    for path in (bootstrap.CONSTRAINTS, bootstrap.USED_CONSTRAINTS):
        Path(path).write_text("\n".join(lines) + "\n")


@pytest.mark.usefixtures("venv")
def test_what_is_as_pinned_passes() -> None:
    lock("apple==1.0", "pear==2.0", "plum==3.0")
    bootstrap.check_locked()


@pytest.mark.usefixtures("venv")
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["pear==2.0"],
            r"^kvferry set-up: \.venv has apple 1\.0, which constraints\.txt does not pin",
        ),
        (["apple==1.1", "pear==2.0"], r"has apple 1\.0, which constraints\.txt pins at 1\.1"),
    ],
)
def test_what_is_not_as_pinned_is_named_in_one_line_with_the_fix(
    lines: list[str], words: str
) -> None:
    lock(*lines)
    with pytest.raises(SystemExit, match=words + r"; `make lock` [^\n]*$"):
        bootstrap.check_locked()
    bootstrap.note_what_was_added()  # the next try: no set-up has ended well, so nothing is excused
    with pytest.raises(SystemExit, match=words):
        bootstrap.check_locked()


def test_what_was_installed_by_hand_stays_and_what_only_the_old_lock_pinned_goes(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    monkeypatch.setattr(bootstrap, "pip", lambda *args: gone.extend(args))
    lock("pear==2.0")
    Path(bootstrap.CONSTRAINTS).write_text("plum==3.0\n")
    Path(bootstrap.STAMP).touch()
    bootstrap.note_what_was_added()
    assert gone == ["uninstall", "--yes", "pear"]
    shutil.rmtree(next(venv.glob("lib/python*/site-packages/pear-*")))
    Path(bootstrap.USED_CONSTRAINTS).write_text("plum==3.0\n")
    bootstrap.check_locked()
    distribution(next(venv.glob("lib/python*/site-packages")), "fig", "4.0")
    with pytest.raises(SystemExit, match=r"has fig 4\.0, .* does not pin"):
        bootstrap.check_locked()
