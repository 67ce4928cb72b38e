"""A real model: prefill at TP2, NHD, blocks of 16; decode at TP4, HND, blocks of 64; equal tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the model is one of transformers'")

from kvferry.tools import demo_model

ANSWER_S = 120.0
ROOT = Path(__file__).parents[2]


class Side:
    """One engine with all its ranks, in a process of its own."""

    def __init__(self, *arguments: Any) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).with_name("rank_process.py")),
                    str(theirs.fileno()),
                ],
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
            )
        self.pipe.send(arguments)

    def answer(self) -> Any:
        assert self.pipe.poll(ANSWER_S), "a process does not answer"
        return self.pipe.recv()  # EOFError: it has ended, and its traceback is above

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


@pytest.mark.slow
def test_the_same_tokens_as_one_process(transport: str) -> None:
    prompts = [prompt[: 40 + 97 * i] for i, prompt in enumerate(demo_model.make_prompts(24)[-4:])]
    assert len({len(prompt) % 64 for prompt in prompts} - {0}) > 1  # partial blocks on both sides
    sides = [Side("prefill", prompts, transport)]
    try:
        sides.append(Side("decode", prompts, transport, sides[0].answer()))
        prefill, decode = sides
        assert prefill.answer() is None
        talks, tokens = decode.answer()
        assert talks == [[0], [0], [1], [1]]  # each head is on two of the four ranks
        assert tokens == prefill.answer()
        assert len({tuple(row) for row in tokens}) == len(tokens)
        for side in sides:
            side.pipe.send(None)
            assert side.process.wait(30.0) == 0
    finally:
        for side in sides:
            side.kill()
