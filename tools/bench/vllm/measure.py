"""Measures vLLM with a connector and without, all engines on one GPU, in one run.

Runs where vLLM for GPUs, torch and kvferry are:

    python -m kvferry.tools.bench.vllm.measure [--json FILE] [none kvferry:push nixl:pull ...]

Every kind is a decode engine, and a prefill engine before it unless it is `none`; all live at once and
are asked in turns, each round in another order. A Llama of 16 layers with random weights, 64 KiB of KV
a token; compiled, with CUDA graphs.

*Decode* is the time a token takes in a batch, from the first token to the last, and its ratio to the
first kind's, round by round. *Load* is one token at decode when prefill has finished, less a step of one
token without a load. Tokens after a load are compared between all kinds that load.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("UCX_TLS", "all")

from kvferry.tools.bench.peers import Peer, close_all
from kvferry.tools.vllm_cpu.engine import Engine, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KINDS = ("none", "kvferry:push", "kvferry:pull", "nixl:pull")
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
VOCABULARY = 4096
KV_TOKEN_NBYTES = 64 << 10
BATCHES = (1, 8, 32)
BATCH_ROUNDS = 12
DECODE_PROMPT_TOKENS = 64
DECODED_TOKENS = 128
PROMPTS_TOKENS = (17, 100, 1000, 4000, 8000)
LOAD_ROUNDS = 6
COMPARED_TOKENS = 24
START_S = 400.0
PORT = 5600  # of NIXL's first engine


def make_model(folder: Path) -> None:
    """Write the model, if it is not there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=VOCABULARY,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        initializer_range=0.06,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def connector(kind: str, role: str) -> dict[str, Any] | None:
    """Return a `KVTransferConfig` for `kvferry:MODE` or `nixl:MODE`; None for `none`."""
    name, _, mode = kind.partition(":")
    if name == "none":
        return None
    if name == "nixl":
        return {"kv_connector": f"Nixl{mode.title()}Connector", "kv_role": role}
    return {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.adapters.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"mode": mode},
    }


class Timed:
    """One engine, in a process of its own: what takes time is timed there."""

    def __init__(self, role: str, options: dict[str, Any], port: int) -> None:
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
        started_s = time.monotonic()
        self._engine = Engine(role, options)
        self._start_s = time.monotonic() - started_s

    def start_s(self) -> float:
        """Return how long the engine took to start."""
        return self._start_s

    def prefill(self, prompt: list[int], name: str) -> Any:
        """Compute a prompt; return where decode finds it."""
        return self._engine.generate(prompt, 1, dict(TO_PREFILL), name).kv_transfer_params

    def generate(self, prompt: list[int], count: int, params: Any, name: str) -> list[int]:
        """Return so many tokens."""
        return tokens(self._engine.generate(prompt, count, params, name))

    def first_token_ms(self, prompt: list[int], params: Any = None, name: str = "") -> float:
        """Return what one token takes, from the request's arrival."""
        name, future = self._engine.submit(prompt, 1, params, name)
        future.result(120)
        return 1e3 * self._engine.first_token_s[name]

    def decode_ms(self, prompts: Sequence[list[int]], count: int) -> float:
        """Return what a token takes in a batch, from the first to the last."""
        begun = [self._engine.submit(each, count) for each in prompts]
        for _, future in begun:
            future.result(120)
        engine, names = self._engine, [name for name, _ in begun]
        first_s = max(engine.started[name] + engine.first_token_s[name] for name in names)
        last_s = max(engine.ended_s[name] for name in names)
        return 1e3 * (last_s - first_s) / (count - 1)

    def close(self) -> None:
        """End its processes."""
        self._engine.close()


class Pair:
    """The engines of one kind, which start side by side with others'."""

    def __init__(self, kind: str, number: int, options: dict[str, Any]) -> None:
        self.kind = kind
        self._count = 0
        self.first_load_ms: float | None = None
        self.engines = {
            role: Peer(
                Timed,
                role,
                options | {"connector": connector(kind, role)},
                PORT + 10 * (2 * number + place),
                daemon=False,
            )
            for place, role in enumerate(("kv_consumer", "kv_producer"))
            if role == "kv_consumer" or connector(kind, role) is not None
        }
        for engine in self.engines.values():
            engine.tell("start_s")
        self.decode = self.engines["kv_consumer"]
        self.prefill = self.engines.get("kv_producer")

    def wait(self) -> None:
        """Return when its engines have started."""
        for role, engine in self.engines.items():
            print(f"{self.kind} {role}: up in {engine.answer(START_S):.0f} s", flush=True)

    def decode_ms(self, prompts: Sequence[list[int]]) -> float:
        return float(self.decode.call("decode_ms", prompts, DECODED_TOKENS))

    def step_ms(self, new: Callable[[], list[int]]) -> float:
        """Return what one token takes without a load."""
        return float(self.decode.call("first_token_ms", new()[:1]))

    def load_ms(self, new: Callable[[], list[int]]) -> float:
        """Return what one token takes at decode when prefill has finished."""
        prompt = new()
        took_ms = float(self.decode.call("first_token_ms", prompt, *self._prefilled(prompt)))
        if self.first_load_ms is None:
            self.first_load_ms = took_ms
        return took_ms

    def tokens_after_load(self, prompt: list[int]) -> list[int]:
        found: list[int] = self.decode.call(
            "generate", prompt, COMPARED_TOKENS, *self._prefilled(prompt)
        )
        return found

    def _prefilled(self, prompt: list[int]) -> tuple[Any, str]:
        assert self.prefill is not None
        self._count += 1
        name = f"{self.kind}-{self._count}"
        return self.prefill.call("prefill", prompt, name), name


