"""`kvferry agents` against a real daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.cluster.messages import Heartbeat, Load, Register, Registration
from tests import ROOT
from tests.support.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess()
    with DaemonClient(process.address) as client:
        there = Registration("p0", "prefill", 1, "tcp://127.0.0.1:9", num_blocks=10)
        generation = client.ask(Register(1, 1, there, 60.0)).generation  # type: ignore[union-attr]
        load = Load(free_blocks=7, handoffs=2, rates={"d0": 2.5e9})
        client.ask(Heartbeat(2, "p0", generation, load))
        yield process
    process.end()


def kvferry(*arguments: str, daemon: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvferry.tools.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "src"), "KVFERRY_DAEMON": daemon, "COLUMNS": "140"},
    )


def test_list_drain_flip_and_restore(daemon: DaemonProcess) -> None:
    assert "p0\tprefill\tserving" in kvferry("agents", "list", daemon=daemon.address).stdout
    assert kvferry("agents", "drain", "p0", daemon=daemon.address).returncode == 0
    assert "p0\tprefill\tdraining" in kvferry("agents", "list", daemon=daemon.address).stdout
    assert kvferry("agents", "flip", "p0", "decode", daemon=daemon.address).returncode == 0
    assert kvferry("agents", "restore", "p0", daemon=daemon.address).returncode == 0
    with DaemonClient(daemon.address) as client:
        (member,) = client.look().members
    assert (member.state, member.wanted_role) == ("serving", "")


def test_what_cannot_be_done_is_one_line(daemon: DaemonProcess) -> None:
    nobody = kvferry("agents", "drain", "nobody", daemon=daemon.address)
    assert nobody.returncode == 1
    assert nobody.stderr.count("\n") == 1
    assert "no agent 'nobody' is registered" in nobody.stderr
    no_role = kvferry("agents", "flip", "p0", "cook", daemon=daemon.address)
    assert "'cook' is no role: use prefill, decode, both" in no_role.stderr
    no_daemon = kvferry("agents", "list", daemon="tcp://127.0.0.1:1")
    assert no_daemon.returncode == 1
    assert "did not answer" in no_daemon.stderr
