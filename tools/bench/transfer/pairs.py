"""The parent's side of `kvferry bench transfer`: starts two workers, times bursts, checks bytes.

Not `peers.Peer`: workers run by other interpreters, of any version and with NumPy alone, so they
cannot be spawned nor be sent pickles; they are frozen and thawed, end with a parent that is killed,
and have a socket to each other. What they are told is JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import kvferry
from kvferry.tools.bench.transfer.driver import TIMEOUT_S, WRITE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvferry.tools.bench.transfer.workload import Shape

OPEN_TIMEOUT_S = 60.0


class WorkerFailed(Exception):
    """A worker said that something went wrong, died, or does not answer.

    Attributes:
        usable: whether it still takes commands.
    """

    def __init__(self, message: str, *, usable: bool) -> None:
        super().__init__(message)
        self.usable = usable


@dataclasses.dataclass(frozen=True)
class Burst:
    """Transfers of one library in a row, one in flight at a time."""

    latencies_ns: list[int]
    cpu_s: float  # both processes
    verified: bool


class Child:
    """One worker process."""

    def __init__(self, python: str, package_root: str, talk: socket.socket | None) -> None:
        mine, its = socket.socketpair()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        talks = [talk.fileno()] if talk is not None else []
        command = [python, "-m", "kvferry.tools.bench.transfer.worker", str(its.fileno())]
        with its:
            self.process = subprocess.Popen(
                command + [str(fd) for fd in talks],
                pass_fds=[its.fileno(), *talks],
                env=environ(package_root),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )
        self._connection = Connection(mine.detach())

    def send(self, name: str, **arguments: Any) -> None:
        """Send a command."""
        try:
            self._connection.send_bytes(json.dumps({"do": name} | arguments).encode())
        except OSError:
            raise WorkerFailed(self._obituary(), usable=False) from None

    def reply(self, timeout_s: float = TIMEOUT_S) -> Any:
        """Return the result of the last command.

        Raises:
            WorkerFailed: the command raised, or the process died or is silent.
        """
        try:
            if not self._connection.poll(timeout_s):
                raise WorkerFailed(f"silent for {timeout_s:.0f} s", usable=False)
            reply = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise WorkerFailed(self._obituary(), usable=False) from None
        if "error" in reply:
            raise WorkerFailed(reply["error"], usable=True)
        return reply["result"]

    def call(self, name: str, **arguments: Any) -> Any:
        """Send a command and wait for its result."""
        self.send(name, **arguments)
        return self.reply()

    def close(self) -> None:
        """End the process. Safe to call again."""
        self._connection.close()
        try:
            self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def _obituary(self) -> str:
        status = self.process.wait(5.0)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"ended with status {status}: {lines[-1] if lines else 'no last words'}"


class Pair:
    """One library between two processes; or in one, with itself.

    Args:
        driver: `module:class` of a `Driver`.
        options: its keyword arguments.
        python: the interpreter whose environment has the library.
        packages: distributions whose versions are of interest.
        alone: whether one process is both ends.

    Attributes:
        import_root: the only folder that is added to the workers' import path.
    """

    def __init__(
        self,
        driver: str,
        options: dict[str, Any],
        *,
        python: str = sys.executable,
        packages: Sequence[str] = (),
        alone: bool = False,
    ) -> None:
        self.driver = driver
        self.versions: dict[str, str] = {}
        self._opening = {"driver": driver, "options": options, "packages": list(packages)}
        self._requests = 0
        self._folder = package_root()
        self.import_root = Path(self._folder.name)
        self._children: dict[str, Child] = {}
        here, there = socket.socketpair()
        with here, there:
            if not alone:
                self._children["src"] = Child(python, self._folder.name, here)
            self._children["dst"] = Child(python, self._folder.name, None if alone else there)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, the source's first."""
        return [child.process.pid for child in self._children.values()]

    def start_opening(self, shapes: Sequence[Shape]) -> None:
        """Tell both ends to make their pools; `finish_opening` waits for them."""
        plain = [dataclasses.asdict(shape) for shape in shapes]
        for end, child in self._children.items():
            child.send("open", end=end, shapes=plain, **self._opening)

    def finish_opening(self) -> None:
        """Connect the two ends.

        Raises:
            WorkerFailed: the library is not there, or does not start.
        """
        opened = {end: child.reply(OPEN_TIMEOUT_S) for end, child in self._children.items()}
        self.versions = opened["dst"]["versions"]
        if len(opened) == 2:
            for end, other in (("src", "dst"), ("dst", "src")):
                self._children[end].send("meet", other=opened[other]["published"])
            for child in self._children.values():
                child.reply(OPEN_TIMEOUT_S)

    def burst(self, shape: Shape, operation: str, *, slot_s: float, count: int = 10_000) -> Burst:
        """Return one checked transfer to warm up, then at least one until `slot_s` is over or
        `count`.

        Raises:
            WorkerFailed: a transfer failed.
        """
        stop_s = time.monotonic() + slot_s
        dst = self._children["dst"]
        dst.call("poison", shape=shape.name, request=self._requests)
        self._move(shape, operation, 1, 0.0)
        verified = dst.call("verify", shape=shape.name, request=self._requests - 1)
        burst = self._move(shape, operation, count, max(0.0, stop_s - time.monotonic()))
        verified &= dst.call("verify", shape=shape.name, request=self._requests - 1)
        return dataclasses.replace(burst, verified=verified)

    def start_resting(self, duration_s: float) -> None:
        """Ask both ends to do nothing for a while; `finish_resting` waits for them."""
        for child in self._children.values():
            child.send("rest", duration_s=duration_s)

    def finish_resting(self) -> float:
        """CPU seconds that doing nothing took, both processes together."""
        return sum(float(child.reply()) for child in self._children.values())

    def freeze(self) -> None:
        """Stop both processes: an idle library that polls would slow the others down."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End both processes. Safe to call again."""
        self.thaw()
        for child in self._children.values():
            with contextlib.suppress(WorkerFailed):
                child.send("close")
        deadline_s = time.monotonic() + 5.0
        for child in self._children.values():
            with contextlib.suppress(WorkerFailed):
                child.reply(max(0.0, deadline_s - time.monotonic()))
            child.close()
        self._children = {}
        self._folder.cleanup()

    def _signal(self, number: int) -> None:
        for child in self._children.values():
            child.process.send_signal(number)

    def _move(self, shape: Shape, operation: str, count: int, limit_s: float) -> Burst:
        children = list(self._children.values())
        active = children[0] if operation == WRITE else children[-1]
        for child in children:
            if child is active:
                bounds = {"first": self._requests, "count": count, "limit_s": limit_s}
                child.send("drive", shape=shape.name, operation=operation, **bounds)
            else:
                child.send("serve", shape=shape.name, operation=operation)
        self._requests += count
        replies, failures, usable = [], [], True
        for child in children:
            try:
                replies.append(child.reply(limit_s + 3 * TIMEOUT_S))
            except WorkerFailed as failure:
                failures.append(str(failure))
                # The active end says so when it stops; a passive one that failed is out of step.
                usable &= failure.usable and child is active
        if failures:
            raise WorkerFailed("; ".join(failures), usable=usable)
        drove = next(reply for reply in replies if "latencies_ns" in reply)
        self._requests += len(drove["latencies_ns"]) - count
        cpu_s = sum(reply["cpu_s"] for reply in replies)
        return Burst(drove["latencies_ns"], cpu_s, verified=False)


def package_root() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with nothing but a link to kvferry: the one thing of this environment that
    another interpreter gets to see."""
    folder = tempfile.TemporaryDirectory(prefix="kvferry-bench-")
    (Path(folder.name) / "kvferry").symlink_to(Path(kvferry.__path__[0]).resolve())
    return folder


def environ(folder: str) -> dict[str, str]:
    """Return what such an interpreter's process is given, so that it imports kvferry and writes
    nothing."""
    return os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
