"""A real model: prefill at TP2, NHD, blocks of 16; decode at TP4, HND, blocks of 64; equal tokens."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers", reason="the model is one of transformers'")

from kvferry.tools.demo import model as demo_model
from tests.support.child import Child

ANSWER_S = 120.0


class Side(Child):
    """One engine with all its ranks, in a process of its own."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(
            "tests.adapters.ranks.rank_process",
            answer_s=ANSWER_S,
            environment={"HF_HUB_OFFLINE": "1"},
        )
        self.pipe.send(arguments)

    def result(self) -> Any:
        """What it sends next; EOFError: it has ended, and its traceback is above."""
        assert self.pipe.poll(ANSWER_S), "a process does not answer"
        return self.pipe.recv()


@pytest.mark.slow
def test_the_same_tokens_as_one_process(transport: str) -> None:
    prompts = [prompt[: 40 + 97 * i] for i, prompt in enumerate(demo_model.make_prompts(24)[-4:])]
    assert len({len(prompt) % 64 for prompt in prompts} - {0}) > 1  # partial blocks on both sides
    sides = [Side("prefill", prompts, transport)]
    try:
        sides.append(Side("decode", prompts, transport, sides[0].result()))
        prefill, decode = sides
        assert prefill.result() is None
        talks, tokens = decode.result()
        assert talks == [[0], [0], [1], [1]]  # each head is on two of the four ranks
        assert tokens == prefill.result()
        assert len({tuple(row) for row in tokens}) == len(tokens)
        for side in sides:
            side.pipe.send(None)
            assert side.process.wait(30.0) == 0
    finally:
        for side in sides:
            side.kill()
            side.pipe.close()
