"""The transfer engine: registers memory, meets peers, counts what they write.

One engine a process is the normal case. It owns a progress thread, up to two copier threads, two
threads for each rail of each tcp link, and two listening sockets. Here are the public API and how
the parts are put together; docs/structure.md lists their locks and the order of these.
"""

from __future__ import annotations

import os
import secrets
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from .connect import handshake
from .connect.dialer import Dialer
from .connect.handshake import HANDSHAKE_TIMEOUT_S, Admissions, ProcessProbe, token_id
from .connect.links import LinkTable
from .connect.listener import Listener, listen
from .context import EngineContext
from .errors import (
    DeadlineExceeded,
    EngineError,
    LinkClosed,
    NotRegistered,
    TransportUnavailable,
)
from .memory.cuda_events import Event, TorchEvent
from .memory.descriptors import CacheDescriptor
from .memory.regions import MemoryRegion, RegionTable, RegisteredCache, quarantine
from .runtime import fork
from .runtime.copy_threads import Copiers, InlineCopies
from .runtime.progress import TICK_S, Progress
from .staging.thresholds import DirectThresholds
from .staging.thresholds import load as load_paths
from .transfer.compute_gate import StreamGate
from .transfer.counters import CounterTable
from .transfer.device_counters import DeviceCounters
from .transfer.plan import TransferPlan
from .transfer.ticket import DEFAULT_TIMEOUT_S, Ticket, all_of
from .transports.cma import path as cma
from .transports.selection import TRANSPORTS, TransportSelection
from .transports.tcp import path as tcp
from .transports.verbs.cards import MAX_QUEUES
from .transports.verbs.device import Nics, check_names
from .transports.verbs.rail import DEFAULT_QUEUES
from .wire.identity import EngineAddress, Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    import torch

    from .layout.kv_layout import KVLayout
    from .link.link import Link
    from .memory.descriptors import RegionDescriptor


COPIERS_S = 0.2  # for copies that have begun when an engine's links are gone


