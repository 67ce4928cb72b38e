"""The agent: what an inference engine embeds to hand KV cache to another, or to take it.

It joins the two wings: a transfer engine that moves bytes, and the control plane that says which.
Prefill calls `send` (or `open_send`, layer by layer), decode calls `receive`; in between are the
eight steps of `docs/structure.md`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from ..control.errors import AgentClosed, HelloTimeout, NotConnected
from ..control.events import SourceOffered
from ..control.handoff import Timing
from ..control.messages import count_blocks
from ..engine.errors import BlockOutOfRange, OverlappingBlocks, PlanError
from ..engine.transfer import TRANSPORTS, TransferEngine
from .agent_core import AgentCore
from .handoffs import Handoff, SendHandoff
from .token_handoffs import expected_nbytes, pack_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ..control.events import Event
    from ..control.messages import Side
    from ..engine.layout import KVLayout

    BlockIds = Sequence[int] | npt.NDArray[np.integer]

Role = Literal["prefill", "decode", "both"]
DEFAULT_TIMEOUT_S = 30.0
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
        transports, verify: for an engine that is made here; see `TransferEngine`.
        advertise_host: the host in `address`, where `bind` names none that peers can reach.
        timing: how long the handoff machines wait.
        ranks: the layouts of all ranks of this engine, where the model's cache is spread over
            several; this agent is one of them. See `ranks.py`.
        rank: which.

    Raises:
        TransportUnavailable, LayoutError, NotRegistered: from the engine.
        ValueError: no peer would take this name or role.
        zmq.ZMQError: `bind` cannot be bound.

    Thread-safe. Messages and addresses carry the keys of registered memory: the network between
    agents has to be trusted. Not usable in a forked child.
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
        advertise_host: str = "",
        timing: Timing | None = None,
        ranks: Sequence[KVLayout] = (),
        rank: int = 0,
    ) -> None:
        self.name = name
        self.role: Role = role
        self.layout = layout
        self._advertise_host = advertise_host
        self._owns_engine = engine is None
        self.engine = engine or _make_engine(
            name, bind, transports, verify=verify, advertise_host=advertise_host
        )
        self._lock = threading.Lock()
        self._closed = False
        self._attempts: OrderedDict[str, int] = OrderedDict()
        try:
            self._cache = self.engine.register_cache(layout, tensors)
            try:
                described = msgspec.structs.replace(
                    self._cache.descriptor, ranks=tuple(ranks), rank=rank
                )
                described.check()
                self._core = AgentCore(
                    name, role, self.engine, self._cache, bind, timing or Timing(), described
                )
            except BaseException:
                self._cache.deregister()
                raise
        except BaseException:
            if self._owns_engine:
                self.engine.close()
            raise

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Agent {self.name} {self.role} at {self.address}>"

    @property
    def address(self) -> str:
        """Where peers connect to."""
        endpoint = self._core.mailbox.endpoint
        if not self._advertise_host or not endpoint.startswith("tcp://"):
            return endpoint
        return f"tcp://{self._advertise_host}:{endpoint.rpartition(':')[2]}"

    @property
    def messages_refused(self) -> int:
        """Messages that could not be queued for their peer; their handoffs have failed."""
        return self._core.messages_refused

    @property
    def frames_refused(self) -> int:
        """Frames that came and were no message, or of no session."""
        return self._core.frames_refused

    def connect(self, address: str, timeout_s: float = 5.0) -> str:
        """Gets acquainted with the agent at `address` and opens a link; returns its name.

        One call serves both directions; an agent that is connected already stays so.

        Raises:
            HelloError: the two do not fit together, or nobody answers; says which.
            EngineError: no link can be opened.
        """
        self._check_open("connect")
        waiter: Future[str] = Future()
        self._soon(self._core.acquaintances.meet, address, timeout_s, waiter)
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
        mode: Literal["push", "pull"] = "push",
        skip_blocks: int = 0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Handoff:
        """Takes a request's blocks from `peer`. Does not block.

        The blocks belong to the handoff until `blocks_free` is done, or `wait` returns.

        Args:
            request_id: what the prefill agent calls it, too.
            peer: name of a connected agent.
            dst_block_ids: where its blocks go, in order; each of them once.
            mode: `push`: the peer writes. `pull`: this agent reads.
            skip_blocks: blocks at the request's beginning that this side has already.
            timeout_s: deadline, counted from here, for all of it.

        Raises:
            NotConnected: no such peer. BlockOutOfRange, OverlappingBlocks, PlanError: the ids.
        """
        self._check_role("receive", "decode")
        table = self._table(dst_block_ids)
        if len(np.unique(table)) != len(table):
            raise OverlappingBlocks(
                f"a destination block id of {request_id} is named twice", operation="receive"
            )
        known = self._core.acquaintances.by_name(peer)
        if known is None or known.read_plan is None:
            raise NotConnected(
                f"no prefill agent {peer!r} is connected: call connect() with its address",
                peer=peer,
                operation="receive",
            )
        handoff = Handoff(request_id, peer, "receive", partial(self._tell, "decode"))
        fields = {
            "attempt": self._next_attempt(request_id),
            "mode": mode,
            "imm": self.engine.new_imm(),
            "num_blocks": len(table),
            "nbytes": known.read_plan.nbytes(len(table)),
            "timeout_s": float(timeout_s),
            "tables": (table.tobytes(),),
            "skip_blocks": skip_blocks,
            "start_token": 0,
            "stop_token": 0,
        }
        self._soon(self._core.receive, handoff, known, fields)
        return handoff

    def receive_tokens(
        self,
        request_id: str,
        peer: str,
        dst_tables: Any,
        *,
        num_tokens: int,
        start_token: int = 0,
        mode: Literal["push", "pull"] = "push",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Handoff:
        """Takes tokens `[start_token, num_tokens)` of a request, whatever the peer's blocks are.

        As `receive` otherwise. Does not block.

        Args:
            dst_tables: a block table for each group of this agent's layout, or the one table: all
                of the request's blocks, from its first token on. Blocks before `start_token` keep
                what they hold.

        Raises:
            NotConnected: no such peer. PlanError: the tables.
        """
        self._check_role("receive", "decode")
        known = self._core.acquaintances.by_name(peer)
        if known is None or known.read_plan is None:
            raise NotConnected(
                f"no prefill agent {peer!r} that has something for this one is connected: call "
                "connect() with its address",
                peer=peer,
                operation="receive",
            )
        tables = pack_tables(dst_tables)
        handoff = Handoff(request_id, peer, "receive", partial(self._tell, "decode"))
        fields = {
            "attempt": self._next_attempt(request_id),
            "mode": mode,
            "imm": self.engine.new_imm(),
            "num_blocks": count_blocks(tables),
            "nbytes": expected_nbytes(known.read_plan, tables, start_token, num_tokens),
            "timeout_s": float(timeout_s),
            "tables": tables,
            "start_token": start_token,
            "stop_token": num_tokens,
        }
        self._soon(self._core.receive, handoff, known, fields)
        return handoff

    def send(
        self, request_id: str, src_block_ids: BlockIds, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Handoff:
        """Hands over a request whose blocks are computed, to the agent that asks. Does not block.

        The blocks belong to the handoff until `blocks_free` is done, or `wait` returns.

        Raises:
            BlockOutOfRange, PlanError: the ids.
        """
        handoff = self.open_send(request_id, src_block_ids, timeout_s=timeout_s)
        handoff.finish()
        return handoff

    def open_send(
        self, request_id: str, src_block_ids: BlockIds, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> SendHandoff:
        """Begins to hand over a request that is being computed; see `SendHandoff.write_layers`.

        Arguments and errors are those of `send`. A cache of several groups has as many block
        tables: give them in a row.
        """
        self._check_role("send", "prefill")
        one = len(self.layout.groups) == 1
        tables = (self._table(src_block_ids).tobytes(),) if one else pack_tables(src_block_ids)
        num_layers = self.layout.num_layers
        handoff = SendHandoff(request_id, num_layers, partial(self._tell, "prefill"))
        source = SourceOffered(tables, num_layers, float(timeout_s))
        self._soon(self._core.offer, handoff, source)
        return handoff

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Ends every handoff, says goodbye to every peer and closes every link. Safe to call again.

        A handoff whose peer can still reach its blocks after `timeout_s` keeps them: its
        `blocks_free` then ends with `AgentClosed`.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        all_back = threading.Event()
        self._core.mailbox.call_soon(partial(self._core.begin_close, all_back.set))
        all_back.wait(timeout_s)
        if self._owns_engine:
            self.engine.close()
        self._core.mailbox.call_soon(self._core.end_close)
        self._core.mailbox.close()
        if not self._owns_engine and all_back.is_set():
            self._cache.deregister()

    # Helpers

    def _soon(self, call: Any, *arguments: Any) -> None:
        self._core.mailbox.call_soon(partial(call, *arguments))

    def _tell(self, side: Side, handoff: Handoff, event: Event) -> None:
        self._soon(self._core.tell, side, handoff, event)

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise AgentClosed("the agent was closed: make another", operation=operation)

    def _check_role(self, operation: str, role: Role) -> None:
        self._check_open(operation)
        if self.role not in (role, "both"):
            raise ValueError(f"{self.name} is {self.role}: only {role} agents {operation}")

    def _table(self, block_ids: BlockIds) -> npt.NDArray[np.int32]:
        """The ids, checked against the layout.

        Raises:
            BlockOutOfRange, PlanError: an id is not a block of the cache; these are no ids.
        """
        ids = np.asarray(block_ids)
        if ids.size == 0:
            return np.zeros(0, "<i4")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise PlanError(
                f"block ids must be one row of integers, not {ids.dtype} of shape {ids.shape}",
                operation="plan",
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.layout.num_blocks:
            raise BlockOutOfRange(
                f"block id {low if low < 0 else high} is not in a cache of "
                f"{self.layout.num_blocks} blocks",
                operation="plan",
            )
        return ids.astype("<i4")

    def _next_attempt(self, request_id: str) -> int:
        with self._lock:
            attempt = self._attempts.pop(request_id, 0) + 1
            self._attempts[request_id] = attempt
            while len(self._attempts) > ATTEMPTS_REMEMBERED:
                self._attempts.popitem(last=False)
        return attempt


def _make_engine(
    name: str, bind: str, transports: Sequence[str] | None, *, verify: bool, advertise_host: str
) -> TransferEngine:
    """An engine that listens where the agent does."""
    host = "127.0.0.1"
    if bind.startswith("tcp://"):
        host = bind[len("tcp://") :].rpartition(":")[0] or host
    host = "0.0.0.0" if host == "*" else host.strip("[]")
    return TransferEngine(
        name=name,
        host=host,
        advertise_host=advertise_host,
        transports=tuple(transports or TRANSPORTS),
        verify=verify,
    )
