"""The agent: what an inference engine embeds to hand KV cache to another, or to take it.

It joins the two wings: a transfer engine that moves bytes, and the control plane that says which.
Prefill calls `send` (or `open_send`, layer by layer), decode calls `receive`; in between are the
eight steps of `docs/structure.md`.
"""

from __future__ import annotations

import platform
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from ...control.cluster.client import daemon_address
from ...control.cluster.messages import Load, Registration, Topology
from ...control.errors import (
    AgentClosed,
    ControlError,
    DaemonTimeout,
    HelloTimeout,
    LinkLost,
    NotConnected,
)
from ...control.handoff.events import SourceOffered
from ...control.handoff.machine import Timing
from ...control.handoff.messages import BLOCK_ID_NBYTES, MAX_BLOCK_IDS
from ...control.keys import check_address, join_address
from ...engine.connect.handshake import HANDSHAKE_TIMEOUT_S
from ...engine.errors import EngineError, PlanError
from ...engine.runtime import fork
from ...engine.transfer.moves import as_tables
from ...engine.transfer_engine import TransferEngine
from ...engine.transports.selection import TRANSPORTS
from .arguments import name_of, natural, one_of, seconds
from .core import AgentCore
from .handoff import Handoff, SendHandoff
from .registration import Registrar, check_registration, describe_cache
from .tables import expected_nbytes, pack_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from ...control.cluster.messages import Member
    from ...control.handoff.events import Event
    from ...control.handoff.messages import Mode, Role, Side
    from ...control.http import HttpServer
    from ...control.keys import Keys
    from ...engine.layout.kv_layout import KVLayout
    from ...engine.memory.descriptors import CacheDescriptor
    from .sessions import PeerSession
    from .tables import BlockIds

DEFAULT_TIMEOUT_S = 30.0
DEFAULT_LEASE_S = 3.0
# Both sides make plans first, which takes seconds for a large cache or on a busy host.
CONNECT_TIMEOUT_S = 3 * HANDSHAKE_TIMEOUT_S
MEET_TIMEOUT_S = HANDSHAKE_TIMEOUT_S  # for a member that a handoff has to connect to first
CLOSE_TIMEOUT_S = 2.0
ATTEMPTS_REMEMBERED = 4096  # requests whose next attempt gets the next number


