"""What `KVFerryConnector` costs a step of vLLM's in which it has nothing to move: all that vLLM calls.

Runs in vLLM's environment (see `environment.py`), without an engine:

    python -m kvferry.tools.vllm_cpu.hooks

The connector is made once for the scheduler and once for a worker of 32 layers, as vLLM makes it, and
its hooks are called in vLLM's order. Medians, in microseconds.
"""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput

from ...adapters.vllm.connector import KVFerryConnector
from .idle_step import medians_us

LAYERS = 32
NAMES = [f"model.layers.{number}.self_attn.attn" for number in range(LAYERS)]
BLOCKS, HEADS, TOKENS, HEAD_SIZE = 8, 2, 32, 32
GOAL_US = 50.0  # that both together may cost


def make(role: KVConnectorRole) -> Any:
    """Return one of the two, of a model of 32 layers on a CPU."""
    spec = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float32
    )
    layer = SimpleNamespace(
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "CPU_ATTN"), isa="vec"
    )
    config = SimpleNamespace(
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVFerryConnector",
            kv_connector_module_path="kvferry.adapters.vllm",
            kv_role="kv_both",
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1, rank=0),
        model_config=SimpleNamespace(
            use_mla=False, get_total_num_kv_heads=lambda: HEADS, served_model_name="m", model="m"
        ),
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(NAMES, layer)),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        speculative_config=None,
    )
    groups = [KVCacheGroupSpec(NAMES, spec)]
    return KVFerryConnector(config, role, KVCacheConfig(BLOCKS, [], groups))


def scheduler_step(connector: Any, output: Any) -> Any:
    """Return what vLLM's scheduler calls; return what it sends the workers."""
    metadata = connector.build_connector_meta(output)
    connector.update_connector_output(KVConnectorOutput())
    connector.has_pending_push_work()
    return metadata


def worker_step(connector: Any, metadata: Any) -> None:
    """What its model runner calls."""
    connector.bind_connector_metadata(metadata)
    for name in NAMES:
        connector.wait_for_layer_load(name)
        connector.save_kv_layer(name, None, None)
    connector.start_load_kv(None)
    connector.wait_for_save()
    connector.get_transfer_results(set())
    connector.get_block_ids_with_load_errors()
    connector.get_kv_connector_stats()
    connector.get_kv_connector_kv_cache_events()
    connector.build_connector_worker_meta()
    connector.clear_connector_metadata()


def measure(steps: int = 5_000) -> dict[str, float]:
    """Of both sides, and of both together."""
    scheduler, worker = make(KVConnectorRole.SCHEDULER), make(KVConnectorRole.WORKER)
    shape = (BLOCKS, HEADS, TOKENS, 2 * HEAD_SIZE)
    worker.register_kv_caches({name: torch.zeros(shape) for name in NAMES})
    output = SchedulerOutput.make_empty()
    output.total_num_scheduled_tokens = 8
    try:
        return medians_us(
            steps, partial(scheduler_step, scheduler, output), partial(worker_step, worker)
        )
    finally:
        worker.shutdown()


if __name__ == "__main__":
    print(json.dumps(measure() | {"goal_us": GOAL_US, "layers": LAYERS}))
