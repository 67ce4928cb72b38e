"""`kvferry rdma-vm`: exit status, output, deadline, and what it says where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry.tools.cli import app
from kvferry.tools.rdma_vm import missing
from tests.needs import lack

COMMAND = (sys.executable, "-m", "kvferry.tools.cli", "rdma-vm", "run")
PATIENCE_S = 300.0


@pytest.fixture
def machine() -> None:
    reason = missing.missing()
    if reason:
        lack(f"needs the virtual machine with RDMA devices; {reason}")


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
def test_a_machine_that_does_not_end_is_ended_and_leaves_nothing(tmp_path: Path) -> None:
    since_s = time.monotonic()
    done = subprocess.run(
        [*COMMAND, "--timeout-s", "2", "--", "sleep", "1000"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    print(f"ended after {time.monotonic() - since_s:.1f} s")
    assert done.returncode == 70
    assert "not done after 2 s" in done.stderr
    assert list(tmp_path.iterdir()) == []
    of_the_machine = str(tmp_path).encode()
    assert not [
        path for path in Path("/proc").glob("[0-9]*/cmdline") if of_the_machine in words(path)
    ]


def words(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""
