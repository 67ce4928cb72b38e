"""vLLM's paged caches as a `KVLayout`: its groups of layers, their tensors, their block tables.

vLLM gives one tensor a layer, `[block, head, token, content]`, whatever its strides; a latent (MLA) is
the same without heads. Some backends store what that says: of each token and head a row, K beside V.
Others *advertise* it and store something else inside a block, the CPU's even in an order that depends
on the machine's instruction set: for these token and content are opaque, and a block is moved as it
is. The codec names backend, instruction set and version; a peer that differs in one of them, or in
the block size of an opaque cache, is refused when agents meet.

Layers that share a block table are a group. Layers of several groups may share one tensor: vLLM's
block manager gives a block to one group at a time. Each is a region of its own, over the same bytes.

vLLM's objects are read by names and attributes alone, so that this needs no vLLM and reads any
version's.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...engine.errors import LayoutError
from ...engine.layout.join import join_groups, join_planes
from ...engine.layout.kv_layout import KVLayout
from ...engine.plan.rank_plan import heads_of_rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# By vLLM's name of the spec; its subclasses have rules of their own (sinks, gaps, compressed states).
KINDS = {"FullAttentionSpec": "full", "MLAAttentionSpec": "mla", "SlidingWindowSpec": "swa"}
NULL_BLOCK = 0  # in vLLM's tables: what a sliding window has left behind
DIMS = "block head token dim"
LATENT_DIMS = "block token dim"
# Read in vLLM 0.32: these write a row a token, of each head or of the latent.
BACKENDS_OF_ROWS = frozenset({"FLASH_ATTN", "TRITON_ATTN", "FLASH_ATTN_MLA", "TRITON_MLA"})
INTERIOR = ("token", "dim")
# vLLM's prefix of a model that guesses tokens; one that shares layers has none.
DRAFT = "draft_model."


class CacheGroup(NamedTuple):
    """Layers that share a block table, and what their kind means for a handoff.

    Attributes:
        table: which of a request's block tables is the group's.
        kind: `full`, `mla` or `swa`, as in `GroupLayout`.
        layers: vLLM's names.
        block_size: tokens of a block of vLLM's block manager.
        window: how many tokens before its own a token attends to; 0 if to all of them. vLLM's
            `sliding_window` counts the token itself too.
    """

    table: int
    kind: str
    layers: tuple[str, ...]
    block_size: int
    window: int = 0

    def num_blocks(self, num_tokens: int) -> int:
        """Return how many blocks so many tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def needed_from(self, num_tokens: int) -> int:
        """Return the first of `num_tokens` tokens that the next one attends to."""
        return max(0, num_tokens - self.window) if self.window else 0


def read_groups(kv_cache_config: Any) -> tuple[CacheGroup, ...]:
    """Return the groups that are to be moved, in vLLM's order.

    Raises:
        ValueError: a kind of cache that cannot be moved; names it and its layers.
    """
    groups = kv_cache_config.kv_cache_groups
    chosen = getattr(kv_cache_config, "transfer_group_ids", range(len(groups)))
    return tuple(_read(index, groups[index]) for index in chosen)


def _read(index: int, group: Any) -> CacheGroup:
    spec = group.kv_cache_spec
    layers = tuple(group.layer_names)
    one_a_layer = getattr(spec, "kv_cache_specs", None)  # layers that differ in shape alone
    specs = list(one_a_layer.values()) if one_a_layer else [spec]
    found = {(type(each).__name__, _window(each)) for each in specs}
    compressed = [each for each in specs if getattr(each, "tokens_per_state", 1) != 1]
    name, window = found.pop()
    if found or compressed or name not in KINDS:
        names = ", ".join(sorted({type(each).__name__ for each in specs}))
        why = " with several tokens in one state" if compressed else ""
        why = why or (" of different windows in one group" if found else "")
        raise ValueError(
            f"KVFerryConnector moves full, sliding-window and MLA attention caches; "
            f"{layers[0] if layers else 'a layer'} has {names}{why}"
        )
    return CacheGroup(index, KINDS[name], layers, spec.block_size, window)


