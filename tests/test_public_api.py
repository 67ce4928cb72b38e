"""The package's front door: what `import kvferry` gives, and what it must not load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvferry

HEAVY = ("torch", "numpy", "triton", "zmq", "transformers")


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "statement",
    ["import kvferry", "import kvferry.control.handoff.messages", "import kvferry.tools.cli"],
)
def test_an_import_loads_nothing_heavy(statement: str) -> None:
    assert modules_after(statement).isdisjoint(HEAVY)


@pytest.mark.parametrize("name", kvferry.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(kvferry, name).__name__ == name


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse(Path(kvferry.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert typed == kvferry._HOMES
    assert sorted(typed) == kvferry.__all__ == dir(kvferry)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Ferry'"):
        _ = kvferry.Ferry
