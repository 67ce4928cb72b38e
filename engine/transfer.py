"""The transfer engine: registers memory, meets peers, counts what they write.

One engine a process is the normal case. It owns a progress thread, up to two copier threads, two
threads for each rail of each tcp link, and two listening sockets.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import select
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import handshake
from .admission import Admissions, token_id
from .copiers import Copiers
from .core import EngineCore
from .counters import CounterTable
from .device_counters import DeviceCounters
from .errors import (
    DeadlineExceeded,
    EngineError,
    LinkClosed,
    NotRegistered,
    ProtocolError,
    TransportUnavailable,
)
from .handshake import EngineAddress, Hello, Identity
from .link import Link
from .memory import CacheDescriptor, MemoryRegion, RegionTable, RegisteredCache, quarantine
from .paths import Paths
from .paths import load as load_paths
from .progress import TICK_S, Progress
from .stream_gate import StreamGate
from .tickets import DEFAULT_TIMEOUT_S, Ticket, all_of
from .transfer_plan import TransferPlan
from .transports import cma, cuda_ipc, tcp, verbs
from .transports.verbs_device import Nics
from .transports.verbs_meeting import Meeting
from .wire import LINK_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    import torch

    from .layout import KVLayout
    from .memory import RegionDescriptor
    from .transports.base import Availability

TRANSPORTS = ("cuda_ipc", "cma", "verbs", "tcp")  # in order of preference
LOCAL = ("cuda_ipc", "cma")  # between processes of one host, over a Unix socket
# A slow machine may need longer: an emulated one takes seconds for the first handshake.
HANDSHAKE_TIMEOUT_S = float(os.environ.get("KVFERRY_HANDSHAKE_TIMEOUT_S", "5"))
MAX_HANDSHAKES = 256  # connections that have not proven themselves yet

log = logging.getLogger(__name__)


class _Pending(NamedTuple):
    """A tcp link whose sockets are still arriving; number -1 is its control channel."""

    hello: Hello
    socks: dict[int, socket.socket]
    deadline_s: float


class TransferEngine:
    """Moves pieces between its registered memory and its peers'.

    Args:
        transports: which to offer, out of `cuda_ipc`, `cma`, `verbs` and `tcp`; those that do not work here
            are left out, and `unavailable` says why.
        host: address to listen on, and to publish unless `advertise_host` is given.
        advertise_host: address that peers should use instead of `host`.
        rails: sockets of a tcp link that this engine opens.
        nics: names of the RDMA devices to use; all that are active if None, or those that the
            environment's `KVFERRY_NICS` names.
        verify: compare a checksum of every chunk that this engine writes or reads, before it is
            counted. Costs a pass over the bytes at each end, and GPU memory is staged for it.
        peer_timeout_s: silence after which a peer counts as frozen or unreachable.
        max_programs: programs that a kernel of a transfer between GPUs may use at a time, to leave
            multiprocessors to a model; no limit if None.
        paths: which pieces go direct and which through staging; the table that
            `kvferry bench paths --save` has saved, or defaults, if None.
        name: shown in errors and metrics.
        require_tokens: refuse every link that does not prove a one-time token; see `admit`.

    Raises:
        TransportUnavailable: none of the transports works here.

    Thread-safe. Close it, or use it as a context manager. Not usable in a forked child.
    """

    def __init__(
        self,
        *,
        transports: Sequence[str] = TRANSPORTS,
        host: str = "127.0.0.1",
        advertise_host: str = "",
        rails: int = tcp.DEFAULT_RAILS,
        nics: Sequence[str] | None = None,
        verify: bool = False,
        peer_timeout_s: float = 1.5,
        max_programs: int | None = None,
        paths: Paths | None = None,
        name: str = "",
        require_tokens: bool = False,
    ) -> None:
        unknown = set(transports) - set(TRANSPORTS)
        if unknown:
            raise TransportUnavailable(
                f"transport {min(unknown)!r} is unknown: use {' or '.join(TRANSPORTS)}",
                operation="start",
            )
        if not 1 <= rails <= 64:
            raise TransportUnavailable(
                f"rails is {rails}: a tcp link has 1 to 64", operation="start"
            )
        self.unavailable: dict[str, str] = {}
        self._nics = Nics(nics)
        self._transports = [t for t in TRANSPORTS if t in transports and self._works(t)]
        if not self._transports:
            raise TransportUnavailable(
                "; ".join(f"{t}: {why}" for t, why in self.unavailable.items())
                or "no transport was asked for",
                operation="start",
            )
        engine_id = secrets.token_hex(16)
        identity = Identity(
            engine_id=engine_id,
            name=name or f"engine-{os.getpid()}-{engine_id[:4]}",
            host_id=handshake.host_id(),
            pid=os.getpid(),
        )
        local = bool(set(LOCAL) & set(self._transports))
        unix_name = f"kvferry-{engine_id}" if local else ""
        remote = bool({"tcp", "verbs"} & set(self._transports))
        self._listeners = _listen(unix_name, host if remote else None)
        tcp_port = self._listeners[-1].getsockname()[1] if remote else 0
        if unix_name:
            cma.permit_peers()
        self._secret = secrets.token_bytes(32)
        self._admissions = Admissions(required=require_tokens)
        self._lock = threading.Condition()
        self._links: list[Link] = []
        self._pending: dict[str, _Pending] = {}
        self._closed = False
        self._rails = rails
        self._greeting: dict[threading.Thread, socket.socket | None] = {}
        self._ticked_s = time.monotonic()
        self._plans: dict[tuple[object, ...], TransferPlan] = {}
        self._probe_word = np.frombuffer(bytearray(secrets.token_bytes(16)), np.uint64)
        progress = Progress(identity.name, self._tick)
        self._core = EngineCore(
            identity=identity,
            regions=RegionTable(engine_id),
            counters=CounterTable(),
            progress=progress,
            copiers=Copiers(identity.name),
            verify=verify,
            peer_timeout_s=peer_timeout_s,
            forget=self._forget,
            device_counters=DeviceCounters(),
            nics=self._nics,
            max_programs=max_programs,
            gate=StreamGate(identity.name),
            paths=paths or load_paths(),
        )
        self._core.regions.counters_on = self._core.device_counters.array
        self._core.regions.on_revoke(self._revoke)
        self._core.regions.on_forget(self._nics.forget)
        self._address = EngineAddress(
            identity=identity,
            secret=self._secret,
            tcp_host=advertise_host or host,
            tcp_port=tcp_port,
            unix_name=unix_name,
            nics=len(self._nics.usable()) if "verbs" in self._transports else 0,
        )
        for listener in self._listeners:
            listener.setblocking(False)
        self._watch_listeners()
        progress.start()

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> EngineAddress:
        """What a peer needs to connect. It holds a secret: send it over a trusted channel only."""
        return self._address

    @property
    def engine_id(self) -> str:
        """This engine's id; a restarted process has another."""
        return self._core.identity.engine_id

    @property
    def name(self) -> str:
        """This engine's name."""
        return self._core.identity.name

    @property
    def transports(self) -> tuple[str, ...]:
        """The transports that this engine offers, best first."""
        return tuple(self._transports)

    @property
    def links(self) -> tuple[Link, ...]:
        """Links that are up, or that a peer may still reach this process through."""
        with self._lock:
            return tuple(self._links)

    @property
    def late_writes(self) -> int:
        """Writes that arrived for an imm that had been given up; they completed nothing."""
        return self._core.counters.late_writes

    @property
    def counters_pending(self) -> int:
        """Counters that somebody waits for."""
        return self._core.counters.pending

    @property
    def staging_nbytes(self) -> int:
        """Memory that staging takes now, at this end of all links."""
        return self._core.staging.nbytes

    @property
    def foreign_writes(self) -> int:
        """Writes and aborts under an imm that another engine was expected to write; not counted."""
        return self._core.counters.foreign_writes

    def register(self, memory: Any) -> MemoryRegion:
        """Registers a CPU tensor, NumPy array or writable buffer. The region keeps it alive.

        Raises:
            NotRegistered: it cannot be registered; says why.
        """
        self._check_open("register")
        return self._core.regions.register(memory)

    def register_cache(self, layout: KVLayout, tensors: Any) -> RegisteredCache:
        """Registers the tensors of a whole cache: one for each region of `layout`, in order.

        Raises:
            LayoutError: they do not fit the layout. NotRegistered: as for `register`.
        """
        self._check_open("register")
        return self._core.regions.register_cache(layout, tensors)

    def plan(
        self,
        src: RegisteredCache | CacheDescriptor,
        dst: RegisteredCache | CacheDescriptor,
        *,
        keys: Collection[tuple[int, str]] | None = None,
    ) -> TransferPlan:
        """How blocks of `src` become blocks of `dst`; cached for the pair.

        One of them is this engine's `RegisteredCache`, the other the peer's `CacheDescriptor`.
        With the own one as source the plan is for `write_blocks` and `write_tokens`, else for
        `read_blocks` and `read_tokens`.

        Args:
            keys: the planes of layers, `(layer, plane)`, to move: what `RankPlan` chose for two
                ranks. All that both hold if None.

        Raises:
            LayoutError: the layouts cannot be reconciled; names the axis and both values.
        """
        if isinstance(src, RegisteredCache) and isinstance(dst, CacheDescriptor):
            local, remote, writes = src, dst, True
        elif isinstance(src, CacheDescriptor) and isinstance(dst, RegisteredCache):
            local, remote, writes = dst, src, False
        else:
            raise NotRegistered(
                "a plan needs one cache of this engine (register_cache) and one descriptor of a "
                "peer's",
                operation="plan",
            )
        remote.check()
        if local.regions[0].descriptor.engine_id != self.engine_id:
            raise NotRegistered(
                "this cache is registered with another engine of this process", operation="plan"
            )
        keys = None if keys is None else frozenset(keys)
        key = (local.descriptor, remote, writes, keys)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = TransferPlan(local, remote, writes=writes, keys=keys)
        return plan

    def new_imm(self) -> int:
        """A 32-bit imm that no counter of this engine has had lately."""
        return self._core.counters.new_imm(self._core.device_counters.busy)

    def expect(
        self,
        imm: int,
        *,
        nbytes: int | None = None,
        writes: int | None = None,
        links: Iterable[Link] = (),
        engine_id: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Ticket:
        """A ticket that ends when so many bytes, or writes, have arrived under `imm`.

        May come before or after the bytes. The counter is retired when the ticket ends.

        Args:
            links: who will write. If one of them ends, so does the ticket; so does it for any
                link that has already written to this imm.
            engine_id: the one engine whose writes and aborts count; anybody's if "".
            timeout_s: deadline.

        Raises:
            ImmInUse: somebody waits on this imm already.
        """
        self._check_open("expect")
        if nbytes is None and writes is None:
            raise ValueError("expect() needs nbytes, writes or both: zero of both is not a wait")
        sources = tuple(links)
        ticket = self._core.counters.expect(
            imm,
            nbytes=nbytes,
            writes=writes,
            sources=sources,
            timeout_s=timeout_s,
            peer=",".join(link.peer.name for link in sources),
            engine_id=engine_id,
        )
        counters = self._core.device_counters
        if nbytes:
            counters.claim(ticket, nbytes)
        ticket._stream_wait = counters.wait
        if nbytes and writes is None and not engine_id:  # a word does not say who has added to it
            ticket._look = partial(counters.spin, ticket, nbytes)
        for link in sources:
            if link.error is not None and not ticket.done():
                ticket._fail(link._counter_error(imm))
        return ticket

    def when_computed(
        self,
        event: torch.cuda.Event,
        then: Callable[[], None],
        failed: Callable[[EngineError], None],
    ) -> None:
        """Calls `then` once a CUDA event has passed: at once if it has, else on a thread of this
        engine. Calls `failed` instead if the GPU has failed. Neither may block."""
        self._core.gate.when(event, then, failed)

    def connect(
        self,
        address: EngineAddress | bytes,
        *,
        transport: str | None = None,
        token: bytes = b"",
        timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> Link:
        """Opens a link over the best transport that both ends have.

        Args:
            address: the peer's `address`, or its encoded bytes.
            transport: take this one and no other.
            token: the one-time token that the peer was told to `admit`, if it was.

        Raises:
            TransportUnavailable: none works; says why for each.
            PeerLost, ProtocolError: the peer is gone, or is something else now.
        """
        self._check_open("connect")
        if not isinstance(address, EngineAddress):
            address = EngineAddress.decode(address)
        reasons: list[str] = []
        last: EngineError | None = None
        for name in TRANSPORTS if transport is None else (transport,):
            reason = self._mismatch(name, address)
            if name == "cuda_ipc" and transport is None and not reason:
                reason = self._no_gpu_memory()
            if name == "verbs" and transport is None and not reason:
                reason = self._gpu_memory()
            if reason:
                reasons.append(f"{name}: {reason}")
                continue
            try:
                return self._connect(name, address, token, timeout_s)
            except EngineError as error:
                last = error
                reasons.append(f"{name}: {error.message}")
            except (OSError, UnicodeError) as error:
                why = error.strerror if isinstance(error, OSError) else None
                reasons.append(f"{name}: {why or error}")
        if last is not None and len(reasons) == 1:
            raise last
        raise TransportUnavailable(
            "; ".join(reasons), operation="connect", peer=address.identity.name
        ) from last

    def admit(self, token: bytes, engine_id: str, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> None:
        """Lets the engine of that id open one link here with that one-time token.

        Args:
            token: 32 random bytes, which that engine gets over a channel that is trusted.

        Raises:
            OutOfRange: the token is not of 32 bytes.
        """
        self._check_open("admit")
        self._admissions.expect(token, engine_id, timeout_s)

    def accept_link(
        self, engine_id: str, timeout_s: float = HANDSHAKE_TIMEOUT_S, *, token: bytes = b""
    ) -> Link:
        """The link to a peer that connects to this engine; waits until it is there.

        Args:
            token: of several links from that peer, the one that this token opened; any if b"".

        Raises:
            DeadlineExceeded: it did not connect.
        """
        deadline_s = time.monotonic() + timeout_s
        opener = token_id(token)
        with self._lock:
            while True:
                for link in self._links:
                    meant = link.peer.engine_id == engine_id and opener in (b"", link.token_id)
                    if meant and not link.closed:
                        return link
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._lock.wait(left_s):
                    raise DeadlineExceeded(
                        f"no link from engine {engine_id[:8]} came in {timeout_s} s",
                        operation="accept",
                    )

    def scatter(
        self,
        links: Sequence[Link],
        src: MemoryRegion,
        src_offsets: Sequence[Any],
        dsts: Sequence[RegionDescriptor],
        dst_offsets: Sequence[Any],
        nbytes: Sequence[Any],
        *,
        imm: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Ticket:
        """Writes other pieces of one region to each peer; entry i of each argument goes to link i.

        Returns:
            One ticket for all of them: it ends when the last one ends, with the first error.
        """
        tickets: list[Ticket] = []
        try:
            for link, here, dst, there, size in zip(
                links, src_offsets, dsts, dst_offsets, nbytes, strict=True
            ):
                tickets.append(
                    link.write(src, here, dst, there, size, imm=imm, timeout_s=timeout_s)
                )
        except (EngineError, ValueError):
            for ticket in tickets:
                ticket.cancel()  # nobody will hold their tickets
            raise
        return all_of(tickets)

    def barrier(
        self, links: Sequence[Link], imm: int, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Ticket:
        """Signals `imm` to every peer; each peer expects as many writes as it has partners."""
        return all_of([link.signal(imm, timeout_s=timeout_s) for link in links])

    def close(self, timeout_s: float = 2.0) -> None:
        """Closes every link, ends every ticket and stops the threads. Safe to call again.

        Memory that a frozen peer could still write into is kept until this process ends.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._links)
            pending, self._pending = self._pending, {}
            greeting = dict(self._greeting)
        for listener in self._listeners:
            self._core.progress.unwatch(listener.fileno())
            listener.close()
        for sock in greeting.values():
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # its thread wakes up and closes it
        for entry in pending.values():
            _close_all(entry.socks.values())
        error = LinkClosed("the engine was closed", operation="close")
        deadline_s = time.monotonic() + timeout_s
        for link in links:
            link.fail(error)
        for ticket in self._core.counters.close(error):
            ticket._fail(error)
        reachable = False
        for link in links:
            try:
                link.quiesced.wait(max(0.0, deadline_s - time.monotonic()))
            except DeadlineExceeded:
                reachable = True
        if reachable:
            quarantine(self._core.regions.all())
        self._core.device_counters.close(free=not reachable)
        self._core.gate.close()
        self._core.copiers.stop()
        self._core.progress.stop()
        for link in links:
            link.discard()
        self._nics.close()
        for thread in greeting:
            if thread is not threading.current_thread():
                thread.join(HANDSHAKE_TIMEOUT_S)

    # Meeting peers.

    def _works(self, name: str) -> bool:
        probes: dict[str, Callable[[], Availability]] = {
            "cuda_ipc": cuda_ipc.available,
            "cma": cma.probe,
            "verbs": lambda: verbs.ready(self._nics),
            "tcp": tcp.probe,
        }
        ok, reason = probes[name]()
        if not ok:
            self.unavailable[name] = reason
        return ok

    def _mismatch(self, name: str, address: EngineAddress) -> str:
        """Why a transport cannot serve this pair, or ""."""
        if name not in TRANSPORTS:
            return f"unknown: use {' or '.join(TRANSPORTS)}"
        if name not in self._transports:
            return self.unavailable.get(name, "not enabled in this engine")
        if name in LOCAL:
            if not address.unix_name:
                return "not enabled in the peer"
            if address.identity.host_id != self._core.identity.host_id:
                return "the peer runs on another host, or in another process namespace"
        elif not (address.nics if name == "verbs" else address.tcp_port):
            return "not enabled in the peer"
        return ""

    def _gpu_memory(self) -> str:
        """Why `verbs` must not be taken, or ""."""
        if any(region.device >= 0 for region in self._core.regions.all()):
            return "it moves host memory, and GPU memory is registered in this engine"
        return ""

    def _no_gpu_memory(self) -> str:
        """Why `cuda_ipc` need not be tried, or ""."""
        if any(region.device >= 0 for region in self._core.regions.all()):
            return ""
        return "no GPU memory is registered in this engine yet"

    def _connect(self, name: str, address: EngineAddress, token: bytes, timeout_s: float) -> Link:
        link_id = secrets.token_hex(16)
        num_rails = self._rails if name == "tcp" else 0
        socks: list[socket.socket] = []
        deadline_s = time.monotonic() + timeout_s
        meeting = Meeting(self._nics, dialed=True) if name == "verbs" else None
        try:
            offer = meeting.offer(address.nics) if meeting is not None else b""
            for rail in range(-1, num_rails):
                left_s = max(0.01, deadline_s - time.monotonic())
                sock = _dial(name, address, left_s)
                socks.append(sock)
                sock.settimeout(left_s)
                challenge, answer = handshake.connect(
                    sock,
                    address,
                    lambda nonce, rail=rail: Hello(  # type: ignore[misc]
                        version=LINK_VERSION,
                        identity=self._core.identity,
                        server_engine_id=address.engine_id,
                        transport=name,
                        link_id=link_id,
                        rail=rail,
                        num_rails=num_rails,
                        nonce=nonce,
                        probe=self._probe_word.ctypes.data,
                        probe_word=self._probe_word.tobytes(),
                        token_id=token_id(token),
                    ),
                    partial(self._reachable, sock, name),
                    token,
                    offer,
                )
            if meeting is not None:
                meeting.take(answer)
        except BaseException:
            _close_all(socks)
            if meeting is not None:
                meeting.close()
            raise
        return self._open(socks[0], challenge.identity, name, socks[1:], meeting, token_id(token))

    def _reachable(self, sock: socket.socket, name: str, peer: Any) -> str:
        """Tries to read the peer's word; a reason to refuse, or ""."""
        if name not in LOCAL:
            return ""
        pid = handshake.peer_pid(sock)
        if name == "cuda_ipc" and peer.identity.pid == pid:
            return ""  # no need to reach its host memory
        try:
            if peer.identity.pid == pid and cma.read_word(pid, peer.probe) == peer.probe_word:
                return ""
        except OSError as error:
            return cma.refusal(error)
        return "the engine at the other end of the socket is not the process that it seems to be"

    def _open(
        self,
        control: socket.socket,
        peer: Identity,
        name: str,
        rails: list[socket.socket],
        meeting: Meeting | None = None,
        opener: bytes = b"",
    ) -> Link:
        with self._lock:
            if self._closed:
                _close_all([control, *rails])
                if meeting is not None:
                    meeting.close()
                raise LinkClosed("the engine was closed", operation="connect")
            if name in LOCAL:
                make = cma.CmaPath if name == "cma" else cuda_ipc.CudaIpcPath
                link = Link(self._core, control, peer, name, lambda it: make(it, peer.pid))
            elif meeting is not None:
                link = Link(
                    self._core, control, peer, name, lambda it: verbs.VerbsPath(it, meeting)
                )
            else:
                link = Link(self._core, control, peer, name, lambda it: tcp.TcpPath(it, rails))
            link.token_id = opener
            link.start()
            self._links.append(link)
            self._lock.notify_all()
        return link

    def _watch_listeners(self) -> None:
        """Watches the listeners that are not watched."""
        progress = self._core.progress
        with self._lock:
            for listener in [] if self._closed else self._listeners:
                if not progress.watches(listener.fileno()):
                    accept = partial(self._accept, listener)
                    progress.watch(listener.fileno(), select.EPOLLIN, accept)

    def _accept(self, listener: socket.socket, _: int) -> None:
        try:
            sock, _address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The client stays in the backlog, and epoll would tell so for ever: `_tick` looks
                # again.
                self._core.progress.unwatch(listener.fileno())
            return  # or it went away before we looked
        unix = listener.family == socket.AF_UNIX
        thread = threading.Thread(
            target=self._welcome, args=(sock, unix), name=f"{self.name}-greet", daemon=True
        )
        with self._lock:
            if self._closed or len(self._greeting) >= MAX_HANDSHAKES:
                sock.close()
                return
            self._greeting[thread] = sock
        thread.start()

    def _welcome(self, sock: socket.socket, unix: bool) -> None:
        """Serves one handshake, on a thread of its own: a slow client holds up nobody."""
        owned = False
        meetings: list[Meeting] = []

        def answer(hello: Hello, offer: bytes) -> bytes:
            if hello.transport != "verbs":
                return b""
            meetings.append(Meeting(self._nics, dialed=False))
            return meetings[0].answer(offer)

        try:
            sock.settimeout(HANDSHAKE_TIMEOUT_S)
            if not unix:
                tcp.tune(sock)
            hello = handshake.accept(
                sock,
                self._core.identity,
                self._secret,
                (self._probe_word.ctypes.data, self._probe_word.tobytes()),
                lambda hello: self._admit(sock, unix, hello) or self._admissions.use(hello),
                self._admissions.token_of,
                answer,
            )
            with self._lock:
                self._greeting[threading.current_thread()] = None  # `close` ends links otherwise
            if hello.transport == "tcp":
                self._file(sock, hello)
            else:
                meeting = meetings[0] if meetings else None
                self._open(sock, hello.identity, hello.transport, [], meeting, hello.token_id)
            owned = True
        except (EngineError, OSError) as error:
            log.debug("kvferry: a handshake failed: %s", error)  # the client was told why
        finally:
            if not owned:
                sock.close()
                for meeting in meetings:
                    meeting.close()
            with self._lock:
                del self._greeting[threading.current_thread()]

    def _admit(self, sock: socket.socket, unix: bool, hello: Hello) -> str:
        """A reason to refuse a client that has proven itself, or ""."""
        if hello.transport not in self._transports or unix != (hello.transport in LOCAL):
            return f"transport {hello.transport!r} is not offered here"
        if hello.transport in LOCAL:
            return self._reachable(sock, hello.transport, hello)
        if hello.transport == "verbs":
            return "" if hello.rail < 0 else "a verbs link has one connection"
        with self._lock:
            if self._closed:
                return "the engine is closing"
            if hello.rail < 0:
                if hello.link_id in self._pending or not 1 <= hello.num_rails <= 64:
                    return f"a link of {hello.num_rails} rails, or one that exists already"
                deadline_s = time.monotonic() + HANDSHAKE_TIMEOUT_S
                self._pending[hello.link_id] = _Pending(hello, {}, deadline_s)
                return ""
            pending = self._pending.get(hello.link_id)
            if (
                pending is None
                or pending.hello.identity != hello.identity
                or not 0 <= hello.rail < pending.hello.num_rails
            ):
                return f"rail {hello.rail} belongs to no link that is being opened"
        return ""

    def _file(self, sock: socket.socket, hello: Hello) -> None:
        """Files one socket of a tcp link, welcomed by now, and opens the link with its last one."""
        with self._lock:
            pending = self._pending.get(hello.link_id)
            if pending is None or hello.rail in pending.socks:
                raise ProtocolError("this link is open, or given up", operation="accept")
            pending.socks[hello.rail] = sock
            if len(pending.socks) <= pending.hello.num_rails:
                return
            del self._pending[hello.link_id]
        control, *rails = (sock for _, sock in sorted(pending.socks.items()))
        first = pending.hello
        self._open(control, first.identity, "tcp", rails, opener=first.token_id)

    # Housekeeping.

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise LinkClosed("the engine is closed: make another", operation=operation)

    def _tick(self, now: float) -> None:
        self._watch_listeners()
        asleep_s = now - self._ticked_s - TICK_S
        self._ticked_s = now
        with self._lock:
            links = list(self._links)
            late = [i for i, p in self._pending.items() if now > p.deadline_s]
            stale = [self._pending.pop(link_id) for link_id in late]
        for entry in stale:
            _close_all(entry.socks.values())
        for ticket in self._core.counters.tickets():
            if ticket.deadline_s is not None and now > ticket.deadline_s:
                ticket._expire()
        for link in links:
            if asleep_s > 0.5:
                link.forgive(asleep_s)
            link.tick(now)

    def _forget(self, link: Link) -> None:
        with self._lock:
            if link in self._links:
                self._links.remove(link)
            counters = self._core.device_counters
            if counters.dirty and not self._links and not self._closed:
                self._core.copiers.run(counters.cleanse)

    def _revoke(self, region_id: int, deadline_s: float) -> None:
        for link in self.links:
            link.revoke(region_id, deadline_s)


def _listen(unix_name: str, tcp_host: str | None) -> list[socket.socket]:
    """The listening sockets: for processes of this host, then for `tcp`, where these are wanted."""
    socks: list[socket.socket] = []
    try:
        if unix_name:
            socks.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            socks[-1].bind(f"\0{unix_name}")
            socks[-1].listen(128)
        if tcp_host is not None:
            socks.append(socket.create_server((tcp_host, 0), backlog=128))
    except (OSError, UnicodeError) as error:
        _close_all(socks)
        raise TransportUnavailable(
            f"cannot listen on {tcp_host or unix_name}: {error}", operation="start"
        ) from error
    return socks


def _dial(name: str, address: EngineAddress, timeout_s: float) -> socket.socket:
    if name in LOCAL:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(f"\0{address.unix_name}")
        except OSError:
            sock.close()
            raise
        return sock
    sock = socket.create_connection((address.tcp_host, address.tcp_port), timeout_s)
    tcp.tune(sock)
    return sock


def _close_all(socks: Iterable[socket.socket]) -> None:
    for sock in socks:
        sock.close()
