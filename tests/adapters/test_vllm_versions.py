"""The connector against the base classes of every vLLM that it is meant for.

`base_classes.json` holds their methods and parameters, read from the wheels of the versions it names;
so this needs no vLLM. That vLLM 0.32 really works is shown by `test_vllm_pairs.py`.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CONNECTOR = HERE.parents[1] / "adapters" / "vllm.py"
BASES = json.loads((HERE / "vllm_engines" / "base_classes.json").read_text())
VERSIONS = ["0.30.0", "0.31.0", "0.32.0", "0.33.0"]
BASE_METHODS = BASES["KVConnectorBase_V1"] | BASES["SupportsHMA"]


def parameters(function: ast.FunctionDef) -> list[str]:
    names = [argument.arg for argument in function.args.args]
    return names + ([f"**{function.args.kwarg.arg}"] if function.args.kwarg else [])


def methods() -> dict[str, ast.FunctionDef]:
    tree = ast.parse(CONNECTOR.read_text())
    (cls,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "KVFerryConnector")
    return {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}


def in_version(name: str, version: str) -> dict[str, Any] | None:
    """A base method as that version has it."""
    for form in BASE_METHODS.get(name, ()):
        if version in form["versions"]:
            return dict(form)
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_every_abstract_method_is_there(version: str) -> None:
    abstract = {
        name
        for name in BASE_METHODS
        if (form := in_version(name, version)) and "abstractmethod" in form["decorators"]
    }
    assert len(abstract) >= 8
    assert abstract <= set(methods())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_method_takes_what_vllm_gives_it(version: str) -> None:
    compared = 0
    for name, function in methods().items():
        form = in_version(name, version)
        if form is not None:
            assert parameters(function) == form["parameters"], name
            compared += 1
    assert compared >= 20


def test_every_public_method_is_one_of_vllms() -> None:
    """A hook with a typing error in its name would never be called, and nobody would notice."""
    unknown = {n for n in methods() if not n.startswith("_") and n not in BASE_METHODS}
    assert not unknown


@pytest.mark.parametrize("version", VERSIONS)
def test_results_have_the_fields_that_are_filled(version: str) -> None:
    fields = [
        name
        for name, forms in BASES["KVConnectorTransferResults"].items()
        if any(version in form["versions"] for form in forms)
    ]
    assert set(fields) == {"finished_sending", "finished_recving", "failed_recving"}
