"""vLLM's cache groups as the connector reads them, and those that it refuses by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.adapters.vllm.cache import Backend, CacheGroup, Heads, describe_caches, read_groups
from kvferry.adapters.vllm.settings import check_supported
from kvferry.engine.errors import LayoutError
from kvferry.engine.plan.token_plan import TokenPlan

CPU = Backend("CPU_ATTN", "vec", "0.32.0")
ALONE = Heads.of_rank(2, 1, 0)


def spec(name: str, **fields: Any) -> Any:
    """One of vLLM's specs, which are known by the names of their classes."""
    made = type(name, (), {})()
    made.__dict__.update({"block_size": 32} | fields)
    return made


def config(*groups: tuple[list[str], Any], **fields: Any) -> Any:
    """A `KVCacheConfig`."""
    made = [SimpleNamespace(layer_names=names, kv_cache_spec=each) for names, each in groups]
    return SimpleNamespace(kv_cache_groups=made, **fields)


def test_groups_are_read_as_vllm_has_them() -> None:
    windows = spec("SlidingWindowSpec", sliding_window=80, extra_retained_tokens=0)
    full = spec("FullAttentionSpec", sliding_window=None, block_size=64, tokens_per_state=1)
    read = read_groups(config((["a.0"], windows), (["a.1", "a.2"], full)))
    assert read == (
        CacheGroup(0, "swa", ("a.0",), 32, 79),
        CacheGroup(1, "full", ("a.1", "a.2"), 64, 0),
    )
    assert [read[0].needed_from(count) for count in (10, 79, 80, 200)] == [0, 0, 1, 121]
    assert read[1].needed_from(200) == 0


def test_a_window_that_speculation_extends_is_moved_with_what_it_retains() -> None:
    windows = spec("SlidingWindowSpec", sliding_window=80, extra_retained_tokens=3)
    assert read_groups(config((["a.0"], windows)))[0].window == 82


def test_a_window_that_vllm_keeps_whole_is_full_attention() -> None:
    """As with --disable-hybrid-kv-cache-manager."""
    (group,) = read_groups(config((["a.0"], spec("FullAttentionSpec", sliding_window=80))))
    assert (group.kind, group.window) == ("full", 0)


def test_groups_that_are_not_transferred_are_left_out() -> None:
    full = spec("FullAttentionSpec")
    read = read_groups(config((["a"], full), (["b"], full), (["c"], full), transfer_group_ids=(2,)))
    assert [(group.table, group.layers) for group in read] == [(2, ("c",))]


