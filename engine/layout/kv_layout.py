"""The layout of a whole paged cache: where in registered memory each block's bytes lie.

A layout is described in bytes, as regions with strides and named axes, so that NHD, HND, stacked
or split K and V, blocks-first, layers-first and separate allocations a layer are all the same kind
of thing. The byte at (layer, plane, slot, axis indices…) of a region lies at

    base_offset + i_layer * layer_stride + i_plane * plane_stride + slot * slot_stride
                + sum(index * axis.stride_bytes)

where `i_layer` and `i_plane` are positions in the region's own `layers` and `planes`.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ..errors import LayoutError
from .region import Axis, RegionLayout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LAYOUT_VERSION = 2  # 2: dtypes and heads of a region, scales, the model's heads and layers
PLAIN_CODEC = "plain"
WHOLE_KINDS = (
    "ssm",
    "ring",
)  # groups whose slots are moved whole: no tokens are looked for in them
_OUTER = ("layer", "plane", "block")
_INNER = ("token", "head", "tile", "dim")


class GroupLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers that share one block table.

    Attributes:
        kind: `full`, `swa` (sliding window), `mla`, `ssm` (state space) or `ring`.
        regions: positions in `KVLayout.regions`.
        window: tokens of a sliding window; 0 without one.
        null_slot: the block id that stands for "no block"; None without one.
    """

    kind: str
    regions: tuple[int, ...]
    window: int = 0
    null_slot: int | None = None


