"""What an engine has to do, for the daemon that places requests: prompts' tokens that wait."""

from __future__ import annotations

from typing import Any


class PromptQueue:
    """Tokens of prompts that this engine has yet to compute. Called by vLLM's scheduler alone.

    A prompt that is loaded counts as the one token of it that is computed in any case: loading takes
    a hundredth of the time, and where blocks are short the free ones say so.
    """

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}
        self._left: dict[str, int] = {}

    @property
    def num_tokens(self) -> int:
        """Of all prompts."""
        return sum(self._left.values())

    def add(self, req_id: str, num_tokens: int) -> None:
        """A request came, with a prompt of so many tokens."""
        self._totals[req_id] = self._left[req_id] = num_tokens

    def load(self, req_id: str) -> None:
        """Its prompt is loaded. If that fails and vLLM computes it, the steps that do tell."""
        if req_id in self._left:
            self._left[req_id] = 1

    def end(self, req_id: str) -> None:
        """It ended, its prompt computed or not. Safe to call again."""
        self._totals.pop(req_id, None)
        self._left.pop(req_id, None)

    def follow(self, output: Any) -> None:
        """A step computes what its `SchedulerOutput` says."""
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
