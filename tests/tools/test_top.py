"""`kvferry top` against a real daemon: one look, and live on a terminal (a pty)."""

from __future__ import annotations

import fcntl
import functools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING

import pytest

from kvferry.control.cluster.client import DaemonClient
from kvferry.control.cluster.messages import (
    Activity,
    Failure,
    Heartbeat,
    LinkActivity,
    LiveHandoff,
    Load,
    Register,
    Registration,
)
from tests import ROOT
from tests.support.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 60.0
ROWS, COLUMNS = 50, 160
HOME = b"\x1b[H"
WORK = Activity(
    age_s=20.0,
    nbytes=1 << 30,
    errors={"LinkLost": 3},
    links=(LinkActivity("p0", "tcp", 1.25e9),),
    live=(LiveHandoff("req-7", "decode", "p0", 3 << 20, 4.2),),
    failures=(Failure("req-3", "LinkLost", "p0", 9.0),),
)


class Member:
    """An agent as the daemon hears it."""

    def __init__(self, client: DaemonClient, name: str, role: str) -> None:
        self._client, self._name = client, name
        there = Registration(name, role, 1, "tcp://127.0.0.1:9", num_blocks=10)  # type: ignore[arg-type]
        answer = client.ask(Register(1, 1, there, 60.0))
        self._generation: int = answer.generation  # type: ignore[union-attr]

    def beat(self, load: Load, activity: Activity | None = None) -> None:
        self._client.ask(Heartbeat(2, self._name, self._generation, load, activity or Activity()))


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess()
    yield process
    process.end()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[DaemonClient]:
    with DaemonClient(daemon.address) as client:
        Member(client, "p0", "prefill").beat(Load(free_blocks=7, handoffs=2, rates={"d0": 2.5e9}))
        decode = Member(client, "d0", "decode")
        decode.beat(Load(free_blocks=4), Activity(age_s=19.0))
        decode.beat(Load(free_blocks=4), WORK)
        yield client


def environment(daemon: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "KVFERRY_DAEMON": daemon,
        "COLUMNS": str(COLUMNS),
        "LINES": str(ROWS),
        "TERM": "xterm",
    }


COMMAND = [sys.executable, "-m", "kvferry.tools.cli", "top"]


class Terminal:
    """The command on a terminal of its own; what is on the screen now."""

    def __init__(self, daemon: str) -> None:
        self._written = b""
        self._end, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            COMMAND,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(daemon),
            start_new_session=True,
            # A shell's jobs in the background ignore SIGINT, and what they start inherits that.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)

    def wait_for(self, *words: str) -> str:
        """The first screen that has all of these."""
        end_s = time.monotonic() + WAIT_S
        while True:
            screen = self._read(end_s)
            if all(word in screen for word in words):
                return screen

    def _read(self, end_s: float) -> str:
        """A whole picture: each begins where the cursor goes home."""
        while True:
            *pictures, last = self._written.split(HOME)
            if len(pictures) > 1:
                self._written = HOME + last
                return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", pictures[-1].decode())
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not select.select([self._end], [], [], left_s)[0]:
                raise TimeoutError(f"not shown; what came is\n{self._written!r}")
            self._written += os.read(self._end, 1 << 16)

    def interrupt(self) -> int:
        """Control-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        end_s = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            assert time.monotonic() < end_s, "it does not end"
            if select.select([self._end], [], [], 0.05)[0]:
                try:
                    self._written += os.read(self._end, 1 << 16)
                except OSError:  # the other end is closed
                    break
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._end)


def test_one_look(daemon: DaemonProcess, client: DaemonClient) -> None:
    found = subprocess.run(
        [*COMMAND, "--once"],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
        env=environment(daemon.address),
    )
    assert found.returncode == 0, found.stderr
    lines = [" ".join(re.split(r"\W*[│┃]\W*", line)).strip() for line in found.stdout.splitlines()]
    assert "2 agents" in lines
    assert any(re.match(r"p0 prefill serving .* 7/10 free", line) for line in lines)
    assert "1 links, 1.25 GB/s" in lines
    assert "p0 d0 tcp 1.25 2.50" in lines
    assert "req-7 p0 d0 3.0 MiB 4.2 s" in lines
    assert "failures since the daemon began: 3 LinkLost" in lines
    assert "req-3 d0 p0 LinkLost 9 s" in lines


@pytest.mark.slow
def test_the_live_view_follows_the_cluster(daemon: DaemonProcess, client: DaemonClient) -> None:
    terminal = Terminal(daemon.address)
    try:
        terminal.wait_for("2 agents", "req-7", "1.25", "req-3")
        third = Member(client, "d1", "decode")
        third.beat(
            Load(), Activity(age_s=5.0, live=(LiveHandoff("req-9", "decode", "p0", 1 << 20, 0.5),))
        )
        terminal.wait_for("3 agents", "d1", "req-9", "req-7")
        third.beat(Load(), Activity(age_s=6.0))
        while "req-9" in (screen := terminal.wait_for("3 agents")):
            pass
        assert "req-7" in screen
        client.drain("d1")
        terminal.wait_for("draining")
        daemon.kill()
        terminal.wait_for("does not answer", "3 agents")  # what was known last
        daemon.start()
        terminal.wait_for("0 agents")
        assert terminal.interrupt() == 0
    finally:
        terminal.close()


@pytest.mark.slow
def test_more_agents_than_lines_are_counted(daemon: DaemonProcess, client: DaemonClient) -> None:
    for number in range(ROWS):
        Member(client, f"z{number:02}", "prefill")
    terminal = Terminal(daemon.address)
    try:
        screen = terminal.wait_for(f"{ROWS + 2} agents, the first ", "req-7", "req-3")
        assert "z49" not in screen
    finally:
        terminal.close()
