"""Where each side of a pair holds the planes of its layers, and the planes of scales beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import LayoutError
from ..layout.block_scales import SCALE_SUFFIX, BlockScales, needs_scale, scale_shape
from ..layout.dtypes import factors
from .region_pairs import differ

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..layout.block_scales import ScaleShape
    from ..layout.kv_layout import KVLayout

    Key = tuple[int, str]  # layer, plane


class Place(NamedTuple):
    """Where one side holds a plane of a layer."""

    group: int
    region: int
    start: int


def places_of(layout: KVLayout) -> dict[Key, Place]:
    """Every plane of every layer of a layout."""
    return {
        (layer, plane): Place(
            number, index, region.base_offset + i * region.layer_stride + p * region.plane_stride
        )
        for number, group in enumerate(layout.groups)
        for index in group.regions
        for region in (layout.regions[index],)
        for i, layer in enumerate(region.layers)
        for p, plane in enumerate(region.planes)
    }


class BlockScaled:
    """The planes of scales beside the planes of two layouts."""

    def __init__(self, src: KVLayout, dst: KVLayout, places: list[dict[Key, Place]]) -> None:
        self._layouts = (src, dst)
        self._places = places
        self._static = fixed_scales(src), fixed_scales(dst)

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


def fixed_scales(layout: KVLayout) -> dict[Key, tuple[float, ...]]:
    """The scales that are part of a layout."""
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


def check_equal_scales(
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