def _window(spec: Any) -> int:
    """As `CacheGroup.window`. Full attention may name a window: its blocks are all kept."""
    if type(spec).__name__ != "SlidingWindowSpec":
        return 0
    return int(spec.sliding_window) - 1 + int(getattr(spec, "extra_retained_tokens", 0))


# Types that say how many bytes a number has, and not what it is.
STORAGE_TYPES = frozenset({"torch.uint8", "torch.int8"})
SYNONYMS = {"fp8": "fp8_e4m3"}  # on the GPUs and CPUs that vLLM's CUDA and CPU builds serve


class Backend(NamedTuple):
    """What fills the cache.

    Attributes:
        name: of vLLM's attention backend, such as `CPU_ATTN`; of all of them where layers differ.
        isa: of the CPU backend, such as `vec` or `amx`; "" elsewhere.
        version: vLLM's; what is opaque may change with it.
        numbers: vLLM's `cache_dtype`: what the numbers are, where torch's type does not say.
    """

    name: str
    isa: str
    version: str
    numbers: str = "auto"


class Heads(NamedTuple):
    """Which of the model's KV heads this rank holds.

    Attributes:
        start: the first.
        held: how many; 0 where a single rank holds what there is.
        replicated: whether other ranks hold the same ones.
    """

    start: int
    held: int
    replicated: bool

    @classmethod
    def of_rank(cls, num_heads: int, tp_size: int, tp_rank: int) -> Heads:
        """Return what vLLM's tensor parallelism gives a rank of a model with so many KV heads."""
        start, stop = heads_of_rank(num_heads, tp_size, tp_rank)
        return cls(start, stop - start if tp_size > 1 else 0, tp_size > num_heads)


def number_layers(names: Iterable[str]) -> dict[str, int]:
    """Return the number of each layer; those of a draft model, which counts from 0 too, follow the
    model's.

    Raises:
        LayoutError: a name has no number, or several.
    """
    own = {name: layer_number(name) for name in names}
    targets = [number for name, number in own.items() if not name.startswith(DRAFT)]
    first = max(targets, default=-1) + 1
    return {name: number + first * name.startswith(DRAFT) for name, number in own.items()}


def layer_number(name: str) -> int:
    """Return a model's own number of a layer: `model.layers.7.self_attn.attn` is 7.

    Raises:
        LayoutError: the name has no number, or several.
    """
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if len(numbers) != 1:
        raise LayoutError(
            f"layer {name!r} has {len(numbers)} numbers in its name: exactly one is expected",
            operation="layout",
        )
    return int(numbers[0])


def describe_caches(
    caches: Mapping[str, Any], groups: Sequence[CacheGroup], backend: Backend, heads: Heads
) -> tuple[KVLayout, list[str]]:
    """Describe the caches that vLLM registers.

    Args:
        caches: a tensor for each layer, by the layer's name: `[block, head, token, content]`, of a
            latent also `[block, token, content]`.
        groups: which of them share a block table.

    Returns:
        The layout, with a group for each of these in their order, and the layers' names in the
        order of its regions.

    Raises:
        LayoutError: caches that cannot be described: layers without a number, in no group, of
            several head counts on a rank that holds a part of them.
    """
    _check_members(caches, groups)
    numbers = number_layers(name for group in groups for name in group.layers)
    groups_parts = []
    names: list[str] = []
    for group in groups:
        members = sorted(group.layers, key=numbers.__getitem__)
        names += members
        # A draft model's layers may be of another shape than those that they share a table with.
        alike = itertools.groupby(members, lambda name: (caches[name].shape, caches[name].dtype))
        parts = [
            _describe_alike(group, list(some), numbers, caches, heads, backend) for _, some in alike
        ]
        groups_parts.append(parts[0] if len(parts) == 1 else join_planes(*parts))
    return groups_parts[0] if len(groups_parts) == 1 else join_groups(*groups_parts), names


