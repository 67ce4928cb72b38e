"""The threads and copies of one path: what they raise ends its link, and the last to leave says so."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Protocol

from ..errors import EngineError, LinkError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


class Breakable(Protocol):
    """What workers may do to their link."""

    def fail(self, error: EngineError, /) -> None:
        """Take it down."""

    def suspect(self) -> None:
        """The peer may be gone."""


class Workers:
    """Who works on a path's memory. Thread-safe."""

    def __init__(
        self, link: Breakable, what: str, *, disconnected: tuple[type[Exception], ...] = ()
    ) -> None:
        """`what`: a worker, for people. `disconnected`: what means that the peer may be gone."""
        self._link = link
        self._what = what
        self._disconnected = disconnected
        self._lock = threading.Lock()
        self._present = 0
        self._guests: set[object] = set()  # threads of others that lend a hand
        self._closed = False
        self._after: Callable[[], None] | None = None

    @property
    def busy(self) -> bool:
        """Whether anybody is at work."""
        return self._present > 0 or bool(self._guests)

    @property
    def closed(self) -> bool:
        """Whether nobody enters any more."""
        return self._closed

    def enter(self) -> bool:
        """Let one more begin, who must then `run` or `leave`; False if none may any more."""
        with self._lock:
            if self._closed:
                return False
            self._present += 1
            return True

    def leave(self) -> None:
        """One who had entered is done. On its thread, and after `halt`, the last one calls back."""
        with self._lock:
            self._present -= 1
            after = self._last_left()
        if after is not None:
            after()

    def _last_left(self) -> Callable[[], None] | None:
        """Return whom to call, once, if nobody is left. Under the lock."""
        if self._present or self._guests:
            return None
        after, self._after = self._after, None
        return after

    def run(self, work: Callable[[], None]) -> None:
        """Do the work of one who has entered, then leave. Raises nothing."""
        try:
            guard(self._link, self._what, work, self._disconnected)
        finally:
            self.leave()

    def enter_and_run(self, work: Callable[[], None]) -> None:
        """Do a work on the calling thread, unless nobody may enter any more. Raises nothing."""
        if self.enter():
            self.run(work)

    def lend_hand(self, work: Callable[[], None]) -> None:
        """Do a work on a thread of the caller's, unless nobody may enter any more, and raise what it
        does. A signal's handler may raise anywhere in it, and here: the thread has left all the same.
        """
        me = object()
        try:
            with self._lock:
                if self._closed:
                    return
                self._guests.add(me)
            work()
            self._depart(me)
        except BaseException:
            self._depart(me)
            raise

    def _depart(self, guest: object) -> None:
        with self._lock:
            self._guests.discard(guest)
            after = self._last_left()
        if after is not None:
            after()

    def close(self) -> None:
        """Nobody enters any more."""
        with self._lock:
            self._closed = True

    def halt(self, after: Callable[[], None]) -> None:
        """Nobody enters any more; calls `after` once, when nobody is left: now, or later from the
        thread of the last one. Never blocks."""
        with self._lock:
            self._closed = True
            self._after = after
            now = self._last_left()
        if now is not None:
            now()


def guard(
    link: Breakable,
    what: str,
    work: Callable[[], None],
    disconnected: tuple[type[Exception], ...] = (),
) -> None:
    """Do work for a link; what it raises takes the link down."""
    try:
        work()
    except EngineError as error:
        link.fail(error)
    except disconnected:
        link.suspect()
    except Exception as error:
        fail_with(link, what, error)


def fail_with(link: Breakable, what: str, error: Exception) -> None:
    """Take a link down because of what was raised for it. Called where that is handled."""
    if isinstance(error, EngineError):
        link.fail(error)
        return
    log.exception("kvferry: %s failed; please report this", what)
    link.fail(LinkError(f"{what} failed: {error!r}", operation="transfer"))
