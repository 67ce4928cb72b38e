"""A process behind a command loop, which a test may freeze and kill.

`Child` is the test's end and `serve` the child's: `(command, arguments, options)` goes one way over
an inherited pipe, `(ok, value or exception)` comes back. Imports nothing of kvferry.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Child:
    """A module that runs in a process of its own: its first argument is the number of the pipe.

    Args:
        module, arguments: what it runs.
        answer_s: how long a command may take; reached only when something hangs.
        launcher: a command that starts it.
        environment: what it gets besides this process's environment.
    """

    farewell: tuple[str, ...] = ("close",)  # the commands that end it well

    def __init__(
        self,
        module: str,
        *arguments: str,
        answer_s: float,
        launcher: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._answer_s = answer_s
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [*launcher, sys.executable, "-m", module, str(theirs.fileno()), *arguments],
                pass_fds=(theirs.fileno(),),
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
                | dict(environment or {}),
            )

    def call(self, command: str, *arguments: Any, **options: Any) -> Any:
        """Runs a command there; raises what it raised."""
        self.pipe.send((command, arguments, options))
        return self.answer(command)

    def answer(self, what: str) -> Any:
        """What it answers to the command before; raises what that raised."""
        assert self.pipe.poll(self._answer_s), f"the process does not answer {what}"
        ok, value = self.pipe.recv()
        if not ok:
            raise value
        return value

    def freeze(self) -> None:
        """SIGSTOP, and until the kernel says that it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; also ends a frozen process."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Lets it say goodbye, then ends the process."""
        with contextlib.suppress(OSError, EOFError):
            if self.process.poll() is None:
                for command in self.farewell:
                    self.call(command)
        self.kill()
        self.pipe.close()


def pipe_of_child() -> Connection[Any, Any]:
    """In the child: the pipe to the test."""
    return Connection(int(sys.argv[1]))


def serve(pipe: Connection[Any, Any], commands: object) -> None:
    """In the child: every public method of `commands` is a command, until the test's process ends."""
    while True:
        try:
            name, arguments, options = pipe.recv()
        except EOFError:
            os._exit(0)  # the test's process is gone
        try:
            answer = (True, getattr(commands, name)(*arguments, **options))
        except Exception as error:
            answer = (False, error)
        pipe.send(answer)
