"""What must hold within one layout, whoever wrote it: a peer's is checked like ours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import LayoutError

if TYPE_CHECKING:
    from .kv_layout import GroupLayout, KVLayout, RegionLayout

MAX_NBYTES = 1 << 62  # offsets are int64, and sums of two must not overflow
MAX_SLOTS = 1 << 31  # a plan packs two block ids into an int64


def check_region(number: int, region: RegionLayout) -> None:
    """One region's strides must place every byte inside it, once."""
    outer = [
        ("layer", len(region.layers), region.layer_stride),
        ("plane", len(region.planes), region.plane_stride),
        ("block", region.num_slots, region.slot_stride),
    ]
    steps = outer + [(axis.name, axis.size, axis.stride_bytes) for axis in region.axes]
    where = f"region {number}"
    if region.elem_bytes < 1 or region.base_offset < 0 or region.tokens_per_slot < 0:
        raise LayoutError(
            f"{where}: elem_bytes {region.elem_bytes}, base_offset {region.base_offset} and "
            f"tokens_per_slot {region.tokens_per_slot} must not be negative"
        )
    names = [name for name, _, _ in steps]
    if len(set(names)) != len(names):
        raise LayoutError(f"{where}: an axis is named twice in {names}")
    if max(region.nbytes, region.base_offset, *(stride for _, _, stride in steps)) > MAX_NBYTES:
        raise LayoutError(f"{where}: sizes beyond {MAX_NBYTES} bytes")
    if region.num_slots > MAX_SLOTS:
        raise LayoutError(
            f"{where}: axis 'block' has size {region.num_slots}, the most is {MAX_SLOTS}"
        )
    for name, size, stride in steps:
        if size < 1 or stride < 0:
            raise LayoutError(f"{where}: axis {name!r} has size {size} and stride {stride}")
    # Sorted by stride, each axis must step over everything that the smaller ones cover.
    covered = region.elem_bytes
    for name, size, stride in sorted((s for s in steps if s[1] > 1), key=lambda s: s[2]):
        if stride < covered:
            raise LayoutError(
                f"{where}: axis {name!r} steps {stride} bytes but what lies inside it takes "
                f"{covered}: slots would overlap"
            )
        covered = stride * (size - 1) + covered
    if region.base_offset + covered > region.nbytes:
        raise LayoutError(
            f"{where}: needs {region.base_offset + covered} bytes but has {region.nbytes}"
        )
    token = [axis.size for axis in region.axes if axis.name == "token"]
    if token and token[0] != region.tokens_per_slot:
        raise LayoutError(
            f"{where}: axis 'token' has size {token[0]} but tokens_per_slot is "
            f"{region.tokens_per_slot}"
        )


def check_group(layout: KVLayout, group: GroupLayout) -> None:
    """What the regions of one block table must have in common."""
    regions = [layout.regions[index] for index in group.regions]
    tokens = {region.tokens_per_slot for region in regions}
    if len(tokens) > 1:
        raise LayoutError(
            f"block sizes differ within a {group.kind} group: {sorted(tokens)} tokens"
        )
    if group.window < 0 or (
        regions and group.window > regions[0].num_slots * regions[0].tokens_per_slot
    ):
        held = regions[0].num_slots * regions[0].tokens_per_slot if regions else 0
        raise LayoutError(
            f"a window of {group.window} tokens is larger than the group's blocks, which hold "
            f"{held} tokens"
        )


def check_scales(layout: KVLayout) -> None:
    seen = set()
    held = {
        (layer, plane): index
        for index, region in enumerate(layout.regions)
        for layer in region.layers
        for plane in region.planes
    }
    for scale in layout.scales:
        key = (scale.layer, scale.plane)
        if key not in held or key in seen:
            raise LayoutError(
                f"a scale is for plane {scale.plane!r} of layer {scale.layer}, which is "
                f"{'scaled twice' if key in seen else 'not held'}"
            )
        seen.add(key)
        start, stop = layout.region_heads(held[key])
        if len(scale.values) not in (1, stop - start):
            raise LayoutError(
                f"plane {scale.plane!r} of layer {scale.layer} has {len(scale.values)} scales: give "
                f"1, or {stop - start} for heads [{start}, {stop})"
            )
        if not all(0.0 < value < math.inf for value in scale.values):
            raise LayoutError(
                f"plane {scale.plane!r} of layer {scale.layer} has scales {scale.values}: they must "
                "be positive and finite"
            )
