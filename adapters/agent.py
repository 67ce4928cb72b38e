"""An agent: what an inference engine embeds to hand KV over, and to be handed KV.

It owns a transfer engine, ZeroMQ sockets and the handoffs' state machines, on one thread beside the
engine's. Agents talk to each other directly.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..control.errors import AgentClosed, HelloTimeout, NotConnected
from ..control.handoff import Timing
from ..control.session import make_hello
from ..engine.errors import BlockOutOfRange, DeadlineExceeded, OverlappingBlocks, PlanError
from ..engine.transfer import TRANSPORTS, TransferEngine
from .agent_loop import HELLO_TIMEOUT_S, Acquaintance, AgentLoop
from .handoffs import Handoff, SendHandoff

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ..control.events import Event
    from ..engine.layout import KVLayout

    BlockIds = Sequence[int] | npt.NDArray[np.integer]

DEFAULT_TIMEOUT_S = 30.0


class Agent:
    """Hands KV over and takes it. Thread-safe; close it, or use it as a context manager.

    Args:
        name: unique among the agents that meet; shown in errors.
        role: `prefill`, `decode` or `both`. Two prefills, or two decodes, refuse each other.
        layout: describes `tensors`.
        tensors: the whole paged cache; the agent keeps it alive until it is closed.
        engine: use this transfer engine and leave it open; makes its own if None.
        bind: ZeroMQ endpoint to listen on; `*` as port takes a free one.
        transports: which the own engine offers; all that work here if None.
        verify: compare checksums of all bytes, for the own engine.
        timing: how long the state machines wait.

    Raises:
        ControlError: the endpoint cannot be bound. LayoutError: the tensors do not fit the layout.
        TransportUnavailable: no transport works here.
    """

    def __init__(
        self,
        *,
        name: str,
        role: Literal["prefill", "decode", "both"],
        layout: KVLayout,
        tensors: Any,
        engine: TransferEngine | None = None,
        bind: str = "tcp://127.0.0.1:*",
        transports: Sequence[str] | None = None,
        verify: bool = False,
        timing: Timing | None = None,
    ) -> None:
        make_hello(name, role, 0, 0)  # refuses names and roles that no peer takes
        self.name = name
        self.role = role
        self._owns_engine = engine is None
        self.engine = engine or TransferEngine(
            transports=tuple(transports or TRANSPORTS), verify=verify, name=name
        )
        self._lock = threading.Lock()
        self._peers: dict[str, tuple[int, Acquaintance]] = {}
        self._attempts: dict[str, int] = {}
        self._closed = False
        try:
            self._cache = self.engine.register_cache(layout, tensors)
            self._loop = AgentLoop(
                name=name,
                role=role,
                engine=self.engine,
                cache=self._cache,
                bind=bind,
                timing=timing or Timing(),
            )
        except BaseException:
            if self._owns_engine:
                self.engine.close()
            raise
        self._loop.start()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """The ZeroMQ endpoint at which other agents reach this one."""
        return self._loop.address

    @property
    def layout(self) -> KVLayout:
        """The layout of this agent's cache."""
        return self._cache.layout

    def connect(self, address: str, timeout_s: float = HELLO_TIMEOUT_S) -> str:
        """Gets acquainted with the agent at `address` and opens a link to its engine.

        Returns:
            The peer's name, for `receive`.

        Raises:
            HelloError: version, role, layout or link do not fit; says which.
            HelloTimeout: nobody answered.
        """
        self._check_open()
        begun = threading.Event()
        box: list[Acquaintance] = []

        def begin(known: Acquaintance) -> None:
            box.append(known)
            begun.set()

        self._loop.post(lambda: self._loop.connect(address, timeout_s, begin))
        if not begun.wait(timeout_s):
            raise HelloTimeout(f"the agent's thread did not take the call in {timeout_s} s")
        known = box[0]
        try:
            known.up.wait(timeout_s + 1.0)
        except DeadlineExceeded as error:
            raise HelloTimeout(
                f"not acquainted after {timeout_s} s", operation="connect"
            ) from error
        with self._lock:
            self._peers[known.machine.name] = (known.machine.number, known)
        return known.machine.name

    def receive(
        self,
        request_id: str,
        peer: str,
        dst_block_ids: BlockIds,
        *,
        mode: Literal["push", "pull"] = "push",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Handoff:
        """Asks `peer` for a request's KV, into these blocks of this agent's cache.

        Args:
            request_id: the name under which the peer sends it.
            peer: what `connect` returned.
            dst_block_ids: as many as the peer has source blocks, in the same order. They belong
                to the handoff until its `blocks_free` has ended.
            mode: `push`: the peer writes as it computes; `pull`: this side reads when all is there.
            timeout_s: deadline of the whole handoff.

        Raises:
            NotConnected: no such peer. BlockOutOfRange, OverlappingBlocks: the ids.
        """
        self._check_open()
        known = self._peers.get(peer)
        if known is None:
            raise NotConnected(
                f"no peer is named {peer!r}: connect() to it first", peer=peer, operation="receive"
            )
        ids = self._check_ids(dst_block_ids, destination=True)
        with self._lock:
            attempt = self._attempts[request_id] = self._attempts.pop(request_id, 0) + 1
            while len(self._attempts) > 65_536:
                del self._attempts[next(iter(self._attempts))]
        handoff = Handoff(request_id, peer, "receive")
        handoff._tell = self._teller(handoff)
        self._loop.post(
            lambda: self._loop.receive(
                handoff, known[0], ids, mode=mode, attempt=attempt, timeout_s=timeout_s
            )
        )
        return handoff

    def send(
        self, request_id: str, src_block_ids: BlockIds, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Handoff:
        """Offers a request's computed KV: it goes to whichever peer asks for it.

        Args:
            request_id: the name under which decode asks for it.
            src_block_ids: blocks of this agent's cache, in the request's order. They belong to the
                handoff until its `blocks_free` has ended.
            timeout_s: how long the offer stands, the transfer included.
        """
        handoff = Handoff(request_id, "", "send")
        self._offer(handoff, src_block_ids, whole=True, timeout_s=timeout_s)
        return handoff

    def open_send(
        self, request_id: str, src_block_ids: BlockIds, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> SendHandoff:
        """As `send`, for KV that is still being computed: tell it which layers are ready."""
        handoff = SendHandoff(request_id, "", "send")
        self._offer(handoff, src_block_ids, whole=False, timeout_s=timeout_s)
        return handoff

    def close(self) -> None:
        """Takes leave of every peer; handoffs under way fail with `AgentClosed`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loop.stop()
        if self._owns_engine:
            self.engine.close()

    def _offer(
        self, handoff: Handoff, src_block_ids: BlockIds, *, whole: bool, timeout_s: float
    ) -> None:
        self._check_open()
        ids = self._check_ids(src_block_ids, destination=False)
        handoff._tell = self._teller(handoff)
        self._loop.post(lambda: self._loop.offer(handoff, ids, whole=whole, timeout_s=timeout_s))

    def _teller(self, handoff: Handoff) -> Any:
        def tell(event: Event) -> None:
            if not self._closed:
                self._loop.post(lambda: self._loop.tell(handoff, event))

        return tell

    def _check_ids(self, block_ids: BlockIds, *, destination: bool) -> npt.NDArray[np.int64]:
        ids = np.asarray(block_ids)
        side = "destination" if destination else "source"
        if ids.size == 0:
            return np.zeros(0, np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise PlanError(f"{side} block ids must be one row of integers", operation="handoff")
        ids = ids.astype(np.int64)
        limit = self.layout.num_blocks
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= limit:
            raise BlockOutOfRange(
                f"{side} block id {low if low < 0 else high} is not in a cache of {limit} blocks",
                operation="handoff",
            )
        if destination:
            ordered = np.sort(ids)
            twice = ordered[1:][ordered[1:] == ordered[:-1]]
            if len(twice):
                raise OverlappingBlocks(
                    f"destination block id {int(twice[0])} is named twice", operation="handoff"
                )
        return ids

    def _check_open(self) -> None:
        if self._closed:
            raise AgentClosed("the agent is closed: make another")
