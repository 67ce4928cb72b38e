"""The connector's figures through vLLM's own classes, without an engine.

Usage: stats.py RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import REGISTRY
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorLogging,
    KVConnectorProm,
)

from kvferry.adapters.vllm.orders import Figures


def take(*, loads: int, sends: int = 0, failed: int = 0) -> dict[str, Any]:
    """What a worker has of one step."""
    figures = Figures(
        [0.002 * (number + 1) for number in range(loads)],
        [1000] * loads,
        [500] * sends,
        failed,
        failed,
    )
    return figures.take()


def main(result_file: str) -> None:
    """Writes down what vLLM's log line and its metrics have."""
    config = KVTransferConfig(
        kv_connector="KVFerryConnector",
        kv_connector_module_path="kvferry.adapters.vllm",
        kv_role="kv_both",
    )
    steps = [take(loads=2), take(loads=1, sends=4, failed=1)]
    lines: list[str] = []
    log = KVConnectorLogging(config)
    log.log(lambda text, *values: lines.append(text % values))  # nothing ended: no line
    for step in steps:
        # Between processes it is plain data; vLLM makes it anew on the other side.
        log.observe(json.loads(json.dumps(step)))
    log.log(lambda text, *values: lines.append(text % values))
    log.log(lambda text, *values: lines.append(text % values))
    prom = KVConnectorProm(
        SimpleNamespace(kv_transfer_config=config),
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )
    prom.observe(steps[0], 1)
    prom.observe(steps[1], 1)
    metrics = {
        f"{sample.name}/{sample.labels['engine']}": sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("vllm:kvferry_") and "le" not in sample.labels
        if not sample.name.endswith("_created")
    }
    Path(result_file).write_text(json.dumps({"lines": lines, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
