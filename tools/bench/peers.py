"""The processes of a benchmark: each holds one object, whose methods the parent calls over a pipe.

Needs the standard library alone: other libraries' environments run this file too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.connection import Connection


class PeerEnded(RuntimeError):
    """The other process ended, or does not answer; one sentence."""


class Peer:
    """Run `make(*arguments)` in a new process and call the methods of what it returns.

    Args:
        make: found by its name in a module. The object that it makes has a `close()`, which is
            called when this end has closed the pipe. A method that answers more than once is a
            generator. What is called `idle()` is called again and again between commands.
        daemon: whether it is killed with this process; then it cannot start processes itself.

    Attributes:
        process: to ask for its state.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, daemon: bool = True) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=daemon)
        self.process.start()
        theirs.close()  # else its end would not be seen here

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a method there and return its (first) answer."""
        self.tell(name, *arguments)
        return self.answer()

    def tell(self, name: str, *arguments: Any) -> None:
        """Call a method there; `answer` returns what it answers."""
        try:
            self._pipe.send((name, arguments))
        except OSError:
            raise self._ended() from None

    def answer(self, timeout_s: float | None = None) -> Any:
        """Return the next answer.

        Raises:
            PeerEnded: there is none, or none in time.
        """
        try:
            if not self._pipe.poll(timeout_s):
                raise PeerEnded(f"the other process did not answer in {timeout_s:g} s")
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None

    def kill(self) -> None:
        """End the process by SIGKILL."""
        self.process.kill()
        self.close()

    def close(self) -> None:
        """Let the process end, or end it. Safe to call again."""
        close_all([self])

    def _ended(self) -> PeerEnded:
        self.process.join()
        return PeerEnded(f"the other process ended with status {self.process.exitcode}")


def close_all(peers: Iterable[Peer], timeout_s: float = 20.0) -> None:
    """Let all processes end at once, for some need each other for that; kill those that do not."""
    peers = list(peers)
    for peer in peers:
        peer._pipe.close()
    for peer in peers:
        peer.process.join(timeout_s)
        peer.process.kill()
        peer.process.join()


def _serve(
    pipe: Connection[Any, Any], make: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Answer the parent until it has closed its end."""
    with contextlib.closing(make(*arguments)) as held:
        idle = getattr(held, "idle", None)
        while True:
            while idle is not None and not pipe.poll(0):
                idle()
            try:
                name, given = pipe.recv()
            except (EOFError, ConnectionResetError):  # the latter with answers that nobody read
                return
            answer = getattr(held, name)(*given)
            for each in answer if isinstance(answer, Iterator) else (answer,):
                with contextlib.suppress(OSError):  # nobody is left to tell: `recv` says so
                    pipe.send(each)
