"""`kvferry doctor`: its exit status, its JSON, and what it reads from a machine that is not this one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kvferry.engine.transports.base import Availability
from kvferry.engine.transports.cma import path as cma
from kvferry.engine.transports.tcp import path as tcp
from kvferry.engine.transports.verbs import path as verbs
from kvferry.tools import doctor
from kvferry.tools.cli import app

if TYPE_CHECKING:
    from pathlib import Path


def test_json_names_every_transport_with_a_reason() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.output)
    assert [check["name"] for check in report["transports"]] == list(doctor.TRANSPORTS)
    assert all(check["detail"] for check in report["transports"] + report["machine"])
    assert result.exit_code == 0


def test_a_table_shows_the_reason_of_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cma, "probe", lambda: Availability(False, "refused [by Yama]"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "refused [by Yama]" in result.output


def test_exits_1_if_no_transport_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for transport in (cma, tcp, verbs):
        monkeypatch.setattr(transport, "probe", lambda: Availability(False, "no"))
    assert CliRunner().invoke(app, ["doctor", "--json"]).exit_code == 1


def test_a_transport_that_cannot_be_imported_is_a_finding() -> None:
    check = doctor.check_transport("pigeon")
    assert check.ok is False
    assert "kvferry.engine.transports.pigeon" in check.detail


def test_rdma_devices_are_read_from_sysfs(tmp_path: Path) -> None:
    assert doctor.check_rdma_devices(tmp_path / "absent").ok is False
    port = tmp_path / "rxe0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "link_layer").write_text("Ethernet\n")
    check = doctor.check_rdma_devices(tmp_path)
    assert check == doctor.Check("RDMA devices", True, "rxe0 (port 1 ACTIVE Ethernet)")


@pytest.mark.parametrize(("scope", "ok"), [("0", True), ("1", True), ("2", False), ("3", False)])
def test_yama_scopes_that_refuse_are_told_apart(tmp_path: Path, scope: str, ok: bool) -> None:
    path = tmp_path / "ptrace_scope"
    path.write_text(f"{scope}\n")
    assert doctor.check_ptrace_scope(path).ok is ok
    assert doctor.check_ptrace_scope(tmp_path / "absent").ok is None