def _describe_alike(
    group: CacheGroup,
    names: list[str],
    numbers: Mapping[str, int],
    caches: Mapping[str, Any],
    heads: Heads,
    backend: Backend,
) -> KVLayout:
    """Layers of one group and one shape."""
    of_rows = BACKENDS_OF_ROWS.issuperset(backend.name.split("+"))
    return KVLayout.from_tensors(
        [caches[name] for name in names],
        _dims(group, names[0], caches[names[0]], heads),
        layers=[numbers[name] for name in names],
        planes=("latent" if group.kind == "mla" else "kv",),
        head_start=heads.start,
        tp_mode="replicate" if heads.replicated else "split",
        kind=group.kind,
        window=group.window,
        null_slot=NULL_BLOCK if group.window else None,
        codec=_codec(backend, names[0], caches[names[0]]),
        opaque=() if of_rows else INTERIOR,
    )


def _codec(backend: Backend, name: str, cache: Any) -> str:
    """Say what fills a cache and, where torch knows it as bytes, what its numbers are.

    vLLM stores several formats as uint8: `fp8_e4m3` and `fp8_e5m2` are other numbers in equal bytes.
    """
    codec = f"vllm/{backend.name}/{backend.isa}/{backend.version}"
    if str(cache.dtype) not in STORAGE_TYPES:
        return codec
    if backend.numbers in ("", "auto"):
        raise LayoutError(
            f"layer {name!r} keeps its numbers as {cache.dtype}, and kv_cache_dtype is "
            f"{backend.numbers!r}: what they are is not known, so set kv_cache_dtype",
            operation="layout",
        )
    return f"{codec}/{SYNONYMS.get(backend.numbers, backend.numbers)}"


def _check_members(caches: Mapping[str, Any], groups: Sequence[CacheGroup]) -> None:
    members = {name for group in groups for name in group.layers}
    places = {caches[name].data_ptr() for name in members if name in caches}
    for name, cache in caches.items():
        # A layer that reads another's cache has none of its own.
        if name not in members and cache.data_ptr() not in places:
            raise LayoutError(f"layer {name!r} is in no cache group", operation="layout")
    for name in members - caches.keys():
        raise LayoutError(f"layer {name!r} has no cache", operation="layout")


def _dims(group: CacheGroup, name: str, cache: Any, heads: Heads) -> str:
    shape = tuple(cache.shape)
    if group.kind == "mla" and (len(shape) == 3 or (len(shape) == 4 and shape[1] == 1)):
        return LATENT_DIMS if len(shape) == 3 else DIMS
    if group.kind == "mla" or len(shape) != 4:
        expected = "[block, token, content]" if group.kind == "mla" else "4 dimensions"
        raise LayoutError(
            f"the cache of layer {name!r} has shape {shape}: a paged {group.kind} attention cache "
            f"of {expected} is expected",
            operation="layout",
        )
    if heads.held and shape[1] != heads.held:
        raise LayoutError(
            f"layer {name!r} has {shape[1]} KV heads on this rank, not {heads.held}: models whose "
            "layers differ in that are moved with tensor_parallel_size 1 alone",
            operation="layout",
        )
    return DIMS


class Tables:
    """Turns vLLM's block tables into a layout's: a block of its manager may be several of the cache.

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
        """Return whether each block of a prompt is one of another cache's, which both call by its
        place."""
        if not self.plain or len(theirs.groups) > 1:
            return False
        first = theirs.regions[theirs.groups[0].regions[0]]
        return first.tokens_per_slot == self.step_tokens

    def rows(self, tables: Sequence[Sequence[int]], num_tokens: int) -> list[Any]:
        """Return the cache's blocks of a prompt's first tokens, a row of ids for each group.

        vLLM's own lists where its blocks are the cache's: agents check and convert ids, all at once,
        and a few of a list without NumPy.
        """
        rows = []
        for table, split, tokens in zip(tables, self._splits, self._tokens, strict=True):
            ids: Any = table
            if split > 1:
                ids = (np.asarray(table, np.int64)[:, None] * split + np.arange(split)).ravel()
            rows.append(ids[: -(-num_tokens // tokens)])
        return rows

    def of_cache(self, tables: Sequence[Sequence[int]], num_tokens: int) -> Any:
        """Return the same as `Agent.open_send` takes them: a single row by itself."""
        rows = self.rows(tables, num_tokens)
        return rows[0] if len(rows) == 1 else rows

    def empty(self) -> Any:
        """No blocks, as `Agent.open_send` takes them."""
        return self.of_cache([[] for _ in self._splits], 0)
