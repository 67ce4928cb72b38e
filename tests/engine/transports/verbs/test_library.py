"""What the transport calls of pyverbs exists in every version that it is meant for.

`pyverbs_declarations.json` has the classes, parameters and names that the sources of pyverbs 57.0 and
59.0 declare (the two agree on all of them); the version of this machine, if there is one, is asked
itself. What the calls do is tested on rdma-core of this machine alone.
"""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvferry.engine.transports.verbs import library as verbs_library
from tests import ROOT

FOLDER = Path(__file__).parent
SOURCES = sorted((ROOT / "engine" / "transports" / "verbs").glob("*.py"))
DECLARED: dict[str, Any] = json.loads((FOLDER / "pyverbs_declarations.json").read_text())
# Attributes and methods of the library's objects that the transport uses.
USED = {
    "addr.AHAttr": [],
    "addr.GID": [],
    "addr.GlobalRoute": [],
    "cq.CompChannel": ["close", "get_cq_event"],
    "cq.CQ": ["ack_events", "close", "poll", "req_notify"],
    "cq.WC": ["byte_len", "imm_data", "qp_num", "status", "vendor_err", "wr_id"],
    "device.Context": ["close", "cmd_fd", "query_device", "query_port"],
    "device.DeviceAttr": ["max_qp_rd_atom", "max_sge"],
    "device.PortAttr": ["active_mtu"],
    "mr.MR": ["close", "lkey", "rkey"],
    "pd.PD": ["close"],
    "qp.QPAttr": [
        *("ah_attr", "dest_qp_num", "max_dest_rd_atomic", "max_rd_atomic", "min_rnr_timer"),
        *("path_mtu", "qp_access_flags", "qp_state", "retry_cnt", "rnr_retry", "rq_psn"),
        *("sq_psn", "timeout"),
    ],
    "qp.QPCap": [],
    "qp.QPEx": [
        *("close", "modify", "post_recv", "qp_num", "to_init", "to_rts", "wr_abort"),
        *("wr_complete", "wr_flags", "wr_id", "wr_rdma_read", "wr_rdma_write"),
        *("wr_rdma_write_imm", "wr_set_sge", "wr_set_sge_list", "wr_start"),
    ],
    "qp.QPInitAttrEx": [],
    "wr.RecvWR": ["close"],
    "wr.SGE": ["addr", "close", "length", "lkey"],
}


def names_of(declared: str) -> set[str]:
    """The names that a class declares, with those of its bases in the same module."""
    names: set[str] = set()
    module = declared.partition(".")[0]
    while declared in DECLARED:
        names |= set(DECLARED[declared]["names"])
        declared = f"{module}.{DECLARED[declared]['base']}"
    return names


def calls() -> list[tuple[str, ast.Call]]:
    """Every call of a class of the library in the transport's sources: `….library.module.Class(…)`."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr=cls, value=ast.Attribute(attr=module, value=owner))
                ) if ast.unparse(owner).split(".")[-1] == "library":
                    found.append((f"{module}.{cls}", node))
    return found


def test_every_class_is_called_with_parameters_that_it_declares() -> None:
    found = calls()
    made_by_the_library = {"cq.WC", "device.DeviceAttr", "device.PortAttr"}
    assert {name for name, _ in found} | made_by_the_library == set(USED)
    for name, call in found:
        parameters = DECLARED[name]["init"]
        assert len(call.args) <= len(parameters), name
        for keyword in call.keywords:
            open_ended = "**kwargs" in parameters
            assert open_ended or keyword.arg in parameters, f"{name}({keyword.arg}=…)"


def test_every_name_is_declared() -> None:
    for declared, names in USED.items():
        assert set(names) <= names_of(declared), declared


def test_this_machines_pyverbs_has_every_name() -> None:
    reason = verbs_library.absence()
    if reason:
        pytest.skip(reason)
    library = verbs_library.load()
    for declared, names in USED.items():
        module, _, cls = declared.partition(".")
        place: Any = getattr(library, module)
        for name in names:
            assert hasattr(getattr(place, cls), name), f"{declared}.{name}"


@pytest.mark.parametrize("scoped", [False, True])
def test_constants_are_found_wherever_a_version_has_them(
    scoped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until 57 by their own names; in 59 within the enumerations that they are of, elsewhere."""
    numbers = {name: number for number, name in enumerate(verbs_library.CONSTANTS)}
    module = ModuleType("made up")
    place: Any = type("ibv_everything", (), {}) if scoped else module
    for name, number in numbers.items():
        setattr(place, name, number)
    if scoped:
        setattr(module, "ibv_everything", place)  # noqa: B010

    def imported(name: str) -> ModuleType:
        if name == ("pyverbs.libibverbs_enums" if scoped else "pyverbs.enums"):
            return module
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", imported)
    assert vars(verbs_library._constants()) == numbers
    delattr(place, "IBV_QPS_ERR")
    with pytest.raises(ImportError, match="no constant IBV_QPS_ERR"):
        verbs_library._constants()
