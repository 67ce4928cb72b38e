"""Both sides of the model test of `test_ranks_end_to_end.py`, each in a process of its own.

Started with the number of an inherited pipe; takes its side and arguments from there.
A process drives the agents of all ranks of its engine. Pools hold heads as tensor parallelism
splits them: a rank's pool has the heads of that rank alone.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.adapters.agent.agent import Agent
from kvferry.adapters.agent.handoff import HandoffSet
from kvferry.adapters.agent.ranks import (
    connect_ranks,
)
from kvferry.adapters.transformers import blocks_for, export_cache, import_cache
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.tools.demo import model as demo_model

if TYPE_CHECKING:
    from collections.abc import Sequence

NHD, HND = "plane block token head dim", "plane block head token dim"
WAIT_S = 120.0  # a loaded machine takes tens of seconds to import the model
NUM_BLOCKS = {16: 128, 64: 40}


class Ranks:
    """One engine's ranks: a pool and an agent for each, in one process.

    With more ranks than KV heads, each head is on several ranks.
    """

    def __init__(self, role: Any, degree: int, dims: str, tokens: int, transport: str) -> None:
        self.model = demo_model.make_model()
        config = self.model.config
        num_heads = config.num_key_value_heads
        share = max(1, num_heads // degree)
        self.heads = [
            (first, first + share)
            for first in (rank * num_heads // degree for rank in range(degree))
        ]
        self.dims, self.tokens = dims, tokens
        self.num_heads = num_heads
        sizes = {
            "plane": 2,
            "block": NUM_BLOCKS[tokens],
            "token": tokens,
            "head": share,
            "dim": config.head_dim,
        }
        shape = [sizes[name] for name in dims.split()]
        self.pools = [
            [
                torch.full(shape, torch.nan, dtype=torch.bfloat16)
                for _ in range(config.num_hidden_layers)
            ]
            for _ in range(degree)
        ]
        layouts = [
            KVLayout.from_tensors(
                pool,
                dims,
                head_start=held[0],
                tp_mode="replicate" if degree > num_heads else "split",
                model_heads=num_heads,
            )
            for pool, held in zip(self.pools, self.heads, strict=True)
        ]
        self.agents = [
            Agent(
                name=f"{role}-{rank}",
                role=role,
                layout=layout,
                tensors=pool,
                transports=(transport,),
                ranks=layouts,
                rank=rank,
            )
            for rank, (layout, pool) in enumerate(zip(layouts, self.pools, strict=True))
        ]
        self._free = np.random.default_rng(degree).permutation(NUM_BLOCKS[tokens]).tolist()

    def allocate(self, num_tokens: int) -> list[int]:
        count = blocks_for(num_tokens, self.tokens)
        taken, self._free = self._free[:count], self._free[count:]
        assert len(taken) == count
        return [int(block) for block in taken]

    def view(self, rank: int, layer: int) -> torch.Tensor:
        """`[plane, block, token, head, dim]` of a rank's pool."""
        pool = self.pools[rank][layer]
        return pool if self.dims == NHD else pool.transpose(2, 3)

    def export(self, cache: Any, ids: list[int]) -> None:
        """A sequence's cache into the blocks of every rank, its heads alone."""
        shape = list(self.view(0, 0).shape)
        shape[3] = self.num_heads
        whole = [torch.zeros(shape, dtype=torch.bfloat16) for _ in self.pools[0]]
        export_cache(cache, whole, ids)
        for rank, (first, last) in enumerate(self.heads):
            for layer, full in enumerate(whole):
                self.view(rank, layer)[:, ids] = full[:, ids, :, first:last]

    def gather(self, ids: list[int], num_tokens: int) -> Any:
        """A sequence's cache out of the blocks of all ranks; replicas must agree."""
        whole = []
        for layer in range(len(self.pools[0])):
            shape = list(self.view(0, layer).shape)
            shape[3] = self.num_heads
            full = torch.full(shape, torch.nan, dtype=torch.bfloat16)
            for rank, (first, last) in enumerate(self.heads):
                mine = self.view(rank, layer)[:, ids]
                there = full[:, ids, :, first:last]
                known = ~there.isnan()
                assert torch.equal(there[known], mine[known])
                full[:, ids, :, first:last] = mine
            whole.append(full)
        return import_cache(whole, ids, num_tokens)

    def close(self) -> None:
        for agent in self.agents:
            agent.close()


def run_prefill(
    pipe: Connection[Any, Any], prompts: Sequence[Sequence[int]], transport: str
) -> None:
    """TP2, NHD, blocks of 16: computes, hands over, and then decodes on as one process would."""
    torch.set_num_threads(1)
    ranks = Ranks("prefill", 2, NHD, 16, transport)
    pipe.send([agent.address for agent in ranks.agents])
    caches, sets = [], []
    for number, prompt in enumerate(prompts):
        cache = demo_model.prefill(ranks.model, prompt)
        ids = ranks.allocate(len(prompt))
        ranks.export(cache, ids)
        caches.append(cache)
        # Each head goes to two of four ranks.
        sets.append(
            HandoffSet(
                [
                    a.send(f"r{number}", ids, timeout_s=WAIT_S)
                    for a in ranks.agents
                    for _ in range(2)
                ]
            )
        )
    pipe.send(None)
    HandoffSet(sets).wait(WAIT_S)
    pipe.send(demo_model.generate(ranks.model, prompts, caches, 8))
    pipe.recv()  # decode is done
    ranks.close()


def run_decode(
    pipe: Connection[Any, Any],
    prompts: Sequence[Sequence[int]],
    transport: str,
    addresses: list[str],
) -> None:
    """TP4, HND, blocks of 64: takes every request, and goes on from it."""
    torch.set_num_threads(1)
    ranks = Ranks("decode", 4, HND, 64, transport)
    peers = [connect_ranks(agent, addresses, 30.0) for agent in ranks.agents]
    caches = []
    for number, prompt in enumerate(prompts):
        ids = ranks.allocate(len(prompt))
        HandoffSet(
            [
                agent.receive_tokens(
                    f"r{number}", name, ids, num_tokens=len(prompt), timeout_s=WAIT_S
                )
                for agent, known in zip(ranks.agents, peers, strict=True)
                for name in known.names.values()
            ]
        ).wait(WAIT_S)
        caches.append(ranks.gather(ids, len(prompt)))
    talks = [sorted(known.names) for known in peers]
    pipe.send((talks, demo_model.generate(ranks.model, prompts, caches, 8)))
    pipe.recv()
    ranks.close()


def main() -> None:
    pipe: Connection[Any, Any] = Connection(int(sys.argv[1]))
    side, *arguments = pipe.recv()
    if side == "prefill":
        run_prefill(pipe, *arguments)
    else:
        run_decode(pipe, *arguments)


if __name__ == "__main__":
    main()
