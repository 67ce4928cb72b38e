"""What of one layout goes where in another, and why two layouts cannot go together.

What comes of it are the bundles of `bundles.py`. Everything that does not fit is refused here, by
the axis and with both values, before anything moves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LayoutError
from ..layout.block_scales import SCALE_SUFFIX
from ..layout.kv_layout import WHOLE_KINDS
from .mapping import Bundle, Step, TablePair
from .planes import (
    BlockScaled,
    check_equal_scales,
    fixed_scales,
    held_scales,
    make_factors,
    places_of,
)
from .region_pairs import differ, signature_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from ..layout.kv_layout import GroupLayout, KVLayout
    from .planes import Key, Place

    _Scales = tuple[dict[Key, tuple[float, ...]], dict[Key, tuple[float, ...]]]


def reconcile(
    src: KVLayout, dst: KVLayout, keys: Collection[Key] | None = None
) -> tuple[TablePair, ...]:
    """Pairs the planes of two layouts.

    Args:
        keys: the planes of layers to move; all that both hold if None.

    Raises:
        LayoutError: the two layouts cannot be reconciled; names what differs and both values.
    """
    _check_models(src, dst)
    places = [places_of(layout) for layout in (src, dst)]
    common = [key for key in places[0] if key in places[1] and (keys is None or key in keys)]
    _check_common(src, dst, places, keys, common)
    blocked = BlockScaled(src, dst, places)
    common = [key for key in common if not blocked.travels_as_scale(key)]
    scales = fixed_scales(src), fixed_scales(dst)
    by_tables: dict[tuple[int, int], dict[Any, list[tuple[Key, Place, Place]]]] = {}
    signatures: dict[tuple[int, int], Any] = {}
    for key in common:
        here, there = places[0][key], places[1][key]
        pair = (here.region, there.region)
        if pair not in signatures:
            signatures[pair] = signature_of(src, dst, *pair)
        tables = by_tables.setdefault((here.group, there.group), {})
        per_block = blocked.shapes(key, signatures[pair][8])
        signature = (
            signatures[pair],
            tuple(len(side.get(key, ())) for side in scales),
            per_block,
        )
        tables.setdefault(signature, []).append((key, here, there))
    dst_groups = [dst_group for _, dst_group in by_tables]
    for group in dst_groups:
        if dst_groups.count(group) > 1:
            raise LayoutError(
                f"group {group} of the destination has one block table, but its layers are in "
                "several groups of the source",
                operation="plan",
            )
    pairs = (
        _table_pair(src, dst, scales, blocked, *groups, found)
        for groups, found in by_tables.items()
    )
    return tuple(sorted(pairs, key=lambda pair: pair.dst_group))


def _check_models(src: KVLayout, dst: KVLayout) -> None:
    differ("codec", src.codec, dst.codec)
    differ("opaque axes", sorted(src.opaque), sorted(dst.opaque))
    if src.model_heads and dst.model_heads:
        differ("number of KV heads of the model", src.model_heads, dst.model_heads)
    if src.model_layers and dst.model_layers:
        differ("number of layers of the model", src.model_layers, dst.model_layers)


def _check_common(
    src: KVLayout,
    dst: KVLayout,
    places: list[dict[Key, Place]],
    keys: Collection[Key] | None,
    common: list[Key],
) -> None:
    shared = set(src.layers) & set(dst.layers)
    if not shared:
        raise LayoutError(
            f"no layer is held by both: source has {src.layers}, destination has {dst.layers}",
            operation="plan",
        )
    for key in sorted(keys or ()):
        if key not in common:
            raise LayoutError(
                f"plane {key[1]!r} of layer {key[0]} is not held by both sides", operation="plan"
            )
    if keys is None:
        planes: list[dict[int, set[str]]] = [{}, {}]
        for side, held in enumerate(places):
            for layer, plane in held:
                planes[side].setdefault(layer, set()).add(plane)
        for layer in sorted(shared):
            left, right = (
                sorted(name for name in planes[side][layer] if not name.endswith(SCALE_SUFFIX))
                for side in (0, 1)
            )
            differ(f"planes of layer {layer}", left, right)


def _table_pair(
    src: KVLayout,
    dst: KVLayout,
    scales: _Scales,
    blocked: BlockScaled,
    src_group: int,
    dst_group: int,
    found: dict[Any, list[tuple[Key, Place, Place]]],
) -> TablePair:
    one, other = src.groups[src_group], dst.groups[dst_group]
    differ("group kind", one.kind, other.kind)
    differ("window", one.window, other.window)
    blocks = _tokens(src, one), _tokens(dst, other)
    state = one.kind in WHOLE_KINDS
    bundles = tuple(
        _bundle(scales, blocked, signature, entries, state=state)
        for signature, entries in found.items()
    )
    aligned = ""
    if any(bundle.dst_scales is not None for bundle in bundles):
        aligned = "its scales are one a block"
    if any(bundle.token is None for bundle in bundles) and not state:
        aligned = (
            f"axis 'token' is opaque in codec {src.codec!r}"
            if "token" in src.opaque
            else "a plane of this group has one value a block"
        )
    if state:
        differ("block size in tokens", *blocks)
    return TablePair(
        src_group,
        dst_group,
        one.kind,
        one.window,
        0 if state else blocks[0],
        0 if state else blocks[1],
        0 if state else math.gcd(*blocks),
        src.regions[one.regions[0]].num_slots,
        dst.regions[other.regions[0]].num_slots,
        one.null_slot,
        other.null_slot,
        bundles,
        aligned,
    )


def _tokens(layout: KVLayout, group: GroupLayout) -> int:
    return layout.regions[group.regions[0]].tokens_per_slot


def _bundle(
    scales: _Scales,
    blocked: BlockScaled,
    signature: Any,
    entries: list[tuple[Key, Place, Place]],
    *,
    state: bool,
) -> Bundle:
    (
        src_axes,
        dst_axes,
        src_slot,
        dst_slot,
        src_elem,
        dst_elem,
        src_dtype,
        dst_dtype,
        heads,
        src_first,
        dst_first,
        whole,
    ) = signature[0]
    there = {axis.name: axis for axis in dst_axes}
    here = {axis.name: axis for axis in src_axes}
    low, high = heads or (0, 1)
    token: Step | None = None
    steps: list[Step] = []
    elements = 1
    begin = [0, 0]
    for name in dict.fromkeys([*here, *there]):
        strides = [side[name].stride_bytes if name in side else 0 for side in (here, there)]
        size = (here.get(name) or there[name]).size
        if name == "head":
            size = high - low
            begin[0] += (low - src_first) * strides[0]
            begin[1] += (low - dst_first) * strides[1]
        if name == "token" and not (whole or state):
            token = Step(name, size, *strides)
        elif name == "dim" and strides == [src_elem, dst_elem]:
            elements = size
        elif size > 1:
            steps.append(Step(name, size, *strides))
    columns = [
        (key[0], src_place.region, src_place.start, dst_place.region, dst_place.start)
        for key, src_place, dst_place in entries
    ]
    table = np.array(columns, np.int64).reshape(-1, 5)
    held = [
        [held_scales(side, key, (low, high), first) for key, _, _ in entries]
        for side, first in zip(scales, (src_first, dst_first), strict=True)
    ]
    keys = [key for key, _, _ in entries]
    scaled = None
    if src_dtype != dst_dtype:
        per_block = [shape is not None for shape in signature[2]]
        scaled = make_factors(keys, held, (src_dtype, dst_dtype), per_block)
    else:
        check_equal_scales(keys, held, high - low)
    return Bundle(
        layer=table[:, 0].copy(),
        src_region=table[:, 1].copy(),
        src_start=table[:, 2] + begin[0],
        dst_region=table[:, 3].copy(),
        dst_start=table[:, 4] + begin[1],
        src_slot_stride=src_slot,
        dst_slot_stride=dst_slot,
        token=token,
        steps=tuple(steps),
        elements=elements,
        src_elem=src_elem,
        dst_elem=dst_elem,
        src_dtype=src_dtype,
        dst_dtype=dst_dtype,
        factors=scaled,
        src_scales=blocked.columns(0, keys, signature[2][0]),
        dst_scales=blocked.columns(1, keys, signature[2][1]),
    )
