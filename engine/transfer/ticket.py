"""A ticket: one operation in flight, that a thread can wait for and a coroutine can await."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from ..errors import Cancelled, DeadlineExceeded, EngineError
from ..runtime import fork
from .stream_wait import wait_for_host

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import torch

DEFAULT_TIMEOUT_S = 30.0  # of operations that are given no deadline

log = logging.getLogger(__name__)

_Error = TypeVar("_Error", bound=EngineError)


class Ticket:
    """One operation in flight.

    Ends exactly once: with a byte count, or with an error (of the engine: an `EngineError`). Safe to
    use from any thread. Its deadline is kept by the engine's monitor, so it ends even when nobody waits on it.

    Attributes:
        marks: when it got where, in nanoseconds of the monotonic clock, as far as its transport can
            tell: `on wire` (the first piece sets out), `first byte` (the first bytes were counted),
            `gathered` and `scattered` (the last piece went into or out of this end's staging).
        staged_nbytes: of its bytes, those that went through this end's staging.
    """

    __slots__ = (
        "_callbacks",
        "_done",
        "_error",
        "_generation",
        "_help",
        "_lock",
        "_look",
        "_nbytes",
        "_spin",
        "_stop_hook",
        "_stream_wait",
        "_waiter",
        "deadline_s",
        "imm",
        "marks",
        "operation",
        "peer",
        "staged_nbytes",
    )

    def __init__(
        self,
        operation: str,
        *,
        peer: str = "",
        imm: int | None = None,
        timeout_s: float | None = None,
        stop_hook: Callable[[EngineError], None] | None = None,
    ) -> None:
        self.operation = operation
        self.peer = peer
        self.imm = imm
        self.deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._generation = fork.generation
        self._lock = threading.Lock()
        self._done = False
        self._nbytes = 0
        self._error: Exception | None = None
        # Held until the end; who waits for it passes it on. An Event costs 30 microseconds more.
        self._waiter: threading.Lock | None = None
        self._callbacks: list[Callable[[Ticket], None]] = []
        self._stop_hook = stop_hook
        self._stream_wait: Callable[[Ticket, torch.cuda.Stream], bool] | None = None
        self._spin: Callable[[], None] | None = None  # waits in native code, awake
        self._look: Callable[[], None] | None = None  # as `_spin`, where it may take long
        self._help: Callable[[], None] | None = None  # does work that nobody began
        self.marks: dict[str, int] = {}
        self.staged_nbytes = 0

    def __repr__(self) -> str:
        state = "pending" if not self._done else repr(self._error) if self._error else "done"
        return f"<Ticket {self.operation} peer={self.peer!r} imm={self.imm} {state}>"

    def done(self) -> bool:
        """Return whether the operation ended, well or badly."""
        if not self._done:
            fork.check(self._generation, self.operation)  # it would never end there
        return self._done

    def exception(self) -> Exception | None:
        """Return the error it ended with, or None while pending or after success."""
        return self._error

    @property
    def nbytes(self) -> int:
        """Bytes moved; 0 until it ends well."""
        return self._nbytes

    def wait(self, timeout_s: float | None = None, *, spin: bool = False) -> int:
        """Blocks until the operation ends and returns its byte count.

        Args:
            timeout_s: bounds this wait alone: when it passes, the operation goes on. Without it the
                ticket's own deadline is the bound.
            spin: for an `expect` of GPU memory over `cuda_ipc`: wait awake, in native code that
                leaves the interpreter lock to others, and see the bytes some 5 us after they are
                there. It keeps a core busy, so wait so only for what is on its way; a sleeping
                thread takes 300 to 500 us to wake on the machines that were measured. Ignored
                with `timeout_s`, with `expect(links=…)` or `expect(engine_id=…)`, since bytes on a GPU
                do not say who sent them, and where there is nothing to look at.

        Raises:
            DeadlineExceeded: `timeout_s` passed, or the operation's own deadline did.
            ForkedProcess: it is pending in the process that forked this one.
            EngineError: what the operation ended with.
        """
        if not self._done:
            fork.check(self._generation, self.operation)
        if timeout_s is None:  # what is awake may help; it cannot say how long that takes
            for work in (self._help, self._spin, self._look if spin else None):
                if not self._done and work is not None:
                    work()
        if not self._done and not self._sleep(timeout_s):
            raise self._make_error(DeadlineExceeded, f"still pending after waiting {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._nbytes

    def _sleep(self, timeout_s: float | None) -> bool:
        """Sleep until the end; False if `timeout_s` passed first."""
        with self._lock:
            if self._done:
                return True
            waiter = self._waiter
            if waiter is None:
                waiter = self._waiter = threading.Lock()
                waiter.acquire()
        limit_s = -1.0 if timeout_s is None else min(max(0.0, timeout_s), threading.TIMEOUT_MAX)
        try:
            if waiter.acquire(timeout=limit_s):
                _pass_on(waiter)
        except BaseException:  # of a signal's handler, perhaps between the two
            if self._done:
                _pass_on(waiter)
            raise
        return self._done

    def __await__(self) -> Generator[object, None, int]:
        if not self._done:
            fork.check(self._generation, self.operation)
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()

            def wake(_: Ticket) -> None:
                # The loop may be closed by the time a late operation ends: nobody awaits it then.
                if not loop.is_closed():
                    loop.call_soon_threadsafe(_resolve, future)

            self.add_done_callback(wake)
            yield from future
        if self._error is not None:
            raise self._error
        return self._nbytes

    def wait_on(self, stream: torch.cuda.Stream) -> None:
        """Let a CUDA stream wait until the operation ends; the host goes on at once.

        For an `expect` of anybody's bytes that come over `cuda_ipc` no host is in the loop: the stream
        waits for a word of GPU memory that the writer's kernel adds to. Such a word does not say who
        has added to it, so an `expect` of certain links or of one engine waits for the host. For a write or read over
        `cuda_ipc` it waits for the kernel. Otherwise it waits for a word that the ending thread
        writes.

        What this process launches behind the wait must have run before (`Link.prepare`): CUDA may
        load a kernel, or allocate memory, only when no stream is waiting.

        The stream goes on however the operation ends: look at `exception()` before you believe
        what it computed.

        Raises:
            EngineError: what the operation has ended with already.
        """
        if not self._done:
            fork.check(self._generation, self.operation)
        wait = self._stream_wait
        if not self._done and not (wait is not None and wait(self, stream)):
            write = wait_for_host(stream)
            self.add_done_callback(lambda _: write())
        if self._error is not None:
            raise self._error

    def add_done_callback(self, callback: Callable[[Ticket], None]) -> None:
        """Call `callback(ticket)` once it ended: at once if it has, else on the ending thread.

        The callback must be short and must not block: it may run on a transport's thread.
        """
        if not self._done:
            fork.check(self._generation, self.operation)
            with self._lock:
                if not self._done:
                    self._callbacks.append(callback)
                    return
        self._call(callback)

    def cancel(self) -> bool:
        """End a pending ticket with `Cancelled`; False when it had already ended.

        A write or read ends once nothing touches its memory any more, so perhaps a moment later.
        Cancelling an `expect` does not stop a writer: the blocks stay in danger until the peer has
        confirmed, or the link is down (`Link.quiesced`).
        """
        if self._done:
            return False
        fork.check(self._generation, self.operation)
        return self._stop(self._make_error(Cancelled, "cancelled by this side"))

    def _mark(self, name: str) -> None:
        """Note that it got here for the first time. At most once a system call: decision 0040."""
        if name not in self.marks:
            self.marks[name] = time.monotonic_ns()

    def _mark_staged(self, name: str, nbytes: int) -> None:
        """Note that so many more of its bytes went through staging."""
        with self._lock:  # a link's rails work side by side
            self.marks[name] = time.monotonic_ns()
            self.staged_nbytes += nbytes

    def _expire(self) -> bool:
        """End a pending ticket because its deadline has passed."""
        return self._stop(self._make_error(DeadlineExceeded, "the deadline passed"))

    def _make_error(self, kind: type[_Error], message: str) -> _Error:
        """Make an error that names the operation, its peer and its imm."""
        return kind(message, operation=self.operation, peer=self.peer, imm=self.imm)

    def _stop(self, error: EngineError) -> bool:
        hook = self._stop_hook
        if hook is None:
            return self._fail(error)
        if self._done:
            return False
        hook(error)
        return True

    def _finish(self, nbytes: int) -> bool:
        return self._end(nbytes, None)

    def _fail(self, error: Exception) -> bool:
        return self._end(0, error)

    def _end(self, nbytes: int, error: Exception | None) -> bool:
        with self._lock:
            if self._done:
                return False
            self._nbytes, self._error = nbytes, error
            self._done = True
            callbacks, self._callbacks = self._callbacks, []
            waiter = self._waiter
        self._stop_hook = self._stream_wait = self._spin = self._help = self._look = None
        if waiter is not None:
            _pass_on(waiter)
        for callback in callbacks:
            self._call(callback)
        return True

    def _call(self, callback: Callable[[Ticket], None]) -> None:
        """One failing callback must not end the transport's thread, nor keep the others waiting."""
        try:
            callback(self)
        except Exception:
            log.exception("kvferry: a callback of %r failed", self)


def all_of(tickets: Sequence[Ticket]) -> Ticket:
    """Return one ticket for several: ends when the last one ends, with their bytes or the first
    error."""
    whole = Ticket(tickets[0].operation if tickets else "nothing")
    left = len(tickets)
    lock = threading.Lock()

    def one_ended(_: Ticket) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        _finish_all(whole, tickets)

    if not tickets:
        whole._finish(0)
    for ticket in tickets:
        ticket.add_done_callback(one_ended)
    return whole


def _finish_all(whole: Ticket, tickets: Sequence[Ticket]) -> None:
    error = next((t.exception() for t in tickets if t.exception() is not None), None)
    if error is not None:
        whole._fail(error)
    else:
        whole._finish(sum(ticket.nbytes for ticket in tickets))


def _pass_on(waiter: threading.Lock) -> None:
    """Wake one of those who wait for it; they do the same."""
    with contextlib.suppress(RuntimeError):  # one who was interrupted has done so in passing
        waiter.release()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
