"""Agents of this process and of others, over every transport."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.adapters.agent import Agent

from .agent_process import Cache, Gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ANSWER_S = 60.0  # reached only when something hangs
ROOT = Path(__file__).parents[2]


class Local:
    """An agent of this process, with its cache."""

    def __init__(self, name: str, role: str, transport: str, cache: Cache, **options: Any) -> None:
        self.cache = cache
        self.agent = Agent(
            name=name,
            role=role,  # type: ignore[arg-type]
            layout=cache.layout,
            tensors=cache.layers,
            transports=(transport,),
            **options,
        )


class Process:
    """A process that will hold an agent; it can be started long before it is needed."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).with_name("agent_process.py")),
                    str(theirs.fileno()),
                ],
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class Remote:
    """An agent of another process, and that process's fate."""

    def __init__(self, held: Process, **options: Any) -> None:
        self.process = held.process
        self._pipe = held.pipe
        self._pipe.send(options)
        self._answer("start")
        self.address: str = self.call("address")

    def call(self, command: str, *arguments: Any, **options: Any) -> Any:
        """Runs a command of `agent_process.py` there; raises what it raised."""
        self._pipe.send((command, arguments, options))
        return self._answer(command)

    def freeze(self) -> None:
        """SIGSTOP, and until the kernel says that it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; also ends a frozen process."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Closes its agent and ends the process."""
        with contextlib.suppress(OSError, EOFError):
            if self.process.poll() is None:
                self.call("open_gate")
                self.call("close")
        self.kill()
        self._pipe.close()

    def _answer(self, command: str) -> Any:
        assert self._pipe.poll(ANSWER_S), f"the remote agent does not answer {command}"
        ok, value = self._pipe.recv()
        if not ok:
            raise value
        return value


@pytest.fixture(params=["cma", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    """Every transport in turn."""
    name: str = request.param
    return name


@pytest.fixture
def new_agent(transport: str) -> Iterator[Callable[..., Local]]:
    """Makes agents of this process."""
    made: list[Local] = []

    def make(
        name: str, role: str, num_blocks: int = 64, options: Any = None, **shape: int
    ) -> Local:
        cache = Cache(num_blocks, **shape)
        made.append(Local(name, role, transport, cache, **(options or {})))
        return made[-1]

    yield make
    for local in made:
        local.agent.close()


@pytest.fixture(scope="session")
def spare() -> Iterator[list[Process]]:
    """A process that starts while the test before runs: a start takes longer than most tests."""
    processes = [Process()]
    yield processes
    for process in processes:
        process.end()


@pytest.fixture
def start_agent(transport: str, spare: list[Process]) -> Iterator[Callable[..., Remote]]:
    """Starts agents of other processes, which a test may freeze or kill."""
    started: list[Remote] = []

    def start(name: str, role: str, **options: Any) -> Remote:
        process = spare.pop()
        spare.append(Process())
        started.append(Remote(process, name=name, role=role, transport=transport, **options))
        return started[-1]

    yield start
    for remote in started:
        remote.thaw()
        remote.end()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate before the bytes that this process moves."""
    gate = Gate()
    yield gate
    gate.open()
