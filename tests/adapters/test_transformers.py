"""A cache that went through a fragmented pool is the same cache, and nothing else was touched."""

from __future__ import annotations

import functools
import random
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch

cache_utils = pytest.importorskip("transformers.cache_utils", reason="needs kvferry[demo]")

from kvferry.adapters.transformers import (  # noqa: E402
    POOL_DIMS,
    blocks_for,
    cache_argument,
    export_cache,
    import_cache,
)
from kvferry.engine.errors import (  # noqa: E402
    BlockOutOfRange,
    LayoutError,
    OverlappingBlocks,
    PlanError,
)
from kvferry.engine.layout.kv_layout import KVLayout  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, KV_HEADS, HEAD_DIM, TOKENS_PER_BLOCK, BLOCKS = 3, 2, 8, 16, 200
SENTINEL = -77.0


def make_pool(device: str = "cpu") -> list[torch.Tensor]:
    shape = (2, BLOCKS, TOKENS_PER_BLOCK, KV_HEADS, HEAD_DIM)
    return [torch.full(shape, SENTINEL, dtype=torch.bfloat16, device=device) for _ in range(LAYERS)]


def make_cache(
    num_tokens: int,
    batch: int = 1,
    heads: int = KV_HEADS,
    dtype: torch.dtype = torch.bfloat16,
    layers: int = LAYERS,
) -> Any:
    generator = torch.Generator().manual_seed(num_tokens)
    cache = cache_utils.DynamicCache()
    for number in range(layers):
        shape = (batch, heads, num_tokens, HEAD_DIM)
        cache.update(
            torch.randn(shape, generator=generator).to(dtype),
            torch.randn(shape, generator=generator).to(dtype),
            number,
        )
    return cache


def scattered_ids(num_tokens: int) -> list[int]:
    """Every second block, in a shuffled order: no two of them are neighbours."""
    ids = list(range(1, BLOCKS, 2))
    random.Random(0).shuffle(ids)
    return ids[: blocks_for(num_tokens, TOKENS_PER_BLOCK)]


def assert_same_cache(left: Any, right: Any) -> None:
    assert len(left.layers) == len(right.layers)
    for a, b in zip(left.layers, right.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 100, 1500])
def test_a_cache_comes_back_equal_through_scattered_blocks(num_tokens: int) -> None:
    cache, pool = make_cache(num_tokens), make_pool()
    ids = scattered_ids(num_tokens)
    assert export_cache(cache, pool, ids) == num_tokens
    back: Any = import_cache(pool, ids, num_tokens)
    assert_same_cache(back, cache)
    assert back.get_seq_length() == num_tokens
    assert all(layer.keys.is_contiguous() for layer in back.layers)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 100])
def test_only_the_tokens_are_written(num_tokens: int) -> None:
    pool, ids = make_pool(), scattered_ids(num_tokens)
    export_cache(make_cache(num_tokens), pool, ids)
    free = sorted(set(range(BLOCKS)) - set(ids))
    used_of_last = (num_tokens - 1) % TOKENS_PER_BLOCK + 1
    for layer in pool:
        assert (layer[:, free] == SENTINEL).all()
        assert (layer[:, ids[-1], used_of_last:] == SENTINEL).all()
        assert (layer[:, ids[-1], :used_of_last] != SENTINEL).any()


