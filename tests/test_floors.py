"""The floors of the library: a folder imports only folders below it, and no two files import each other.

Imports count wherever they stand: for types alone, and inside functions, too.
"""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePath

import pytest

from tests import ROOT

# From the ground up, folders and files of a folder; those on one floor do not import each other.
FLOORS = {
    "": "kernels < engine, control < adapters < tools",
    "kernels": "cast, errors, runtime, signal < paged, scaling < tiles < copy, walk"
    " < launch, relayout, rows < pieces",
    "engine": "errors < runtime < layout < plan, memory < transfer, staging < wire < context"
    " < transports < convert < link < connect < transfer_engine",
    "engine.transports": "base < segments, workers < cma, tcp, verbs < cuda_ipc < selection",
    "control": "errors < wire, keys < curve, http < handoff < cluster < placement < daemon < __main__",
    "control.cluster": "messages < membership, summary, view < presence, store"
    " < etcd, peer_loads, replication < client",
    "adapters": "agent < vllm, sglang, transformers",
    "tools": "bootstrap, lazy, map, pinned < agents, daemon, demo, doctor, keys, rdma_vm,"
    " sglang_wheel, trace, vllm_cpu < bench, router, top < cli",
}
MOST_FILES = 16  # in one folder
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for wing in ("kernels", "engine", "control", "adapters", "tools")
    for path in sorted((ROOT / wing).rglob("*.py"))
}


def imports_of(name: str) -> set[str]:
    """Find the files of the library that a file imports."""
    package = [*FILES[name].relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])]).removeprefix("kvferry.")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("kvferry.") for alias in node.names}
    return found & FILES.keys() - {name}


IMPORTS = {name: imports_of(name) for name in FILES}


@pytest.mark.parametrize("folder", FLOORS)
def test_a_folder_imports_only_folders_below_it(folder: str) -> None:
    floors = [floor.split(", ") for floor in FLOORS[folder].split(" < ")]
    height = {unit: number for number, floor in enumerate(floors) for unit in floor}
    prefix = f"{folder}." if folder else ""
    unit = {
        name: name.removeprefix(prefix).partition(".")[0]
        for name in FILES
        if name.startswith(prefix)
    }
    assert set(unit.values()) == set(height), "the list of floors does not name what is there"
    wrong = [
        f"{name} imports {other}"
        for name in unit
        for other in sorted(IMPORTS[name] & unit.keys())
        if unit[name] != unit[other] and height[unit[name]] <= height[unit[other]]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {name: set(imports) for name, imports in IMPORTS.items()}
    circles = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
            break
        except CycleError as error:
            circle = error.args[1]
            circles.append(", which is imported by ".join(circle))
            graph[circle[1]].remove(circle[0])
    assert not circles, "\n".join(circles)


def test_no_folder_is_full() -> None:
    counts = Counter(PurePath(path).parent.relative_to(ROOT) for path in FILES.values())
    assert not {str(folder): count for folder, count in counts.items() if count > MOST_FILES}
