"""A blocking client of the daemon, for tools and for whoever routes requests.

An agent does not use it: `presence.py` is its side, on its own thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, TypeVar

import zmq

from ..curve import protect_client
from ..errors import ConfigError, DaemonDenied, DaemonTimeout, ForkedProcess, PlacementError
from ..keys import split_address
from .messages import (
    CHANGES_TOPIC,
    LOADS_TOPIC,
    Denied,
    Done,
    Drain,
    Flip,
    Look,
    Place,
    Placed,
    Restore,
    Show,
    Shown,
    Snapshot,
    answers,
    requests,
)
from .summary import merge
from .view import View

if TYPE_CHECKING:
    from ..handoff.messages import Role
    from ..keys import Keys
    from .messages import AnyAnswer, Ask

DEFAULT_DAEMON = "tcp://127.0.0.1:7717"
TIMEOUT_S = 2.0
MAX_TIMEOUT_S = 604_800.0
ASK_AGAIN_S = 0.5
# Then dialled again: the kernel asks a host that is away after 1, 3, 7, 15, 31 s, and one that came
# back in between would have to wait for that.
CONNECT_MS = 2000
STORE_S = 0.1  # between two looks whether a daemon's store is back
SILENT_S = 1.5  # a daemon says something every 0.5 s

_T = TypeVar("_T")


class DaemonClient:
    """Asks the daemon at `address` (with `#` and its public key, if `keys` are given).

    Several addresses, with commas between them, are daemons of one cluster: whichever answers.

    Raises:
        ConfigError: the address is none, or has no key although there are keys.

    Not thread-safe. Close it, or use it as a context manager. In a child of fork() everything that is
    asked of it raises `ForkedProcess`, and closing it does nothing.
    """

    def __init__(self, address: str = DEFAULT_DAEMON, keys: Keys | None = None) -> None:
        self.address = address
        self._keys = keys
        self._daemons = [daemon_address(one, keys) for one in address.split(",")]
        self._turn = 0
        self._pid = os.getpid()
        self._context: zmq.Context[Any] = zmq.Context()
        self._numbers = itertools.count(1)
        self._sockets = [self._connect(zmq.DEALER, *daemon) for daemon in self._daemons]

    def __enter__(self) -> DaemonClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets. Safe to call again."""
        if self._pid == os.getpid():
            self._context.destroy(linger=0)

    def look(self, *, loads: bool = True, timeout_s: float = TIMEOUT_S) -> Snapshot:
        """Who is there."""
        return self._ask(Look(next(self._numbers), loads), Snapshot, timeout_s)

    def show(self, timeout_s: float = TIMEOUT_S) -> Shown:
        """Return what the agents do, as all daemons that answer tell.

        Raises:
            DaemonTimeout: none answers. DaemonDenied: none can tell; it may be an older one.
        """
        self._check_process("show")
        ask = Show(next(self._numbers))
        frame, waiting, found = requests.encode(ask), list(self._sockets), []
        denial: Denied | None = None
        end_s, again_s = _end_s(timeout_s), 0.0
        while waiting and (now_s := time.monotonic()) < end_s:
            if now_s >= again_s:
                again_s = now_s + ASK_AGAIN_S
                for socket in waiting:
                    with contextlib.suppress(zmq.Again):
                        socket.send(frame, zmq.NOBLOCK)
            ready = zmq.select(waiting, [], [], min(end_s, again_s) - now_s)[0]
            for socket in ready:
                answer: Any = answers.decode(socket.recv())
                if answer.request not in (ask.request, 0):
                    continue  # to what was given up
                waiting.remove(socket)
                if isinstance(answer, Shown):
                    found.append(answer)
                elif isinstance(answer, Denied):
                    denial = answer
            if ready and found:  # what is known now is worth more than a daemon that is away
                end_s = min(end_s, now_s + ASK_AGAIN_S)
        if found:
            return merge(found)
        if denial is not None:
            raise DaemonDenied(denial.detail or denial.reason, operation="show")
        raise self._timeout(ask, timeout_s)

    def place(
        self,
        tokens: int,
        *,
        model: str = "",
        cached: dict[str, int] | None = None,
        exclude: tuple[str, ...] = (),
        policy: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> Placed:
        """Return which pair takes a request; see `Place`.

        Raises:
            PlacementError: none fits.
        """
        ask = Place(next(self._numbers), tokens, model, cached or {}, exclude, policy)
        return self._ask(ask, Placed, timeout_s)

    def drain(self, name: str, timeout_s: float = TIMEOUT_S) -> None:
        """Nothing more is placed on this agent; what is under way goes on."""
        self._ask(Drain(next(self._numbers), name), Done, timeout_s)

    def restore(self, name: str, timeout_s: float = TIMEOUT_S) -> None:
        """Undo `drain`."""
        self._ask(Restore(next(self._numbers), name), Done, timeout_s)

    def flip(self, name: str, role: Role, timeout_s: float = TIMEOUT_S) -> None:
        """Drain this agent, which then take another role."""
        self._ask(Flip(next(self._numbers), name, role), Done, timeout_s)

    def ask(self, ask: Ask, timeout_s: float = TIMEOUT_S) -> AnyAnswer:
        """Return the daemon's answer, a denial too.

        Raises:
            DaemonTimeout: there is none.
        """
        self._check_process(type(ask).__name__.lower())
        frame = requests.encode(ask)
        end_s = _end_s(timeout_s)
        again_s, times = 0.0, 0
        while (now_s := time.monotonic()) < end_s:
            if now_s >= again_s:  # every request may come twice
                again_s = now_s + ASK_AGAIN_S
                self._turn = (self._turn + (times > 0)) % len(self._sockets)
                times += 1
                with contextlib.suppress(zmq.Again):  # one that has been away for long
                    self._sockets[self._turn].send(frame, zmq.NOBLOCK)
            socket = self._sockets[self._turn]
            if socket.poll(int((min(end_s, again_s) - now_s) * 1000) + 1):
                answer: Any = answers.decode(socket.recv())
                if answer.request in (ask.request, 0):
                    return answer  # type: ignore[no-any-return]
        raise self._timeout(ask, timeout_s)

    def watch(self) -> Watch:
        """Follow the cluster."""
        return Watch(self)

    def _ask(self, ask: Ask, kind: type[_T], timeout_s: float) -> _T:
        end_s = _end_s(timeout_s)
        while True:
            answer = self.ask(ask, end_s - time.monotonic())
            if isinstance(answer, kind):
                return answer
            store = isinstance(answer, Denied) and answer.reason == "store"
            if not store or time.monotonic() + STORE_S > end_s:
                break
            self._turn = (self._turn + 1) % len(self._sockets)
            time.sleep(STORE_S)
        operation = type(ask).__name__.lower()
        if isinstance(answer, Denied):
            detail = answer.detail or answer.reason
            if answer.reason == "nobody":
                raise PlacementError(detail, operation=operation, retryable=True)
            raise DaemonDenied(detail, operation=operation, retryable=store)
        raise DaemonDenied(f"the daemon answered with {type(answer).__name__}", operation=operation)

    def _check_process(self, operation: str) -> None:
        if self._pid != os.getpid():
            raise ForkedProcess(
                "this client belongs to the process that forked this one: make one of this "
                "process's own",
                operation=operation,
            )

    def _timeout(self, ask: Ask, timeout_s: float) -> DaemonTimeout:
        return DaemonTimeout(
            f"the daemon at {self.address} did not answer in {max(0.0, timeout_s):.3g} s: is it "
            f"running{', and is this key in its allow-list' * (self._keys is not None)}?",
            operation=type(ask).__name__.lower(),
        )

    def _connect(self, kind: int, endpoint: str, server_key: bytes) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        protect_client(socket, self._keys, server_key)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"{endpoint!r} is no address: {error.strerror}") from error
        return socket


