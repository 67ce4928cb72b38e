"""The demo's two processes: one computes prompts and their reference, one decodes what it is handed.

Each batch of prompts goes through the same steps:

1. prefill computes the prompts one by one into its pool and opens a handoff a transport for each;
2. decode asks for each request over each transport, waits for its last byte, and imports it. Both
   processes do nothing else meanwhile, so a handoff's latency is not that of the model;
3. decode generates from what arrived, a transport after the other; prefill generates the reference
   from caches that never left it, then starts on the next batch.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvferry.adapters.agent.agent import Agent
from kvferry.adapters.transformers import blocks_for, export_cache, import_cache
from kvferry.control.errors import HelloRefused
from kvferry.engine.errors import TransportUnavailable
from kvferry.tools.demo import model as demo_model
from kvferry.tools.demo.events import (
    Addresses,
    Computed,
    Connected,
    Finished,
    Generated,
    Prefilled,
    Ready,
    Received,
    Skipped,
    Step,
)
from kvferry.tools.demo.pool import TOKENS_PER_BLOCK, FragmentedPool

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from kvferry.tools.demo.events import Options

    Role = Literal["prefill", "decode"]


CONNECT_TIMEOUT_S = 20.0
"""Both processes may share one core, with a model's start-up still on it."""


class PeerGone(RuntimeError):
    """The other worker closed its pipe or stayed silent."""


def prefill(options: Options, parent: Connection, peer: Connection) -> None:
    """What the prefill process does."""
    device = options.devices[0]
    model = demo_model.make_model(device)
    prompts = demo_model.make_prompts(options.num_prompts)
    batches = demo_model.batches(options.num_prompts)
    pool = _make_pool(
        model, max(_num_blocks(prompts, batch) for batch in batches), seed=1, device=device
    )
    agents, unavailable = _make_agents("prefill", options, pool)
    parent.send(Ready("prefill"))
    peer.send(Addresses({name: agent.address for name, agent in agents.items()}, unavailable))
    transports = _receive(peer, Connected, options).transports

    for batch in batches:
        caches, block_ids, handoffs = [], [], []
        for prompt in batch:
            started_s = time.perf_counter()
            cache = demo_model.prefill(model, prompts[prompt])
            _synchronize(device)
            prefill_s = time.perf_counter() - started_s
            ids = pool.allocate(len(prompts[prompt]))
            export_cache(cache, pool.tensors, ids)
            caches.append(cache)
            block_ids.append(ids)
            parent.send(Prefilled(prompt, len(prompts[prompt]), prefill_s))
        for prompt, ids in zip(batch, block_ids, strict=True):
            handoffs.append(
                [
                    agents[name].send(f"{name}-{prompt}", ids, timeout_s=options.deadline_s)
                    for name in transports
                ]
            )
        peer.send(Computed(batch))
        for ids, of_prompt in zip(block_ids, handoffs, strict=True):
            for handoff in of_prompt:
                handoff.wait(options.deadline_s)
                handoff.blocks_free.wait(options.deadline_s)
            pool.free(ids)
        _generate(model, prompts, batch, caches, "reference", options, parent)

    _receive(peer, Finished, options)  # decode is done: no agent of ours is needed any more
    _finish("prefill", agents, pool, parent)


