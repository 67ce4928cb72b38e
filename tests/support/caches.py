"""Caches of any layout for tests, and the slow truth about what moving tokens does to one.

The truth goes through the logical cache `[layer, plane, token, head, dim]`: it is read out of one
side's blocks token by token in PyTorch, and laid into the other's. It knows nothing of pieces.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from kvferry.engine.layout.kv_layout import KVLayout

SENTINEL = 0xA5
AXES = ("layer", "plane", "block", "token", "head", "dim")


@dataclasses.dataclass
class PagedPool:
    """One rank's cache: tensors whose axes lie in memory in any order.

    Attributes:
        tensors: one, or one a layer.
        view: the same memory as `[layer, plane, block, token, head, dim]`, a view for each layer.
    """

    tensors: list[torch.Tensor]
    dims: str
    layout: KVLayout
    layers: tuple[int, ...]
    heads: tuple[int, int]

    @classmethod
    def make(
        cls,
        order: tuple[str, ...],
        *,
        layers: tuple[int, ...],
        heads: tuple[int, int],
        num_blocks: int,
        tokens: int,
        dim: int,
        planes: int = 2,
        stacked: bool = True,
        dtype: torch.dtype = torch.uint8,
        seed: int | None = None,
        **options: Any,
    ) -> PagedPool:
        """Random content if there is a seed, else the sentinel in every byte."""
        sizes = {
            "layer": len(layers),
            "plane": planes,
            "block": num_blocks,
            "token": tokens,
            "head": heads[1] - heads[0],
            "dim": dim,
        }
        names = [name for name in order if stacked or name != "layer"]
        shape = [sizes[name] for name in names]
        count = 1 if stacked else len(layers)
        tensors = [_fill(shape, dtype, None if seed is None else seed + i) for i in range(count)]
        dims = " ".join(names)
        layout = KVLayout.from_tensors(
            tensors[0] if stacked else tensors,
            dims,
            layers=layers,
            head_start=heads[0],
            **options,
        )
        return cls(tensors, dims, layout, layers, heads)

    def logical(self, layer: int) -> torch.Tensor:
        """A view `[plane, block, token, head, dim]` of one of the model's layers."""
        names = self.dims.split()
        position = self.layers.index(layer)
        whole = self.tensors[0] if "layer" in names else self.tensors[position]
        if "layer" in names:
            whole = whole.select(names.index("layer"), position)
            names.remove("layer")
        return whole.permute([names.index(name) for name in AXES[1:]])

    def clone(self) -> PagedPool:
        """The same content elsewhere."""
        return dataclasses.replace(self, tensors=[tensor.clone() for tensor in self.tensors])

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        """The memory of each region as bytes."""
        return [tensor.view(torch.uint8).reshape(-1).numpy() for tensor in self.tensors]

    def equals(self, other: PagedPool) -> bool:
        """Every byte, those in no block included."""
        pairs = zip(self.arrays(), other.arrays(), strict=True)
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def _fill(shape: list[int], dtype: torch.dtype, seed: int | None) -> torch.Tensor:
    nbytes = dtype.itemsize * int(np.prod(shape))
    if seed is None:
        raw = torch.full((nbytes,), SENTINEL, dtype=torch.uint8)
    else:
        generator = torch.Generator().manual_seed(seed)
        if dtype.is_floating_point:
            numbers = torch.randn(nbytes // dtype.itemsize, generator=generator) * 3
            raw = numbers.to(dtype).view(torch.uint8)
        else:
            raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def expect_tokens(
    src: PagedPool,
    dst: PagedPool,
    src_table: list[int],
    dst_table: list[int],
    start: int,
    stop: int,
    *,
    layers: tuple[int, ...] | None = None,
    cast: Any = None,
) -> PagedPool:
    """What `dst` must hold afterwards, token by token.

    Args:
        cast: numbers `[plane, head, dim]` of a layer and its index, to the destination's dtype.
    """
    after = dst.clone()
    low, high = max(src.heads[0], dst.heads[0]), min(src.heads[1], dst.heads[1])
    for layer in set(src.layers) & set(dst.layers):
        if layers is not None and layer not in layers:
            continue
        here, there = src.logical(layer), after.logical(layer)
        mine = slice(low - src.heads[0], high - src.heads[0])
        theirs = slice(low - dst.heads[0], high - dst.heads[0])
        src_tokens, dst_tokens = here.shape[2], there.shape[2]
        for token in range(start, stop):
            numbers = here[:, src_table[token // src_tokens], token % src_tokens, mine]
            place = there[:, dst_table[token // dst_tokens], token % dst_tokens, theirs]
            place.copy_(numbers if cast is None else cast(numbers, layer))
    return after