class Agent:
    """Hands over, and takes, the blocks of one paged cache.

    Args:
        name: how peers know it; unique among them. A restarted agent may take its name again.
        role: what it does; two agents of one role have nothing to say to each other.
        layout: the cache.
        tensors: the cache's memory, a tensor (or array) for each region of the layout. Registered
            until `close`.
        engine: a transfer engine to use; it is not closed with the agent. One is made if None.
        bind: ZeroMQ endpoint for messages; `*` as port takes a free one.
        transports, verify, max_programs: for an engine that is made here; see `TransferEngine`.
        advertise_host: the host in `address`, where `bind` names none that peers can reach.
        timing: how long the handoff machines wait.
        keys: key pair and allow-list for every ZeroMQ socket; without them `bind` must be an
            address of this machine.
        daemon: address of a daemon, to be found by others and to find them; none if "". It may come
            and go: agents that know each other never wait for it.
        model, topology, tokens_per_s: what the daemon places by; see `Registration`.
        service: where its engine serves clients; the daemon tells routers.
        lease_s: how long after its last sign of life the daemon still counts on this agent.
        http: `host:port` for /metrics, /trace, /healthz and /readyz; not served if "".
        fixed_role: the engine keeps its role: a flip is denied.
        ranks: the layouts of all ranks of this engine, where the model's cache is spread over
            several; this agent is one of them. See `ranks.py`.
        rank: which.

    Raises:
        InsecureAddress: `bind` can be reached from other machines, and there are no `keys`.
        ConfigError: `daemon` is no address, or names no key although there are `keys`.
        TransportUnavailable, LayoutError, NotRegistered: from the engine.
        ValueError: no peer, or no daemon, would take this name, role, model or speed.
        zmq.ZMQError: `bind` cannot be bound.

    Attributes:
        descriptor: its cache as peers see it, with its place among the ranks of its engine.

    Thread-safe. In a child of fork() everything that is asked of it, and of its handoffs, raises
    `ForkedProcess`, and closing it does nothing.
    """

    def __init__(
        self,
        *,
        name: str,
        role: Role,
        layout: KVLayout,
        tensors: Any,
        engine: TransferEngine | None = None,
        bind: str = "tcp://127.0.0.1:*",
        transports: Sequence[str] | None = None,
        verify: bool = False,
        max_programs: int | None = None,
        advertise_host: str = "",
        timing: Timing | None = None,
        keys: Keys | None = None,
        daemon: str = "",
        model: str = "",
        topology: Topology | None = None,
        tokens_per_s: float = 0.0,
        service: str = "",
        lease_s: float = DEFAULT_LEASE_S,
        http: str = "",
        fixed_role: bool = False,
        ranks: Sequence[KVLayout] = (),
        rank: int = 0,
    ) -> None:
        check_address(bind, keys, f"agent {name}")
        if daemon:
            for address in daemon.split(","):
                daemon_address(address, keys)
        self.name = name
        self.role: Role = role
        self._keys = keys
        self.layout = layout
        self._num_blocks, self._num_layers = layout.num_blocks, layout.num_layers
        self._advertise_host = advertise_host
        self._lock = threading.Lock()
        self._generation = fork.generation
        self._closed = False
        self._attempts: OrderedDict[str, int] = OrderedDict()
        self._registrar: Registrar | None = None
        self._http: HttpServer | None = None
        self._owns_engine = engine is None
        self.engine = engine or TransferEngine(
            name=name,
            host=_host_of(bind),
            advertise_host=advertise_host,
            transports=transports or TRANSPORTS,
            verify=verify,
            max_programs=max_programs,
            require_tokens=True,
        )
        with ExitStack() as undo:
            if self._owns_engine:
                undo.callback(self.engine.close)
            self._cache = self.engine.register_cache(layout, tensors)
            undo.callback(self._cache.deregister)
            self.descriptor = msgspec.structs.replace(
                self._cache.descriptor, ranks=tuple(ranks), rank=rank
            )
            self.descriptor.check()
            self.engine.warm_up(self._cache)
            timing = timing or Timing()
            self._core = AgentCore(
                name, role, self.engine, self._cache, self.descriptor, bind, timing, keys
            )
            undo.pop_all()
            undo.callback(self.close)
            if http:
                self._http = self._serve(http)
            undo.pop_all()
        if daemon:
            registration = Registration(
                name=name,
                role=role,
                life=self._core.sessions.life,
                address=self.address,
                model=model,
                transports=self.engine.transports,
                public_key=keys.public if keys is not None else b"",
                tokens_per_s=tokens_per_s,
                topology=topology or Topology(host=platform.node()),
                service=service,
                fixed_role=fixed_role,
                **describe_cache(layout),
            )
            try:
                check_registration(registration)
                lease_s = seconds("lease_s", lease_s)
            except ValueError:
                self.close()
                raise
            self._registrar = Registrar(
                daemon,
                registration,
                lease_s,
                self._core.messaging,
                self._core.sessions,
                self._core.executor,
                count_handoffs=self._core.count_handoffs,
                flip=self._take_role,
            )
            self._soon(self._registrar.start)
        fork.disown_in_child(self)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        mine = self._generation == fork.generation
        where = f"at {self.address}" if mine else "of the process that forked this one"
        return f"<Agent {self.name} {self.role} {where}>"

    @property
    def address(self) -> str:
        """Where peers connect to."""
        endpoint = self._core.messaging.endpoint
        if self._advertise_host and endpoint.startswith("tcp://"):
            endpoint = f"tcp://{self._advertise_host}:{endpoint.rpartition(':')[2]}"
        return join_address(endpoint, self._keys.public if self._keys is not None else b"")

    @property
    def http_address(self) -> str:
        """Where /metrics is served; "" if it is not."""
        return self._http.address if self._http is not None else ""

    @property
    def members(self) -> dict[str, Member]:
        """Who is there, by name, as the daemon last said. Empty without one. Not to be changed."""
        return self._registrar.members if self._registrar is not None else {}

    @property
    def registered(self) -> bool:
        """Whether the daemon knows this agent now."""
        return self._registrar is not None and self._registrar.standing.present

    @property
    def draining(self) -> bool:
        """Whether nothing new is to be placed on this agent."""
        return self._registrar is not None and self._registrar.draining

    def write_trace(self, path: Path | str) -> int:
        """Write the last handoffs' timelines for `kvferry trace`; return how many.

        Raises:
            ConfigError: the file cannot be written.
        """
        return self._core.executor.recorder.write(path)

    def report(self, *, queued_tokens: int = 0, free_blocks: int = 0) -> None:
        """Tell, with the next heartbeat, what placement should know of the engine's load.

        Raises:
            ValueError: a number is no integer from 0 up.
        """
        load = Load(
            queued_tokens=natural("queued_tokens", queued_tokens),
            free_blocks=natural("free_blocks", free_blocks),
        )
        if self._registrar is not None:
            self._registrar.report = load

    def wait_for_member(self, name: str, timeout_s: float = 5.0) -> Member:
        """Return the member of that name; wait until the daemon knows it.

        Raises:
            DaemonTimeout: it does not. NotConnected: this agent has no daemon.
        """
        registrar = self._registrar
        if registrar is None:
            raise NotConnected(
                "this agent has no daemon: give `daemon`, or connect() to an address",
                peer=name,
                operation="wait",
            )
        if not registrar.wait(lambda: name in registrar.members, timeout_s):
            why = "" if registrar.standing.present else f" ({registrar.standing.reason})"
            raise DaemonTimeout(
                f"the daemon has not told of an agent {name!r} in {timeout_s} s{why}",
                peer=name,
                operation="wait",
            )
        return registrar.members[name]

    @property
    def messages_refused(self) -> int:
        """Messages that could not be queued for their peer; their handoffs have failed."""
        return self._core.messaging.messages_refused

    @property
    def frames_refused(self) -> int:
        """Frames that came and were no message, or of no session."""
        return self._core.messaging.frames_refused

    def descriptor_of(self, peer: str) -> CacheDescriptor:
        """Return the cache of a connected peer, with its place among the ranks of its engine.

        Raises:
            NotConnected: no such peer.
        """
        known = self._core.sessions.by_name(peer)
        if known is None or known.peer_cache is None:
            raise NotConnected(
                f"no agent {peer!r} is connected, or it is gone again: call connect() with its "
                "address",
                peer=peer,
                operation="plan",
            )
        return known.peer_cache

    def connect(self, address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> str:
        """Get acquainted with the agent at `address` and open a link; return its name.

        `address` may be the name of a member, too. One call serves both directions; an agent that
        is connected already stays so.

        Raises:
            HelloError: the two do not fit together, or nobody answers; says which.
            EngineError: no link can be opened. NotConnected: no member has that name.
        """
        self._check_open("connect")
        waiter: Future[str] = Future()
        if "://" in address:
            self._soon(self._core.sessions.meet, address, timeout_s, waiter)
        else:
            self._meet_member(address, timeout_s, waiter, "connect")
        try:
            return waiter.result(timeout_s + 1.0)  # the session keeps the time itself
        except FutureTimeoutError as error:
            if waiter.done():
                raise
            raise HelloTimeout(f"no answer from {address} in {timeout_s} s") from error

    def receive(
        self,
        request_id: str,
        peer: str,
        dst_block_ids: BlockIds,
        *,
        mode: Mode = "push",
        skip_blocks: int = 0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Handoff:
        """Take a request's blocks from `peer`. Does not block.

        The blocks belong to the handoff until `blocks_free` is done, or `wait` returns.

        Args:
            request_id: what the prefill agent calls it, too: any text. What has no short printable
                one goes by its hash.
            peer: name of a connected agent, or of a member: it is connected to first.
            dst_block_ids: where its blocks go, in order; each of them once. In GPU memory no kernel
                may be using them any more, nor be enqueued to.
            mode: `push`: the peer writes. `pull`: this agent reads.
            skip_blocks: blocks at the request's beginning that this side has already.
            timeout_s: deadline, counted from here, for all of it; at most seven days. One that has
                passed ends the handoff at once.

        Raises:
            ValueError: an argument is not what it has to be; names it.
            NotConnected: no such peer. BlockOutOfRange, OverlappingBlocks, PlanError: the ids.
        """
        self._check_role("receive", "decode")
        tables = pack_tables("destination", (dst_block_ids,), self._num_blocks)
        return self._receive(request_id, peer, mode, tables, timeout_s, skip_blocks=skip_blocks)

    def receive_tokens(
        self,
        request_id: str,
        peer: str,
        dst_tables: Any,
        *,
        num_tokens: int,
        start_token: int = 0,
        mode: Mode = "push",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Handoff:
        """Take tokens `[start_token, num_tokens)` of a request, whatever the peer's blocks are.

        As `receive` otherwise. Does not block.

        Args:
            dst_tables: a block table for each group of this agent's layout, or the one table: all
                of the request's blocks, from its first token on. Blocks before `start_token` keep
                what they hold.

        Raises:
            NotConnected: no such peer. PlanError: the tables.
        """
        self._check_role("receive", "decode")
        tables = pack_tables("destination", as_tables(dst_tables))
        tokens = (natural("start_token", start_token), natural("num_tokens", num_tokens))
        if not tokens[1]:
            raise PlanError("num_tokens is 0: there is nothing to receive", operation="receive")
        return self._receive(request_id, peer, mode, tables, timeout_s, tokens=tokens)

    def _receive(
        self,
        request_id: str,
        peer: str,
        mode: Mode,
        tables: tuple[bytes, ...],
        timeout_s: float,
        *,
        skip_blocks: int = 0,
        tokens: tuple[int, int] = (0, 0),
    ) -> Handoff:
        """Ask a peer, after getting acquainted with it if it is a member only."""
        one_of("mode", mode, ("push", "pull"))
        request_id = name_of(request_id)
        fields: dict[str, Any] = {
            "mode": mode,
            "num_blocks": sum(map(len, tables)) // BLOCK_ID_NBYTES,
            "timeout_s": seconds("timeout_s", timeout_s),
            "tables": tables,
            "skip_blocks": natural("skip_blocks", skip_blocks, MAX_BLOCK_IDS),
            "start_token": tokens[0],
            "stop_token": tokens[1],
        }
        known = self._core.sessions.by_name(peer)
        handoff = Handoff(request_id, peer, "receive", partial(self._tell, "decode"))
        if known is not None and known.read_plan is not None:
            self._ask(handoff, known, fields)
        else:
            waiter: Future[str] = Future()
            timeout_s = min(fields["timeout_s"], MEET_TIMEOUT_S)
            self._meet_member(peer, timeout_s, waiter, "receive")
            waiter.add_done_callback(partial(self._met, handoff, fields, time.monotonic()))
        return handoff

    def _ask(self, handoff: Handoff, known: PeerSession, fields: dict[str, Any]) -> None:
        plan = known.read_plan
        assert plan is not None
        handoff._placed_ns = time.monotonic_ns()
        if fields["stop_token"]:
            fields["nbytes"] = expected_nbytes(
                plan, fields["tables"], fields["start_token"], fields["stop_token"]
            )
        else:
            fields["nbytes"] = plan.nbytes(fields["num_blocks"])
        fields["imm"] = self.engine.new_imm()
        fields["attempt"] = self._next_attempt(handoff.request_id)
        ask = partial(self._core.receive, handoff, known, fields)
        self._core.messaging.loop.call_now(ask)

    def _meet_member(
        self, name: str, timeout_s: float, waiter: Future[str], operation: str
    ) -> None:
        """Get acquainted with a member that the daemon told of."""
        member = self.members.get(name)
        if member is None or name == self.name:
            raise NotConnected(
                f"no prefill agent {name!r} that has something for this one is connected, and the "
                "daemon knows none: call connect() with its address",
                peer=name,
                operation=operation,
            )
        there = member.registration
        expected = (name, there.life)
        self._soon(self._core.sessions.meet, there.address, timeout_s, waiter, expected)

    def _met(
        self, handoff: Handoff, fields: dict[str, Any], began_s: float, waiter: Future[str]
    ) -> None:
        """A handoff's peer is connected now, or cannot be. On the agent's thread."""
        error = waiter.exception()
        assert error is None or isinstance(error, Exception)
        known = self._core.sessions.by_name(handoff.peer)
        fields["timeout_s"] = max(fields["timeout_s"] - (time.monotonic() - began_s), 1e-3)
        try:
            if error is not None:
                raise error
            if known is None or known.read_plan is None:
                raise NotConnected(
                    f"{handoff.peer} is connected, and has nothing for this agent",
                    peer=handoff.peer,
                    operation="receive",
                )
            self._ask(handoff, known, fields)
        except (ControlError, EngineError) as why:
            lost = LinkLost(
                f"{handoff.peer} could not be connected to: {why}",
                handoff=handoff.request_id,
                peer=handoff.peer,
                operation="receive",
                retryable=why.retryable,
            )
            lost.__cause__ = why
            handoff._refuse(lost)

    def send(
        self,
        request_id: str,
        src_block_ids: BlockIds,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        stream: torch.cuda.Stream | None = None,
    ) -> Handoff:
        """Hand over a request whose blocks are computed, to the agent that asks. Does not block.

        The blocks belong to the handoff until `blocks_free` is done, or `wait` returns. In GPU
        memory they count as computed when `stream` (the device's current one if None) has done what
        it has been given so far.

        Raises:
            BlockOutOfRange, PlanError: the ids.
        """
        handoff = self.open_send(request_id, src_block_ids, timeout_s=timeout_s)
        handoff.finish(stream=stream)
        return handoff

    def open_send(
        self,
        request_id: str,
        src_block_ids: BlockIds,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_asked: Callable[[str], None] | None = None,
    ) -> SendHandoff:
        """Begin to hand over a request that is being computed; see `SendHandoff.write_layers`.

        Arguments and errors are those of `send`. A cache of several groups has as many block
        tables: give them in a row. `on_asked` is called with the name of who asks.
        """
        self._check_role("send", "prefill")
        if len(self.layout.groups) == 1:
            tables = pack_tables("source", (src_block_ids,), self._num_blocks)
        else:
            tables = pack_tables("source", as_tables(src_block_ids))
        tell, num_layers = partial(self._tell, "prefill"), self._num_layers
        timeout_s, request_id = seconds("timeout_s", timeout_s), name_of(request_id)
        handoff = SendHandoff(request_id, num_layers, tell, self.engine, self._cache.device)
        handoff.on_asked = on_asked
        source = SourceOffered(tables, num_layers, timeout_s)
        self._soon(self._core.offer, handoff, source)
        return handoff

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End every handoff, say goodbye to every peer and close every link. Safe to call again.

        A handoff whose peer can still reach its blocks after `timeout_s` keeps them: its
        `blocks_free` then ends with `AgentClosed`.

        Raises:
            RuntimeError: it is called by a callback of this agent's, which would wait for itself.
        """
        if self._generation != fork.generation:
            return
        if self._core.messaging.loop.mine:
            raise RuntimeError(
                f"{self.name} cannot be closed by a callback that it makes: close it from a thread"
            )
        with self._lock:
            if self._closed:
                return
            self._closed = True
        all_back = threading.Event()
        if self._http is not None:
            self._http.close()
        if self._registrar is not None:
            self._soon(self._registrar.leave)
        self._soon(self._core.begin_close, all_back.set)
        all_back.wait(timeout_s)
        if self._owns_engine:
            self.engine.close()
        self._soon(self._core.end_close)
        self._core.close()
        if not self._owns_engine and all_back.is_set():
            self._cache.deregister()

    def forked(self) -> list[int]:
        """Refuse everything, in a child; return what it shares with this process."""
        shared = [] if self._closed or self._http is None else [self._http.fileno()]
        for part in ("_core", "_cache", "_registrar", "_http"):
            setattr(self, part, fork.Inherited())
        return shared

    # Helpers

    def _serve(self, address: str) -> HttpServer:
        from .metrics import AgentMetrics

        executor = self._core.executor
        metrics = AgentMetrics(
            self.engine, self._core.messaging, executor.recorder, self._core.count_handoffs
        )
        executor.observers.append(metrics.note)
        return metrics.serve(address, self._unready)

    def _unready(self) -> str:
        """Return why nothing new should come here, or ""."""
        if self._closed:
            return "closed"
        if self.draining:
            return "draining"
        if self._registrar is not None and not self._registrar.standing.present:
            return f"not registered: {self._registrar.standing.reason}"
        return ""

    def _take_role(self, role: Role) -> None:
        self._core.flip(role)
        self.role = role

    def _soon(self, call: Any, *arguments: Any) -> None:
        self._core.messaging.call_soon(partial(call, *arguments))

    def _tell(self, side: Side, handoff: Handoff, event: Event) -> None:
        self._soon(self._core.tell, side, handoff, event)

    def _check_open(self, operation: str) -> None:
        fork.check(self._generation, operation)
        if self._closed:
            raise AgentClosed("the agent was closed: make another", operation=operation)

    def _check_role(self, operation: str, role: Role) -> None:
        self._check_open(operation)
        if self.role not in (role, "both"):
            raise ValueError(f"{self.name} is {self.role}: only {role} agents {operation}")

    def _next_attempt(self, request_id: str) -> int:
        with self._lock:
            attempt = self._attempts.pop(request_id, 0) + 1
            self._attempts[request_id] = attempt
            while len(self._attempts) > ATTEMPTS_REMEMBERED:
                self._attempts.popitem(last=False)
        return attempt


def _host_of(bind: str) -> str:
    """Return where an engine listens whose agent is bound there."""
    host = bind.removeprefix("tcp://").rpartition(":")[0] if bind.startswith("tcp://") else ""
    return "0.0.0.0" if host == "*" else host.strip("[]") or "127.0.0.1"