class Watch:
    """A `View` that keeps itself up to date while `poll` is called. Made by `DaemonClient.watch`.

    Close it, or use it as a context manager.
    """

    def __init__(self, client: DaemonClient) -> None:
        self.view = View()
        self._client = client
        self._subscribe()

    def _subscribe(self) -> None:
        client = self._client
        snapshot = client.look()
        endpoint, server_key = client._daemons[client._turn]
        publisher = publisher_endpoint(endpoint, snapshot.publisher)
        self._socket = client._connect(zmq.SUB, publisher, server_key)
        self._socket.subscribe(CHANGES_TOPIC)
        self._socket.subscribe(LOADS_TOPIC)
        self.view.hear(client.look())
        self._heard_s = time.monotonic()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop following. Safe to call again."""
        self._socket.close(0)

    def poll(self, timeout_s: float) -> bool:
        """Take what has come, waiting up to `timeout_s` for it; whether the members changed.

        Raises:
            DaemonTimeout: a new snapshot was needed and did not come.
        """
        self._client._check_process("watch")
        changed = False
        if self._socket.poll(int(timeout_s * 1000)):
            self._heard_s = time.monotonic()
            while True:
                try:
                    _, frame = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                changed |= self.view.hear(answers.decode(frame))
        if len(self._client._daemons) > 1 and time.monotonic() > self._heard_s + SILENT_S:
            self._socket.close(0)
            self._subscribe()  # to whichever daemon answers
            return True
        if self.view.stale:
            changed |= self.view.hear(self._client.look())
        return changed


def _end_s(timeout_s: float) -> float:
    """Return when so many seconds are over; at once, if none are left.

    Raises:
        ValueError: they never are, or not within a week.
    """
    if not timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(f"timeout_s is {timeout_s}: give seconds, {MAX_TIMEOUT_S:g} at most")
    return time.monotonic() + timeout_s


def daemon_address(address: str, keys: Keys | None) -> tuple[str, bytes]:
    """Return the endpoint and the key of a daemon (or an agent).

    Raises:
        ConfigError: it is no address, or there is a key on one side only.
    """
    endpoint, server_key = split_address(address)
    if "://" not in endpoint:
        raise ConfigError(f"{address!r} is no address of a daemon: write tcp://HOST:PORT")
    if keys is not None and not server_key:
        raise ConfigError(
            f"{address!r} names no public key: append `#` and the key of whoever answers there"
        )
    if keys is None and server_key:
        raise ConfigError(f"{address!r} asks for keys: give a key file that is allowed there")
    return endpoint, server_key


def publisher_endpoint(daemon: str, publisher: str) -> str:
    """Return where to follow a daemon that listens on every address: at the host that it was asked
    at."""
    if not publisher.startswith("tcp://*:"):
        return publisher
    host = daemon[len("tcp://") :].rpartition(":")[0]
    return f"tcp://{host}:{publisher.rpartition(':')[2]}"
