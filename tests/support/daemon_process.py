"""A daemon in a process of its own, which a test may freeze, kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import IO

from tests import ROOT

START_S = 30.0  # reached only when something hangs


class DaemonProcess:
    """`python -m kvferry.control` on free ports of this machine."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = list(arguments)
        self.address = ""
        self.publisher = ""
        self.key = self.http = ""
        self.start()

    def start(self) -> None:
        """Starts it; a second time where it was before."""
        bind = self.address or "tcp://127.0.0.1:*"
        publish = self.publisher or "tcp://127.0.0.1:*"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvferry.control"),
                *("--bind", bind, "--publish", publish, "--log-level", "warning"),
                *self.arguments,
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
        line = _first_line(self.process)
        assert line.startswith("kvferry daemon: listening on "), line
        self.address = line.split()[4].rstrip(",")
        self.publisher = line.split()[7].rstrip(",")
        self.http = line.partition("http on ")[2].partition(",")[0]

    def kill(self) -> None:
        """SIGKILL; also ends a frozen process."""
        self.process.kill()
        self._reap()

    def terminate(self) -> tuple[int, str]:
        """SIGTERM; returns the exit status and the last words."""
        self.process.terminate()
        words = self.process.communicate(timeout=START_S)[0]
        return self.process.returncode, words

    def freeze(self) -> None:
        """SIGSTOP, and until the kernel says that it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self._reap()

    def _reap(self) -> None:
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def _first_line(process: subprocess.Popen[str]) -> str:
    """What it says first; a process that says nothing is killed."""
    stdout: IO[str] | None = process.stdout
    assert stdout is not None
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    line = stdout.readline()
    watchdog.cancel()
    return line
