"""Moves one sequence's KV between a Hugging Face `DynamicCache` and a paged pool.

The pool is one tensor for each layer, with the dimensions `POOL_DIMS`:

    [plane, block, token, head, dim]        plane 0 holds keys, plane 1 values

so `KVLayout.from_tensors(pool, POOL_DIMS)` describes it. A stacked tensor with a leading layer
dimension works too, and so do permuted views of any other order (HND, blocks first, …). The cache
holds `[batch, head, token, dim]` a layer. Works with transformers 4.57 and newer (`cache.layers`);
transformers itself is imported only when a cache is made.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from ..engine.errors import BlockOutOfRange, LayoutError, OverlappingBlocks, PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from transformers.cache_utils import DynamicCache

    Pool = torch.Tensor | Sequence[torch.Tensor]
    BlockIds = torch.Tensor | np.ndarray[Any, Any] | Sequence[int]

POOL_DIMS = "plane block token head dim"


def cache_argument(model: Any) -> str:
    """Name the argument by which `model` takes its cache: `cache`, or `past_key_values` before.

    `signature` looks through the decorators around `forward`, one of which still takes the old name
    of a newer transformers and warns.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def export_cache(
    cache: DynamicCache,
    pool: Pool,
    block_ids: BlockIds,
    *,
    row: int | None = None,
    num_tokens: int | None = None,
) -> int:
    """Copy one sequence of `cache` into `block_ids` of `pool`, and nothing into other blocks.

    The last block is written only as far as the tokens go; ids beyond the last token are ignored.
    All checks come before the first byte.

    Args:
        cache: read, not kept; every layer a full attention layer that holds the same tokens.
        pool: one `[plane, block, token, head, dim]` tensor a layer, of the cache's dtype, device.
        block_ids: where each run of `tokens_per_block` tokens goes, in order; any order of ids.
        row: which sequence of a batch; may be left out where the batch has one.
        num_tokens: how many tokens, from the first; all if not given.

    Returns:
        The number of tokens copied.

    Raises:
        LayoutError: cache and pool differ in layers, heads, head size, dtype or device.
        PlanError: too few block ids, one out of range, or one twice.
    """
    layers = _layers(pool)
    _check_layer_count(len(cache.layers), len(layers))
    pairs = [_layer_tensors(number, layer) for number, layer in enumerate(cache.layers)]
    batch, _, held, _ = pairs[0][0].shape
    if row is None and batch != 1:
        raise LayoutError(
            f"the cache holds a batch of {batch} sequences: say which one with row=",
            operation="export",
        )
    row = 0 if row is None else row
    if not 0 <= row < batch:
        raise LayoutError(
            f"row {row} is not in the cache: its batch has {batch} sequences", operation="export"
        )
    num_tokens = held if num_tokens is None else num_tokens
    if not 1 <= num_tokens <= held:
        raise PlanError(
            f"num_tokens is {num_tokens} but the cache holds {held} tokens", operation="export"
        )
    for number, (planes, layer) in enumerate(zip(pairs, layers, strict=True)):
        for states in planes:
            _check_states(number, states, pairs[0][0], layer)
    ids = _check_block_ids(block_ids, num_tokens, layers[0], "export")
    if len(set(ids.tolist())) != ids.numel():
        raise OverlappingBlocks(
            "a block id occurs twice: two runs of tokens would share one block", operation="export"
        )
    for planes, layer in zip(pairs, layers, strict=True):
        for plane, states in enumerate(planes):
            _write_blocks(states[row].transpose(0, 1)[:num_tokens], layer[plane], ids)
    return num_tokens


def import_cache(
    pool: Pool, block_ids: BlockIds, num_tokens: int, *, config: Any = None
) -> DynamicCache:
    """Make a `DynamicCache` of batch 1 from `block_ids` of `pool`.

    The cache owns a copy: the blocks may be freed as soon as this returns.

    Args:
        pool: one `[plane, block, token, head, dim]` tensor a layer.
        block_ids: the sequence's blocks in order; ids beyond the last token are ignored.
        num_tokens: how many tokens the blocks hold.
        config: the model's config, if the cache is to be checked against its layers and heads.

    Raises:
        LayoutError: pool and config differ in layers, heads or head size, or the model has layers
            that are not full attention.
        PlanError: too few block ids, or one out of range.
    """
    from transformers.cache_utils import DynamicCache

    layers = _layers(pool)
    ids = _check_block_ids(block_ids, num_tokens, layers[0], "import")
    cache = DynamicCache() if config is None else DynamicCache(config=config)
    if config is not None:
        _check_config(config, cache, layers)
    for number, layer in enumerate(layers):
        keys, values = (
            plane.index_select(0, ids).flatten(0, 1)[:num_tokens].transpose(0, 1).unsqueeze(0)
            for plane in layer
        )
        # `update` concatenates, so the cache gets dense tensors of its own: the one copy.
        cache.update(keys, values, number)
    return cache


