"""Two ranks' buffers, item by item, as layouts and plans.

A component's buffers become regions whose slots are items, one "layer" for each pair of buffers. Where
both ranks hold the same heads an item is so many bytes, whatever is in them. Where tensor parallelism
differs, a page is `[token, head, dim]`, and the layouts describe the heads that both hold and no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ...engine.errors import LayoutError
from ...engine.layout.kv_layout import GroupLayout, KVLayout
from ...engine.layout.region import Axis, RegionLayout
from ...engine.memory.descriptors import CacheDescriptor
from ...engine.memory.regions import RegisteredCache
from ...engine.plan.rank_plan import heads_of_rank
from ...engine.transfer.plan import TransferPlan
from .memory import AUX, KV

if TYPE_CHECKING:
    from collections.abc import Callable

    from .memory import Held
    from .messages import Component, Entry, Geometry

ITEM = ("item",)


class Slice(NamedTuple):
    """The heads of a page that both ranks hold.

    Attributes:
        src_start, dst_start: the first of them, counted from each rank's own first head.
        num_heads: how many; 0 if another prefill rank sends them.
        src_heads, dst_heads: how many each rank holds.
    """

    src_start: int
    dst_start: int
    num_heads: int
    src_heads: int
    dst_heads: int


class Plans(NamedTuple):
    """How each component moves; None where this rank sends nothing of it."""

    kv: TransferPlan | None
    aux: TransferPlan | None
    states: tuple[TransferPlan | None, ...]


class Planner:
    """Plans from this prefill rank's buffers to those of decode ranks."""

    def __init__(self, held: Held, geometry: Geometry) -> None:
        self._held = held
        self._geometry = geometry
        self._caches: dict[tuple[int, str], RegisteredCache] = {}

    def plans(self, theirs: Geometry) -> Plans:
        """Return how everything moves to a decode rank of this geometry.

        Raises:
            LayoutError: the two do not go together; one sentence that names what differs.
        """
        mine = self._geometry
        check_geometries(mine, theirs)
        kinds = [c.kind for c in mine.components], [c.kind for c in theirs.components]
        if kinds[0] != kinds[1]:
            raise _differs("state components", kinds[0][2:], kinds[1][2:])
        made = [
            self._plan(number, theirs, component)
            for number, component in enumerate(theirs.components)
        ]
        return Plans(made[0], made[1], tuple(made[2:]))

    def _plan(self, number: int, theirs: Geometry, component: Component) -> TransferPlan | None:
        mine = self._geometry.components[number]
        heads = _slice_of(mine.kind, self._geometry, theirs)
        if heads is not None and not heads.num_heads:
            return None
        pairs = _pairs(mine, component, one_stage=self._geometry.pp_size == 1)
        chosen = [
            (i, here, there)
            for i, j in pairs
            if (here := mine.entries[i]) is not None and (there := component.entries[j]) is not None
        ]
        if not chosen:
            return None
        make = _whole_items(mine.kind) if heads is None else _sliced(theirs.page_size, heads)
        src = _layout([make(here, there, True) for _, here, there in chosen])
        dst = _layout([make(here, there, False) for _, here, there in chosen])
        remote = CacheDescriptor(dst, tuple(there.region for _, _, there in chosen))
        remote.check()
        return TransferPlan(
            self._cache(number, src, [i for i, _, _ in chosen]), remote, writes=True
        )

    def _cache(self, number: int, layout: KVLayout, entries: list[int]) -> RegisteredCache:
        """This rank's side of a plan: equal ones are one."""
        key = (number, f"{layout.digest()}/{entries}")
        if key not in self._caches:
            regions = (self._held.regions[number][i] for i in entries)
            self._caches[key] = RegisteredCache(layout, tuple(r for r in regions if r is not None))
        return self._caches[key]


def check_geometries(mine: Geometry, theirs: Geometry) -> None:
    """What must be alike between a prefill and a decode rank.

    Raises:
        LayoutError: naming what is not.
    """
    for what, one, other in (
        ("page size", mine.page_size, theirs.page_size),
        ("attention kind (MLA)", mine.mla, theirs.mla),
        ("hybrid MLA", mine.hybrid_mla, theirs.hybrid_mla),
        (
            "decode context parallelism",
            (mine.dcp_size, mine.dcp_rank),
            (theirs.dcp_size, theirs.dcp_rank),
        ),
    ):
        if one != other:
            raise _differs(what, one, other)
    # fp8_e4m3 and fp8_e5m2 are other numbers in equal bytes. What `auto` stands for is the model's type,
    # or what its checkpoint says: of the first an item has two bytes a number, as of bfloat16.
    plain = {mine.numbers, theirs.numbers} <= {"auto", "bf16", "bfloat16"}
    if mine.numbers != theirs.numbers and not plain:
        raise _differs("kv_cache_dtype", mine.numbers, theirs.numbers)
    if max(mine.tp_size, theirs.tp_size) % min(mine.tp_size, theirs.tp_size):
        raise _differs(
            "attention TP size, and neither divides the other: it", mine.tp_size, theirs.tp_size
        )


