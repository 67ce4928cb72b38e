"""Two regions, one at each end: whether the numbers of one can become the other's, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import LayoutError
from ..layout.block_scales import is_scale
from ..layout.dtypes import has_conversion

if TYPE_CHECKING:
    from ..layout.kv_layout import KVLayout
    from ..layout.region import RegionLayout


def differ(what: str, left: object, right: object) -> None:
    """Raises a LayoutError that names both values, unless they are equal."""
    if left != right:
        raise LayoutError(
            f"{what} differs: source has {left}, destination has {right}", operation="plan"
        )


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


def signature_of(src: KVLayout, dst: KVLayout, left: int, right: int) -> tuple[Any, ...]:
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
