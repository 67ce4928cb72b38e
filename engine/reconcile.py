"""What of one layout goes where in another, and why two layouts cannot go together.

A plane of a layer that both sides hold makes an *entry*. Entries whose regions have the same shape
and strides on each side form a *bundle*: all that differs between them is where each begins. Bundles
of one pair of block tables form a *table pair*. Everything that does not fit is refused here, by
the axis and with both values, before anything moves.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .block_scales import SCALE_SUFFIX, BlockScales, is_scale, needs_scale, scale_shape
from .convert import factors, has_conversion
from .errors import LayoutError
from .layout import WHOLE_KINDS

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy.typing as npt

    from .block_scales import ScaleShape
    from .layout import GroupLayout, KVLayout, RegionLayout

    Key = tuple[int, str]  # layer, plane
    _Scales = tuple[dict[Key, tuple[float, ...]], dict[Key, tuple[float, ...]]]


class Step(NamedTuple):
    """One axis that is walked on both sides."""

    name: str
    size: int
    src_stride: int
    dst_stride: int


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
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
        """Which entries are of these layers."""
        return np.isin(self.layer, np.fromiter(layers, np.int64, len(layers)))


@dataclasses.dataclass(frozen=True, eq=False)
class TablePair:
    """Bundles that share a block table on each side.

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
    bundles: tuple[Bundle, ...]
    aligned: str = ""


class _BlockScaled:
    """The planes of scales beside the planes of two layouts."""

    def __init__(self, src: KVLayout, dst: KVLayout, places: list[dict[Key, _Place]]) -> None:
        self._layouts = (src, dst)
        self._places = places
        self._static = _scales(src), _scales(dst)

    def _dtypes(self, key: Key) -> tuple[str, str]:
        one, other = (
            layout.region_dtype(places[key].region)
            for layout, places in zip(self._layouts, self._places, strict=True)
        )
        return one, other

    def travels_as_scale(self, key: Key) -> bool:
        """Whether a plane of scales is made anew, since its numbers are converted."""
        data = (key[0], key[1].removesuffix(SCALE_SUFFIX))
        if not key[1].endswith(SCALE_SUFFIX) or not all(data in side for side in self._places):
            return False
        return len(set(self._dtypes(data))) > 1

    def shapes(
        self, key: Key, heads: tuple[int, int] | None
    ) -> tuple[ScaleShape | None, ScaleShape | None]:
        """How the scales of a plane that is converted lie on each side; None where there are none.

        Raises:
            LayoutError: they are none that can be converted, or one side of bits lacks them.
        """
        dtypes = self._dtypes(key)
        scale = (key[0], key[1] + SCALE_SUFFIX)
        found: list[ScaleShape | None] = []
        for side, name in enumerate(("source", "destination")):
            place = self._places[side].get(scale)
            static = key in self._static[side]
            if dtypes[0] == dtypes[1]:
                held = [scale in places for places in self._places]
                if held[0] != held[1] and needs_scale(dtypes[0]):
                    differ(f"whether plane {key[1]!r} has scales a block", *held)
                place = None
            if place is None or static or not needs_scale(dtypes[side]):
                found.append(None)
                continue
            data = self._places[side][key]
            if place.group != data.group:
                raise LayoutError(
                    f"planes {key[1]!r} and {scale[1]!r} of the {name} are in two groups: join them "
                    "with join_planes",
                    operation="plan",
                )
            layout = self._layouts[side]
            found.append(scale_shape(name, layout, place.region, data.region, heads or (0, 1)))
        return found[0], found[1]

    def columns(self, side: int, keys: list[Key], shape: ScaleShape | None) -> BlockScales | None:
        """Where the scales of these planes lie."""
        if shape is None:
            return None
        places = [self._places[side][layer, plane + SCALE_SUFFIX] for layer, plane in keys]
        return BlockScales(
            np.array([place.region for place in places], np.int64),
            np.array([place.start + shape.offset for place in places], np.int64),
            shape,
        )


