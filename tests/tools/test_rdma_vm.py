"""`kvferry rdma-vm`: exit status, output, deadline, and what it says where it cannot run."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kvferry.tools.cli import app
from kvferry.tools.rdma_vm import missing
from tests.needs import lack

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = (sys.executable, "-m", "kvferry.tools.cli", "rdma-vm", "run")
PATIENCE_S = 300.0


@pytest.fixture
def machine() -> None:
    reason = missing.missing()
    if reason:
        lack(reason)


def test_a_host_without_a_program_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missing, "which", lambda name: None if name == "cpio" else "/bin/true")
    monkeypatch.setattr(missing, "FILES", {"/no/such/file": "python3-pyverbs"})
    assert missing.missing() == "missing here: apt-get install cpio python3-pyverbs"
    result = CliRunner().invoke(app, ["rdma-vm", "run", "--", "true"])
    assert result.exit_code == 69


def test_another_processor_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "aarch64" in missing.missing()


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_a_command_runs_on_rdma_devices_and_returns_its_status(tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.write_text("from the host")
    script = f"rdma link show; cat {note}; echo >&2 loud; echo lost > {note}; exit 7"
    done = subprocess.run(
        [*COMMAND, "--pairs", "2", "--", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 7, done.stderr
    active = [line for line in done.stdout.splitlines() if "state ACTIVE" in line]
    assert [line.split()[1] for line in active] == ["rxe0/1", "rxe1/1", "rxe2/1", "rxe3/1"]
    assert "from the host" in done.stdout
    assert "loud" in done.stdout
    assert note.read_text() == "from the host"


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_a_machine_that_does_not_end_is_ended() -> None:
    since_s = time.monotonic()
    done = subprocess.run(
        [*COMMAND, "--timeout-s", "2", "--", "sleep", "1000"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    print(f"ended after {time.monotonic() - since_s:.1f} s")
    assert done.returncode == 70
    assert "not done after 2 s" in done.stderr
