"""Time to first token through a pair of real engines: kvferry's connector beside NIXL's.

Runs in vLLM's environment (see `environment.py`), one pair of engines after the other:

    python -m kvferry.tools.vllm_cpu.measure MODEL [kvferry:push:cma kvferry:pull:tcp nixl ...]

*Decode's time* is from the request's arrival at decode until its first token, when prefill is done
already: loading and one forward pass of one token. *Both at once* is from the moment that both have
the request, less what prefill alone takes for the like of it. *Alone* is decode's time for a prompt
that it has in its own cache but for the last block: the part that no connector can save.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

from .engine import Engine

PROMPT_TOKENS = 500
REQUESTS = 40
WARM_UP = 5
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


def connector(kind: str, role: str) -> dict[str, Any]:
    """A `KVTransferConfig`: `kvferry:MODE:TRANSPORT`, or `nixl`."""
    if kind == "nixl":
        return {"kv_connector": "NixlConnector", "kv_role": role}
    _, mode, transport = kind.split(":")
    return {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.adapters.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"mode": mode, "transports": [transport]},
    }


class Measurement:
    """One pair of engines, and prompts that no cache has seen."""

    def __init__(self, model: str, kind: str) -> None:
        import os

        common = {"model": model, "dtype": "float32", "block_size": 32}
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = "5600"
        self.prefill = Engine("p", common | {"connector": connector(kind, "kv_producer")})
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = "5700"
        self.decode = Engine("d", common | {"connector": connector(kind, "kv_consumer")})
        self._random = random.Random(1)

    def prompt(self) -> list[int]:
        return [self._random.randint(3, 258) for _ in range(PROMPT_TOKENS)]

    def first_token_s(self, prompt: list[int], params: Any) -> float:
        """From arrival at decode until the first token."""
        name, output = self.decode.submit(prompt, 1, params)
        output.result(60)
        return self.decode.first_token_s[name]

    def one_after_the_other(self) -> tuple[float, float, dict[str, Any]]:
        """Prefill's own time, decode's time, and what prefill answered."""
        prompt = self.prompt()
        started_s = time.monotonic()
        params = self.prefill.generate(prompt, 1, dict(TO_PREFILL)).kv_transfer_params
        took_s = time.monotonic() - started_s
        return took_s, self.first_token_s(prompt, dict(params)), params

    def alone(self) -> float:
        """Decode's time for a prompt whose whole blocks it has."""
        prompt = self.prompt()
        self.decode.generate(prompt, 1)
        return self.first_token_s(prompt, None)

    def at_once(self, first: dict[str, Any], number: int) -> float:
        """From the arrival at both until decode's first token."""
        prompt, name = self.prompt(), f"measured-{number}"
        address = {key: first[key] for key in ("remote_engine_id", "remote_host", "remote_port")}
        to_decode = {"do_remote_prefill": True, "transfer_id": name} | address
        started, output = self.decode.submit(prompt, 1, to_decode)
        self.prefill.generate(prompt, 1, TO_PREFILL | {"transfer_id": name})
        output.result(60)
        return self.decode.first_token_s[started]


def measure(model: str, kind: str) -> dict[str, Any]:
    """Medians in milliseconds."""
    pair = Measurement(model, kind)
    prefills, decodes, alone, at_once = [], [], [], []
    for number in range(WARM_UP + REQUESTS):
        prefill_s, decode_s, params = pair.one_after_the_other()
        prefills.append(prefill_s)
        decodes.append(decode_s)
        alone.append(pair.alone())
        if kind.startswith("kvferry:push"):
            at_once.append(pair.at_once(params, number) - prefill_s)
    found = {"prefill": prefills, "decode": decodes, "alone": alone, "at_once": at_once}
    medians = {
        name: round(1e3 * statistics.median(values[WARM_UP:]), 2) if values else None
        for name, values in found.items()
    }
    return {"kind": kind, "requests": REQUESTS, "prompt_tokens": PROMPT_TOKENS} | medians


def measure_idle_step(steps: int = 20_000) -> dict[str, float]:
    """Microseconds that the connector adds to a step when there is nothing to move."""
    import torch

    from ...adapters.vllm_groups import CacheGroup
    from ...adapters.vllm_layout import Backend, describe_caches, heads_of_rank
    from ...adapters.vllm_scheduler import SchedulerSide
    from ...adapters.vllm_settings import Settings
    from ...adapters.vllm_worker import WorkerSide

    names = [f"model.layers.{number}.attn" for number in range(32)]
    caches = {name: torch.zeros(8, 2, 32, 64) for name in names}
    backend = Backend("CPU_ATTN", "vec", "")
    groups = (CacheGroup(0, "full", tuple(names), 32),)
    layout, in_order = describe_caches(caches, groups, backend, heads_of_rank(2, 1, 0))
    worker = WorkerSide(
        engine_id="idle",
        rank=0,
        role="both",
        settings=Settings(),
        layout=layout,
        names=in_order,
        caches=caches,
        num_blocks=layout.num_blocks,
    )
    scheduler = SchedulerSide("idle", Settings(), groups=groups, tp_size=1, pp_size=1)
    output = SimpleNamespace(total_num_scheduled_tokens=8)

    def worker_step(orders: Any) -> None:
        worker.end_preempted(orders)
        worker.before_forward(orders)
        for name in names:
            worker.layer_computed(name)
        worker.begin_receives(orders)
        worker.after_forward()
        worker.take_results(idle=False)

    took: dict[str, list[float]] = {"scheduler": [], "worker": []}
    for _ in range(steps):
        started_s = time.perf_counter()
        orders = scheduler.take_orders(output)
        between_s = time.perf_counter()
        worker_step(orders)
        took["scheduler"].append(between_s - started_s)
        took["worker"].append(time.perf_counter() - between_s)
    worker.close()
    return {name: round(1e6 * statistics.median(each), 2) for name, each in took.items()}


def main(model: str, *kinds: str) -> None:
    """Measures each kind; prints a JSON line for each."""
    for kind in kinds or ("kvferry:push:cma", "nixl"):
        found = {"idle_us": measure_idle_step()} if kind == "idle" else measure(model, kind)
        print("==", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
