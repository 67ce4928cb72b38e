"""The control wing stands on its own: no torch, no NumPy, no engine, and a fast start."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from kvferry.control import errors
from tests import ROOT

FOLDER = ROOT / "control"
MODULES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in FOLDER.rglob("*.py")
}
# Sockets around the pure rest.
SHELLS = {
    "__main__",
    "cluster.client",
    "cluster.etcd",
    "cluster.peer_loads",
    "curve",
    "daemon.daemon",
}


def test_what_a_simulator_needs_of_placement_loads_no_sockets_and_no_clock() -> None:
    script = (
        "import sys; import kvferry.control.placement.fleet, kvferry.control.placement.policy; "
        "print(*sorted(m for m in sys.modules if m.startswith('kvferry.control.')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT / "src"
    )
    control = {name.removeprefix("kvferry.control.") for name in found.stdout.split()}
    assert control == {
        *("cluster", "cluster.messages", "errors", "handoff", "handoff.messages", "wire"),
        *("placement", "placement.fleet", "placement.policy"),
    }


@pytest.mark.parametrize(
    ("modules", "more"), [(MODULES - SHELLS, "zmq"), (SHELLS, "torch")], ids=["pure", "shells"]
)
def test_control_imports_nothing_heavy(modules: set[str], more: str) -> None:
    imports = "; ".join(f"import kvferry.control.{module}" for module in sorted(modules))
    heavy = set(["torch", "numpy", "kvferry.engine", "kvferry.adapters", "kvferry.kernels"]) | {
        more
    }
    script = f"import sys; {imports}; print(*sorted({heavy} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT / "src"
    )
    assert found.stdout.split() == []


def _error_types() -> list[type[errors.ControlError]]:
    found = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    return [kind for kind in found if issubclass(kind, errors.ControlError)]


def test_the_tree_at_the_top_of_the_file_is_complete() -> None:
    assert errors.__doc__ is not None
    for kind in _error_types():
        assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", _error_types(), ids=lambda kind: kind.__name__)
def test_every_error_says_what_where_and_whether_to_retry(kind: type[errors.ControlError]) -> None:
    if kind is errors.ProtocolError:
        error: errors.ControlError = errors.ProtocolError("m", fault="deep", peer="p")
    else:
        error = kind("m", handoff="r#1", peer="p", operation="send", retryable=True)
        assert error.retryable is True
        assert error.handoff == "r#1"
    assert "peer=p" in str(error)
    assert isinstance(kind.retryable, bool)
