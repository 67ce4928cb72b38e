"""One region of a cache: a stretch of registered memory, in bytes, with strides and named axes."""

from __future__ import annotations

import itertools
import math

import msgspec

from ..errors import LayoutError

MAX_NBYTES = 1 << 62  # offsets are int64, and sums of two must not overflow
MAX_SLOTS = 1 << 31  # a plan packs two block ids into an int64


class Axis(msgspec.Struct, frozen=True, array_like=True):
    """One named axis inside a slot: `size` steps of `stride_bytes` bytes."""

    name: str
    size: int
    stride_bytes: int


class RegionLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one region (one stretch of registered memory) holds.

    Attributes:
        layers: global indices of the layers it holds, in order of address.
        planes: names of the planes it holds (`k`, `v`; `latent` for MLA; `state`).
        layer_stride, plane_stride, slot_stride: bytes between neighbours; 0 where there is one.
        num_slots: how many block ids it has.
        tokens_per_slot: token slots of a block; 0 for state that has no tokens.
        elem_bytes: bytes of one element of the innermost axis.
        axes: the axes inside a slot, outermost first.
        base_offset: bytes from the region's start to its first slot.
        nbytes: size of the region.
        dtype: element type, if other than the layout's.
        heads: range of the model's heads, if other than the layout's.
    """

    layers: tuple[int, ...]
    planes: tuple[str, ...]
    layer_stride: int
    plane_stride: int
    slot_stride: int
    num_slots: int
    tokens_per_slot: int
    elem_bytes: int
    axes: tuple[Axis, ...]
    base_offset: int
    nbytes: int
    dtype: str = ""
    heads: tuple[int, int] | None = None

    @property
    def slot_nbytes(self) -> int:
        """Payload bytes of one slot of one layer and one plane."""
        return math.prod(axis.size for axis in self.axes) * self.elem_bytes

    @property
    def keys(self) -> list[tuple[int, str]]:
        """Every `(layer, plane)` that it holds."""
        return list(itertools.product(self.layers, self.planes))

    def axis(self, name: str) -> Axis | None:
        """Find an axis inside a slot by its name; None where there is none."""
        return next((axis for axis in self.axes if axis.name == name), None)

    def check(self, number: int) -> None:
        """Check that the strides place every byte inside the region, once; also for a peer's.

        Args:
            number: the region's position in its layout, for the message.

        Raises:
            LayoutError: naming the axis and the values.
        """
        outer = [
            ("layer", len(self.layers), self.layer_stride),
            ("plane", len(self.planes), self.plane_stride),
            ("block", self.num_slots, self.slot_stride),
        ]
        steps = outer + [(axis.name, axis.size, axis.stride_bytes) for axis in self.axes]
        where = f"region {number}"
        if self.elem_bytes < 1 or self.base_offset < 0 or self.tokens_per_slot < 0:
            raise LayoutError(
                f"{where}: elem_bytes {self.elem_bytes}, base_offset {self.base_offset} and "
                f"tokens_per_slot {self.tokens_per_slot} must not be negative"
            )
        names = [name for name, _, _ in steps]
        if len(set(names)) != len(names):
            raise LayoutError(f"{where}: an axis is named twice in {names}")
        if max(self.nbytes, self.base_offset, *(stride for _, _, stride in steps)) > MAX_NBYTES:
            raise LayoutError(f"{where}: sizes beyond {MAX_NBYTES} bytes")
        if self.num_slots > MAX_SLOTS:
            raise LayoutError(
                f"{where}: axis 'block' has size {self.num_slots}, the most is {MAX_SLOTS}"
            )
        for name, size, stride in steps:
            if size < 1 or stride < 0:
                raise LayoutError(f"{where}: axis {name!r} has size {size} and stride {stride}")
        # Sorted by stride, each axis must step over everything that the smaller ones cover.
        covered = self.elem_bytes
        for name, size, stride in sorted((s for s in steps if s[1] > 1), key=lambda s: s[2]):
            if stride < covered:
                raise LayoutError(
                    f"{where}: axis {name!r} steps {stride} bytes but what lies inside it takes "
                    f"{covered}: slots would overlap"
                )
            covered = stride * (size - 1) + covered
        if self.base_offset + covered > self.nbytes:
            raise LayoutError(
                f"{where}: needs {self.base_offset + covered} bytes but has {self.nbytes}"
            )
        token = self.axis("token")
        if token and token.size != self.tokens_per_slot:
            raise LayoutError(
                f"{where}: axis 'token' has size {token.size} but tokens_per_slot is "
                f"{self.tokens_per_slot}"
            )