def test_token_lands_where_the_layout_says() -> None:
    num_tokens = 40
    cache, pool, ids = make_cache(num_tokens), make_pool(), scattered_ids(num_tokens)
    export_cache(cache, pool, ids)
    for number, layer in enumerate(cache.layers):
        for token in range(num_tokens):
            block, slot = ids[token // TOKENS_PER_BLOCK], token % TOKENS_PER_BLOCK
            assert torch.equal(pool[number][0, block, slot], layer.keys[0, :, token])
            assert torch.equal(pool[number][1, block, slot], layer.values[0, :, token])


def test_an_imported_cache_owns_its_memory() -> None:
    cache, pool, ids = make_cache(33), make_pool(), scattered_ids(33)
    export_cache(cache, pool, ids)
    back: Any = import_cache(pool, ids, 33)
    for layer in pool:
        layer.fill_(SENTINEL)
    assert_same_cache(back, cache)


@pytest.mark.parametrize("dims", ["block plane head token dim", "token block plane head dim"])
def test_any_order_of_dimensions_works_as_a_view(dims: str) -> None:
    order = [dims.split().index(name) for name in POOL_DIMS.split()]
    back = [POOL_DIMS.split().index(name) for name in dims.split()]
    pool = [layer.permute(back).contiguous().permute(order) for layer in make_pool()]
    assert not pool[0].is_contiguous()
    cache, ids = make_cache(50), scattered_ids(50)
    export_cache(cache, pool, ids)
    assert_same_cache(import_cache(pool, ids, 50), cache)
    assert (pool[0][:, 0::2] == SENTINEL).all()


def test_a_stacked_tensor_is_a_pool_too() -> None:
    pool = torch.stack(make_pool())
    cache, ids = make_cache(50), scattered_ids(50)
    export_cache(cache, pool, ids)
    assert_same_cache(import_cache(pool, ids, 50), cache)


def test_the_pool_has_a_layout() -> None:
    layout = KVLayout.from_tensors(make_pool(), POOL_DIMS)
    assert layout.num_layers == LAYERS
    assert layout.block_nbytes == LAYERS * 2 * TOKENS_PER_BLOCK * KV_HEADS * HEAD_DIM * 2


def test_one_row_of_a_batch_and_a_prefix_of_its_tokens() -> None:
    cache, pool, ids = make_cache(50, batch=3), make_pool(), scattered_ids(50)
    assert export_cache(cache, pool, ids, row=2, num_tokens=37) == 37
    back: Any = import_cache(pool, ids, 37)
    for layer, original in zip(back.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys[0], original.keys[2, :, :37])
        assert torch.equal(layer.values[0], original.values[2, :, :37])


def test_a_cropped_cache_can_be_exported() -> None:
    cache, pool, ids = make_cache(50), make_pool(), scattered_ids(50)
    cache.crop(-1)
    assert export_cache(cache, pool, ids) == 49
    assert_same_cache(import_cache(pool, ids, 49), cache)


def test_more_block_ids_than_tokens_leave_the_rest_alone() -> None:
    pool, ids = make_pool(), scattered_ids(100)
    export_cache(make_cache(17), pool, ids)
    assert all((layer[:, ids[2:]] == SENTINEL).all() for layer in pool)


@pytest.mark.slow
def test_grouped_query_model_goes_on_from_an_imported_cache() -> None:
    llama = pytest.importorskip("transformers.models.llama")
    torch.manual_seed(0)
    config = llama.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        initializer_range=0.2,
    )
    model = llama.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    prompt = torch.randint(0, 64, (1, 45))
    pool, ids = make_pool(), scattered_ids(45)
    with torch.inference_mode():
        cache = cache_utils.DynamicCache(config=config)
        name = cache_argument(model)
        model(input_ids=prompt, use_cache=True, **{name: cache})
        export_cache(cache, pool, ids)
        back: Any = import_cache(pool, ids, 45, config=config)
        step = prompt[:, :1]
        left = model(input_ids=step, use_cache=True, **{name: cache}).logits
        right = model(input_ids=step, use_cache=True, **{name: back}).logits
    assert torch.equal(left, right)


def takes_cache(*, cache: Any = None, cache_position: Any = None) -> None: ...


def takes_past_key_values(*, past_key_values: Any = None, cache_position: Any = None) -> None: ...


@pytest.mark.parametrize(
    ("forward", "name"),
    [(takes_cache, "cache"), (takes_past_key_values, "past_key_values")],
)
def test_the_cache_goes_by_the_name_that_the_model_has_for_it(
    forward: Callable[..., None], name: str
) -> None:
    @functools.wraps(forward)
    def decorated(**_options: Any) -> None: ...

    assert cache_argument(types.SimpleNamespace(forward=decorated)) == name