def slice_heads(mine: Geometry, theirs: Geometry) -> Slice:
    """Return the heads that move from this prefill rank to that decode rank.

    Raises:
        LayoutError: heads cannot be split so.
    """
    total = theirs.total_heads
    if not total or mine.total_heads != total:
        raise _differs("number of KV heads of the model", mine.total_heads, total)
    for size in (mine.tp_size, theirs.tp_size):
        if total % size and size % total:
            raise LayoutError(
                f"{total} KV heads are not split evenly over {size} ranks", operation="sglang"
            )
    ours = heads_of_rank(total, mine.tp_size, mine.tp_rank)
    other = heads_of_rank(total, theirs.tp_size, theirs.tp_rank)
    low, high = max(ours[0], other[0]), min(ours[1], other[1])
    count = max(0, high - low)
    if mine.tp_size > theirs.tp_size and mine.tp_size > total:
        # Several of the prefill ranks that write to this decode rank hold the same head: the first does.
        writers, sharers = mine.tp_size // theirs.tp_size, mine.tp_size // total
        if mine.tp_rank % writers and mine.tp_rank % sharers:
            count = 0
    sizes = ours[1] - ours[0], other[1] - other[0]
    return Slice(low - ours[0], low - other[0], count, *sizes)


def _slice_of(kind: str, mine: Geometry, theirs: Geometry) -> Slice | None:
    """Return which heads of a component's items move; None for whole items.

    Raises:
        LayoutError: this kind does not move between these tensor parallelisms.
    """
    if kind == AUX or mine.mla:
        return None
    if kind == "mamba":
        if mine.state_tp_size != theirs.state_tp_size:
            raise _differs(
                "TP size, with state of type 'mamba', which",
                mine.state_tp_size,
                theirs.state_tp_size,
            )
        return None
    if mine.tp_size == theirs.tp_size:
        return None
    if kind == KV:
        return None if mine.hybrid_mla else slice_heads(mine, theirs)
    if kind == "swa" and {mine.swa_layout, theirs.swa_layout} == {"nhd"} and mine.pp_size == 1:
        return slice_heads(mine, theirs)
    raise _differs(
        f"attention TP size, with state of type {kind!r}, which", mine.tp_size, theirs.tp_size
    )


def _pairs(mine: Component, theirs: Component, *, one_stage: bool) -> list[tuple[int, int]]:
    """Return which entry of theirs each of mine goes to: by layer, the n-th of a layer to the n-th.

    A pipeline stage of prefill holds some of decode's layers.
    """
    counts = len(mine.entries), len(theirs.entries)
    if mine.kind == AUX:  # an optional buffer may be enabled at one end only; SGLang warns of it
        return [(i, i) for i in range(min(counts))]
    if mine.layer_ids and theirs.layer_ids:
        if (len(mine.layer_ids), len(theirs.layer_ids)) != counts:
            raise _differs(f"layers of component {mine.kind!r}: their number", *counts)
        free: dict[int, list[int]] = {}
        for position, layer in enumerate(theirs.layer_ids):
            free.setdefault(layer, []).append(position)
        pairs = []
        for position, layer in enumerate(mine.layer_ids):
            if not free.get(layer):
                raise LayoutError(
                    f"component {mine.kind!r}: layer {layer} of prefill is missing at decode",
                    operation="sglang",
                )
            pairs.append((position, free[layer].pop(0)))
        return pairs
    if counts[0] != counts[1] or not one_stage:
        raise _differs(
            f"number of buffers of component {mine.kind!r}, which name no layers: it", *counts
        )
    return [(i, i) for i in range(counts[0])]


def _whole_items(kind: str) -> Callable[[Entry, Entry, bool], RegionLayout]:
    def make(here: Entry, there: Entry, local: bool) -> RegionLayout:
        if here.item_nbytes != there.item_nbytes:
            raise _differs(f"bytes of an item of {kind!r}", here.item_nbytes, there.item_nbytes)
        entry = here if local else there
        return _region(entry, (Axis("dim", entry.item_nbytes, 1),), 1, 0)

    return make


def _sliced(page_size: int, heads: Slice) -> Callable[[Entry, Entry, bool], RegionLayout]:
    def make(here: Entry, there: Entry, local: bool) -> RegionLayout:
        head_nbytes, rest = divmod(here.item_nbytes, page_size * heads.src_heads)
        if rest or there.item_nbytes != page_size * heads.dst_heads * head_nbytes:
            raise LayoutError(
                f"pages of {here.item_nbytes} bytes at prefill and {there.item_nbytes} at decode do "
                f"not hold {page_size} tokens of {heads.src_heads} and {heads.dst_heads} heads",
                operation="sglang",
            )
        held, start = (
            (heads.src_heads, heads.src_start) if local else (heads.dst_heads, heads.dst_start)
        )
        axes = (
            Axis("token", page_size, held * head_nbytes),
            Axis("dim", heads.num_heads * head_nbytes, 1),
        )
        return _region(here if local else there, axes, page_size, start * head_nbytes)

    return make


def _region(entry: Entry, axes: tuple[Axis, ...], tokens: int, offset: int) -> RegionLayout:
    return RegionLayout(
        layers=(0,),
        planes=ITEM,
        layer_stride=0,
        plane_stride=0,
        slot_stride=entry.item_nbytes,
        num_slots=entry.num_items,
        tokens_per_slot=tokens,
        elem_bytes=1,
        axes=axes,
        base_offset=offset,
        nbytes=entry.item_nbytes * entry.num_items,
    )


def _layout(regions: list[RegionLayout]) -> KVLayout:
    """Regions numbered as layers, of as many slots as all of them have."""
    slots = min(region.num_slots for region in regions)
    numbered = (
        msgspec.structs.replace(region, layers=(n,), num_slots=slots)
        for n, region in enumerate(regions)
    )
    layout = KVLayout(
        regions=tuple(numbered),
        groups=(GroupLayout("full", tuple(range(len(regions)))),),
        dtype="uint8",
        head_start=0,
        head_stop=1,
    )
    layout.check()
    return layout


def _differs(what: str, prefill: object, decode: object) -> LayoutError:
    return LayoutError(
        f"{what} differs: prefill has {prefill}, decode has {decode}", operation="sglang"
    )
