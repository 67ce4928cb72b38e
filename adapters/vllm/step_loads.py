"""Which loads vLLM's step waits for, instead of being told later that they ended.

A load that vLLM is told about later costs a step without a forward pass, a sleep of 1 ms and one more
step. One that the step waits for costs what it takes, but nobody else's request is begun meanwhile. So
a step waits only for what is small, from an engine that has answered before, when prefill has finished
and no other request is being computed. Decision 0048 has the measurements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .params import Params

# That a step is held up at most, if prefill falls silent after its answer; then the load has failed,
# and the next ones from that engine are waited for outside of steps. 500 tokens of a tiny model took
# 4 ms on two busy cores.
TIMEOUT_S = 5.0


class StepLoads:
    """One engine's rule. Not thread-safe: vLLM's scheduler calls it.

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

    def waits(self, params: Params, num_tokens: int) -> bool:
        """Whether this step waits for a prompt of so many tokens. Changes nothing."""
        return (
            0 < num_tokens * self._token_nbytes <= self._left
            and params.get("remote_num_tokens") is not None  # prefill's own answer says so
            and params.get("remote_engine_id") in self._answered
            and self._ended.issuperset(self._computed)
        )

    def begin(self, params: Params, num_tokens: int) -> None:
        """This step does."""
        self._left -= num_tokens * self._token_nbytes
        self._waited.add(str(params["remote_engine_id"]))

    def scheduled(self, num_scheduled_tokens: Mapping[str, int]) -> None:
        """The step's requests are known: those that the next one goes on with unless they end."""
        self._computed = num_scheduled_tokens
        self._ended.clear()
        self._left = self._max_nbytes

    def request_ended(self, req_id: str) -> None:
        """It will not be in the next step."""
        self._ended.add(req_id)

    def load_ended(self, engine_id: str, *, failed: bool) -> None:
        """A load that no step waited for."""
        if failed:
            self._answered.discard(engine_id)
        else:
            self._answered.add(engine_id)

    def step_ended(self, invalid_blocks: Any) -> None:
        """The loads that it waited for failed, some of them, if there are invalid blocks."""
        if invalid_blocks:
            self._answered -= self._waited
        self._waited.clear()
