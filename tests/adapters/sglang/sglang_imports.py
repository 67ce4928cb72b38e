"""Lets SGLang's disaggregation classes be imported and made where SGLang's server cannot run.

Real are `sglang.srt.disaggregation` (all that is used of it), its plug-in and hook machinery, network
and environment utilities and the bootstrap server. Left out, because they import kernels for GPUs:
the package's own `__init__`, its model configurations, its process groups, its page-interleaved pool
and its server arguments; nothing of theirs is called here. What a running server has published as its
configuration is `PARALLEL`, `DISAGG` and so on.
"""

from __future__ import annotations

import logging
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PARALLEL = SimpleNamespace(
    attn_tp_size=1,
    attn_tp_rank=0,
    attn_cp_size=1,
    attn_cp_rank=0,
    attn_dcp_size=1,
    attn_dcp_rank=0,
    attn_dp_size=1,
    attn_dp_rank=0,
    dist_init_addr=None,
    dp_size=1,
    enable_cp_tp_group_sharing=False,
    enable_dsa_cache_layer_split=False,
    enable_kv_cache_sharding=False,
    load_balance_method="round_robin",
    nnodes=1,
    num_dp_ranks=1,
    pp_group=None,
    pp_size=1,
)
DISAGG = SimpleNamespace(
    disaggregation_bootstrap_port=0,
    disaggregation_decode_allocation_policy="early",
    disaggregation_transfer_backend="kvferry",
)
SERVING = SimpleNamespace(host="127.0.0.1", port=0)
OBSERVABILITY = SimpleNamespace(enable_trace=False)


def install(packages: Path) -> None:
    """Makes `import sglang` find what is unpacked in this folder."""
    sys.path.append(str(packages))
    _module("sglang", packages / "sglang")
    _module("sglang.srt.configs", Path())
    _module("sglang.srt.distributed", Path())
    _module(
        "sglang.srt.configs.model_config",
        get_dsa_mtp_topk_width=_not_called,
        is_deepseek_dsa=_not_called,
    )
    _module("sglang.srt.distributed.communication_tags", P2PTag=object)
    _module("sglang.srt.distributed.parallel_state", GroupCoordinator=object)
    _module("sglang.srt.mem_cache.page_interleave", get_kv_shard_group=_not_called)
    _module("sglang.srt.server_args", ServerArgs=object)
    from sglang.srt import runtime_context

    # Transformers, which SGLang's `__init__` imports, gives it to every logger.
    logging.Logger.warning_once = logging.Logger.warning  # type: ignore[attr-defined]
    runtime_context.get_parallel = lambda: PARALLEL
    runtime_context.get_disagg = lambda: DISAGG
    runtime_context.get_serving = lambda: SERVING
    runtime_context.get_observability = lambda: OBSERVABILITY


def _module(name: str, path: Path | None = None, **contents: Any) -> None:
    module: Any = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=path is not None)
    if path is not None:
        module.__path__ = [str(path)]
    vars(module).update(contents)
    sys.modules[name] = module


def _not_called(*_: Any, **__: Any) -> None:
    raise AssertionError("these tests are not meant to get here")
