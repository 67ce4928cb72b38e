"""A stand-in for a model's forward pass: the matrix products and the attention of its layers.

Every layer has the same weights, of the real one's shapes. What it writes into the cache is a copy of
its own K and V, so that bytes can be compared; tokens mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

if TYPE_CHECKING:
    from collections.abc import Callable

    Tensor = torch.Tensor


@dataclass(frozen=True)
class Shape:
    """A model's layers, over all tensor-parallel ranks.

    Attributes:
        latent: numbers a token that a layer keeps, if it has no heads of K and V (MLA); else 0.
        kv_heads: heads of K and V; with `latent`, 1.
        inner: width of the products' inner side: the feed-forward part, or of all experts that a
            token is given to.
        downs: what a token is projected to before its heads (MLA): of queries, of K and V.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    latent: int = 0
    downs: tuple[int, int] = (0, 0)


LLAMA_70B = Shape("Llama 70B", 80, 8192, 64, 8, 128, 28672)
# Eight experts of 2,048 and a shared one; as wide as the first three layers, which have none.
DEEPSEEK_V3 = Shape("DeepSeek V3", 61, 7168, 128, 1, 128, 9 * 2048, 576, (1536, 512))


class StandIn:
    """One rank's part of a model, on a device. One thread.

    Args:
        ranks: of the prefill engine; each has `1 / ranks` of the heads and of the inner width.
        reduce: adds up a tensor over the ranks, in place.
    """

    def __init__(
        self,
        shape: Shape,
        ranks: int,
        num_tokens: int,
        device: str,
        reduce: Callable[[Tensor], object],
    ) -> None:
        self._shape = shape
        self._reduce = reduce
        self._heads = shape.heads // ranks
        self._kv_heads = max(1, shape.kv_heads // ranks)
        width = self._heads * shape.head_dim
        kv_width = 2 * self._kv_heads * shape.head_dim

        def weights(rows: int, columns: int) -> Tensor:
            made = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
            return made.normal_(0, rows**-0.5)

        if shape.latent:
            down_q, down_kv = shape.downs
            self._down = weights(shape.hidden, down_q + shape.latent)
            self._up_q = weights(down_q, width)
            self._up_kv = weights(down_kv, 2 * width)
        else:
            self._qkv = weights(shape.hidden, width + kv_width)
        self._out = weights(width, shape.hidden)
        self._gate_up = weights(shape.hidden, 2 * shape.inner // ranks)
        self._down_ff = weights(shape.inner // ranks, shape.hidden)
        self._prompt = weights(num_tokens, shape.hidden)

    def forward(self, caches: list[Tensor], slots: Tensor, computed: Callable[[int], None]) -> None:
        """One forward pass; `computed` is called with each layer whose K and V are in its cache.

        Args:
            caches: of each layer, `[slot, number]`: a row a token.
            slots: of the prompt's tokens.
        """
        hidden = self._prompt
        for layer, cache in enumerate(caches):
            hidden = self._layer(hidden, cache, slots, layer, computed)

    def _layer(
        self,
        hidden: Tensor,
        cache: Tensor,
        slots: Tensor,
        layer: int,
        computed: Callable[[int], None],
    ) -> Tensor:
        normed = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:])
        query, keys, values, kept = self._project(normed)
        cache.index_copy_(0, slots, kept)
        # With a batch dimension: PyTorch has a fused kernel only for that.
        mixed = scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            is_causal=True,
            enable_gqa=keys.shape[0] != query.shape[0],
        )[0]
        # Where vLLM tells its connector: the attention of a layer is done, its other half is not.
        computed(layer)
        out = mixed.transpose(0, 1).flatten(1) @ self._out
        self._reduce(out)
        hidden = hidden + out
        normed = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:])
        gate, up = (normed @ self._gate_up).chunk(2, -1)
        out = (silu(gate) * up) @ self._down_ff
        self._reduce(out)
        return hidden + out

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, keys and values, each `[head, token, dim]`, and what the cache keeps."""
        shape = self._shape

        def by_head(flat: Tensor, heads: int) -> Tensor:
            return flat.reshape(len(flat), heads, shape.head_dim).transpose(0, 1)

        if shape.latent:
            down_q, down_kv = shape.downs
            query, latent = (normed @ self._down).tensor_split([down_q], -1)
            keys, values = (latent[:, :down_kv] @ self._up_kv).chunk(2, -1)
            query = by_head(query @ self._up_q, self._heads)
            return query, by_head(keys, self._heads), by_head(values, self._heads), latent
        width = self._heads * shape.head_dim
        query, keys_values = (normed @ self._qkv).tensor_split([width], -1)
        keys, values = keys_values.chunk(2, -1)
        # As vLLM has it: of each head, its key and its value side by side.
        by_key = (len(normed), self._kv_heads, shape.head_dim)
        kept = torch.cat([keys.reshape(by_key), values.reshape(by_key)], -1)
        return (
            by_head(query, self._heads),
            by_head(keys, self._kv_heads),
            by_head(values, self._kv_heads),
            kept.flatten(1),
        )