class TransferEngine:
    """Moves pieces between its registered memory and its peers'.

    Args:
        transports: which to offer, out of `cuda_ipc`, `cma`, `verbs` and `tcp`; those that do not work here
            are left out, and `unavailable` says why.
        host: address to listen on, and to publish unless `advertise_host` is given.
        advertise_host: address that peers should use instead of `host`.
        rails: sockets of a tcp link that this engine opens.
        nics: names of the RDMA devices to use. If None: those that the environment's `KVFERRY_NICS`
            names, else those nearest to the GPUs whose memory is registered when a link is
            opened, else all that are active.
        queues: queue pairs for direct writes on each rail of a verbs link that this engine opens. Each
            is a flow of its own to the network: more of them spread a rail over several paths.
        verify: compare a checksum of every chunk that this engine writes or reads, before it is
            counted. Costs a pass over the bytes at each end, and GPU memory is staged for it.
        peer_timeout_s: silence after which a peer is lost whose process is stopped, or whose host
            acknowledges nothing; one that may be busy has 10 s.
        max_programs: programs that a kernel of a transfer between GPUs may use at a time, to leave
            multiprocessors to a model; no limit if None.
        paths: which pieces go direct and which through staging; the table that
            `kvferry bench paths --save` has saved, or defaults, if None.
        name: shown in errors and metrics.
        require_tokens: refuse every link that does not prove a one-time token; see `admit`.

    Raises:
        TransportUnavailable: none of the transports works here, one is unknown, or a NIC is not
            there.

    Thread-safe. Close it, or use it as a context manager. In a child of fork() everything that is
    asked of it, of its links and of its tickets raises `ForkedProcess`, and closing it does nothing.
    """

    def __init__(
        self,
        *,
        transports: Sequence[str] = TRANSPORTS,
        host: str = "127.0.0.1",
        advertise_host: str = "",
        rails: int = tcp.DEFAULT_RAILS,
        nics: Sequence[str] | None = None,
        queues: int = DEFAULT_QUEUES,
        verify: bool = False,
        peer_timeout_s: float = 1.5,
        max_programs: int | None = None,
        paths: DirectThresholds | None = None,
        name: str = "",
        require_tokens: bool = False,
    ) -> None:
        if not 1 <= rails <= 64:
            raise TransportUnavailable(
                f"rails is {rails}: a tcp link has 1 to 64", operation="start"
            )
        if not 1 <= queues < MAX_QUEUES:
            raise TransportUnavailable(
                f"queues is {queues}: a rail of a verbs link has 1 to {MAX_QUEUES - 1}",
                operation="start",
            )
        if nics is not None and "verbs" in transports:
            check_names(nics)
        nics_here = Nics(nics)
        self._selection = TransportSelection(transports, nics_here)
        self.unavailable = self._selection.unavailable
        engine_id = secrets.token_hex(16)
        identity = Identity(
            engine_id=engine_id,
            name=name or f"engine-{os.getpid()}-{engine_id[:4]}",
            host_id=handshake.host_id(),
            pid=os.getpid(),
        )
        unix_name = f"kvferry-{engine_id}" if self._selection.local else ""
        socks = listen(unix_name, host if self._selection.remote else None)
        tcp_port = socks[-1].getsockname()[1] if self._selection.remote else 0
        if unix_name:
            cma.permit_peers()
        secret = secrets.token_bytes(32)
        self._links = LinkTable()
        self._admissions = Admissions(required=require_tokens)
        self._ticked_s = time.monotonic()
        self._plans: dict[tuple[object, ...], TransferPlan] = {}
        self._inline_copies: set[InlineCopies] = set()
        self._core = EngineContext(
            identity=identity,
            regions=RegionTable(engine_id),
            counters=CounterTable(),
            progress=Progress(identity.name, self._tick),
            copiers=Copiers(identity.name),
            verify=verify,
            peer_timeout_s=peer_timeout_s,
            device_counters=DeviceCounters(),
            max_programs=max_programs,
            gate=StreamGate(identity.name),
            paths=paths or load_paths(),
        )
        self._core.regions.shares_gpu = "cuda_ipc" in self._selection.offered
        self._core.regions.counters_on = self._core.device_counters.array
        self._core.regions.on_revoke(self._revoke)
        self._core.regions.on_forget(nics_here.forget)
        nics_here.gpus = self._core.regions.gpu_addresses
        self._address = EngineAddress(
            identity=identity,
            secret=secret,
            tcp_host=advertise_host or host,
            tcp_port=tcp_port,
            unix_name=unix_name,
        )
        shared = (self._core, self._links, self._selection, ProcessProbe())
        self._dialer = Dialer(*shared, rails, queues)
        self._listener = Listener(*shared, socks, secret, self._admissions)
        self._listener.start()
        self._core.progress.start()
        self._generation = fork.generation
        fork.disown_in_child(self)

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> EngineAddress:
        """What a peer needs to connect. It holds a secret: send it over a trusted channel only.

        The number of its RDMA devices is the one that fits the memory that is registered by now.
        """
        if "verbs" not in self._selection.offered:
            return self._address
        return msgspec.structs.replace(
            self._address, nics=max(1, len(self._selection.nics.usable()))
        )

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
        return self._selection.offered

    @property
    def links(self) -> tuple[Link, ...]:
        """Links that are up, or that a peer may still reach this process through."""
        return tuple(self._links.all())

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
        """Writes and aborts under an imm that another engine, or link, was to write; not counted."""
        return self._core.counters.foreign_writes

    def register(self, memory: Any) -> MemoryRegion:
        """Register a CPU tensor, NumPy array or writable buffer. The region keeps it alive.

        Raises:
            NotRegistered: it cannot be registered; says why.
        """
        self._check_open("register")
        return self._core.regions.register(memory)

    def register_cache(self, layout: KVLayout, tensors: Any) -> RegisteredCache:
        """Register the tensors of a whole cache: one for each region of `layout`, in order.

        Raises:
            LayoutError: they do not fit the layout. NotRegistered: as for `register`.
        """
        self._check_open("register")
        return self._core.regions.register_cache(layout, tensors)

    def warm_up(self, cache: RegisteredCache) -> None:
        """Compile what the first transfers between this cache and a peer's of the same layout would
        wait for. Takes up to seconds on a GPU whose kernels were never compiled; for host memory
        there is nothing to do.

        Raises:
            DeviceError: the GPU failed.
        """
        if cache.kind != "cuda" or "cuda_ipc" not in self.transports:
            return
        from .transports.cuda_ipc.plan import load_kernels

        load_kernels(TransferPlan(cache, cache.descriptor, writes=True), self._core.max_programs)

    def plan(
        self,
        src: RegisteredCache | CacheDescriptor,
        dst: RegisteredCache | CacheDescriptor,
        *,
        keys: Collection[tuple[int, str]] | None = None,
    ) -> TransferPlan:
        """Return how blocks of `src` become blocks of `dst`; cached for the pair.

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
        """Return a 32-bit imm that no counter of this engine has had lately.

        Raises:
            ImmInUse: 65,536 counters of GPU memory are waited for.
        """
        words = self._core.device_counters
        return self._core.counters.new_imm(words.owned, words.dirty)

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
        """Return a ticket that ends when so many bytes, or writes, have arrived under `imm`.

        May come before or after the bytes. The counter is retired when the ticket ends.

        Args:
            links: who will write. Only what comes over these links counts, and if one of them ends,
                so does the ticket. Any link's writes and aborts count if none is given; the ticket
                then ends with any link that has already written to this imm.
            engine_id: the one engine whose writes and aborts count; any engine's if "". It is what a
                peer calls itself: where peers do not trust each other, name its links, or admit
                each by a token.
            timeout_s: deadline.

        Raises:
            ImmInUse: somebody waits on this imm already. OutOfRange: a number is none from 0 up.
        """
        self._check_open("expect")
        if nbytes is None and writes is None:
            raise ValueError("expect() needs nbytes, writes or both: zero of both is not a wait")
        sources = tuple(links)
        ticket = self._core.counters.expect(
            imm,
            nbytes=nbytes,
            writes=writes,
            sources=[link.source for link in sources],
            timeout_s=timeout_s,
            peer=",".join(link.peer.name for link in sources),
            engine_id=engine_id,
        )
        counters = self._core.device_counters
        if nbytes:
            counters.claim(ticket, nbytes)
        if not engine_id and not sources:  # a word of GPU memory does not say who has added to it
            ticket._stream_wait = counters.wait
            if nbytes and writes is None:
                ticket._look = partial(counters.spin, ticket, nbytes)
        for link in sources:
            if link.error is not None and not ticket.done():
                ticket._fail(link.down_error("expect", imm))
        return ticket

    def take_inline_copies(self, stalled: Callable[[], None]) -> InlineCopies:
        """Return what one thread of the caller's does itself of the small copies that it begins.

        Args:
            stalled: called, on a thread of this engine, again and again while a copy does not end:
                another thread should go on with the work of the one that does it. It must not block.
        """
        self._check_open("take inline copies")
        inline_copies = InlineCopies(self._core.copiers, stalled)
        self._inline_copies.add(inline_copies)
        return inline_copies

    def return_inline_copies(self, inline_copies: InlineCopies) -> None:
        """No thread does these any more."""
        self._inline_copies.discard(inline_copies)
        inline_copies.hand_over()

    def when_computed(
        self,
        event: torch.cuda.Event | Event,
        then: Callable[[], None],
        failed: Callable[[EngineError], None],
    ) -> None:
        """Call `then` once a CUDA event has passed: at once if it has, else on a thread of this
        engine. Calls `failed` instead if the GPU has failed. Neither may block."""
        known = event if isinstance(event, Event) else TorchEvent(event)
        self._core.gate.when(known, then, failed)

    def connect(
        self,
        address: EngineAddress | bytes,
        *,
        transport: str | None = None,
        token: bytes = b"",
        timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> Link:
        """Open a link over the best transport that both ends have.

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
        return self._dialer.connect(address, transport, token, timeout_s)

    def admit(self, token: bytes, engine_id: str, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> None:
        """Let the engine of that id open one link here with that one-time token.

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
        """Return the link to a peer that connects to this engine; wait until it is there.

        Args:
            token: of several links from that peer, the one that this token opened; any if b"".

        Raises:
            DeadlineExceeded: it did not connect.
        """
        return self._links.wait(engine_id, token_id(token), timeout_s)

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
        """Write other pieces of one region to each peer; entry i of each argument goes to link i.

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
        """Signal `imm` to every peer; each peer expects as many writes as it has partners."""
        return all_of([link.signal(imm, timeout_s=timeout_s) for link in links])

    def close(self, timeout_s: float = 2.0) -> None:
        """Close every link, end every ticket and stop the threads. Safe to call again.

        Memory that a frozen peer could still write into is kept until this process ends.
        """
        if fork.generation != self._generation:
            return
        links = self._links.close()
        if links is None:
            return
        self._listener.close()
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
        self._core.copiers.stop(max(COPIERS_S, deadline_s - time.monotonic()))
        self._core.progress.stop()
        for link in links:
            link.discard()
        self._selection.nics.close()
        self._listener.join()

    def forked(self) -> tuple[int, ...]:
        """Refuse everything, in a child."""
        for part in ("_core", "_links", "_dialer", "_admissions", "_selection", "_plans"):
            setattr(self, part, fork.Inherited())
        return ()

    # Housekeeping.

    def _check_open(self, operation: str) -> None:
        if self._links.closed:
            raise LinkClosed("the engine is closed: make another", operation=operation)

    def _tick(self, now: float) -> None:
        """Deadlines, and what links and the listener do now and then; on the progress thread."""
        asleep_s = now - self._ticked_s - TICK_S
        self._ticked_s = now
        links = self._links.all()
        for ticket in self._core.counters.tickets():
            if ticket.deadline_s is not None and now > ticket.deadline_s:
                ticket._expire()
        self._core.copiers.tick(now)
        for inline_copies in list(self._inline_copies):
            inline_copies.tick(now)
        for link in links:
            if asleep_s > 0.5:
                link.forgive(asleep_s)
            link.tick(now)
        self._listener.tick(now)

    def _revoke(self, region_id: int, deadline_s: float) -> None:
        for link in self.links:
            link.revoke(region_id, deadline_s)