def decode(options: Options, parent: Connection, peer: Connection) -> None:
    """What the decode process does."""
    device = options.devices[1]
    model = demo_model.make_model(device)
    prompts = demo_model.make_prompts(options.num_prompts)
    longest = _num_blocks(prompts, range(len(prompts) - 1, len(prompts)))
    pool = _make_pool(model, longest, seed=2, device=device)
    agents, unavailable = _make_agents("decode", options, pool)
    parent.send(Ready("decode"))
    addresses: Addresses = _receive(peer, Addresses, options)
    peers = _connect(agents, addresses, unavailable, options)
    for name, reason in unavailable.items():
        parent.send(Skipped(name, reason))
    peer.send(Connected(tuple(peers)))
    layer = model.config.num_hidden_layers // 2

    for batch in demo_model.batches(options.num_prompts):
        _receive(peer, Computed, options)
        caches: dict[str, list[Any]] = {name: [] for name in peers}
        for prompt in batch:
            for name in peers:
                ids = pool.allocate(len(prompts[prompt]))
                _synchronize(device)  # the poison is in the blocks before anything else is
                started_s = time.perf_counter()
                handoff = agents[name].receive(
                    f"{name}-{prompt}", peers[name], ids, timeout_s=options.deadline_s
                )
                nbytes = handoff.wait(options.deadline_s)
                latency_s = time.perf_counter() - started_s
                if options.corrupt and prompt == options.num_prompts // 2:
                    pool.flip_bits(int(ids[(len(ids) - 1) // 2]), layer)
                caches[name].append(
                    import_cache(pool.tensors, ids, len(prompts[prompt]), config=model.config)
                )
                handoff.blocks_free.wait(options.deadline_s)
                pool.free(ids)
                parent.send(Received(name, prompt, nbytes, latency_s))
        for name in peers:
            _generate(model, prompts, batch, caches.pop(name), name, options, parent)

    finished = _finish("decode", agents, pool, parent)
    peer.send(finished)


def _generate(
    model: Any,
    prompts: list[list[int]],
    batch: range,
    caches: list[Any],
    path: str,
    options: Options,
    parent: Connection,
) -> None:
    """Generate a batch and tell the parent, a step at a time and then the tokens."""
    tokens = demo_model.generate(
        model,
        [prompts[prompt] for prompt in batch],
        caches,
        options.num_tokens,
        lambda: parent.send(Step(path, len(batch))),
    )
    parent.send(Generated(path, dict(zip(batch, tokens, strict=True))))


def _make_agents(
    role: Role, options: Options, pool: FragmentedPool
) -> tuple[dict[str, Agent], dict[str, str]]:
    """Return an agent for each transport, all of them on the one pool; and why some have none."""
    agents, unavailable = {}, {}
    for name in options.transports:
        try:
            agents[name] = Agent(
                name=f"{role}-{name}",
                role=role,
                layout=pool.layout,
                tensors=pool.tensors,
                transports=(name,),
            )
        except TransportUnavailable as error:
            if not options.skip_unavailable:
                raise
            unavailable[name] = error.message
    return agents, unavailable


def _connect(
    agents: dict[str, Agent],
    addresses: Addresses,
    unavailable: dict[str, str],
    options: Options,
) -> dict[str, str]:
    """Connect agents to their peers: the peer's name by transport, of those that work.

    Adds to `unavailable` those that do not.

    Raises:
        TransportUnavailable: a transport that was asked for, or every one, does not work.
    """
    peers = {}
    for name, agent in agents.items():
        if name not in addresses.agents:
            continue
        try:
            peers[name] = agent.connect(addresses.agents[name], CONNECT_TIMEOUT_S)
        except (TransportUnavailable, HelloRefused) as error:  # refused: there can be no link
            if not options.skip_unavailable:
                raise
            unavailable[name] = error.message
    unavailable.update(addresses.unavailable)
    if not peers:
        raise TransportUnavailable(
            "; ".join(f"{name}: {why}" for name, why in unavailable.items()), operation="connect"
        )
    return peers


def _make_pool(model: Any, blocks_in_use: int, *, seed: int, device: str) -> FragmentedPool:
    """Return a pool with room to scatter: three times the blocks that are ever held together."""
    return FragmentedPool(model.config, 3 * blocks_in_use, seed=seed, device=device)


def _synchronize(device: str) -> None:
    """Wait for what this process has enqueued on its GPU, if it has one."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def _num_blocks(prompts: list[list[int]], batch: range) -> int:
    """Return how many blocks the prompts of a batch fill."""
    return sum(blocks_for(len(prompts[prompt]), TOKENS_PER_BLOCK) for prompt in batch)


def _receive(peer: Connection, kind: Any, options: Options) -> Any:
    """Return the other worker's next message, which must be a `kind`.

    Raises:
        PeerGone: it ended, or said nothing for `options.deadline_s`.
    """
    try:
        if not peer.poll(options.deadline_s):
            raise PeerGone(f"the other process was silent for {options.deadline_s:.0f} s")
        message = peer.recv()
    except (EOFError, ConnectionResetError) as error:
        raise PeerGone("the other process ended") from error
    if not isinstance(message, kind):
        raise PeerGone(f"the other process sent {message!r} instead of {kind.__name__}")
    return message


def _finish(
    role: Role, agents: dict[str, Agent], pool: FragmentedPool, parent: Connection
) -> Finished:
    """Close the agents, look the pool over, and tell the parent."""
    for agent in agents.values():
        agent.close()
    finished = Finished(role, pool.num_blocks, pool.num_free, pool.stray_blocks())
    parent.send(finished)
    return finished
