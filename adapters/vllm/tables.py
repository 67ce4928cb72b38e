"""vLLM's block tables as those of a layout: a block of its block manager may be several of the cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...engine.layout.kv_layout import KVLayout


class Tables:
    """Turns the tables of orders into those of a layout.

    Args:
        layout: with a group for each table.
        num_blocks: of vLLM's block manager.

    Attributes:
        split: blocks of the first group's cache that one of vLLM's stands for.
        plain: whether one table says it all, and every block of a prompt is in it.
        step_tokens: tokens that are whole blocks in every group.
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        firsts = [layout.regions[group.regions[0]] for group in layout.groups]
        self._splits = [region.num_slots // num_blocks for region in firsts]
        self._tokens = [region.tokens_per_slot for region in firsts]
        self.split = self._splits[0]
        self.step_tokens = math.lcm(*self._tokens)
        self.plain = len(layout.groups) == 1 and not layout.groups[0].window

    def pair_with(self, theirs: KVLayout) -> bool:
        """Whether each block of a prompt is one of another cache's, which both call by its place."""
        if not self.plain or len(theirs.groups) > 1:
            return False
        first = theirs.regions[theirs.groups[0].regions[0]]
        return first.tokens_per_slot == self.step_tokens

    def of_cache(self, tables: Sequence[Sequence[int]], num_tokens: int) -> Any:
        """The cache's blocks of a prompt's first tokens, as agents take them: a row of ids for each
        group, or the one row."""
        rows = []
        for table, split, tokens in zip(tables, self._splits, self._tokens, strict=True):
            ids = np.asarray(table, np.int64)
            if split > 1:
                ids = (ids[:, None] * split + np.arange(split)).ravel()
            rows.append(ids[: -(-num_tokens // tokens)])
        return rows[0] if len(rows) == 1 else rows

    def empty(self) -> Any:
        """No blocks, in the same form."""
        return self.of_cache([[] for _ in self._splits], 0)