class Scale(msgspec.Struct, frozen=True, array_like=True):
    """What the stored numbers of one layer and plane are multiplied by to get the real ones.

    Attributes:
        values: one for all heads, or one for each head held.
    """

    layer: int
    plane: str
    values: tuple[float, ...]


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine's (or one rank's) whole paged cache, in bytes.

    Attributes:
        regions: the stretches of memory that hold it.
        groups: which regions share a block table.
        dtype: element type, as torch names it without its prefix (`bfloat16`).
        head_start, head_stop: the model's KV heads that this rank holds.
        tp_mode: `split` or `replicate`: whether ranks hold different heads or the same ones.
        codec: how bytes inside a slot are encoded; `plain` is an array of `dtype`.
        opaque: axes that may be neither sliced nor reordered, because the codec hides them.
        scales: of quantised planes (fp8, int8), where they are fixed. Scales that differ from block
            to block are a plane of their own: `k_scale` beside `k`, without token axis.
        model_heads, model_layers: of the whole model; 0 where nobody said.
    """

    regions: tuple[RegionLayout, ...]
    groups: tuple[GroupLayout, ...]
    dtype: str
    head_start: int
    head_stop: int
    tp_mode: str = "split"
    codec: str = PLAIN_CODEC
    opaque: tuple[str, ...] = ()
    version: int = LAYOUT_VERSION
    scales: tuple[Scale, ...] = ()
    model_heads: int = 0
    model_layers: int = 0

    @classmethod
    def from_tensors(
        cls,
        tensors: Any,
        dims: str,
        *,
        layers: Sequence[int] | None = None,
        planes: Sequence[str] | None = None,
        head_start: int = 0,
        tokens_per_block: int = 0,
        tp_mode: str = "split",
        kind: str = "full",
        window: int = 0,
        null_slot: int | None = None,
        codec: str = PLAIN_CODEC,
        opaque: Sequence[str] = (),
        scales: Mapping[str, Any] | None = None,
        model_heads: int = 0,
        model_layers: int = 0,
    ) -> KVLayout:
        """Describe torch tensors (or NumPy arrays) that are a paged cache.

        Args:
            tensors: one tensor for each layer, or a single one that holds all layers and then
                has a `layer` dimension. Any strides; each tensor becomes one region that starts
                at its first element.
            dims: the dimensions' names in order, out of `layer plane block token head dim`, for
                example `"plane block token head dim"` (NHD) or `"block plane head token dim"`.
                `plane`, `head` and `token` may be absent (MLA has one plane and no heads). Where
                `dim` is cut into tiles that do not lie side by side, `tile` counts them.
            layers: global layer indices; 0, 1, 2, … if not given.
            planes: names of the planes; `k v` for two, `latent` for one.
            head_start: global index of the first KV head held here.
            tokens_per_block: where no axis counts the tokens of a block.
            kind, window, null_slot: see `GroupLayout`.
            tp_mode, codec, opaque, model_heads, model_layers: see `KVLayout`.
            scales: of each quantised plane: one number, `[layer]` or `[layer, head]` of them.

        Raises:
            LayoutError: a dimension is missing, doubled or contradicts another tensor's.
        """
        if not isinstance(dims, str):
            raise LayoutError(
                f"dims is one text, such as 'plane block token head dim', not {dims!r}"
            )
        names = dims.split()
        for name in names:
            if name not in _OUTER + _INNER:
                raise LayoutError(f"axis {name!r} is unknown: use {' '.join(_OUTER + _INNER)}")
            if names.count(name) > 1:
                raise LayoutError(f"axis {name!r} is named twice in {dims!r}")
        for name in ("block", "dim"):
            if name not in names:
                raise LayoutError(f"axis {name!r} is missing from {dims!r}")
        stacked = "layer" in names
        parts = [tensors] if hasattr(tensors, "shape") else list(tensors)
        if not parts:
            raise LayoutError("no tensors were given: a cache has at least one")
        if stacked and len(parts) > 1:
            raise LayoutError(
                f"axis 'layer' is in {dims!r}, so one tensor is expected, not {len(parts)}"
            )
        described = [_describe(part, names) for part in parts]
        sizes, _, elem_bytes, dtype = described[0]
        for position, (other_sizes, _, _, other_dtype) in enumerate(described):
            for name in names:
                if other_sizes[name] != sizes[name]:
                    raise LayoutError(
                        f"axis {name!r} has size {sizes[name]} in tensor 0 "
                        f"but {other_sizes[name]} in tensor {position}"
                    )
            if other_dtype != dtype:
                raise LayoutError(
                    f"dtype is {dtype} in tensor 0 but {other_dtype} in tensor {position}"
                )
        num_layers = sizes["layer"] if stacked else len(parts)
        layer_ids = tuple(range(num_layers)) if layers is None else tuple(int(i) for i in layers)
        if len(layer_ids) != num_layers or len(set(layer_ids)) != num_layers:
            raise LayoutError(f"axis 'layer' has {num_layers} entries but layers={list(layer_ids)}")
        num_planes = sizes.get("plane", 1)
        default = ("k", "v") if num_planes == 2 else ("latent",) if num_planes == 1 else ()
        plane_names = tuple(planes) if planes is not None else default
        if planes is None and not plane_names:
            raise LayoutError(
                f"axis 'plane' has {num_planes} entries: name them, planes=['k', 'v', …]"
            )
        if len(plane_names) != num_planes:
            raise LayoutError(
                f"axis 'plane' has {num_planes} entries but planes={list(plane_names)}"
            )
        regions = []
        for position, (_, strides, _, _) in enumerate(described):
            inner = [name for name in names if name in _INNER]
            axes = tuple(Axis(name, sizes[name], strides[name]) for name in inner)
            if axes[-1].name != "dim" or axes[-1].stride_bytes != elem_bytes:
                last = next(axis for axis in axes if axis.name == "dim")
                raise LayoutError(
                    f"axis 'dim' must be innermost and dense: its stride is {last.stride_bytes} "
                    f"bytes, one element is {elem_bytes}"
                )
            span = sum((sizes[n] - 1) * strides[n] for n in names) + elem_bytes
            regions.append(
                RegionLayout(
                    layers=layer_ids if stacked else (layer_ids[position],),
                    planes=plane_names,
                    layer_stride=strides["layer"] if stacked else 0,
                    plane_stride=strides.get("plane", 0),
                    slot_stride=strides["block"],
                    num_slots=sizes["block"],
                    tokens_per_slot=sizes.get(
                        "token", tokens_per_block or (0 if kind in WHOLE_KINDS else 1)
                    ),
                    elem_bytes=elem_bytes,
                    axes=axes,
                    base_offset=0,
                    nbytes=span,
                )
            )
        layout = cls(
            regions=tuple(regions),
            groups=(GroupLayout(kind, tuple(range(len(regions))), window, null_slot),),
            dtype=dtype,
            head_start=head_start,
            head_stop=head_start + sizes.get("head", 1),
            tp_mode=tp_mode,
            codec=codec,
            opaque=tuple(opaque),
            scales=_make_scales(scales or {}, layer_ids),
            model_heads=model_heads,
            model_layers=model_layers,
        )
        layout.check()
        return layout

    def region_heads(self, index: int) -> tuple[int, int]:
        """Return the model's heads that a region holds."""
        return self.regions[index].heads or (self.head_start, self.head_stop)

    def region_dtype(self, index: int) -> str:
        """Return the element type of a region."""
        return self.regions[index].dtype or self.dtype

    def check(self) -> None:
        """Check that the layout does not contradict itself; also for one that a peer sent.

        Raises:
            LayoutError: naming the axis and the values.
        """
        if self.version != LAYOUT_VERSION:
            raise LayoutError(
                f"layout version {self.version} is not {LAYOUT_VERSION}: "
                "run the same kvferry version on both ends"
            )
        if not self.regions:
            raise LayoutError("a layout needs at least one region")
        for number, region in enumerate(self.regions):
            region.check(number)
        if not 0 <= self.head_start < self.head_stop:
            raise LayoutError(
                f"axis 'head': [{self.head_start}, {self.head_stop}) is no range of heads"
            )
        if self.tp_mode not in ("split", "replicate"):
            raise LayoutError(f"tp_mode {self.tp_mode!r} is neither 'split' nor 'replicate'")
        for number, region in enumerate(self.regions):
            held = region.axis("head")
            start, stop = self.region_heads(number)
            if held and (held.size != stop - start or start < 0):
                raise LayoutError(
                    f"region {number}: axis 'head' has size {held.size} but heads "
                    f"[{start}, {stop}) are held"
                )
            if held and 0 < self.model_heads < stop:
                raise LayoutError(
                    f"region {number}: axis 'head' holds [{start}, {stop}) of a model of "
                    f"{self.model_heads} heads"
                )
        seen: set[int] = set()
        rows: set[tuple[int, str]] = set()
        for group in self.groups:
            slots = set()
            for index in group.regions:
                if not 0 <= index < len(self.regions) or index in seen:
                    raise LayoutError(f"region {index} is in no group or in two")
                seen.add(index)
                slots.add(self.regions[index].num_slots)
            if len(slots) > 1:
                raise LayoutError(
                    f"axis 'block' differs within a {group.kind} group: {sorted(slots)} slots"
                )
            self._check_group(group)
            for region in (self.regions[index] for index in group.regions):
                for row in region.keys:
                    if row in rows:
                        raise LayoutError(f"plane {row[1]!r} of layer {row[0]} is held twice")
                    rows.add(row)
        if len(seen) != len(self.regions):
            raise LayoutError("every region must be in one group")
        self._check_scales()

    def _check_group(self, group: GroupLayout) -> None:
        """Check what the regions of one block table must have in common."""
        regions = [self.regions[index] for index in group.regions]
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

    def _check_scales(self) -> None:
        """Check that every scale is for a plane held here, once, and is a positive number."""
        seen = set()
        held = {key: index for index, region in enumerate(self.regions) for key in region.keys}
        for scale in self.scales:
            key = (scale.layer, scale.plane)
            if key not in held or key in seen:
                raise LayoutError(
                    f"a scale is for plane {scale.plane!r} of layer {scale.layer}, which is "
                    f"{'scaled twice' if key in seen else 'not held'}"
                )
            seen.add(key)
            start, stop = self.region_heads(held[key])
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

    @property
    def layers(self) -> tuple[int, ...]:
        """Global indices of all layers held, ascending."""
        return tuple(sorted({layer for region in self.regions for layer in region.layers}))

    @property
    def num_layers(self) -> int:
        """How many layers are held."""
        return len(self.layers)

    @property
    def num_blocks(self) -> int:
        """How many block ids the cache has."""
        return min(region.num_slots for region in self.regions)

    @property
    def block_nbytes(self) -> int:
        """Payload bytes of one block over all layers and planes."""
        return sum(r.slot_nbytes * len(r.layers) * len(r.planes) for r in self.regions)

    def digest(self) -> str:
        """Return a short name of this exact layout; equal layouts have equal digests."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()


def _make_scales(scales: Mapping[str, Any], layers: tuple[int, ...]) -> tuple[Scale, ...]:
    made = []
    for plane, given in scales.items():
        values = np.asarray(given, np.float32)
        if values.ndim > 2 or (values.ndim and values.shape[0] != len(layers)):
            raise LayoutError(
                f"scales of plane {plane!r} have shape {values.shape}: give one number, "
                f"[{len(layers)} layers] or [{len(layers)} layers, heads]"
            )
        heads = values.shape[1] if values.ndim == 2 else 1
        rows = np.broadcast_to(values.reshape(-1, heads), (len(layers), heads))
        made += [
            Scale(layer, plane, tuple(row))
            for layer, row in zip(layers, rows.tolist(), strict=True)
        ]
    return tuple(made)


def _describe(tensor: Any, names: list[str]) -> tuple[dict[str, int], dict[str, int], int, str]:
    """Read sizes, strides in bytes, element bytes and dtype name of a torch tensor or NumPy array."""
    if len(tensor.shape) != len(names):
        raise LayoutError(
            f"a tensor of shape {tuple(tensor.shape)} does not have the {len(names)} axes "
            f"{' '.join(names)}"
        )
    if hasattr(tensor, "element_size"):
        elem = int(tensor.element_size())
        strides = [int(s) * elem for s in tensor.stride()]
        dtype = str(tensor.dtype).removeprefix("torch.")
    else:
        elem = int(tensor.dtype.itemsize)
        strides = [int(s) for s in tensor.strides]
        dtype = str(tensor.dtype)
    sizes = {name: int(size) for name, size in zip(names, tensor.shape, strict=True)}
    by_name = dict(zip(names, strides, strict=True))
    for name, size in sizes.items():
        if size < 1:
            raise LayoutError(f"axis {name!r} is empty")
    for name, size in sizes.items():
        if by_name[name] < 0 or (size > 1 and by_name[name] == 0):
            raise LayoutError(
                f"axis {name!r} has stride {by_name[name]} bytes: expanded and flipped tensors "
                "are no caches"
            )
    return sizes, by_name, elem, dtype
