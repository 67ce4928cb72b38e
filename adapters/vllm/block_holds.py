"""Blocks that are kept while they are handed over, though vLLM needs them no more.

A request lets go of a sliding window's blocks as the window moves on: with the prompt's last token
the block may go that only this token still attended to, and decode computes that token again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class Holds:
    """Keep references to blocks of vLLM's block pool, by request. Called by vLLM's scheduler alone."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._held: dict[str, list[Any]] = {}

    def bind(self, pool: Any) -> None:
        """Take vLLM's `BlockPool`."""
        self._pool = pool

    @property
    def num_free_blocks(self) -> int:
        """Count the pool's free blocks; 0 before there is a pool."""
        return int(self._pool.get_num_free_blocks()) if self._pool is not None else 0

    def hold(self, req_id: str, block_ids: Sequence[int]) -> None:
        """Keep blocks that the request has, until `release`.

        Raises:
            RuntimeError: this vLLM told nothing of its block pool.
        """
        if not block_ids:
            return
        if self._pool is None:
            raise RuntimeError(
                "vLLM did not call bind_gpu_block_pool: blocks of sliding windows cannot be kept "
                "while they are handed over; use vLLM 0.30 or later"
            )
        blocks = [self._pool.blocks[block_id] for block_id in block_ids]
        self._pool.touch(blocks)
        self._held[req_id] = blocks

    def release(self, req_id: str) -> None:
        """Let go of a request's blocks; the last ones are to be reused first."""
        blocks = self._held.pop(req_id, None)
        if blocks:
            self._pool.free_blocks(reversed(blocks))