class _Place(NamedTuple):
    """Where one side holds a plane of a layer."""

    group: int
    region: int
    start: int


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
    places = [_places(layout) for layout in (src, dst)]
    common = [key for key in places[0] if key in places[1] and (keys is None or key in keys)]
    _check_common(src, dst, places, keys, common)
    blocked = _BlockScaled(src, dst, places)
    common = [key for key in common if not blocked.travels_as_scale(key)]
    scales = _scales(src), _scales(dst)
    by_tables: dict[tuple[int, int], dict[Any, list[tuple[Key, _Place, _Place]]]] = {}
    signatures: dict[tuple[int, int], Any] = {}
    for key in common:
        here, there = places[0][key], places[1][key]
        pair = (here.region, there.region)
        if pair not in signatures:
            signatures[pair] = _signature(src, dst, *pair)
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


def differ(what: str, left: object, right: object) -> None:
    """Raises a LayoutError that names both values, unless they are equal."""
    if left != right:
        raise LayoutError(
            f"{what} differs: source has {left}, destination has {right}", operation="plan"
        )


def _check_models(src: KVLayout, dst: KVLayout) -> None:
    differ("codec", src.codec, dst.codec)
    differ("opaque axes", sorted(src.opaque), sorted(dst.opaque))
    if src.model_heads and dst.model_heads:
        differ("number of KV heads of the model", src.model_heads, dst.model_heads)
    if src.model_layers and dst.model_layers:
        differ("number of layers of the model", src.model_layers, dst.model_layers)


def _places(layout: KVLayout) -> dict[Key, _Place]:
    return {
        (layer, plane): _Place(
            number, index, region.base_offset + i * region.layer_stride + p * region.plane_stride
        )
        for number, group in enumerate(layout.groups)
        for index in group.regions
        for region in (layout.regions[index],)
        for i, layer in enumerate(region.layers)
        for p, plane in enumerate(region.planes)
    }


