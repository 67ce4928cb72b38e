"""Where each side of a pair holds the planes of its layers, and whether one side's numbers can
become the other's: their regions, and the scales beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import LayoutMismatch
from ..layout.block_scales import SCALE_SUFFIX, BlockScales, is_scale, needs_scale, scale_shape
from ..layout.dtypes import factors, has_conversion

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..layout.block_scales import ScaleShape
    from ..layout.kv_layout import KVLayout
    from ..layout.region import Axis

    Key = tuple[int, str]  # layer, plane


class PlaneAddress(NamedTuple):
    """Where one side holds a plane of a layer."""

    group: int
    region: int
    start: int


def places_of(layout: KVLayout) -> dict[Key, PlaneAddress]:
    """Return every plane of every layer of a layout."""
    return {
        (layer, plane): PlaneAddress(
            number, index, region.base_offset + i * region.layer_stride + p * region.plane_stride
        )
        for number, group in enumerate(layout.groups)
        for index in group.regions
        for region in (layout.regions[index],)
        for i, layer in enumerate(region.layers)
        for p, plane in enumerate(region.planes)
    }


# Two regions, one at each end.


def differ(what: str, left: object, right: object) -> None:
    """Raise a LayoutError that names both values, unless they are equal."""
    if left != right:
        raise LayoutMismatch(f"{what} differs: source has {left}, destination has {right}")


def _heads(src: KVLayout, dst: KVLayout, left: int, right: int) -> tuple[int, int]:
    """Return the heads that both regions hold; (0, 1) where neither has a head axis."""
    held = [src.region_heads(left), dst.region_heads(right)]
    low, high = max(held[0][0], held[1][0]), min(held[0][1], held[1][1])
    if low >= high:
        raise LayoutMismatch(
            f"axis 'head': source holds [{held[0][0]}, {held[0][1]}) and destination "
            f"[{held[1][0]}, {held[1][1]}), which have no head in common"
        )
    return low, high


class RegionPair(NamedTuple):
    """All of a region at the source and one at the destination but where they begin; hashable.

    Attributes:
        axes, slot_strides, elem_bytes, dtypes: at the source and at the destination.
        heads: the heads that move; None where there is no head axis.
        first_heads: the first head that either side holds.
        whole: whether slots move whole.
    """

    axes: tuple[tuple[Axis, ...], tuple[Axis, ...]]
    slot_strides: tuple[int, int]
    elem_bytes: tuple[int, int]
    dtypes: tuple[str, str]
    heads: tuple[int, int] | None
    first_heads: tuple[int, int]
    whole: bool


def pair_regions(src: KVLayout, dst: KVLayout, left: int, right: int) -> RegionPair:
    """Describe two regions, after checking that the numbers of one can become the other's.

    Raises:
        LayoutError: they cannot; names what differs and both values.
    """
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
    with_heads = [region.axis("head") is not None for region in (one, other)]
    if any(with_heads):
        heads = _heads(src, dst, left, right)
    token = [region.axis("token") for region in (one, other)]
    blocks = one.tokens_per_slot, other.tokens_per_slot
    # A slot of one token needs no axis for it.
    hidden = [not axis and size > 1 for axis, size in zip(token, blocks, strict=True)]
    if hidden[0] != hidden[1] and any(token):
        differ("axis 'token'", *(axis.size if axis else "none" for axis in token))
    if not blocks[0] or not blocks[1]:
        differ("block size in tokens", *blocks)
    whole = not any(token) or "token" in src.opaque
    if whole and blocks[0] != blocks[1] and not is_scale(one.planes):
        why = (
            f"axis 'token' is opaque in codec {src.codec!r}"
            if "token" in src.opaque
            else "the slots of this plane have no token axis"
        )
        raise LayoutMismatch(
            f"{why}, so the block size cannot change from {blocks[0]} to {blocks[1]} tokens"
        )
    if is_scale(one.planes) and blocks[0] % max(1, blocks[1]):
        raise LayoutMismatch(
            f"plane {one.planes[0]!r} has a scale a block of {blocks[0]} tokens at the source and "
            f"of {blocks[1]} at the destination: several scales cannot become one without "
            "quantising again"
        )
    for name in src.opaque:
        axes = [[axis for axis in region.axes if axis.name == name] for region in (one, other)]
        held = (src.region_heads(left), dst.region_heads(right))
        if axes[0] != axes[1] or (name == "head" and held[0] != held[1]):
            raise LayoutMismatch(
                f"axis {name!r} is opaque in codec {src.codec!r}, so it cannot change "
                f"from {axes[0]} to {axes[1]}"
            )
    if src.opaque and dtypes[0] != dtypes[1]:
        differ(f"dtype, which codec {src.codec!r} hides,", *dtypes)
    return RegionPair(
        axes=(one.axes, other.axes),
        slot_strides=(one.slot_stride, other.slot_stride),
        elem_bytes=(one.elem_bytes, other.elem_bytes),
        dtypes=dtypes,
        heads=heads,
        first_heads=(
            src.region_heads(left)[0] if with_heads[0] else 0,
            dst.region_heads(right)[0] if with_heads[1] else 0,
        ),
        whole=whole,
    )


# Scales.


class Scales:
    """The scales of two layouts: those that are part of them, and planes of scales beside others.

    Attributes:
        fixed: the former, at the source and at the destination.
    """

    def __init__(self, src: KVLayout, dst: KVLayout, places: list[dict[Key, PlaneAddress]]) -> None:
        self._layouts = (src, dst)
        self._places = places
        self.fixed = _fixed_scales(src), _fixed_scales(dst)

    def _dtypes(self, key: Key) -> tuple[str, str]:
        one, other = (
            layout.region_dtype(places[key].region)
            for layout, places in zip(self._layouts, self._places, strict=True)
        )
        return one, other

    def travels_as_scale(self, key: Key) -> bool:
        """Return whether a plane of scales is made anew, since its numbers are converted."""
        data = (key[0], key[1].removesuffix(SCALE_SUFFIX))
        if not key[1].endswith(SCALE_SUFFIX) or not all(data in side for side in self._places):
            return False
        return len(set(self._dtypes(data))) > 1

    def shapes(
        self, key: Key, heads: tuple[int, int] | None
    ) -> tuple[ScaleShape | None, ScaleShape | None]:
        """Return how the scales of a plane that is converted lie on each side; None where there are
        none.

        Raises:
            LayoutError: they are none that can be converted, or one side of bits lacks them.
        """
        dtypes = self._dtypes(key)
        scale = (key[0], key[1] + SCALE_SUFFIX)
        found: list[ScaleShape | None] = []
        for side, name in enumerate(("source", "destination")):
            place = self._places[side].get(scale)
            static = key in self.fixed[side]
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
                raise LayoutMismatch(
                    f"planes {key[1]!r} and {scale[1]!r} of the {name} are in two groups: join them "
                    "with join_planes"
                )
            layout = self._layouts[side]
            found.append(scale_shape(name, layout, place.region, data.region, heads or (0, 1)))
        return found[0], found[1]

    def columns(self, side: int, keys: list[Key], shape: ScaleShape | None) -> BlockScales | None:
        """Return where the scales of these planes lie."""
        if shape is None:
            return None
        places = [self._places[side][layer, plane + SCALE_SUFFIX] for layer, plane in keys]
        return BlockScales(
            np.array([place.region for place in places], np.int64),
            np.array([place.start + shape.offset for place in places], np.int64),
            shape,
        )


def _fixed_scales(layout: KVLayout) -> dict[Key, tuple[float, ...]]:
    return {(scale.layer, scale.plane): scale.values for scale in layout.scales}


def held_scales(
    scales: dict[Key, tuple[float, ...]], key: Key, heads: tuple[int, int], first: int
) -> tuple[float, ...] | None:
    """Scales of the heads that move: one for all, or one each; None without any."""
    values = scales.get(key)
    if values is None or len(values) == 1:
        return values
    return values[heads[0] - first : heads[1] - first]


def make_factors(
    keys: list[Key],
    held: list[list[tuple[float, ...] | None]],
    dtypes: tuple[str, str],
    per_block: list[bool],
) -> npt.NDArray[np.float32]:
    """Return what each entry's numbers are multiplied by, for all heads or each."""
    rows = []
    for row, key in enumerate(keys):
        sides: list[tuple[float, ...]] = []
        for side, dtype in enumerate(dtypes):
            values = held[side][row]
            if per_block[side]:
                values = (1.0,)
            if values is None and needs_scale(dtype):
                raise LayoutMismatch(
                    f"scales of plane {key[1]!r} of layer {key[0]} are missing at the "
                    f"{('source', 'destination')[side]}: dtype is {dtypes[0]} at the source and "
                    f"{dtypes[1]} at the destination, and {dtype} needs scales (1.0 is one)"
                )
            sides.append(values if values is not None and needs_scale(dtype) else (1.0,))
        rows.append(factors(*sides))
    width = max(len(row) for row in rows)
    return np.stack([np.broadcast_to(row, width) for row in rows])


def check_equal_scales(
    keys: list[Key], held: list[list[tuple[float, ...] | None]], num_heads: int
) -> None:
    """Numbers that are moved bit for bit must mean the same at both ends."""
    for key, *sides in zip(keys, *held, strict=True):
        each = [None if v is None else v if len(v) > 1 else v * num_heads for v in sides]
        if each[0] != each[1]:
            raise LayoutMismatch(
                f"scales of plane {key[1]!r} of layer {key[0]} differ: source has {sides[0]}, "
                f"destination has {sides[1]}; numbers of one dtype are moved bit for bit"
            )
