"""The layouts in `docs/layouts.md` are what the page says, and go together where they should."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from kvferry.engine.errors import LayoutError
from kvferry.engine.layout.join import join_groups, join_planes
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.plan.token_plan import TokenPlan
from tests import ROOT

PAGE = ROOT / "docs" / "layouts.md"
LAYERS, BLOCKS, HEADS, TOKENS, DIM = 2, 8, 4, 16, 64


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for _ in range(LAYERS)]


@pytest.fixture(scope="module")
def layouts() -> dict[str, KVLayout]:
    """What the page's last block of code defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {
        "KVLayout": KVLayout,
        "join_groups": join_groups,
        "join_planes": join_planes,
        "vllm_caches": empty(BLOCKS, HEADS, TOKENS, 2 * DIM),
        "mla_caches": empty(BLOCKS, 1, TOKENS, 576),
        "k_buffers": empty(BLOCKS * 16, HEADS, DIM),
        "v_buffers": empty(BLOCKS * 16, HEADS, DIM),
        "trtllm_pool": empty(BLOCKS, LAYERS, 2, HEADS, 32, DIM)[0],
        "flowkv_pool": empty(BLOCKS, LAYERS, 2, 64, HEADS, DIM)[0],
        "hf_keys": empty(3, HEADS, 128, DIM),
        "hf_values": empty(3, HEADS, 128, DIM),
        "fp8_caches": empty(2, BLOCKS, TOKENS, HEADS, DIM, dtype=torch.float8_e4m3fn),
        "k_scales": [0.5] * LAYERS,
        "v_scales": [[0.25] * HEADS] * LAYERS,
        "tpla_caches": empty(BLOCKS, TOKENS, 256 + 64),
        "index_caches": empty(BLOCKS, TOKENS, 132, dtype=torch.uint8),
        "full_caches": empty(2, BLOCKS, TOKENS, HEADS, DIM)[:1],
        "window_caches": empty(2, BLOCKS, TOKENS, HEADS, DIM)[:1],
        "conv_states": empty(BLOCKS, 3, 96)[:1],
        "ssm_states": empty(BLOCKS, HEADS, DIM, 16, dtype=torch.float32)[:1],
    }
    exec(blocks[-1], names)
    return {name: value for name, value in names.items() if isinstance(value, KVLayout)}


LIKE_LLAMA = ("vllm", "sglang", "sglang_paged", "trtllm", "flowkv", "hugging_face", "fp8")


def test_every_pair_of_one_model_goes_together(layouts: dict[str, KVLayout]) -> None:
    token_nbytes = LAYERS * 2 * HEADS * DIM * 2
    for one, other in itertools.permutations(LIKE_LLAMA, 2):
        plan = TokenPlan(layouts[one], layouts[other])
        expected = token_nbytes // 2 if other == "fp8" else token_nbytes
        assert plan.nbytes(0, 40) == 40 * expected, (one, other)


def test_the_others_are_what_they_are(layouts: dict[str, KVLayout]) -> None:
    others = {"vllm_mla", "vllm_cpu", "tpla", "vllm_indexed", "windowed", "mamba"}
    assert set(layouts) == {*LIKE_LLAMA, *others}
    assert layouts["vllm_mla"].regions[0].slot_nbytes == TOKENS * 576 * 2
    assert layouts["tpla"].region_heads(0) == (1, 2)
    with pytest.raises(LayoutError, match="codec differs"):
        TokenPlan(layouts["vllm_cpu"], layouts["vllm"])


def test_groups_move_what_each_of_them_needs(layouts: dict[str, KVLayout]) -> None:
    """Of 40 tokens, and of 200, with a page of state."""
    token = 2 * HEADS * DIM * 2
    state = 3 * 96 * 2 + HEADS * DIM * 16 * 4
    for name, of_40, of_200 in (
        ("vllm_indexed", 40 * LAYERS * (576 * 2 + 132), 200 * LAYERS * (576 * 2 + 132)),
        ("windowed", 2 * 40 * token, (200 + 128) * token),
        ("mamba", 40 * token + state, 200 * token + state),
    ):
        plan = TokenPlan(layouts[name], layouts[name])
        assert (plan.nbytes(0, 40), plan.nbytes(0, 200)) == (of_40, of_200), name
