"""Workers of the vLLM connector for tests: caches shaped as vLLM's, and steps as vLLM makes them."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any

import torch

from kvferry.adapters.vllm.cache import Backend, CacheGroup, Heads, describe_caches
from kvferry.adapters.vllm.orders import Orders, ReceiveOrder
from kvferry.adapters.vllm.settings import Settings
from kvferry.adapters.vllm.worker import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvferry.adapters.vllm.orders import Results

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 12, 2, 4, 16
WAIT_S = 30.0
CPU = Backend("CPU_ATTN", "vec", "0.32.0")
ROWS = Backend("FLASH_ATTN", "", "0.32.0")
NAMES = [f"model.layers.{number}.self_attn.attn" for number in range(LAYERS)]
SENTINEL = -7
FULL = (CacheGroup(0, "full", tuple(NAMES), TOKENS),)


def make_caches(
    seed: int | None, tokens: int = TOKENS, blocks: int = BLOCKS, device: str = "cpu"
) -> dict[str, Any]:
    """A cache a layer; all of one value if there is no seed."""
    shape = (blocks, HEADS, tokens, CONTENT)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    if seed is None:
        return {name: torch.full(shape, SENTINEL, **options) for name in NAMES}
    torch.manual_seed(seed)
    return {name: torch.randn(shape, **options) for name in NAMES}


def make_worker(
    engine_id: str,
    role: str,
    caches: dict[str, Any],
    *,
    transport: str,
    backend: Backend = CPU,
    groups: tuple[CacheGroup, ...] = FULL,
    split: int = 1,
    model: str = "",
    rank: int = 0,
    ranks: Any = (),
    **options: Any,
) -> WorkerSide:
    """The worker of one rank; `split` blocks of the cache are one of vLLM's."""
    heads = Heads.of_rank(1 if groups[0].kind == "mla" else HEADS, max(1, len(ranks)), rank)
    layout, names = describe_caches(caches, groups, backend, heads)
    return WorkerSide(
        engine_id=engine_id,
        rank=rank,
        role=role,
        settings=Settings(transports=(transport,), timeout_s=10, lease_s=10, **options),
        layout=layout,
        names=names,
        caches=caches,
        num_blocks=layout.num_blocks // split,
        ranks=ranks,
        model=model,
    )


def step(
    worker: WorkerSide, orders: Orders, *, computes: bool = False, names: Sequence[str] = NAMES
) -> Results:
    """One step, as vLLM's model runner makes it."""
    worker.before_forward(orders)
    for name in names if computes else ():
        worker.layer_computed(name)
    worker.begin_receives(orders)
    worker.after_forward()
    return worker.take_results(idle=not computes)


def until_reported(worker: WorkerSide, orders: Orders | None = None) -> Results:
    """A step with these orders, then steps without any, until one reports something."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        results = step(worker, orders or Orders())
        orders = None
        if results.sent or results.received:
            return results
    raise AssertionError("nothing was reported")


def ask(prefill: WorkerSide, blocks: list[int], num_tokens: int, local: int = 0) -> Orders:
    address = prefill.agent.address
    order = ReceiveOrder("d", "r", "p", [address], [blocks], num_tokens, local)
    return Orders(receives=[order])


def start_ranks(
    new_worker: Callable[..., WorkerSide],
    name: str,
    role: str,
    model: dict[str, Any],
    num: int,
    mode: str,
    groups: tuple[CacheGroup, ...] = FULL,
    **options: Any,
) -> list[tuple[WorkerSide, dict[str, Any]]]:
    """An engine of several ranks, each with its share of the model's heads; of a latent, all of it.

    Layers that share a tensor share a rank's part of it, too.
    """
    latent = groups[0].kind == "mla"
    shares = []
    for rank in range(num):
        parts: dict[int, Any] = {}
        for cache in model.values():
            part = cache if latent else cache.chunk(num, 1)[rank]
            parts.setdefault(cache.data_ptr(), part.clone() if latent else part.contiguous())
        shares.append({layer: parts[cache.data_ptr()] for layer, cache in model.items()})
    heads = 1 if latent else HEADS
    layouts = [
        describe_caches(shares[0], groups, CPU, Heads.of_rank(heads, num, rank))[0]
        for rank in range(num)
    ]
    options |= {"mode": mode, "ranks": layouts if num > 1 else (), "groups": groups}
    return [
        (new_worker(name, role, share, rank=rank, **options), share)
        for rank, share in enumerate(shares)
    ]


def two_ports() -> int:
    """The first of two ports that follow on each other, are free, and are given to nobody who asks
    for any."""
    for port in range(20_000 + os.getpid() % 5_000, 30_000, 2):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("all ports are taken")
