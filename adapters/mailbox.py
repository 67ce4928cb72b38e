"""An agent's post: ZeroMQ sockets, timers and wake-ups, all on one thread of its own.

Every agent binds one ROUTER. To each agent that it connects to it opens one DEALER, and the answers
come back on that same connection, so only one side has to be reachable. Nothing is ever dropped in
silence: a full queue and a vanished peer are errors of `send`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import secrets
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import zmq

from ..control.wire import MAX_FRAME_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable

QUEUE_MESSAGES = 4096  # high-water mark a peer; a handoff needs three or four
HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 3000
LINGER_MS = 200  # how long a farewell may take
BATCH = 64  # frames taken from one socket before the others have their turn

log = logging.getLogger("kvferry.agent")


class Route(NamedTuple):
    """The way to one peer: our DEALER to it (`dealer` > 0), or its identity at our ROUTER."""

    dealer: int
    identity: bytes


class Timer:
    """A call that is due later; `cancel` before that."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Stops it."""
        self.call = None


class Mailbox:
    """Sockets, timers and one thread, which makes every call into the agent.

    Args:
        bind: ZeroMQ endpoint of the ROUTER; `*` as port takes a free one.
        on_frame: called with each frame and the route it came by.
        name: for the thread.

    Raises:
        zmq.ZMQError: the endpoint cannot be bound.

    `call_soon` is safe from any thread; everything else but `close` is for calls that the mailbox
    makes.
    """

    def __init__(self, bind: str, on_frame: Callable[[Route, bytes], None], name: str) -> None:
        self._on_frame = on_frame
        self._context = zmq.Context()
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects keeps its route
        try:
            self._router.bind(bind)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._dealers: dict[int, zmq.Socket[bytes]] = {}
        self._numbers = itertools.count(1)
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._poller.register(self._router, zmq.POLLIN)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"kvferry-{name}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def on_thread(self) -> bool:
        """Whether the caller runs on the mailbox's thread."""
        return threading.current_thread() is self._thread

    def call_soon(self, call: Callable[[], None]) -> None:
        """Makes `call` on the mailbox's thread, after those that came before. Any thread."""
        self._calls.append(call)
        with self._wake_lock, contextlib.suppress(BlockingIOError):  # awake anyway
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Makes `call` in a while."""
        timer = Timer(call)
        entry = (time.monotonic() + seconds, next(self._numbers), timer)
        heapq.heappush(self._timers, entry)
        return timer

    def dial(self, endpoint: str) -> Route:
        """A route to the agent that binds this endpoint, whether or not it is there yet.

        Raises:
            zmq.ZMQError: this is no endpoint.
        """
        dealer = self._socket(zmq.DEALER)
        identity = b"k" + secrets.token_bytes(15)
        dealer.setsockopt(zmq.ROUTING_ID, identity)
        try:
            dealer.connect(endpoint)
        except zmq.ZMQError:
            dealer.close(0)
            raise
        route = Route(next(self._numbers), b"")
        self._dealers[route.dealer] = dealer
        self._poller.register(dealer, zmq.POLLIN)
        return route

    def hang_up(self, route: Route) -> None:
        """Closes the DEALER of a route that this side dialled; others close by themselves."""
        dealer = self._dealers.pop(route.dealer, None)
        if dealer is not None:
            self._poller.unregister(dealer)
            dealer.close(LINGER_MS)

    def send(self, route: Route, frame: bytes) -> str:
        """Queues one frame; returns "" or why that cannot be. Never blocks."""
        try:
            if not route.dealer:
                self._router.send_multipart((route.identity, frame), zmq.NOBLOCK)
                return ""
            dealer = self._dealers.get(route.dealer)
            if dealer is None:
                return "the connection was closed"
            dealer.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return f"{QUEUE_MESSAGES} messages wait already: the peer does not read"
        except zmq.ZMQError as error:
            return f"the peer is not connected ({error.strerror})"
        return ""

    def close(self) -> None:
        """Stops the thread and closes the sockets. Not from the thread itself. Once."""
        self.call_soon(self._stop)
        self._thread.join()
        self._context.destroy(linger=LINGER_MS)
        with self._wake_lock:  # engine threads may still report something
            fd, self._wake_fd = self._wake_fd, -1
        os.close(fd)

    def _stop(self) -> None:
        self._stopping = True

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        for option, value in (
            (zmq.SNDHWM, QUEUE_MESSAGES),
            (zmq.RCVHWM, QUEUE_MESSAGES),
            (zmq.MAXMSGSIZE, MAX_FRAME_NBYTES),  # a peer that sends more is disconnected
            (zmq.LINGER, LINGER_MS),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        ):
            socket.setsockopt(option, value)
        return socket

    # The thread.

    def _run(self) -> None:
        while not self._stopping:
            for ready, _ in self._poller.poll(self._sleep_ms()):
                if ready == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                elif isinstance(ready, zmq.Socket):
                    self._take(ready)
            for _ in range(len(self._calls)):
                self._guarded(self._calls.popleft())
            self._fire_timers()

    def _sleep_ms(self) -> int | None:
        if self._calls:
            return 0
        if not self._timers:
            return None
        return max(0, int((self._timers[0][0] - time.monotonic()) * 1000) + 1)

    def _fire_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, timer = heapq.heappop(self._timers)
            if timer.call is not None:
                self._guarded(timer.call)

    def _take(self, socket: zmq.Socket[bytes]) -> None:
        """Takes what has come, a bounded number of frames at a time."""
        dealer = 0
        if socket is not self._router:
            dealer = next((n for n, known in self._dealers.items() if known is socket), 0)
            if not dealer:
                return  # hung up meanwhile
        for _ in range(BATCH):
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            identity = b"" if dealer else parts.pop(0)
            frame = parts[0] if len(parts) == 1 else b""  # ours have one part: not a message
            self._guarded(partial(self._on_frame, Route(dealer, identity), frame))

    def _guarded(self, call: Callable[[], None]) -> None:
        """One failing call must not end the conversation with every other peer."""
        try:
            call()
        except Exception:
            log.exception("a call of the agent failed; please report this")
