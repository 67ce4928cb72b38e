"""What of one layout goes where in another, and why two layouts cannot go together.

A plane of a layer that both sides hold is an *entry*. Entries whose regions have the same shape and
strides on each side form a *copy group*: all that differs between them is where each begins. Copy
groups of one pair of block tables form a *table pair*. Everything that does not fit is refused here,
by the axis and with both values, before anything moves.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import LayoutMismatch
from ..layout.block_scales import SCALE_SUFFIX
from ..layout.kv_layout import WHOLE_KINDS
from .planes import (
    RegionPair,
    Scales,
    check_equal_scales,
    differ,
    held_scales,
    make_factors,
    pair_regions,
    places_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy.typing as npt

    from ..layout.block_scales import BlockScales, ScaleShape
    from ..layout.kv_layout import GroupLayout, KVLayout
    from .planes import Key, PlaneAddress

    # A plane of a layer, where it is at source and destination.
    _Entry = tuple[Key, PlaneAddress, PlaneAddress]


class Step(NamedTuple):
    """One axis that is walked on both sides."""

    name: str
    size: int
    src_stride: int
    dst_stride: int


@dataclasses.dataclass(frozen=True, eq=False)
class CopyGroup:
    """Entries of one shape.

    Attributes:
        layer, src_region, src_start, dst_region, dst_start: columns, one row an entry: byte 0 of
            slot 0, with the heads that both hold.
        src_slot_stride, dst_slot_stride: bytes that a block id adds.
        token: the token axis; None where a slot is moved whole.
        steps: the other axes of more than one step, none of them `dim`.
        elements: of one innermost run.
        src_elem, dst_elem: bytes of an element.
        src_dtype, dst_dtype: names.
        factors: `[entry, 1 or heads]` that numbers are multiplied by on their way; None for bits.
        src_scales: also multiplied by these, of the source's blocks.
        dst_scales: divided by these, which are found and written for each destination's block.
    """

    layer: npt.NDArray[np.int64]
    src_region: npt.NDArray[np.int64]
    src_start: npt.NDArray[np.int64]
    dst_region: npt.NDArray[np.int64]
    dst_start: npt.NDArray[np.int64]
    src_slot_stride: int
    dst_slot_stride: int
    token: Step | None
    steps: tuple[Step, ...]
    elements: int
    src_elem: int
    dst_elem: int
    src_dtype: str
    dst_dtype: str
    factors: npt.NDArray[np.float32] | None = None
    src_scales: BlockScales | None = None
    dst_scales: BlockScales | None = None

    @property
    def by_head(self) -> bool:
        """Whether a run must not hold numbers of several heads: their scales may differ."""
        shapes = [scales.shape for scales in (self.src_scales, self.dst_scales) if scales]
        wide = self.factors is not None and self.factors.shape[1] > 1
        return wide or any(shape.head_stride for shape in shapes)

    @property
    def scales_per_block(self) -> int:
        """How many scales an entry writes beside each block of the destination."""
        if self.dst_scales is None:
            return 0
        heads = [step.size for step in self.steps if step.name == "head"]
        return heads[0] if heads and self.dst_scales.shape.head_stride else 1

    @property
    def converts(self) -> bool:
        """Whether numbers change on their way."""
        return self.factors is not None

    @property
    def run_nbytes(self) -> int:
        """Bytes at the destination of one token, or of one slot without tokens."""
        return math.prod(step.size for step in self.steps) * self.elements * self.dst_elem

    def chosen(self, layers: Collection[int]) -> npt.NDArray[np.bool_]:
        """Return which entries are of these layers."""
        return np.isin(self.layer, np.fromiter(layers, np.int64, len(layers)))


@dataclasses.dataclass(frozen=True, eq=False)
class TablePair:
    """Copy groups that share a block table on each side.

    Attributes:
        src_group, dst_group: positions in the layouts' groups.
        kind, window: of the group.
        src_tokens, dst_tokens: of a block; 0 for state.
        unit: tokens of the largest stretch that never leaves a block on either side; 0 for state.
        aligned: whether a transfer must begin at a block boundary of the destination, and why.
    """

    src_group: int
    dst_group: int
    kind: str
    window: int
    src_tokens: int
    dst_tokens: int
    unit: int
    src_slots: int
    dst_slots: int
    src_null: int | None
    dst_null: int | None
    copy_groups: tuple[CopyGroup, ...]
    aligned: str = ""


class _Alike(NamedTuple):
    """What entries of one copy group have in common; hashable.

    Attributes:
        regions: theirs.
        num_scales: how many fixed scales each has on either side.
        block_scales: how their scales lie that differ from block to block, on either side.
    """

    regions: RegionPair
    num_scales: tuple[int, int]
    block_scales: tuple[ScaleShape | None, ScaleShape | None]


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
    scales = Scales(src, dst, places)
    common = [key for key in common if not scales.travels_as_scale(key)]
    by_tables: dict[tuple[int, int], dict[_Alike, list[_Entry]]] = {}
    regions: dict[tuple[int, int], RegionPair] = {}
    for key in common:
        here, there = places[0][key], places[1][key]
        numbers = (here.region, there.region)
        if numbers not in regions:
            regions[numbers] = pair_regions(src, dst, *numbers)
        pair = regions[numbers]
        one, other = (len(side.get(key, ())) for side in scales.fixed)
        alike = _Alike(pair, (one, other), scales.shapes(key, pair.heads))
        tables = by_tables.setdefault((here.group, there.group), {})
        tables.setdefault(alike, []).append((key, here, there))
    dst_groups = [dst_group for _, dst_group in by_tables]
    for group in dst_groups:
        if dst_groups.count(group) > 1:
            raise LayoutMismatch(
                f"group {group} of the destination has one block table, but its layers are in "
                "several groups of the source"
            )
    pairs = (_table_pair(src, dst, scales, *groups, found) for groups, found in by_tables.items())
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
    places: list[dict[Key, PlaneAddress]],
    keys: Collection[Key] | None,
    common: list[Key],
) -> None:
    shared = set(src.layers) & set(dst.layers)
    if not shared:
        raise LayoutMismatch(
            f"no layer is held by both: source has {src.layers}, destination has {dst.layers}"
        )
    for key in sorted(keys or ()):
        if key not in common:
            raise LayoutMismatch(f"plane {key[1]!r} of layer {key[0]} is not held by both sides")
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
    scales: Scales,
    src_group: int,
    dst_group: int,
    found: dict[_Alike, list[_Entry]],
) -> TablePair:
    one, other = src.groups[src_group], dst.groups[dst_group]
    differ("group kind", one.kind, other.kind)
    differ("window", one.window, other.window)
    blocks = _tokens(src, one), _tokens(dst, other)
    state = one.kind in WHOLE_KINDS
    copy_groups = tuple(
        _copy_group(scales, alike, entries, state=state) for alike, entries in found.items()
    )
    aligned = ""
    if any(copy_group.dst_scales is not None for copy_group in copy_groups):
        aligned = "its scales are one a block"
    if any(copy_group.token is None for copy_group in copy_groups) and not state:
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
        copy_groups,
        aligned,
    )


def _tokens(layout: KVLayout, group: GroupLayout) -> int:
    return layout.regions[group.regions[0]].tokens_per_slot


def _copy_group(scales: Scales, alike: _Alike, entries: list[_Entry], *, state: bool) -> CopyGroup:
    pair = alike.regions
    here, there = ({axis.name: axis for axis in axes} for axes in pair.axes)
    low, high = pair.heads or (0, 1)
    token: Step | None = None
    steps: list[Step] = []
    elements = 1
    begin = [0, 0]
    for name in dict.fromkeys([*here, *there]):
        strides = [side[name].stride_bytes if name in side else 0 for side in (here, there)]
        size = (here.get(name) or there[name]).size
        if name == "head":
            size = high - low
            begin = [(low - first) * n for first, n in zip(pair.first_heads, strides, strict=True)]
        if name == "token" and not (pair.whole or state):
            token = Step(name, size, *strides)
        elif name == "dim" and strides == list(pair.elem_bytes):
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
        for side, first in zip(scales.fixed, pair.first_heads, strict=True)
    ]
    keys = [key for key, _, _ in entries]
    scaled = None
    if pair.dtypes[0] != pair.dtypes[1]:
        per_block = [shape is not None for shape in alike.block_scales]
        scaled = make_factors(keys, held, pair.dtypes, per_block)
    else:
        check_equal_scales(keys, held, high - low)
    return CopyGroup(
        layer=table[:, 0].copy(),
        src_region=table[:, 1].copy(),
        src_start=table[:, 2] + begin[0],
        dst_region=table[:, 3].copy(),
        dst_start=table[:, 4] + begin[1],
        src_slot_stride=pair.slot_strides[0],
        dst_slot_stride=pair.slot_strides[1],
        token=token,
        steps=tuple(steps),
        elements=elements,
        src_elem=pair.elem_bytes[0],
        dst_elem=pair.elem_bytes[1],
        src_dtype=pair.dtypes[0],
        dst_dtype=pair.dtypes[1],
        factors=scaled,
        src_scales=scales.columns(0, keys, alike.block_scales[0]),
        dst_scales=scales.columns(1, keys, alike.block_scales[1]),
    )
