"""The progress thread: one thread an engine, asleep in epoll until something happens.

It serves every control channel, listener and process descriptor of the engine, and ticks for
heartbeats and deadlines. Callbacks run on it and must not block.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from . import fork

if TYPE_CHECKING:
    from collections.abc import Callable

TICK_S = 0.05  # a PeerLost by heartbeat, or a deadline, is at most this late

log = logging.getLogger(__name__)


class Progress:
    """Runs callbacks for ready descriptors, calls from other threads, and a regular tick."""

    def __init__(self, name: str, on_tick: Callable[[float], None]) -> None:
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._handlers: dict[int, tuple[int, Callable[[int], None]]] = {}  # with the watch's number
        self._num_watches = 0
        self._calls: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._stopped = False
        self._on_tick = on_tick
        self._thread = threading.Thread(target=self._run, name=f"{name}-progress", daemon=True)
        fork.disown_in_child(self)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def on_thread(self) -> bool:
        """Whether the caller is the progress thread."""
        return threading.current_thread() is self._thread

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` whenever `fd` is ready."""
        with self._lock:
            if self._stopped:
                return
            self._num_watches += 1
            self._handlers[fd] = (self._num_watches, handler)
            self._epoll.register(fd, events)

    def watches(self, fd: int) -> bool:
        """Return whether `fd` is watched."""
        return fd in self._handlers

    def change(self, fd: int, events: int) -> None:
        """Watch `fd` for other events."""
        with self._lock:
            if fd in self._handlers and not self._stopped:
                self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching; call it before closing `fd`. Safe to call twice."""
        with self._lock:
            if self._handlers.pop(fd, None) is not None and not self._stopped:
                self._epoll.unregister(fd)

    def call_soon(self, function: Callable[[], None]) -> None:
        """Run `function` on the progress thread."""
        with self._lock:
            if self._stopped:
                return
            self._calls.append(function)
            os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """End the thread and wait for it. Safe to call twice."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            os.eventfd_write(self._wake_fd, 1)
        if not self.on_thread and self._thread.ident is not None:
            self._thread.join()
        self._epoll.close()
        os.close(self._wake_fd)

    def forked(self) -> list[int]:
        """Return what a child shares with this process: all that it watches, too."""
        return [] if self._epoll.closed else [self._epoll.fileno(), self._wake_fd]

    def _run(self) -> None:
        next_tick = time.monotonic() + TICK_S
        while not self._stopped:
            known = self._num_watches
            for fd, events in self._epoll.poll(max(0.0, next_tick - time.monotonic())):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    continue
                number, handler = self._handlers.get(fd, (known + 1, None))
                # A watch that began meanwhile may have the number of a descriptor that was closed, and
                # the event be of that one. What is ready is told again.
                if handler is not None and number <= known:
                    self._guarded(partial(handler, events))
            with self._lock:
                calls, self._calls = self._calls, []
            for call in calls:
                self._guarded(call)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK_S
                self._guarded(partial(self._on_tick, now))

    def _guarded(self, function: Callable[[], None]) -> None:
        """One failing callback must not end progress for every link of the engine."""
        try:
            function()
        except Exception:
            log.exception("kvferry: a progress callback failed; please report this")
