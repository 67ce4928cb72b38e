"""Scales that differ from block to block: where they lie, and what they are on the CPU.

A plane `k` of fp8 or int8 may have a plane `k_scale` beside it, float32, without token axis: one
scale a block, or one for each block and head. Whoever makes such numbers chooses the scale: the
largest magnitude among the tokens that it puts into the block becomes the largest that the type can
hold. So numbers and scale are written together, and a transfer has to begin at a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import LayoutMismatch
from .dtypes import QUANTISED

if TYPE_CHECKING:
    import numpy.typing as npt

    from .kv_layout import KVLayout

    Ids = npt.NDArray[np.int64]

SCALE_SUFFIX = "_scale"
SCALE_NBYTES = 4


class ScaleShape(NamedTuple):
    """What the scales of several planes have in common; hashable.

    Attributes:
        slot_stride, head_stride: bytes between blocks and heads; no heads where that is 0.
        offset: bytes from slot 0 to the first head that moves.
    """

    slot_stride: int
    head_stride: int
    offset: int


class BlockScales(NamedTuple):
    """Where the scales of a copy group's entries lie on one side, as columns.

    Attributes:
        region, start: of block 0 and the first head that moves, one row an entry.
        shape: the strides.
    """

    region: Ids
    start: Ids
    shape: ScaleShape

    def offsets(self, entry: Ids, head: Ids, block: Ids) -> Ids:
        """Bytes from the start of each one's region."""
        offsets: Ids = (
            self.start[entry] + block * self.shape.slot_stride + head * self.shape.head_stride
        )
        return offsets


def scale_shape(
    side: str, layout: KVLayout, region: int, data: int, heads: tuple[int, int]
) -> ScaleShape:
    """Return the strides of a scale region for the numbers of region `data`, of which `heads` move.

    Raises:
        LayoutError: it is no plane of scales, or one scale is for heads that do not all move.
    """
    shape = layout.regions[region]
    if layout.region_dtype(region) != "float32" or shape.elem_bytes != SCALE_NBYTES:
        raise LayoutMismatch(
            f"plane {shape.planes[0]!r} of the {side} is {layout.region_dtype(region)}: scales are "
            "float32"
        )
    for axis in shape.axes:
        if axis.name != "head" and axis.size > 1:
            raise LayoutMismatch(
                f"plane {shape.planes[0]!r} of the {side} has {axis.size} scales along axis "
                f"{axis.name!r}: one a block, or one for each block and head, can be converted"
            )
    head = shape.axis("head")
    if head is not None:
        first = layout.region_heads(region)[0]
        return ScaleShape(
            shape.slot_stride, head.stride_bytes, (heads[0] - first) * head.stride_bytes
        )
    held = layout.region_heads(data)
    if side == "destination" and held != heads and layout.regions[data].axis("head"):
        raise LayoutMismatch(
            f"plane {shape.planes[0]!r} of the destination has one scale for heads [{held[0]}, "
            f"{held[1]}), of which this source has [{heads[0]}, {heads[1]}): give each head its own"
        )
    return ScaleShape(shape.slot_stride, 0, 0)


def is_scale(planes: tuple[str, ...]) -> bool:
    """Return whether a region holds scales."""
    return all(plane.endswith(SCALE_SUFFIX) for plane in planes)


def needs_scale(dtype: str) -> bool:
    """Return whether numbers of this type mean something only with a scale."""
    return dtype in QUANTISED


def group_maxima(group: Ids, num_groups: int, maxima: npt.NDArray[np.float32]) -> Any:
    """Return the largest of `maxima` in each group."""
    found = np.zeros(num_groups, np.float32)
    np.maximum.at(found, group, maxima)
    return found
