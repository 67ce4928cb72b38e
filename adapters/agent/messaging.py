"""An agent's post: ZeroMQ sockets, and what is said and heard over them in the agent's turns.

Every agent binds one ROUTER. To each agent that it connects to it opens one DEALER, and the answers
come back on that same connection, so only one side has to be reachable. Nothing is ever dropped in
silence: of a full queue and of a vanished peer the sender is told.

What one turn has to say to one peer goes out together, as the parts of one ZeroMQ message: under
load a message costs 3 µs instead of 11.

A socket's descriptor tells of news, not of what is there: whoever has used the socket has to look
whether more has come (`ZMQ_EVENTS`) before it is waited for.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import zmq

from ...control.cluster.client import CONNECT_MS, daemon_address
from ...control.curve import Gatekeeper, protect_client, protect_server
from ...control.errors import ConfigError
from ...control.handoff.machine import MAX_REASON_CHARS
from ...control.handoff.messages import MAX_FRAME_NBYTES, Refused, encode
from .event_loop import EventLoop

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...control.handoff.messages import Message, Reason
    from ...control.keys import Keys

    OnFrame = Callable[["ReplyTo", bytes], None]
    OnRefused = Callable[[str], None]

QUEUE_MESSAGES = 4096  # high-water mark a peer, in batches; a handoff needs three or four messages
HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 3000
LINGER_MS = 200  # how long a farewell may take
BATCH = 64  # ZeroMQ messages taken from one socket before the others have their turn
BATCH_PARTS = 64  # messages that go out together, at most
BATCH_NBYTES = 256 << 10  # and bytes; a larger message goes alone
HELD_BACK_ERRANDS = 16  # of 30 µs each; a message costs its reader 100 µs, so two go as one

# As plain numbers: an operation on PyZMQ's own takes as long as a small message.
_AT_ONCE, _MORE_TO_COME = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_READABLE = int(zmq.POLLIN)

log = logging.getLogger("kvferry.agent")


class ReplyTo(NamedTuple):
    """The way to one peer: our DEALER to it (`dealer` > 0), or its identity at our ROUTER."""

    dealer: int
    identity: bytes


class Messaging:
    """Sockets, and the turns in which they are used.

    Args:
        bind: ZeroMQ endpoint of the ROUTER; `*` as port takes a free one.
        on_frame: called with each frame and the route it came by.
        name: for the thread.
        keys: for CURVE on every socket; none if None.

    Attributes:
        loop: what the agent does, one thing at a time.
        messages_refused: messages to agents that could not be queued.
        frames_refused: frames that were no message, or of no session.

    Raises:
        zmq.ZMQError: the endpoint cannot be bound.

    For whoever has the turn, but for `call_soon`, `start` and `close`.
    """

    def __init__(self, bind: str, on_frame: OnFrame, name: str, keys: Keys | None = None) -> None:
        self.messages_refused = self.frames_refused = 0
        self._context = zmq.Context()
        self._keys = keys
        self.gatekeeper = Gatekeeper(self._context, keys) if keys is not None else None
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects keeps its route
        protect_server(self._router, keys)
        try:
            self._router.bind(bind)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._dealers: dict[int, zmq.Socket[bytes]] = {}
        self._takers: dict[zmq.Socket[bytes], Callable[[], None]] = {}
        self._used: dict[zmq.Socket[bytes], None] = {}  # look into these before sleeping
        self._on_frame = on_frame
        self._outbox: dict[ReplyTo, list[tuple[bytes, OnRefused]]] = {}
        self._numbers = itertools.count(1)
        self.loop = EventLoop(name, self._end_turn, self._end_call)
        self.call_soon, self.call_later = self.loop.call_soon, self.loop.call_later
        self._read(self._router, 0, on_frame)
        if self.gatekeeper is not None:
            gate = self.gatekeeper
            self._watch(gate.socket, gate.answer, gate.answer)

    def start(self) -> None:
        """Start the thread."""
        self.loop.start()

    def dial(self, address: str, on_frame: OnFrame | None = None, *, queue: bool = True) -> ReplyTo:
        """Return a route to whoever binds this address, whether or not it is there yet.

        Args:
            on_frame: takes what comes by this route, instead of the messaging's own.
            queue: whether messages wait for a peer that is not there; else they are refused.

        Raises:
            zmq.ZMQError, ConfigError: this is no address.
        """
        dealer = self._socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, b"k" + secrets.token_bytes(15))
        dealer.setsockopt(zmq.IMMEDIATE, not queue)
        return self._connect(dealer, address, on_frame or self._on_frame)

    def subscribe(self, address: str, topic: bytes, on_frame: OnFrame) -> ReplyTo:
        """Follow the publisher at this address; `hang_up` ends it.

        Raises:
            zmq.ZMQError, ConfigError: this is no address.
        """
        subscriber = self._socket(zmq.SUB)
        subscriber.subscribe(topic)
        subscriber.setsockopt(zmq.MAXMSGSIZE, -1)  # a daemon's picture of 10,000 agents is 6 MB
        return self._connect(subscriber, address, on_frame)

    def hang_up(self, route: ReplyTo) -> None:
        """Close the socket of a route that this side dialled; others close by themselves."""
        self._flush(route)
        socket = self._dealers.pop(route.dealer, None)
        if socket is not None:
            del self._takers[socket]
            self.loop.unwatch(int(socket.getsockopt(zmq.FD)))
            socket.close(LINGER_MS)

    def send(self, route: ReplyTo, frame: bytes, refused: OnRefused) -> None:
        """Send one frame: at the end of this turn, or now if this is a call that is made at once.

        `refused` is told, in another turn, if that cannot be.
        """
        waiting = self._outbox.setdefault(route, [])
        waiting.append((frame, refused))
        if self.loop.at_once or len(waiting) >= BATCH_PARTS or len(frame) > BATCH_NBYTES:
            self._flush(route)

    def tell(self, route: ReplyTo, message: Message, refused: OnRefused | None = None) -> None:
        """Send an agent a message; `refused` is told why if that cannot be, as in `send`."""
        self.send(route, encode(message), partial(self._count_refused, refused))

    def _count_refused(self, refused: OnRefused | None, reason: str) -> None:
        self.messages_refused += 1
        if refused is not None:
            refused(reason)

    def refuse(self, route: ReplyTo, number: int, reason: Reason, detail: str) -> None:
        """Answer a frame that makes no sense here."""
        self.frames_refused += 1
        self.tell(route, Refused(number, reason, detail[:MAX_REASON_CHARS]))

    def flush(self) -> None:
        """Hand everything that was sent to ZeroMQ. Never blocks."""
        while self._outbox:
            self._flush(next(iter(self._outbox)))

    def _flush(self, route: ReplyTo) -> None:
        waiting = self._outbox.pop(route, [])
        while waiting:
            size = count = 0
            for frame, _ in waiting:
                size += len(frame)
                if count and size > BATCH_NBYTES:
                    break
                count += 1
            batch, waiting = waiting[:count], waiting[count:]
            reason = self._hand_over(route, [frame for frame, _ in batch])
            for _, refused in batch if reason else ():
                self.call_soon(partial(refused, reason))

    def _hand_over(self, route: ReplyTo, frames: list[bytes]) -> str:
        """Queue one batch; return "" or why that cannot be."""
        socket = self._dealers.get(route.dealer) if route.dealer else self._router
        if socket is None:
            return "the connection was closed"
        self._used[socket] = None
        try:
            if not route.dealer:
                socket.send(route.identity, _MORE_TO_COME)
            for frame in frames[:-1]:
                socket.send(frame, _MORE_TO_COME)
            socket.send(frames[-1], _AT_ONCE)
        except zmq.Again:
            return f"{QUEUE_MESSAGES} messages wait already: the peer does not read"
        except zmq.ZMQError as error:
            return f"the peer is not connected ({error.strerror})"
        return ""

    def close(self) -> None:
        """Stop the thread and close the sockets. Not from the thread itself. Once."""
        self.loop.stop(lambda: self._context.destroy(linger=LINGER_MS))

    def _connect(self, socket: zmq.Socket[bytes], address: str, on_frame: OnFrame) -> ReplyTo:
        try:
            endpoint, server_key = daemon_address(address, self._keys)
            protect_client(socket, self._keys, server_key)
            socket.connect(endpoint)
        except (ConfigError, zmq.ZMQError):
            socket.close(0)
            raise
        route = ReplyTo(next(self._numbers), b"")
        self._dealers[route.dealer] = socket
        self._read(socket, route.dealer, on_frame)
        return route

    def _read(self, socket: zmq.Socket[bytes], number: int, on_frame: OnFrame) -> None:
        take = partial(self._take, socket, number, on_frame)
        self._watch(socket, take, partial(take, told=True))

    def _watch(
        self, socket: zmq.Socket[bytes], take: Callable[[], None], told: Callable[[], None]
    ) -> None:
        """Call `told` when the socket's descriptor tells of news, and `take` after its use."""
        self._takers[socket] = take
        self._used[socket] = None  # of what has come before, its descriptor may not tell
        self.loop.watch(int(socket.getsockopt(zmq.FD)), told)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        for option, value in (
            (zmq.SNDHWM, QUEUE_MESSAGES),
            (zmq.RCVHWM, QUEUE_MESSAGES),
            (zmq.MAXMSGSIZE, MAX_FRAME_NBYTES),  # a peer that sends more is disconnected
            (zmq.LINGER, LINGER_MS),
            (zmq.CONNECT_TIMEOUT, CONNECT_MS),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        ):
            socket.setsockopt(option, value)
        return socket

    # What turns call.

    def _end_turn(self) -> bool:
        """Send what was said, and look into the sockets that were used; True if there may be more.

        While a few inline copies wait, what was said waits for what they make of it, and goes with that.
        """
        inline_copies = self.loop.inline_copies
        held_back = (
            inline_copies is not None and 0 < len(inline_copies.waiting) <= HELD_BACK_ERRANDS
        )
        if not held_back:
            self.flush()
        used, self._used = self._used, {}
        for socket in used:
            take = self._takers.get(socket)
            if take is not None:  # else it was hung up
                take()
        return bool(self._used or (self._outbox and not held_back))

    def _end_call(self) -> bool:
        """Send what was said in a call on another thread, and take nothing there."""
        self.flush()
        self._used = {socket: None for socket in self._used if _has_news(socket)}
        return bool(self._used)

    def _take(
        self, socket: zmq.Socket[bytes], number: int, on_frame: OnFrame, *, told: bool = False
    ) -> None:
        """Take what has come, a bounded number of batches at a time.

        `told`: there is something, most probably, and to ask takes as long as to read it.
        """
        for _ in range(BATCH):
            if not told and not _has_news(socket):
                return
            told = False
            parts: list[bytes] = []
            try:
                more = True
                while more:  # PyZMQ's `recv_multipart` asks a socket option for each part: 3 µs
                    part = socket.recv(_AT_ONCE, copy=False)
                    parts.append(part.bytes)
                    more = part.more
            except zmq.ZMQError:
                return
            route = ReplyTo(number, b"" if number else parts.pop(0))
            for frame in parts[:BATCH_PARTS]:
                self._hear(on_frame, route, frame)
        self._used[socket] = None

    def _hear(self, on_frame: OnFrame, route: ReplyTo, frame: bytes) -> None:
        """One failing frame must not end the conversation with every other peer."""
        try:
            on_frame(route, frame)
        except Exception:
            log.exception("a frame could not be handled; please report this")


def _has_news(socket: zmq.Socket[bytes]) -> bool:
    """Return whether something can be read; False of a socket that was hung up."""
    return not socket.closed and bool(int(socket.getsockopt(zmq.EVENTS)) & _READABLE)
