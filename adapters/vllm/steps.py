"""What the scheduler side follows vLLM's steps for: prompts that wait, loads that a step waits for, and
blocks that are kept while they are handed over, though vLLM needs them no more.

A load that vLLM is told about later costs a step without a forward pass, a sleep of 1 ms and one more
step. One that the step waits for costs what it takes, but nobody else's request is begun meanwhile. So
a step waits only for what is small, from an engine that has answered before, when prefill has finished
and no other request is being computed. Decision 0048 has the measurements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .params import Asked

# That a step is held up at most, if prefill falls silent after its answer; then the load has failed,
# and the next ones from that engine are waited for outside of steps. 500 tokens of a tiny model took
# 4 ms on two busy cores.
TIMEOUT_S = 5.0


class StepLoads:
    """Decide which loads a step waits for. Not thread-safe: vLLM's scheduler calls it.

    Args:
        max_nbytes: that all loads of a step may have together; 0 for none.
        token_nbytes: of a token's KV on one rank; 0 where no step may wait.
    """

    def __init__(self, max_nbytes: int = 0, token_nbytes: int = 0) -> None:
        self._left = self._max_nbytes = max_nbytes if token_nbytes else 0
        self._token_nbytes = token_nbytes
        self._computed: Mapping[str, int] = {}
        self._ended: set[str] = set()
        self._answered: set[str] = set()
        self._waited: set[str] = set()

    def waits(self, asked: Asked, num_tokens: int) -> bool:
        """Say whether this step waits for a prompt of so many tokens. Changes nothing."""
        return (
            0 < num_tokens * self._token_nbytes <= self._left
            and asked.remote_num_tokens is not None  # prefill's own answer says so
            and asked.remote_engine_id in self._answered
            and self._ended.issuperset(self._computed)
        )

    def begin(self, engine_id: str, num_tokens: int) -> None:
        """Note that this step waits for a load of so many tokens from that engine."""
        self._left -= num_tokens * self._token_nbytes
        self._waited.add(engine_id)

    def scheduled(self, num_scheduled_tokens: Mapping[str, int]) -> None:
        """Note the step's requests: those that the next one goes on with unless they end."""
        self._computed = num_scheduled_tokens
        self._ended.clear()
        self._left = self._max_nbytes

    def request_ended(self, req_id: str) -> None:
        """Note that a request will not be in the next step."""
        self._ended.add(req_id)

    def load_ended(self, engine_id: str, *, failed: bool) -> None:
        """Note the end of a load that no step waited for."""
        if failed:
            self._answered.discard(engine_id)
        else:
            self._answered.add(engine_id)

    def step_ended(self, invalid_blocks: Any) -> None:
        """Note a step's end: some of the loads that it waited for failed if there are invalid blocks."""
        if invalid_blocks:
            self._answered -= self._waited
        self._waited.clear()


class PromptQueue:
    """Count tokens of prompts that this engine has yet to compute. Called by vLLM's scheduler alone.

    A prompt that is loaded counts as the one token of it that is computed in any case: loading takes
    a hundredth of the time, and where blocks are short the free ones say so.
    """

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}
        self._left: dict[str, int] = {}

    @property
    def num_tokens(self) -> int:
        """Count them, of all prompts."""
        return sum(self._left.values())

    def add(self, req_id: str, num_tokens: int) -> None:
        """Count a request that came, with a prompt of so many tokens."""
        self._totals[req_id] = self._left[req_id] = num_tokens

    def load(self, req_id: str) -> None:
        """Note that its prompt is loaded. If that fails and vLLM computes it, the steps that do tell."""
        if req_id in self._left:
            self._left[req_id] = 1

    def end(self, req_id: str) -> None:
        """Forget a request that ended, its prompt computed or not. Safe to call again."""
        self._totals.pop(req_id, None)
        self._left.pop(req_id, None)

    def follow(self, output: Any) -> None:
        """Note what a step computes, as its `SchedulerOutput` says."""
        if not self._left:
            return
        for new in output.scheduled_new_reqs:
            self._computed(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._computed(req_id, computed, output)

    def _computed(self, req_id: str, before: int, output: Any) -> None:
        total = self._totals.get(req_id)
        if total is None:
            return
        left = total - before - int(output.num_scheduled_tokens.get(req_id, 0))
        if left > 0:
            self._left[req_id] = left
        else:
            self.end(req_id)


class Holds:
    """Keep references to blocks of vLLM's block pool, by request. Called by vLLM's scheduler alone.

    A request lets go of a sliding window's blocks as the window moves on: with the prompt's last token
    the block may go that only this token still attended to, and decode computes that token again. One
    that is preempted lets go of all its blocks, while a peer may still read them.
    """

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
                "vLLM did not call bind_gpu_block_pool: blocks cannot be kept while they are handed "
                "over; use vLLM 0.30 or later"
            )
        blocks = [self._pool.blocks[block_id] for block_id in block_ids]
        self._pool.touch(blocks)
        self._held[req_id] = blocks

    def release(self, req_id: str) -> None:
        """Let go of a request's blocks; the last ones are to be reused first."""
        blocks = self._held.pop(req_id, None)
        if blocks:
            self._pool.free_blocks(reversed(blocks))
