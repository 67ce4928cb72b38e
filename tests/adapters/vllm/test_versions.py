"""The connector against the classes of every vLLM that it is meant for.

`base_classes.json` holds their methods, parameters and fields. `tools/vllm_cpu/read_bases.py` has read
them from the wheels of the versions it names; so this needs no vLLM. That vLLM 0.32 really works is
shown by `test_pairs.py`.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvferry.tools.vllm_cpu import read_bases
from tests import ROOT

HERE = Path(__file__).parent
CONNECTOR = ROOT / "adapters" / "vllm" / "connector.py"
BASES = json.loads((HERE / "engines" / "base_classes.json").read_text())
STATS = CONNECTOR.with_name("stats.py")
VERSIONS = ["0.30.0", "0.31.0", "0.32.0", "0.33.0"]
BASE_METHODS = BASES["KVConnectorBase_V1"] | BASES["SupportsHMA"]


# What the connector reads of vLLM's objects by attribute alone.
READ = {
    "BlockPool": ("blocks", "free_blocks", "get_num_free_blocks", "touch"),
    "CachedRequestData": ("new_block_ids", "num_computed_tokens", "req_ids", "resumed_req_ids"),
    "KVCacheBlocks": ("get_block_ids",),
    "KVCacheConfig": ("kv_cache_groups", "num_blocks", "transfer_group_ids"),
    "KVCacheGroupSpec": ("kv_cache_spec", "layer_names"),
    "KVCacheSpec": ("block_size", "page_size_bytes", "tokens_per_state"),
    "KVConnectorFactory": ("_registry", "register_connector"),
    "KVConnectorOutput": (
        "failed_recving",
        "finished_recving",
        "finished_sending",
        "invalid_block_ids",
    ),
    "KVConnectorPromMetrics": ("per_engine_labelvalues",),
    "KVConnectorRole": ("SCHEDULER",),
    "KVConnectorStats": ("data",),
    "KVTransferConfig": (
        "engine_id",
        "kv_connector_extra_config",
        "kv_load_failure_policy",
        "kv_role",
    ),
    "NewRequestData": ("block_ids", "num_computed_tokens", "req_id"),
    "Request": ("kv_transfer_params", "num_prompt_tokens", "request_id", "status"),
    "RequestStatus": ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED"),
    "SchedulerOutput": (
        "num_scheduled_tokens",
        "scheduled_cached_reqs",
        "scheduled_new_reqs",
        "total_num_scheduled_tokens",
    ),
    "SlidingWindowSpec": ("extra_retained_tokens", "sliding_window"),
    "UniformTypeKVCacheSpecs": ("kv_cache_specs",),
}
# And calls of them, with as many arguments after the first.
CALLED = {
    ("BlockPool", "free_blocks"): 1,
    ("BlockPool", "get_num_free_blocks"): 0,
    ("BlockPool", "touch"): 1,
    ("KVConnectorFactory", "register_connector"): 3,
}


def parameters(function: ast.FunctionDef) -> list[str]:
    names = [argument.arg for argument in function.args.args]
    return names + ([f"**{function.args.kwarg.arg}"] if function.args.kwarg else [])


def methods(file: Path = CONNECTOR, name: str = "KVFerryConnector") -> dict[str, ast.FunctionDef]:
    tree = ast.parse(file.read_text())
    (cls,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}


def in_version(name: str, version: str, members: Any = BASE_METHODS) -> dict[str, Any] | None:
    """A base method, or another class's member, as that version has it."""
    for form in members.get(name, ()):
        if version in form["versions"]:
            return dict(form)
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_every_abstract_method_is_there(version: str) -> None:
    abstract = {
        name
        for name in BASE_METHODS
        if "abstractmethod" in (in_version(name, version) or {}).get("decorators", ())
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


@pytest.mark.parametrize("version", VERSIONS)
def test_stats_and_metrics_are_called_as_they_expect(version: str) -> None:
    for base, ours in (("Stats", "KVFerryStats"), ("PromMetrics", "KVFerryPromMetrics")):
        members = BASES[f"KVConnector{base}"]
        compared = 0
        for name, function in methods(STATS, ours).items():
            form = in_version(name, version, members)
            if form is not None:
                assert parameters(function) == form["parameters"], name
                compared += 1
        # What a base class leaves open is there.
        left = {n for n in ("aggregate", "is_empty", "observe", "reduce", "reset") if n in members}
        assert left <= set(methods(STATS, ours))
        assert compared >= len(left) > 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cls", sorted(READ))
def test_what_is_read_by_attribute_is_there(cls: str, version: str) -> None:
    for name in READ[cls]:
        assert in_version(name, version, BASES[cls]) is not None, name
        taken = CALLED.get((cls, name))
        if taken is not None:
            form = in_version(name, version, BASES[cls])
            assert form is not None
            assert len(form["parameters"]) == 1 + taken, name


def test_nothing_is_listed_that_is_not_read() -> None:
    source = "".join(path.read_text() for path in sorted(CONNECTOR.parent.glob("*.py")))
    for names in READ.values():
        for name in names:
            assert re.search(rf"\.{name}\b|\"{name}\"", source), name


def test_wheels_are_read_as_they_are(tmp_path: Path) -> None:
    """Two versions of one class: what they share, what they do not, and what `__init__` sets."""
    first = "class KVTransferConfig:\n    kv_role: str\n    def call(self, a, *, b, **c): ...\n"
    second = "class KVTransferConfig:\n    def __init__(self):\n        self.kv_role = 1\n"
    paths = []
    for version, text in (("0.1", first), ("0.2", second)):
        paths.append(str(tmp_path / f"vllm-{version}-py3-none-any.whl"))
        with zipfile.ZipFile(paths[-1], "w") as wheel:
            for file in read_bases.CLASSES:
                wheel.writestr(file, text if file.endswith("/kv_transfer.py") else "")
    found = json.loads(read_bases.write(read_bases.merge(dict(map(read_bases.read_wheel, paths)))))
    call = {"decorators": [], "parameters": ["self", "a", "b", "**c"], "versions": ["0.1"]}
    init = {"decorators": [], "parameters": ["self"], "versions": ["0.2"]}
    kept = {"field": True, "versions": ["0.1", "0.2"]}
    assert found == {"KVTransferConfig": {"__init__": [init], "call": [call], "kv_role": [kept]}}
