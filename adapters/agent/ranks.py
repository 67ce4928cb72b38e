"""Agents of engines whose caches are spread over ranks: who connects to whom, and how many read.

Each rank has an agent of its own, in a process of its own or not, which knows the layouts of all
ranks of its engine. Both sides work out alike who sends what to whom (`engine/plan/rank_plan.py`), so a decode
rank takes from just the prefill ranks that it needs, and everything moves from rank to rank, with
nobody in between. Each pair of ranks has a handoff of its own; `HandoffSet` ends those of a process
together, and the engine, which waits for all of its ranks anyway, those of several processes.

    decode rank:   peers = connect_ranks(agent, addresses_of_all_prefill_ranks)
                   handoff = HandoffSet([agent.receive_tokens("r", name, tables, num_tokens=1000)
                                         for name in peers.names.values()])
    prefill rank:  handoff = HandoffSet([agent.send("r", tables)
                                         for _ in range(num_readers(agent, "decode-0"))])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...control.errors import NotConnected
from ...control.keys import join_address, split_address
from .agent import CONNECT_TIMEOUT_S, Agent
from .sessions import rank_plan_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...engine.plan.rank_plan import RankPlan


class RankPeers(NamedTuple):
    """The prefill ranks that one decode rank needs.

    Attributes:
        names: of the connected agents that it takes from, by rank.
        plan: of both sets of ranks.
    """

    names: dict[int, str]
    plan: RankPlan


def connect_ranks(
    agent: Agent,
    addresses: Sequence[str],
    timeout_s: float = CONNECT_TIMEOUT_S,
    *,
    ports_follow: bool = False,
) -> RankPeers:
    """Connect a decode rank to the prefill ranks that it needs.

    Args:
        addresses: of the agents of all prefill ranks, by rank.
        ports_follow: the first rank's address alone will do: the next ranks have the next ports.

    Raises:
        HelloError, EngineError: as for `Agent.connect`; the ranks do not make one model.
    """
    mine = agent.descriptor
    first = agent.connect(addresses[0], timeout_s)
    plan = rank_plan_of(agent.descriptor_of(first), mine)
    if ports_follow and len(addresses) == 1:
        addresses = [_port_after(addresses[0], rank) for rank in range(len(plan.src))]
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


def _port_after(address: str, count: int) -> str:
    """Return the address of the agent whose port is `count` after this one's; of the same key."""
    endpoint, key = split_address(address)
    host, _, port = endpoint.rpartition(":")
    return join_address(f"{host}:{int(port) + count}", key)


def num_readers(agent: Agent, peer: str) -> int:
    """Return how many decode ranks this prefill rank sends to, when it is asked by `peer`'s engine.

    Raises:
        NotConnected: no such peer.
    """
    mine = agent.descriptor
    return len(rank_plan_of(mine, agent.descriptor_of(peer)).of(mine.rank))
