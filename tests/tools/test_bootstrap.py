"""The set-up script: it must parse under an old Python, and say in one line what is missing."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from kvferry.tools import bootstrap


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
