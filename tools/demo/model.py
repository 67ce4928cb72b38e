"""The demo's model and prompts: the same in every process that starts from the same seeds.

A small Llama (8 layers, grouped KV heads, bf16) with random weights. The weights are drawn wider
than a model's usual 0.02: at 0.02 most prompts repeat one token for ever and a damaged block often
goes unnoticed; at 0.2 about 30 of 32 tokens differ, and flipping the lowest bit of each byte of
one block changes nearly all of them, even among 1,500 tokens.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from kvferry.adapters.transformers import cache_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VOCAB_SIZE = 1024
SHORTEST_PROMPT, LONGEST_PROMPT = 17, 1500
BATCH_SIZE = 16
"""Requests that decode together. One by one a token costs 14 ms of Python for 8 layers (measured on
one 2.5 GHz core), which is 30 s for 64 prompts of 32 tokens; by sixteens it is 7 s."""

_MODEL_SEED, _PROMPT_SEED = 20, 21


def make_model(device: str = "cpu") -> Any:
    """Return the demo's `LlamaForCausalLM`, in bf16; take no file and no network.

    The weights are drawn on the CPU, so that they are the same everywhere.
    """
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2 * LONGEST_PROMPT,
        "initializer_range": 0.2,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(_MODEL_SEED)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    return model.to(device, torch.bfloat16).eval()


def make_prompts(num_prompts: int) -> list[list[int]]:
    """Prompts sorted by length: the shortest and the longest allowed, between them log-uniform."""
    draw = random.Random(_PROMPT_SEED)
    low, high = math.log(SHORTEST_PROMPT), math.log(LONGEST_PROMPT)
    lengths = [SHORTEST_PROMPT, LONGEST_PROMPT][:num_prompts]
    lengths += [round(math.exp(draw.uniform(low, high))) for _ in range(num_prompts - 2)]
    return [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in sorted(lengths)]


def batches(num_prompts: int) -> list[range]:
    """Return which prompts decode together; neighbours in length, so that little is padding."""
    return [
        range(start, min(start + BATCH_SIZE, num_prompts))
        for start in range(0, num_prompts, BATCH_SIZE)
    ]


@torch.inference_mode()
def prefill(model: Any, prompt: Sequence[int]) -> DynamicCache:
    """Run one prompt through the model; the cache holds every token of it."""
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt], device=model.device)
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    return cache


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    caches: Sequence[DynamicCache],
    num_tokens: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Greedy tokens that follow each prompt, all prompts in one batch.

    Reference and disaggregated decode both come through here with the same prompts side by side:
    the same shapes and the same kernels, so equal caches give equal tokens. Each cache loses its
    last token, which is fed again: that proves the first generated token too.
    """
    batch = _left_padded(caches, [len(prompt) - 1 for prompt in prompts], model.config)
    longest = max(len(prompt) for prompt in prompts) - 1
    mask = torch.tensor(
        [[0] * (longest - len(prompt) + 1) + [1] * (len(prompt) - 1) for prompt in prompts],
        device=model.device,
    )
    last = torch.tensor([[prompt[-1]] for prompt in prompts], device=model.device)
    one = torch.ones_like(last)
    taken = {cache_argument(model): batch}
    generated = []
    for _ in range(num_tokens):
        mask = torch.cat([mask, one], dim=1)
        output = model(
            input_ids=last,
            attention_mask=mask,
            position_ids=mask.sum(dim=1, keepdim=True) - 1,
            use_cache=True,
            logits_to_keep=1,
            **taken,
        )
        last = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        generated.append(last)
        on_step()
    tokens: list[list[int]] = torch.cat(generated, dim=1).tolist()
    return tokens


def _left_padded(caches: Sequence[Any], lengths: Sequence[int], config: Any) -> DynamicCache:
    """Return the first `lengths[i]` tokens of each cache as one batch, zeros before the shorter
    ones."""
    longest = max(lengths)
    batch = DynamicCache(config=config)
    for number, layer in enumerate(caches[0].layers):
        _, heads, _, dim = layer.keys.shape
        keys = layer.keys.new_zeros(len(caches), heads, longest, dim)
        values = torch.zeros_like(keys)
        for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            keys[row, :, longest - length :] = cache.layers[number].keys[0, :, :length]
            values[row, :, longest - length :] = cache.layers[number].values[0, :, :length]
        batch.update(keys, values, number)
    return batch
