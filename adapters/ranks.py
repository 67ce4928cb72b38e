"""Handoffs between engines whose caches are spread over ranks.

Each rank has an agent of its own, which knows the layouts of all ranks of its engine. Both sides
work out alike who sends what to whom (`engine/ranks.py`), so a decode rank talks to just the prefill
ranks that it needs, and everything moves from rank to rank, with nobody in between.

    decode rank:   peers = connect_ranks(agent, addresses_of_all_prefill_ranks)
                   handoff = receive_from_ranks(agent, peers, "r", tables, num_tokens=1000)
    prefill rank:  handoff = send_to_ranks(agent, "r", tables, num_readers(agent, "decode-0"))

`HandoffSet` joins handoffs into one that is done when all are; when one fails the others are
cancelled, which their peers' sets notice in turn. Sets nest: where one process drives several ranks
it joins theirs, and a failure of one rank ends the request on all.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ..control.errors import NotConnected
from ..engine.tickets import Ticket, all_of
from .agent import CONNECT_TIMEOUT_S, Agent
from .rank_plans import rank_plan_of

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from ..engine.ranks import RankPlan
    from .handoffs import Handoff

DEFAULT_TIMEOUT_S = 30.0


class RankPeers(NamedTuple):
    """The prefill ranks that one decode rank needs.

    Attributes:
        names: of the connected agents, by rank.
        plan: of both sets of ranks.
    """

    names: dict[int, str]
    plan: RankPlan


class HandoffSet:
    """Several handoffs of one request, as one. Thread-safe.

    Attributes:
        parts: the handoffs, or sets of them.
        blocks_free: a ticket that ends when the blocks of all parts are free, as in `Handoff`.
    """

    def __init__(self, parts: Sequence[Handoff | HandoffSet]) -> None:
        self.parts = tuple(parts)
        self.blocks_free: Ticket = all_of([part.blocks_free for part in self.parts])
        self._outcome = Ticket("handoff")
        self._left = len(self.parts)
        self._lock = threading.Lock()
        if not self.parts:
            self._outcome._finish(0)
        for part in self.parts:
            part.add_done_callback(self._ended)

    def __repr__(self) -> str:
        return f"<HandoffSet of {len(self.parts)}, {self._left} pending>"

    def done(self) -> bool:
        """Whether all ended, or one ended badly."""
        return self._outcome.done()

    @property
    def error(self) -> Exception | None:
        """What the first that failed failed with."""
        return self._outcome.exception()

    @property
    def nbytes(self) -> int:
        """Bytes moved by all; 0 until all ended well."""
        return self._outcome.nbytes

    def wait(self, timeout_s: float | None = None) -> int:
        """As `Handoff.wait`, for all of them."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for part in self.parts:
            if self._outcome.done():
                break
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            try:
                part.wait(left_s)
            except Exception:
                if not part.done():
                    raise  # the wait's own time is up
        return self._outcome.wait(timeout_s)

    def __await__(self) -> Generator[object, None, int]:
        return self._outcome.__await__()

    def cancel(self, reason: str = "cancelled") -> None:
        """Asks for the end of all of them."""
        for part in self.parts:
            if not part.done():
                part.cancel(reason)

    def add_done_callback(self, callback: Any) -> None:
        """Calls `callback(set)` when it ended. It must not block."""
        self._outcome.add_done_callback(lambda _: callback(self))

    def _ended(self, part: Handoff | HandoffSet) -> None:
        if part.error is not None:
            if self._outcome._fail(part.error):
                self.cancel(f"another rank failed: {part.error}")
            return
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._outcome._finish(sum(part.nbytes for part in self.parts))


def connect_ranks(
    agent: Agent, addresses: Sequence[str], timeout_s: float = CONNECT_TIMEOUT_S
) -> RankPeers:
    """Connects a decode rank to the prefill ranks that it needs.

    Args:
        addresses: of the agents of all prefill ranks, by rank.

    Raises:
        HelloError, EngineError: as for `Agent.connect`; the ranks do not make one model.
    """
    mine = agent._core.described
    first = agent.connect(addresses[0], timeout_s)
    known = agent._core.acquaintances.by_name(first)
    if known is None or known.peer_cache is None:
        raise NotConnected(f"{first} is gone again", peer=first, operation="connect")
    plan = rank_plan_of(known.peer_cache, mine)
    if len(plan.src) != len(addresses):
        raise NotConnected(
            f"{first} is one of {len(plan.src)} ranks, but {len(addresses)} addresses were given",
            peer=first,
            operation="connect",
        )
    names = {
        route.src: first if route.src == 0 else agent.connect(addresses[route.src], timeout_s)
        for route in plan.to(mine.rank)
    }
    return RankPeers(names, plan)


def receive_from_ranks(
    agent: Agent,
    peers: RankPeers,
    request_id: str,
    dst_tables: Any,
    *,
    num_tokens: int,
    start_token: int = 0,
    mode: Any = "push",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> HandoffSet:
    """Takes a decode rank's part of a request from every prefill rank that has some of it.

    Arguments and errors are those of `Agent.receive_tokens`.
    """
    parts: list[Handoff] = []
    try:
        for _, name in sorted(peers.names.items()):
            parts.append(
                agent.receive_tokens(
                    request_id,
                    name,
                    dst_tables,
                    num_tokens=num_tokens,
                    start_token=start_token,
                    mode=mode,
                    timeout_s=timeout_s,
                )
            )
    except BaseException:
        HandoffSet(parts).cancel("another rank could not be asked")
        raise
    return HandoffSet(parts)


def num_readers(agent: Agent, peer: str) -> int:
    """How many decode ranks this prefill rank sends to, when it is asked by `peer`'s engine.

    Raises:
        NotConnected: no such peer.
    """
    known = agent._core.acquaintances.by_name(peer)
    if known is None or known.peer_cache is None:
        raise NotConnected(f"no agent {peer!r} is connected", peer=peer, operation="send")
    mine = agent._core.described
    return len(rank_plan_of(mine, known.peer_cache).of(mine.rank))


def send_to_ranks(
    agent: Agent,
    request_id: str,
    src_tables: Any,
    readers: int,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> HandoffSet:
    """Hands over a prefill rank's part of a request to so many decode ranks, whoever asks.

    The blocks belong to all of the handoffs until the set's `blocks_free` is done.

    Raises:
        BlockOutOfRange, PlanError: the tables.
    """
    return HandoffSet(
        [agent.send(request_id, src_tables, timeout_s=timeout_s) for _ in range(readers)]
    )
