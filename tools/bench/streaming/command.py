"""`kvferry bench streaming`: what streaming a prompt's layers costs the forward pass, and hides."""

from __future__ import annotations

import torch

from kvferry.tools.bench.cli import JsonPath, fail
from kvferry.tools.bench.figures import WrongBytes, write_json
from kvferry.tools.bench.streaming import measure as streaming_measure


def streaming(json_path: JsonPath = None) -> None:
    """Stream layers of Llama 70B's and DeepSeek V3's shapes while a stand-in for them computes.

    Two GPUs for one rank at each end, four for two; one GPU for both ends shares its memory with the forward pass. Beside it the same prompt is moved when all of it is computed, pushed and pulled. Exits 1 if bytes arrived wrong, or if there is no GPU.
    """
    if not torch.cuda.is_available():
        fail("streaming", "torch sees no CUDA device")
    try:
        rows = streaming_measure.measure_all(streaming_measure.cases(torch.cuda.device_count()))
    except WrongBytes as error:
        fail("streaming", f"bytes arrived wrong: {error}")
    write_json(json_path, rows)
