"""An etcd of its own for a test, which may kill it and start it again on what it has kept."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from tests.needs import need

if TYPE_CHECKING:
    from pathlib import Path

START_S = 60.0  # reached only when something hangs
TRIES = 5  # a free port may be taken before etcd has it


class EtcdProcess:
    """`etcd` on a free port of this machine, with its files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.program = need("etcd")
        self.folder = folder
        self.log = (folder / "etcd.log").open("ab")
        self.port = 0
        for attempt in range(TRIES):
            self.port, self.peer_port = _free_ports()
            self.process = self._launch()
            if self._answers():
                return
            self.process.kill()
            self.process.wait()
            assert attempt < TRIES - 1, (folder / "etcd.log").read_text()[-2000:]

    @property
    def url(self) -> str:
        """As `--store` takes it."""
        return f"etcd://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it again where it was."""
        self.process = self._launch()
        assert self._answers(), (self.folder / "etcd.log").read_text()[-2000:]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.kill()
        self.log.close()

    def _launch(self) -> subprocess.Popen[bytes]:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self.port, self.peer_port))
        return subprocess.Popen(
            [
                *(self.program, "--data-dir", str(self.folder / "etcd")),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", f"default={peer}", "--log-level", "error"),
            ],
            stdout=self.log,
            stderr=self.log,
        )

    def _answers(self) -> bool:
        """Waits until it serves; False if it ended."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end_s = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < end_s:
            try:
                with opener.open(f"http://127.0.0.1:{self.port}/health", timeout=1.0) as answer:
                    if json.load(answer).get("health") == "true":
                        return True
            except (OSError, urllib.error.URLError, ValueError):
                time.sleep(0.02)  # it offers nothing to wait for
        return False


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]