def _check_common(
    src: KVLayout,
    dst: KVLayout,
    places: list[dict[Key, _Place]],
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


def _scales(layout: KVLayout) -> dict[Key, tuple[float, ...]]:
    return {(scale.layer, scale.plane): scale.values for scale in layout.scales}


def _heads(src: KVLayout, dst: KVLayout, left: int, right: int) -> tuple[int, int]:
    """The heads that both regions hold; (0, 1) where neither has a head axis."""
    held = [src.region_heads(left), dst.region_heads(right)]
    low, high = max(held[0][0], held[1][0]), min(held[0][1], held[1][1])
    if low >= high:
        raise LayoutError(
            f"axis 'head': source holds [{held[0][0]}, {held[0][1]}) and destination "
            f"[{held[1][0]}, {held[1][1]}), which have no head in common",
            operation="plan",
        )
    return low, high


def _axis(region: RegionLayout, name: str) -> tuple[int, int] | None:
    """Size and stride."""
    for axis in region.axes:
        if axis.name == name:
            return axis.size, axis.stride_bytes
    return None


def _signature(src: KVLayout, dst: KVLayout, left: int, right: int) -> tuple[Any, ...]:
    """All of two regions but where they begin; checks that one can become the other."""
    one, other = src.regions[left], dst.regions[right]
    dtypes = src.region_dtype(left), dst.region_dtype(right)
    if not has_conversion(*dtypes):
        differ("dtype", *dtypes)
    if dtypes[0] == dtypes[1]:
        differ("element size in bytes", one.elem_bytes, other.elem_bytes)
    sizes = [
        {a.name: a.size for a in r.axes if a.name not in ("head", "token") and a.size > 1}
        for r in (one, other)
    ]
    for name in sizes[0] | sizes[1]:
        differ(f"axis {name!r}", sizes[0].get(name, 1), sizes[1].get(name, 1))
    heads: tuple[int, int] | None = None
    with_heads = [_axis(region, "head") is not None for region in (one, other)]
    if any(with_heads):
        heads = _heads(src, dst, left, right)
    token = [_axis(region, "token") is not None for region in (one, other)]
    blocks = one.tokens_per_slot, other.tokens_per_slot
    # A slot of one token needs no axis for it.
    hidden = [not axis and size > 1 for axis, size in zip(token, blocks, strict=True)]
    if hidden[0] != hidden[1] and any(token):
        sizes_of = (_axis(one, "token"), _axis(other, "token"))
        differ("axis 'token'", *(held[0] if held else "none" for held in sizes_of))
    if not blocks[0] or not blocks[1]:
        differ("block size in tokens", *blocks)
    whole = not any(token) or "token" in src.opaque
    if whole and blocks[0] != blocks[1] and not is_scale(one.planes):
        why = (
            f"axis 'token' is opaque in codec {src.codec!r}"
            if "token" in src.opaque
            else "the slots of this plane have no token axis"
        )
        raise LayoutError(
            f"{why}, so the block size cannot change from {blocks[0]} to {blocks[1]} tokens",
            operation="plan",
        )
    if is_scale(one.planes) and blocks[0] % max(1, blocks[1]):
        raise LayoutError(
            f"plane {one.planes[0]!r} has a scale a block of {blocks[0]} tokens at the source and "
            f"of {blocks[1]} at the destination: several scales cannot become one without "
            "quantising again",
            operation="plan",
        )
    for name in src.opaque:
        axes = [[axis for axis in region.axes if axis.name == name] for region in (one, other)]
        held = (src.region_heads(left), dst.region_heads(right))
        if axes[0] != axes[1] or (name == "head" and held[0] != held[1]):
            raise LayoutError(
                f"axis {name!r} is opaque in codec {src.codec!r}, so it cannot change "
                f"from {axes[0]} to {axes[1]}",
                operation="plan",
            )
    if src.opaque and dtypes[0] != dtypes[1]:
        differ(f"dtype, which codec {src.codec!r} hides,", *dtypes)
    return (
        one.axes,
        other.axes,
        one.slot_stride,
        other.slot_stride,
        one.elem_bytes,
        other.elem_bytes,
        *dtypes,
        heads,
        src.region_heads(left)[0] if with_heads[0] else 0,
        dst.region_heads(right)[0] if with_heads[1] else 0,
        whole,
    )


def _table_pair(
    src: KVLayout,
    dst: KVLayout,
    scales: _Scales,
    blocked: _BlockScaled,
    src_group: int,
    dst_group: int,
    found: dict[Any, list[tuple[Key, _Place, _Place]]],
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
    blocked: _BlockScaled,
    signature: Any,
    entries: list[tuple[Key, _Place, _Place]],
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
        [_held(side, key, (low, high), first) for key, _, _ in entries]
        for side, first in zip(scales, (src_first, dst_first), strict=True)
    ]
    keys = [key for key, _, _ in entries]
    scaled = None
    if src_dtype != dst_dtype:
        per_block = [shape is not None for shape in signature[2]]
        scaled = _factors(keys, held, (src_dtype, dst_dtype), per_block)
    else:
        _check_equal_scales(keys, held, high - low)
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


def _held(
    scales: dict[Key, tuple[float, ...]], key: Key, heads: tuple[int, int], first: int
) -> tuple[float, ...] | None:
    """Scales of the heads that move: one for all, or one each; None without any."""
    values = scales.get(key)
    if values is None or len(values) == 1:
        return values
    return values[heads[0] - first : heads[1] - first]


def _factors(
    keys: list[Key],
    held: list[list[tuple[float, ...] | None]],
    dtypes: tuple[str, str],
    per_block: list[bool],
) -> npt.NDArray[np.float32]:
    """What each entry's numbers are multiplied by, for all heads or each."""
    rows = []
    for row, key in enumerate(keys):
        sides: list[tuple[float, ...]] = []
        for side, dtype in enumerate(dtypes):
            values = held[side][row]
            if per_block[side]:
                values = (1.0,)
            if values is None and needs_scale(dtype):
                raise LayoutError(
                    f"scales of plane {key[1]!r} of layer {key[0]} are missing at the "
                    f"{('source', 'destination')[side]}: dtype is {dtypes[0]} at the source and "
                    f"{dtypes[1]} at the destination, and {dtype} needs scales (1.0 is one)",
                    operation="plan",
                )
            sides.append(values if values is not None and needs_scale(dtype) else (1.0,))
        rows.append(factors(*sides))
    width = max(len(row) for row in rows)
    return np.stack([np.broadcast_to(row, width) for row in rows])


def _check_equal_scales(
    keys: list[Key], held: list[list[tuple[float, ...] | None]], num_heads: int
) -> None:
    """Numbers that are moved bit for bit must mean the same at both ends."""
    for key, *sides in zip(keys, *held, strict=True):
        each = [None if v is None else v if len(v) > 1 else v * num_heads for v in sides]
        if each[0] != each[1]:
            raise LayoutError(
                f"scales of plane {key[1]!r} of layer {key[0]} differ: source has {sides[0]}, "
                f"destination has {sides[1]}; numbers of one dtype are moved bit for bit",
                operation="plan",
            )
