"""vLLM's paged caches as a `KVLayout`.

vLLM gives one tensor a layer, `[block, head, token, content]`, whatever its strides; a latent (MLA) is
the same without heads. Some backends store what that says: of each token and head a row, K beside V.
Others *advertise* it and store something else inside a block, the CPU's even in an order that depends
on the machine's instruction set: for these token and content are opaque, and a block is moved as it
is. The codec names backend, instruction set and version; a peer that differs in one of them, or in
the block size of an opaque cache, is refused when agents meet.

Layers of several groups may share one tensor: vLLM's block manager gives a block to one group at a
time. Each is a region of its own, over the same bytes.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from ...engine.errors import LayoutError
from ...engine.layout.join import join_groups, join_planes
from ...engine.layout.kv_layout import KVLayout
from .groups import NULL_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .groups import CacheGroup

DIMS = "block head token dim"
LATENT_DIMS = "block token dim"
# Read in vLLM 0.32: these write a row a token, of each head or of the latent.
BACKENDS_OF_ROWS = frozenset({"FLASH_ATTN", "TRITON_ATTN", "FLASH_ATTN_MLA", "TRITON_MLA"})
INTERIOR = ("token", "dim")
DRAFT = (
    "draft_model."  # vLLM's prefix of a model that guesses tokens; one that shares layers has none
)


class Backend(NamedTuple):
    """What fills the cache.

    Attributes:
        name: of vLLM's attention backend, such as `CPU_ATTN`; of all of them where layers differ.
        isa: of the CPU backend, such as `vec` or `amx`; "" elsewhere.
        version: vLLM's; what is opaque may change with it.
    """

    name: str
    isa: str
    version: str


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


def number_layers(names: Iterable[str]) -> dict[str, int]:
    """The number of each layer; those of a draft model, which counts from 0 too, follow the model's.

    Raises:
        LayoutError: a name has no number, or several.
    """
    own = {name: layer_number(name) for name in names}
    targets = [number for name, number in own.items() if not name.startswith(DRAFT)]
    first = max(targets, default=-1) + 1
    return {name: number + first * name.startswith(DRAFT) for name, number in own.items()}


def layer_number(name: str) -> int:
    """A model's own number of a layer: `model.layers.7.self_attn.attn` is 7.

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


def heads_of_rank(model_heads: int, tp_size: int, tp_rank: int) -> Heads:
    """vLLM splits heads evenly over ranks; ranks beyond the number of heads share them."""
    held = max(1, model_heads // tp_size) if tp_size > 1 else 0
    return Heads(tp_rank * model_heads // tp_size, held, tp_size > model_heads)


def describe_caches(
    caches: Mapping[str, Any], groups: Sequence[CacheGroup], backend: Backend, heads: Heads
) -> tuple[KVLayout, list[str]]:
    """Describes the caches that vLLM registers.

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
        codec=f"vllm/{backend.name}/{backend.isa}/{backend.version}",
        opaque=() if of_rows else INTERIOR,
    )


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