def test_layers_of_a_group_may_differ_in_shape() -> None:
    each = {"a.0": spec("MLAAttentionSpec"), "a.1": spec("MLAAttentionSpec")}
    (group,) = read_groups(
        config((["a.0", "a.1"], spec("UniformTypeKVCacheSpecs", kv_cache_specs=each)))
    )
    assert group.kind == "mla"


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (spec("MambaSpec"), "a.0 has MambaSpec"),
        (spec("ChunkedLocalAttentionSpec"), "a.0 has ChunkedLocalAttentionSpec"),
        (
            spec("MLAAttentionSpec", tokens_per_state=4),
            "a.0 has MLAAttentionSpec with several tokens in one state",
        ),
        (
            spec(
                "UniformTypeKVCacheSpecs",
                kv_cache_specs={
                    "a.0": spec("SlidingWindowSpec", sliding_window=8),
                    "a.1": spec("SlidingWindowSpec", sliding_window=9),
                },
            ),
            "a.0 has SlidingWindowSpec of different windows in one group",
        ),
    ],
)
def test_other_kinds_are_refused_by_name(refused: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_groups(config((["a.0", "a.1"], refused)))


def test_groups_over_the_same_bytes_are_regions_of_their_own() -> None:
    shared = [torch.zeros(9, 2, 4, 16) for _ in range(2)]
    names = [f"model.layers.{number}.attn" for number in range(4)]
    caches = {name: shared[number // 2] for number, name in enumerate(names)}
    groups = (
        CacheGroup(0, "swa", (names[2], names[0]), 4, 5),
        CacheGroup(1, "full", (names[1], names[3]), 4),
    )
    layout, order = describe_caches(caches, groups, CPU, ALONE)
    assert order == [names[0], names[2], names[1], names[3]]
    assert [region.layers for region in layout.regions] == [(0,), (2,), (1,), (3,)]
    assert [(g.kind, g.regions, g.window, g.null_slot) for g in layout.groups] == [
        ("swa", (0, 1), 5, 0),
        ("full", (2, 3), 0, None),
    ]
    assert layout.codec == "vllm/CPU_ATTN/vec/0.32.0"
    assert layout.opaque == ("token", "dim")


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_draft_models_layers_follow_the_models(heads: int, together: bool) -> None:
    names = [f"model.layers.{number}.self_attn.attn" for number in range(11)]
    drafts = [f"draft_model.model.layers.{number}.self_attn.attn" for number in (1, 0)]
    caches = {name: torch.zeros(9, 2, 4, 16) for name in names}
    caches |= {name: torch.zeros(9, heads, 4, 16) for name in drafts}
    if together:
        groups: tuple[CacheGroup, ...] = (CacheGroup(0, "full", (*drafts, *names), 4),)
    else:
        groups = (
            CacheGroup(0, "full", tuple(drafts), 4),
            CacheGroup(1, "full", tuple(names), 4),
        )
    layout, order = describe_caches(caches, groups, CPU, ALONE)
    in_order = [*names, drafts[1], drafts[0]]
    assert [in_order.index(name) for name in order] == [r.layers[0] for r in layout.regions]
    assert layout.layers == tuple(range(13))
    assert len(layout.groups) == len(groups)
    held = {r.layers[0]: layout.region_heads(i) for i, r in enumerate(layout.regions)}
    assert (held[10], held[11], held[12]) == ((0, 2), (0, heads), (0, heads))


@pytest.mark.parametrize(
    ("backend", "opaque"),
    [
        ("FLASH_ATTN", ()),
        ("FLASH_ATTN+TRITON_ATTN", ()),
        ("FLASHINFER", ("token", "dim")),
        ("FLASH_ATTN+FLASHINFER", ("token", "dim")),
    ],
)
def test_a_backend_whose_blocks_nobody_has_read_is_opaque(
    backend: str, opaque: tuple[str, ...]
) -> None:
    name = "model.layers.0.attn"
    caches = {name: torch.zeros(9, 2, 4, 16)}
    group = CacheGroup(0, "full", (name,), 4)
    layout, _ = describe_caches(caches, [group], Backend(backend, "", "0.32.0"), ALONE)
    assert layout.codec == f"vllm/{backend}//0.32.0"
    assert layout.opaque == opaque


@pytest.mark.parametrize("shape", [(9, 4, 16), (9, 1, 4, 16)])
def test_a_latent_is_one_plane_without_heads(shape: tuple[int, ...]) -> None:
    caches = {"model.layers.0.attn": torch.zeros(shape)}
    groups = (CacheGroup(0, "mla", tuple(caches), 4),)
    layouts = [
        describe_caches(caches, groups, CPU, Heads.of_rank(1, 2, rank))[0] for rank in range(2)
    ]
    assert layouts[0] == layouts[1]
    assert layouts[0].tp_mode == "replicate"
    assert layouts[0].groups[0].kind == "mla"
    assert layouts[0].regions[0].planes == ("latent",)


@pytest.mark.parametrize(
    ("kind", "shape", "heads", "says"),
    [
        ("full", (3, 5), ALONE, "a paged full attention cache of 4 dimensions is expected"),
        ("mla", (3, 2, 4, 5), ALONE, r"a paged mla attention cache of \[block, token, content\]"),
        (
            "full",
            (3, 4, 4, 5),
            Heads(2, 2, replicated=False),
            "has 4 KV heads on this rank, not 2: models whose layers differ in that",
        ),
    ],
)
def test_caches_of_another_shape_are_refused(
    kind: str, shape: tuple[int, ...], heads: Heads, says: str
) -> None:
    caches = {"model.layers.0.attn": torch.zeros(shape)}
    with pytest.raises(LayoutError, match=says):
        describe_caches(caches, (CacheGroup(0, kind, tuple(caches), 4),), CPU, heads)


def test_every_cache_is_in_a_group_and_every_layer_has_one() -> None:
    caches = {f"model.layers.{number}.attn": torch.zeros(3, 2, 4, 8) for number in range(2)}
    first, second = caches
    with pytest.raises(LayoutError, match=f"layer '{second}' is in no cache group"):
        describe_caches(caches, (CacheGroup(0, "full", (first,), 4),), CPU, ALONE)
    del caches[second]
    with pytest.raises(LayoutError, match=f"layer '{second}' has no cache"):
        describe_caches(caches, (CacheGroup(0, "full", (first, second), 4),), CPU, ALONE)
    caches[second] = caches[first]  # it reads the other's
    layout, _ = describe_caches(caches, (CacheGroup(0, "full", (first,), 4),), CPU, ALONE)
    assert layout.layers == (0,)


@pytest.mark.parametrize("name", ["model.norm", "model.layers.1.experts.2.attn"])
def test_a_layer_has_one_number(name: str) -> None:
    with pytest.raises(LayoutError, match="numbers in its name"):
        describe_caches(
            {name: torch.zeros(3, 2, 4, 8)}, (CacheGroup(0, "full", (name,), 4),), CPU, ALONE
        )


@pytest.mark.parametrize(
    ("tp_size", "rank", "want"),
    [(1, 0, (0, 0, False)), (4, 3, (6, 2, False)), (16, 5, (2, 1, True))],
)
def test_heads_of_a_rank(tp_size: int, rank: int, want: tuple[int, int, bool]) -> None:
    assert tuple(Heads.of_rank(8, tp_size, rank)) == want


@pytest.mark.parametrize(("cache_dtype", "known"), [("fp8", "fp8_e4m3"), ("fp8_e5m2", "fp8_e5m2")])
def test_numbers_that_torch_knows_as_bytes_are_named(cache_dtype: str, known: str) -> None:
    """Two formats of equal size are not one: their bytes would be read as other numbers."""
    caches = {"model.layers.0.attn": torch.zeros((9, 2, 4, 16), dtype=torch.uint8)}
    group = CacheGroup(0, "full", tuple(caches), 4)
    backend = CPU._replace(numbers=cache_dtype)
    layout, _ = describe_caches(caches, [group], backend, ALONE)
    assert layout.codec == f"vllm/CPU_ATTN/vec/0.32.0/{known}"
    other, _ = describe_caches(caches, [group], CPU._replace(numbers="fp8_inc"), ALONE)
    with pytest.raises(LayoutError, match=f"codec differs: source has .*{known}, .*fp8_inc"):
        TokenPlan(layout, other)


def test_bytes_that_nobody_says_the_meaning_of_are_refused() -> None:
    caches = {"model.layers.0.attn": torch.zeros((9, 2, 4, 16), dtype=torch.uint8)}
    group = CacheGroup(0, "full", tuple(caches), 4)
    with pytest.raises(LayoutError, match="set kv_cache_dtype"):
        describe_caches(caches, [group], CPU, ALONE)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        ("parallel_config", "pipeline_parallel_size", 2),
        ("parallel_config", "decode_context_parallel_size", 2),
        ("parallel_config", "prefill_context_parallel_size", 4),
        ("parallel_config", "enable_dbo", True),
        ("parallel_config", "ubatch_size", 2),
        ("cache_config", "calculate_kv_scales", True),
        ("kv_cache_config", "has_mixed_precision_kv_cache", True),
    ],
)
def test_what_would_be_moved_wrongly_is_refused_when_the_engine_starts(
    config: str, name: str, value: object
) -> None:
    plain = {
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1, enable_dbo=False, ubatch_size=0
        ),
        "cache_config": SimpleNamespace(),
        "kv_cache_config": SimpleNamespace(has_mixed_precision_kv_cache=False),
    }
    check_supported(**plain)
    setattr(plain[config], name, value)
    with pytest.raises(ValueError, match=f"{name}={value}: set "):
        check_supported(**plain)