def in_rounds(
    pairs: Sequence[Pair], count: int, ask: Callable[[Pair], float]
) -> dict[str, list[float]]:
    """Ask all in turns, each round in another order, after one round that warms up."""
    found: dict[str, list[float]] = {pair.kind: [] for pair in pairs}
    for number in range(count + 1):
        start = number % len(pairs)
        for pair in (*pairs[start:], *pairs[:start]):
            value = ask(pair)
            if number:
                found[pair.kind].append(value)
    return found


def measure(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Measure everything; print and return it."""
    numbers = random.Random(5)

    def prompt(num_tokens: int) -> list[int]:
        return [numbers.randrange(3, VOCABULARY) for _ in range(num_tokens)]

    report: dict[str, Any] = {"decode": [], "load": [], "tokens": []}
    for batch in BATCHES:
        prompts = [prompt(DECODE_PROMPT_TOKENS) for _ in range(batch)]
        found = in_rounds(pairs, BATCH_ROUNDS, functools.partial(Pair.decode_ms, prompts=prompts))
        base = found[pairs[0].kind]
        for kind, each in found.items():
            ratios = [mine / other for mine, other in zip(each, base, strict=True)]
            row = {"batch": batch, "kind": kind, "ms": statistics.median(each)}
            report["decode"].append(row | {"ratio": statistics.median(ratios)})
            print(f"decode, batch {batch:2}, {kind:13} {row['ms']:7.3f} ms a token, "
                  f"{statistics.median(ratios):.3f} of {pairs[0].kind}", flush=True)  # fmt: skip
    loading = [pair for pair in pairs if pair.prefill is not None]
    for num_tokens in PROMPTS_TOKENS if loading else ():
        new = functools.partial(prompt, num_tokens)
        loads = in_rounds(loading, LOAD_ROUNDS, functools.partial(Pair.load_ms, new=new))
        steps = in_rounds(loading, LOAD_ROUNDS, functools.partial(Pair.step_ms, new=new))
        for kind, each in loads.items():
            step_ms, load_ms = statistics.median(steps[kind]), statistics.median(each)
            nbytes = num_tokens * KV_TOKEN_NBYTES
            report["load"].append(
                {"tokens": num_tokens, "nbytes": nbytes, "kind": kind, "step_ms": step_ms}
                | {"load_ms": load_ms, "more_ms": load_ms - step_ms}
            )
            print(f"load, {num_tokens:5} tokens, {nbytes / 1e6:6.1f} MB, {kind:13} "
                  f"{load_ms:8.2f} ms, {load_ms - step_ms:8.2f} beyond a step", flush=True)  # fmt: skip
    for num_tokens in PROMPTS_TOKENS if len(loading) > 1 else ():
        text = prompt(num_tokens)
        made = {pair.kind: pair.tokens_after_load(text) for pair in loading}
        equal = len({*map(tuple, made.values())}) == 1
        report["tokens"].append({"tokens": num_tokens, "equal": equal})
        print(f"tokens after a load of {num_tokens}: {'equal' if equal else made}", flush=True)
    report["first_load_ms"] = {pair.kind: pair.first_load_ms for pair in loading}
    print("first load, ms:", report["first_load_ms"], flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, default=Path("vllm-bench-model"))
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    given = parser.parse_args()
    make_model(given.model)
    options = {
        "model": str(given.model),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": 9000,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 9000,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 4 << 30,
        "enable_prefix_caching": False,
        "enforce_eager": given.eager,
        "cudagraph_capture_sizes": [] if given.eager else [1, 2, 4, 8, 16, 32],
    }
    pairs: list[Pair] = []
    try:
        for number, kind in enumerate(given.kinds):
            pairs.append(Pair(kind, number, options))
        for pair in pairs:
            pair.wait()
        report = measure(pairs)
    finally:
        close_all([engine for pair in pairs for engine in pair.engines.values()])
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1))
    sys.exit(not all(row["equal"] for row in report["tokens"]))


if __name__ == "__main__":
    main()