def blocks_for(num_tokens: int, tokens_per_block: int) -> int:
    """Return how many blocks `num_tokens` tokens fill, the last one perhaps in part."""
    return -(-num_tokens // tokens_per_block)


def _write_blocks(states: torch.Tensor, plane: torch.Tensor, ids: torch.Tensor) -> None:
    """Copy `[token, head, dim]` states into `[block, token, head, dim]`, a partial block last."""
    tokens_per_block = plane.shape[1]
    full, rest = divmod(states.shape[0], tokens_per_block)
    if full:
        whole = states[: full * tokens_per_block].view(full, *plane.shape[1:])
        plane.index_copy_(0, ids[:full], whole)
    if rest:
        plane[int(ids[full]), :rest].copy_(states[full * tokens_per_block :])


def _layers(pool: Pool) -> list[torch.Tensor]:
    """Return the pool as one 5-dimensional tensor a layer."""
    layers = list(pool.unbind(0)) if isinstance(pool, torch.Tensor) else list(pool)
    if not layers:
        raise LayoutError("the pool has no layers", operation="pool")
    for number, layer in enumerate(layers):
        if layer.dim() != 5 or layer.shape[0] != 2:
            raise LayoutError(
                f"layer {number} of the pool has shape {list(layer.shape)}: expected "
                f"[{', '.join(POOL_DIMS.split())}] with 2 planes",
                operation="pool",
            )
        if layer.shape != layers[0].shape or layer.dtype != layers[0].dtype:
            raise LayoutError(
                f"layer {number} of the pool is {layer.dtype} {list(layer.shape)} but layer 0 is "
                f"{layers[0].dtype} {list(layers[0].shape)}: all layers must be alike",
                operation="pool",
            )
    return layers


def _layer_tensors(number: int, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a cache layer's keys and values; refuse kinds that do not hold every token as it
    is."""
    _check_kind(layer, f"layer {number} of the cache is", "cache")
    if layer.keys is None or layer.values is None or layer.get_seq_length() == 0:
        raise LayoutError(
            f"layer {number} of the cache holds no tokens: run the model first", operation="cache"
        )
    return layer.keys, layer.values


def _check_kind(layer: Any, has: str, operation: str) -> None:
    from transformers.cache_utils import DynamicLayer

    # Exactly this class: its subclasses drop tokens (sliding window), quantise, or keep more.
    if type(layer) is not DynamicLayer:
        raise LayoutError(
            f"{has} a {type(layer).__name__}: only full attention layers (DynamicLayer) can be "
            "paged",
            operation=operation,
        )


def _check_heads(
    where: str, num_heads: int, head_dim: int, layer: torch.Tensor, operation: str
) -> None:
    """KV heads and their size must be those of a pool's layer."""
    for what, mine, pools in (
        ("KV heads", num_heads, layer.shape[3]),
        ("dimensions a head", head_dim, layer.shape[4]),
    ):
        if mine != pools:
            raise LayoutError(
                f"{where} has {mine} {what} but the pool has {pools}", operation=operation
            )


def _check_layer_count(cache_layers: int, pool_layers: int) -> None:
    if cache_layers != pool_layers:
        raise LayoutError(
            f"the cache has {cache_layers} layers but the pool has {pool_layers}",
            operation="cache",
        )


def _check_states(
    number: int, states: torch.Tensor, first: torch.Tensor, layer: torch.Tensor
) -> None:
    """One plane of a cache layer must be like layer 0's and fit the pool's blocks."""
    where = f"layer {number} of the cache"
    if states.shape[0] != first.shape[0] or states.shape[2] != first.shape[2]:
        raise LayoutError(
            f"{where} holds {list(states.shape)} but layer 0 {list(first.shape)}: "
            "every layer must hold the same sequences and tokens",
            operation="export",
        )
    _check_heads(where, states.shape[1], states.shape[3], layer, "export")
    if states.dtype != layer.dtype:
        raise LayoutError(
            f"{where} is {states.dtype} but the pool is {layer.dtype}: load the model with "
            f"dtype={layer.dtype} or make the pool {states.dtype}",
            operation="export",
        )
    if states.device != layer.device:
        raise LayoutError(
            f"{where} is on {states.device} but the pool is on {layer.device}: move one of them",
            operation="export",
        )


def _check_block_ids(
    block_ids: BlockIds, num_tokens: int, layer: torch.Tensor, operation: str
) -> torch.Tensor:
    """Return the ids that `num_tokens` tokens use, int64, on the pool's device."""
    ids = torch.as_tensor(block_ids)
    if ids.dim() != 1 or ids.is_floating_point():
        raise PlanError(
            f"block ids must be a list of integers, not {ids.dtype} {list(ids.shape)}",
            operation=operation,
        )
    if num_tokens < 1:
        raise PlanError(f"num_tokens is {num_tokens}: at least one is needed", operation=operation)
    _, num_blocks, tokens_per_block, _, _ = layer.shape
    needed = blocks_for(num_tokens, tokens_per_block)
    if ids.numel() < needed:
        raise PlanError(
            f"{num_tokens} tokens need {needed} blocks of {tokens_per_block} tokens but "
            f"{ids.numel()} block ids were given",
            operation=operation,
        )
    ids = ids[:needed].to(layer.device, torch.int64)
    outside = ids[(ids < 0) | (ids >= num_blocks)]
    if outside.numel():
        raise BlockOutOfRange(
            f"block id {int(outside[0])} is not in the pool: it has {num_blocks} blocks",
            operation=operation,
        )
    return ids


def _check_config(config: Any, cache: DynamicCache, layers: list[torch.Tensor]) -> None:
    """The model that will use an imported cache must agree with the pool."""
    text = config.get_text_config(decoder=True)
    _check_layer_count(len(cache.layers), len(layers))
    for number, layer in enumerate(cache.layers):
        _check_kind(layer, f"layer {number} of the model needs", "import")
    query_heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or query_heads
    model_dim = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    _check_heads("the model", kv_heads, model_dim, layers[0], "import")
