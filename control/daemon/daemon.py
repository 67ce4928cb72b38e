"""The daemon's process: ZeroMQ sockets around `membership.py` and `policy.py`.

One ROUTER for requests, one XPUB for changes, one thread. With a store (`replication.py`) it is one of
several that serve the same members. It is off every request's path: agents
that know each other go on without it, and when it comes back they tell it again who they are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
import time
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import zmq

from ..cluster.membership import Membership
from ..cluster.messages import (
    CHANGES_TOPIC,
    LOADS_TOPIC,
    MAX_REQUEST_NBYTES,
    Beat,
    Denied,
    Deregister,
    Drain,
    Flip,
    Heartbeat,
    Look,
    Place,
    Placed,
    Register,
    Restore,
    Show,
    Shown,
    answers,
    requests,
)
from ..cluster.peer_loads import PeerLoads
from ..cluster.replication import Cluster
from ..cluster.store import Peer
from ..cluster.summary import summarize
from ..curve import Gatekeeper, protect_server, sender_key
from ..errors import ConfigError, PlacementError, ProtocolError
from ..keys import is_local
from ..placement.fleet import Fleet
from ..placement.policy import place
from .figures import DaemonFigures, History
from .settings import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ..cluster.messages import Activity, AnyAnswer, AnyRequest, Snapshot
    from ..http import HttpServer
    from ..keys import Keys, Permit
    from .settings import Settings

BATCH = 256  # requests taken before changes are published and leases looked at
MAX_PARTS = 64  # requests in one ZeroMQ message
TURN_S = 0.1  # of requests, however many wait: leases and changes are looked at in between
FLUSH_S = 0.02  # changes wait as long for others, so that 2,000 agents at once are 50 publications
TICK_S = 0.5  # a lost last change is noticed within
LOADS_S = 1.0
SHOWN_S = 1.0  # agents beat once a second
COMPLAIN_S = 1.0
ASLEEP_S = 0.25  # a loop that comes so late was not run: nobody's lease pays for it
QUEUE_MESSAGES = 10_000
HEARTBEAT_MS = 1000  # ZeroMQ looks whether the other end is there
HEARTBEAT_TIMEOUT_MS = 5000
LINGER_MS = 500
DRAIN_S = 0.5  # for requests that wait when the daemon is told to end

RIGHTS: dict[str, tuple[type, ...]] = {  # by the role of a key
    "agent": (Register, Heartbeat, Deregister, Look),
    "router": (Look, Place),
    "operator": (Look, Place, Show, Drain, Restore, Flip),
}

_REQUEST_0 = b"\xa7request\x00"  # in msgpack, the field `request` of an answer to number 0

log = logging.getLogger("kvferry.daemon")


class Daemon:
    """One daemon. `run` serves until `stop`; then `close`.

    Raises:
        ConfigError: an address cannot be bound; says which and why.
    """

    def __init__(self, settings: Settings, keys: Keys | None) -> None:
        store = open_store(settings)
        self._context: zmq.Context[Any] = zmq.Context()
        self._keys = keys
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self.gatekeeper = Gatekeeper(self._context, keys) if keys is not None else None
            self._router = self._bind(zmq.ROUTER, settings.bind)
            self._publisher = self._bind(zmq.XPUB, settings.publish)
        except BaseException:
            self._context.destroy(linger=0)
            os.close(self._wake_fd)
            raise
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        publisher = self._publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        self.publisher = publisher.replace("0.0.0.0", "*").replace("[::]", "*")
        self.membership = Membership(
            epoch=_random62(),
            # Microseconds: no daemon gives a million generations a second, so those of the next
            # life are higher, unless the clock was set back; `Register.previous` mends that.
            first_generation=time.time_ns() // 1000,
            publisher=self.publisher,
            daemon=_random62() + 1 if store is not None else 0,
        )
        self.cluster: Cluster | None = None
        if store is not None:
            self.cluster = Cluster(self.membership, store, self._reply)
        self.fleet = Fleet()
        self.requests_served = 0
        self.faults = 0
        self._complain_due_s = 0.0
        self.requests_denied = 0
        self._poller = zmq.Poller()
        for socket in (self._router, self._publisher, self.gatekeeper and self.gatekeeper.socket):
            if socket is not None:
                self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._peer_loads = PeerLoads(self._context, keys, self._poller)
        self._stopping = False
        self._read_s = time.monotonic()
        self._worked_s = time.thread_time()
        self.history = History(self._read_s)
        self._shown: tuple[float, Shown] | None = None
        self._pictured: tuple[int, list[bytes]] | None = None
        self.figures = self._look()
        self.http: HttpServer | None = None
        if settings.http:
            # Imported here: the metrics library takes 6 MiB, which a daemon without it saves.
            from ..http import http_host
            from .metrics import serve_daemon

            if not is_local(http_host(settings.http)):
                log.warning(
                    "metrics and the page are served at %s, without keys: whoever reaches it can "
                    "read agents' names, hosts and figures",
                    settings.http,
                )
            try:
                self.http = serve_daemon(settings.http, lambda: self.figures)
            except BaseException:
                self.close()
                raise
        self._flush_due_s = self._tick_due_s = self._loads_due_s = 0.0
        if store is not None:
            key = keys.public if keys is not None else b""
            host = self.publisher.replace("*", sockets.gethostname())
            store.start(Peer(self.membership.daemon, host, key), self._wake)

    def stop(self) -> None:
        """Let `run` answer what waits, publish the last changes, and return. Any thread, any
        time."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake_fd, 1)

    def run(self) -> None:
        """Serve until `stop`."""
        self._worked_s = time.thread_time()
        timeout_s = 0.0
        while not self._stopping:
            ready = dict(self._poller.poll(int(timeout_s * 1000) + 1))
            self._serve(ready, self._now_s(timeout_s))
            timeout_s = self._housekeep(self._now_s(0.0))
        self._drain()

    def _now_s(self, idle_s: float) -> float:
        """Return the time; what passed since the last call beyond `idle_s`, and beyond work, is
        forgiven.

        Called between any two steps, so that a process that is stopped anywhere takes nobody's
        lease.
        """
        now_s, worked_s = time.monotonic(), time.thread_time()
        late_s = now_s - self._read_s - idle_s - (worked_s - self._worked_s)
        self._read_s, self._worked_s = now_s, worked_s
        if late_s > ASLEEP_S:
            log.warning("the daemon was asleep for %.1f s: all leases are longer by that", late_s)
            self.membership.forgive(late_s)
        return now_s

    def close(self) -> None:
        """Close the sockets. Once."""
        if self.cluster is not None:
            self.cluster.close()
        if self.http is not None:
            self.http.close()
        self._context.destroy(linger=LINGER_MS)
        os.close(self._wake_fd)

    def _bind(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        for option, value in (
            (zmq.SNDHWM, QUEUE_MESSAGES),
            (zmq.RCVHWM, QUEUE_MESSAGES),
            (zmq.MAXMSGSIZE, MAX_REQUEST_NBYTES),  # whoever sends more is disconnected
            (zmq.LINGER, LINGER_MS),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        ):
            socket.setsockopt(option, value)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # an agent that reconnects keeps its route
        protect_server(socket, self._keys)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {endpoint}: {error.strerror}") from error
        return socket

    # The loop

    def _serve(self, ready: dict[Any, int], now_s: float) -> None:
        if self._wake_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        if self.gatekeeper is not None and self.gatekeeper.socket in ready:
            self.gatekeeper.answer()
        if self._publisher in ready:
            self._watchers_came()
        for daemon, loads in self._peer_loads.take(ready).items():
            self.membership.hear_loads(daemon, loads)
        if self._router in ready:
            end_s = time.monotonic() + TURN_S
            for _ in range(BATCH):
                if not self._take(now_s) or time.monotonic() > end_s:
                    break

    def _watchers_came(self) -> None:
        """Take subscriptions off the XPUB, or they would fill its queue."""
        with contextlib.suppress(zmq.ZMQError):
            for _ in range(BATCH):
                self._publisher.recv(zmq.NOBLOCK)

    def _take(self, now_s: float) -> bool:
        """Answer one ZeroMQ message, whose parts are a request each; False if none waits."""
        try:
            frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:
            return False
        envelope = [frames[0].bytes]
        if len(frames) > 2 and not frames[1].bytes:  # REQ sockets put an empty part between
            envelope.append(b"")
        for frame in frames[len(envelope) : len(envelope) + MAX_PARTS]:
            key = sender_key(frame) if self._keys is not None else b""
            answer = self._answer(frame.bytes, now_s, key, envelope)
            if answer is not None:
                self._reply(envelope, answer)
        return True

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """What fails for one request, record or publication ends that one alone."""
        try:
            yield
        except Exception:
            self.faults += 1
            now_s = time.monotonic()
            if now_s >= self._complain_due_s:  # a flood of them is one traceback a second
                self._complain_due_s = now_s + COMPLAIN_S
                log.exception("%s failed, and was left out; please report this", what)

    def _reply(self, envelope: list[bytes], answer: AnyAnswer | bytes) -> None:
        self.requests_served += 1
        try:
            frame = answer if isinstance(answer, bytes) else answers.encode(answer)
        except ProtocolError as error:
            answer = Denied(answer.request, "protocol", error.message[:1024])  # type: ignore[union-attr]
            frame = answers.encode(answer)
        self.requests_denied += isinstance(answer, Denied)
        with contextlib.suppress(zmq.ZMQError):  # it went, or does not read: it asks again
            self._router.send_multipart([*envelope, frame], zmq.NOBLOCK)

    def _answer(
        self, frame: bytes, now_s: float, key: bytes, envelope: list[bytes]
    ) -> AnyAnswer | bytes | None:
        """Return the answer to one request; None if it is answered later, or has to be asked
        again."""
        try:
            ask: AnyRequest = requests.decode(frame)
        except ProtocolError as error:
            return Denied(0, "protocol", error.message[:1024])
        if self.gatekeeper is not None:
            objection = _objection(self.gatekeeper.permit(key), ask)
            if objection:
                return Denied(ask.request, "key", objection[:1024])
        kind = type(ask).__name__
        answer: AnyAnswer | bytes | None = Denied(
            ask.request, "protocol", f"this {kind} failed here"
        )
        with self._guarded(f"a {kind}"):
            answer = self._decide(ask, now_s, key, envelope)
        if isinstance(ask, Heartbeat) and isinstance(answer, Beat):
            with self._guarded("an activity"):
                self.history.take(ask.name, ask.activity, now_s)
        return answer

    def _decide(
        self, ask: AnyRequest, now_s: float, key: bytes, envelope: list[bytes]
    ) -> AnyAnswer | bytes | None:
        tell = self._tells.get(type(ask))
        if tell is not None and (self.cluster is None or self.cluster.ready):
            return tell(self, ask, now_s)
        if self.cluster is not None:
            return self.cluster.answer(ask, now_s, key, envelope)
        return self.membership.answer(ask, now_s, key)

    def _look_up(self, ask: Look, _: float) -> Snapshot | bytes:
        """Encoded once a change: after a restart every agent asks for the same."""
        self._flush()
        sequence = self.membership.sequence
        if ask.loads:
            return self.membership.snapshot(ask.request, loads=True)
        if self._pictured is None or self._pictured[0] != sequence:
            try:
                frame = answers.encode(self.membership.snapshot(0, loads=False))
            except ProtocolError:
                return self.membership.snapshot(ask.request, loads=False)  # denied, with the reason
            self._pictured = (sequence, frame.split(_REQUEST_0, 1))
        head, tail = self._pictured[1]
        return b"".join((head, _REQUEST_0[:-1], msgspec.msgpack.encode(ask.request), tail))

    def _place(self, ask: Place, _: float) -> AnyAnswer:
        self._flush()
        try:
            decision = place(self.fleet, ask)
        except PlacementError as error:
            return Denied(ask.request, "nobody", error.message[:1024])
        self.fleet.reserve(decision, ask.tokens)
        return Placed(
            ask.request,
            decision.prefill,
            decision.decode,
            self.fleet.generation(decision.prefill),
            self.fleet.generation(decision.decode),
            decision.estimate_s,
            decision.reason[:1024],
        )

    def _show(self, ask: Show, now_s: float) -> Shown:
        """Worked out once a second at most, however many look."""
        if self._shown is None or now_s >= self._shown[0] + SHOWN_S:
            there, loads = self.membership.members, self.membership.loads
            shown = summarize(0, there, loads, self._activities(), self.history.errors)
            self._shown = (now_s, shown)
        return msgspec.structs.replace(self._shown[1], request=ask.request)

    _tells: ClassVar[Mapping[type, Callable[..., AnyAnswer | bytes]]] = {
        Look: _look_up,
        Place: _place,
        Show: _show,
    }

    def _activities(self) -> dict[str, Activity]:
        """Return what agents told last that are heard here: those that went, or went elsewhere, do
        not."""
        activities = self.history.activities.items()
        return {name: one for name, one in activities if self.membership.hears(name)}

    def _housekeep(self, now_s: float) -> float:
        """Return what is due; return the seconds until something is again."""
        lease_s = self.membership.expire(now_s)
        if self.cluster is not None:
            with self._guarded("what the store tells"):
                self.cluster.work(now_s)
            self._peer_loads.follow(self.cluster.peers)
        if now_s >= self._flush_due_s:
            self._flush_due_s = now_s + FLUSH_S
            self._flush()
        if now_s >= self._tick_due_s:
            self._tick_due_s = now_s + TICK_S
            self._publish(CHANGES_TOPIC, self.membership.tick())
        if now_s >= self._loads_due_s:
            self._loads_due_s = now_s + LOADS_S
            self.history.turn(now_s, time.time())
            if self.http is not None:
                self.figures = self._look()
            for loads in self.membership.flush_loads():
                for name, load in loads.loads.items():
                    with self._guarded("a load"):
                        self.fleet.load(name, load)
                self._publish(LOADS_TOPIC, loads)
        due_s = self._flush_due_s if self.membership.changed else self._tick_due_s
        return max(0.0, min(lease_s, due_s - now_s, self._loads_due_s - now_s))

    def _flush(self) -> None:
        changes = self.membership.flush()
        if changes is None:
            return
        for gone in changes.gone:
            log.info("%s (generation %d) is gone: %s", gone.name, gone.generation, gone.reason)
            self.fleet.remove(gone.name)
        for member in changes.members:
            log.info(
                "%s (generation %d) is %s, %s",
                member.name,
                member.generation,
                member.role,
                member.state,
            )
            with self._guarded("a member"):
                self.fleet.put(member)
        self._publish(CHANGES_TOPIC, changes)

    def _publish(self, topic: bytes, message: msgspec.Struct) -> None:
        # Slow watchers miss it, and notice the gap; so do all if it has no room in a frame.
        with self._guarded("a publication"), contextlib.suppress(zmq.ZMQError):
            self._publisher.send_multipart([topic, answers.encode(message)], zmq.NOBLOCK)

    def _look(self) -> DaemonFigures:
        return DaemonFigures(
            time.monotonic(),
            self.membership.members,
            self.membership.loads,
            self.requests_served,
            self.requests_denied,
            self.membership.sequence,
            self._stopping,
            self.membership.epoch,
            self._keys is not None,
            self._activities(),
            tuple(self.history.points),
            dict(self.history.errors),
        )

    def _drain(self) -> None:
        """Answer what waits, and publish the last changes."""
        self.figures = self._look()
        end_s = time.monotonic() + DRAIN_S
        while time.monotonic() < end_s and self._take(time.monotonic()):
            pass
        self._flush()
        log.info(
            "drained: %d agents were registered; handoffs between agents go on without the daemon",
            len(self.membership),
        )


def _objection(permit: Permit | None, ask: AnyRequest) -> str:
    """Return why a key may not ask that; "" if it may."""
    if permit is None:
        return "this public key is not in the allow-list any more"
    kind = type(ask)
    if permit.role and kind not in RIGHTS[permit.role]:
        return f"the allow-list gives this key the role {permit.role!r}: no {kind.__name__}"
    name = ask.registration.name if isinstance(ask, Register) else getattr(ask, "name", None)
    if name is not None and not permit.covers(name):
        return f"the allow-list gives this key the names {permit.names!r}, and not {name!r}"
    return ""


def _random62() -> int:
    """Return a number that nobody else has; the module `secrets` would load OpenSSL for it, in 20
    ms."""
    return int.from_bytes(os.urandom(8), "little") >> 2
