"""What vLLM's connector costs a step in which it has nothing to move. Needs no vLLM.

python -m kvferry.tools.vllm_cpu.idle_step
"""

from __future__ import annotations

import json
import statistics
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ...adapters.vllm.cache import Backend, CacheGroup, Heads, describe_caches
from ...adapters.vllm.scheduler import SchedulerSide
from ...adapters.vllm.settings import Settings
from ...adapters.vllm.worker import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS = 32


def medians_us(
    steps: int, scheduler_step: Callable[[], Any], worker_step: Callable[[Any], None]
) -> dict[str, float]:
    """Time steps of both sides: what the scheduler's returns, the worker's takes."""
    took: dict[str, list[float]] = {"scheduler_us": [], "worker_us": [], "both_us": []}
    for _ in range(steps):
        started_s = time.perf_counter()
        told = scheduler_step()
        between_s = time.perf_counter()
        worker_step(told)
        ended_s = time.perf_counter()
        took["scheduler_us"].append(1e6 * (between_s - started_s))
        took["worker_us"].append(1e6 * (ended_s - between_s))
        took["both_us"].append(1e6 * (ended_s - started_s))
    return {name: round(statistics.median(each), 2) for name, each in took.items()}


def measure(steps: int = 20_000) -> dict[str, float]:
    """Medians in microseconds, of both sides."""
    names = [f"model.layers.{number}.attn" for number in range(LAYERS)]
    caches = {name: torch.zeros(8, 2, 32, 64) for name in names}
    backend = Backend("CPU_ATTN", "vec", "")
    groups = (CacheGroup(0, "full", tuple(names), 32),)
    layout, in_order = describe_caches(caches, groups, backend, Heads.of_rank(2, 1, 0))
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
    scheduler = SchedulerSide("idle", Settings(), groups=groups, tp_size=1)
    output = SimpleNamespace(total_num_scheduled_tokens=8, num_scheduled_tokens={"a": 8})

    def worker_step(orders: Any) -> None:
        worker.before_forward(orders)
        for name in names:
            worker.layer_computed(name)
        worker.begin_receives(orders)
        worker.after_forward()
        worker.take_results(idle=False)

    try:
        return medians_us(steps, lambda: scheduler.take_orders(output), worker_step)
    finally:
        worker.close()


if __name__ == "__main__":
    print(json.dumps(measure()))
