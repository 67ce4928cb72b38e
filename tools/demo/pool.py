"""A paged pool that is fragmented on purpose, and poisons every block that nobody holds."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.adapters.transformers import POOL_DIMS, blocks_for
from kvferry.engine.layout.kv_layout import KVLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS_PER_BLOCK = 16
POISON = -1
"""Each 16-bit word of a free block: all ones, a NaN in bf16, so a block that never arrived cannot
pass for one that did."""


class PoolExhausted(RuntimeError):
    """Not enough free blocks that lie apart."""


class FragmentedPool:
    """One `[plane, block, token, head, dim]` bf16 tensor a layer, and the blocks' allocator.

    Two blocks of one allocation never have neighbouring ids, and their order is shuffled: no two
    of a request's blocks could be moved as one piece. Not thread-safe.
    """

    def __init__(self, config: Any, num_blocks: int, *, seed: int, device: str = "cpu") -> None:
        """Poison `num_blocks` blocks for a model's layers and KV heads; owns their memory."""
        shape = (2, num_blocks, TOKENS_PER_BLOCK, config.num_key_value_heads, config.head_dim)
        self.tensors = [
            torch.full(shape, POISON, dtype=torch.int16, device=device).view(torch.bfloat16)
            for _ in range(config.num_hidden_layers)
        ]
        self.layout = KVLayout.from_tensors(self.tensors, POOL_DIMS)
        self.num_blocks = num_blocks
        self._free = set(range(num_blocks))
        self._draw = random.Random(seed)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Ids of the blocks for `num_tokens` tokens, no two of them neighbours.

        Raises:
            PoolExhausted: the free blocks do not hold that many that lie apart.
        """
        needed = blocks_for(num_tokens, TOKENS_PER_BLOCK)
        candidates = sorted(self._free)
        self._draw.shuffle(candidates)
        taken: dict[int, None] = {}
        for block in candidates:
            if len(taken) == needed:
                break
            if block - 1 not in taken and block + 1 not in taken:
                taken[block] = None
        if len(taken) < needed:
            raise PoolExhausted(
                f"{num_tokens} tokens need {needed} blocks that lie apart; "
                f"{len(self._free)} of {self.num_blocks} blocks are free"
            )
        self._free.difference_update(taken)
        return np.fromiter(taken, dtype=np.int64, count=needed)

    def free(self, block_ids: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """Take blocks back and poison them. The caller vouches that no writer can reach them.

        Raises:
            ValueError: a block is free already.
        """
        ids = [int(block) for block in block_ids]
        for block in ids:
            if block in self._free:
                raise ValueError(f"block {block} is free already")
        for layer in self.tensors:
            layer.view(torch.int16)[:, ids] = POISON
        self._free.update(ids)

    def stray_blocks(self) -> int:
        """Return how many free blocks hold anything but poison: something wrote where it had no
        right."""
        ids = sorted(self._free)
        touched = torch.zeros(len(ids), dtype=torch.bool)
        for layer in self.tensors:
            touched |= (layer.view(torch.int16)[:, ids] != POISON).flatten(2).any(2).any(0).cpu()
        return int(touched.sum())

    def flip_bits(self, block: int, layer: int) -> None:
        """Flip the lowest bit of every byte of a block in one layer: the negative control."""
        self.tensors[layer].view(torch.uint8)[:, block] ^= 1