class TestWhatIsRefused:
    """Every refusal is one sentence that names the thing, and leaves the pool untouched."""

    @pytest.mark.parametrize(
        ("cache", "ids", "error", "words"),
        [
            (lambda: make_cache(33), [5, 9], PlanError, "33 tokens need 3 blocks of 16 .* 2 block"),
            (lambda: make_cache(17), [5, BLOCKS], BlockOutOfRange, "block id 200 .* 200 blocks"),
            (lambda: make_cache(17), [5, -1], BlockOutOfRange, "block id -1"),
            (lambda: make_cache(17), [5, 5], OverlappingBlocks, "twice"),
            (lambda: make_cache(17), [[5, 6]], PlanError, "list of integers"),
            (lambda: make_cache(17), [5.0, 6.0], PlanError, "list of integers"),
            (
                lambda: make_cache(17, dtype=torch.float32),
                [5, 7],
                LayoutError,
                r"torch\.float32 but the pool is torch\.bfloat16",
            ),
            (lambda: make_cache(17, heads=4), [5, 7], LayoutError, "4 KV heads .* pool has 2"),
            (lambda: make_cache(17, layers=4), [5, 7], LayoutError, "4 layers but the pool has 3"),
            (lambda: make_cache(17, batch=2), [5, 7], LayoutError, "batch of 2 .* row="),
            (
                lambda: (
                    cache_utils.DynamicCache([(None, None)] * LAYERS)
                    if False
                    else cache_utils.DynamicCache()
                ),
                [5],
                LayoutError,
                "0 layers",
            ),
        ],
    )
    def test_by_export(
        self, cache: Callable[[], Any], ids: Any, error: type[Exception], words: str
    ) -> None:
        pool = make_pool()
        with pytest.raises(error, match=words):
            export_cache(cache(), pool, ids)
        assert all((layer == SENTINEL).all() for layer in pool)

    def test_another_device(self) -> None:
        pool = make_pool(device="meta")
        with pytest.raises(LayoutError, match="is on cpu but the pool is on meta"):
            export_cache(make_cache(17), pool, [5, 7])

    def test_a_row_or_a_length_that_the_cache_has_not(self) -> None:
        with pytest.raises(LayoutError, match=r"row 2 .* 2 sequences"):
            export_cache(make_cache(17, batch=2), make_pool(), [5, 7], row=2)
        with pytest.raises(PlanError, match="num_tokens is 18 but the cache holds 17"):
            export_cache(make_cache(17), make_pool(), [5, 7], num_tokens=18)

    def test_layers_that_forget_tokens(self) -> None:
        cache = make_cache(17)
        cache.layers[1] = cache_utils.DynamicSlidingWindowLayer(sliding_window=8)
        with pytest.raises(LayoutError, match=r"layer 1 .* DynamicSlidingWindowLayer"):
            export_cache(cache, make_pool(), [5, 7])

    def test_layers_that_are_still_empty(self) -> None:
        cache = make_cache(17)
        cache.layers[2] = cache_utils.DynamicLayer()
        with pytest.raises(LayoutError, match=r"layer 2 .* holds no tokens"):
            export_cache(cache, make_pool(), [5, 7])

    def test_a_pool_of_another_shape(self) -> None:
        with pytest.raises(LayoutError, match="layer 0 of the pool has shape"):
            export_cache(make_cache(17), [layer[0] for layer in make_pool()], [5, 7])
        uneven = make_pool()
        uneven[1] = uneven[1][:, :10]
        with pytest.raises(LayoutError, match="layer 1 of the pool"):
            import_cache(uneven, [5, 7], 17)

    @pytest.mark.parametrize(
        ("ids", "num_tokens", "words"),
        [([5], 17, "17 tokens need 2 blocks"), ([5, 900], 17, "block id 900"), ([5], 0, "is 0")],
    )
    def test_by_import(self, ids: Any, num_tokens: int, words: str) -> None:
        with pytest.raises(PlanError, match=words):
            import_cache(make_pool(), ids, num_tokens)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"num_key_value_heads": 4}, "4 KV heads but the pool has 2"),
            ({"num_hidden_layers": 5}, "5 layers but the pool has 3"),
            ({"head_dim": 16}, "16 dimensions a head but the pool has 8"),
        ],
    )
    def test_a_model_that_is_not_the_pools(self, change: dict[str, int], words: str) -> None:
        llama = pytest.importorskip("transformers.models.llama.configuration_llama")
        settings = {
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 8,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
        }
        config = llama.LlamaConfig(**{**settings, **change})
        with pytest.raises(LayoutError, match=words):
            import_cache(make_pool(), [5, 7], 17, config=config)
