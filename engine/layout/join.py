"""Layouts put together: several groups in one cache, or several planes behind one block table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import LayoutError
from .kv_layout import GroupLayout, KVLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .region import RegionLayout


def join_groups(*layouts: KVLayout) -> KVLayout:
    """Return one cache of several block tables: the groups of all layouts, in their order.

    For hybrid models: full attention beside sliding windows, an indexer's cache, or state. Register
    it with the tensors of all of them in a row.

    Raises:
        LayoutError: they differ in what a cache has once (codec, model), or hold a plane twice.
    """
    groups = []
    shift = 0
    for layout in layouts:
        groups += [
            msgspec.structs.replace(group, regions=tuple(index + shift for index in group.regions))
            for group in layout.groups
        ]
        shift += len(layout.regions)
    return _joined(layouts, tuple(groups))


def join_planes(*layouts: KVLayout) -> KVLayout:
    """Return one group that holds the planes of several layouts behind one block table.

    For planes that differ in shape: a latent and its rotary part, keys and their scales a block.

    Raises:
        LayoutError: they differ in kind, window or null slot; and as for `join_groups`.
    """
    firsts = [layout.groups[0] for layout in layouts]
    for name in ("kind", "window", "null_slot"):
        _same(name, [getattr(group, name) for group in firsts])
    whole = range(sum(len(layout.regions) for layout in layouts))
    group = GroupLayout(firsts[0].kind, tuple(whole), firsts[0].window, firsts[0].null_slot)
    return _joined(layouts, (group,))


def _joined(layouts: Sequence[KVLayout], groups: tuple[GroupLayout, ...]) -> KVLayout:
    if not layouts:
        raise LayoutError("no layouts were given to join")
    for name in ("codec", "opaque", "version"):
        _same(name, [getattr(layout, name) for layout in layouts])
    first = next(
        (layout for layout in layouts if any(region.axis("head") for region in layout.regions)),
        layouts[0],
    )
    regions = [
        _in_its_own_terms(layout, index)
        for layout in layouts
        for index in range(len(layout.regions))
    ]
    joined = KVLayout(
        regions=tuple(regions),
        groups=groups,
        dtype=first.dtype,
        head_start=first.head_start,
        head_stop=first.head_stop,
        tp_mode=first.tp_mode,
        codec=first.codec,
        opaque=first.opaque,
        scales=tuple(scale for layout in layouts for scale in layout.scales),
        model_heads=first.model_heads,
        model_layers=max(layout.model_layers for layout in layouts),
    )
    joined.check()
    return joined


def _in_its_own_terms(layout: KVLayout, index: int) -> RegionLayout:
    """Return a region that says itself what its layout said for all."""
    return msgspec.structs.replace(
        layout.regions[index],
        dtype=layout.region_dtype(index),
        heads=layout.region_heads(index),
    )


def _same(name: str, values: list[Any]) -> None:
    for value in values[1:]:
        if value != values[0]:
            raise LayoutError(f"layouts to be joined differ in {name}: {values[0]!r} and {value!r}")
