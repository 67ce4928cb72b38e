"""A peer's layout and descriptors are believed in nothing that could reach other memory here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from kvferry.engine.errors import EngineError, LayoutError, NotRegistered, OutOfRange, PlanError
from kvferry.engine.layout.kv_layout import GroupLayout, KVLayout
from kvferry.engine.layout.region import Axis
from kvferry.engine.memory.descriptors import CacheDescriptor
from kvferry.engine.memory.regions import RegionTable
from kvferry.engine.plan.block_plan import BlockPlan
from kvferry.engine.plan.token_plan import TokenPlan
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.wire import tables

if TYPE_CHECKING:
    from kvferry.engine.layout.region import RegionLayout

DIMS = "plane block token head dim"


def tensors(layers: int = 2) -> list[np.ndarray[Any, Any]]:
    return [np.zeros((2, 6, 4, 2, 8), np.uint8) for _ in range(layers)]


@pytest.fixture
def honest() -> CacheDescriptor:
    """What a well-behaved peer would send."""
    arrays = tensors()
    table = RegionTable("peer")
    return table.register_cache(KVLayout.from_tensors(arrays, DIMS), arrays).descriptor


def changed(cache: CacheDescriptor, number: int, **changes: Any) -> CacheDescriptor:
    """The same cache with one region's layout changed, and memory enough for it."""
    regions = list(cache.layout.regions)
    regions[number] = msgspec.structs.replace(regions[number], **changes)
    layout = msgspec.structs.replace(cache.layout, regions=tuple(regions))
    larger = tuple(
        msgspec.structs.replace(region, nbytes=max(region.nbytes, shape.nbytes))
        for region, shape in zip(cache.regions, regions, strict=True)
    )
    return CacheDescriptor(layout, larger)


def grown(region: RegionLayout, name: str, size: int) -> dict[str, Any]:
    """Changes that let one axis of a region grow without a contradiction."""
    axes = tuple(
        msgspec.structs.replace(axis, size=size) if axis.name == name else axis
        for axis in region.axes
    )
    wide = 1 << 40
    return {
        "axes": tuple(
            msgspec.structs.replace(axis, stride_bytes=wide >> 8 * i)
            if axis.name != "dim"
            else axis
            for i, axis in enumerate(axes)
        ),
        "slot_stride": wide << 8,
        "plane_stride": wide << 16,
        "nbytes": wide << 18,
        "tokens_per_slot": axes[0].size,
    }


@pytest.mark.parametrize("axis", ["token", "head", "dim"])
def test_a_later_region_may_not_be_larger_than_the_first(
    honest: CacheDescriptor, axis: str
) -> None:
    """Only the first regions used to be compared: the second one's axes would then have spread its
    pieces over whatever lies behind this process's own region."""
    layout = KVLayout.from_tensors(tensors(), DIMS)
    liar = changed(honest, 1, **grown(honest.layout.regions[1], axis, 200))
    with TransferEngine() as engine:
        mine = engine.register_cache(layout, tensors())
        for pair in ((liar, mine), (mine, liar)):
            with pytest.raises(LayoutError):
                engine.plan(*pair)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"elem_bytes": 2}, "axis 'dim' steps 1 bytes"),
        ({"axes": (Axis("token", 4, 16), Axis("head", 2, 8), Axis("token", 8, 1))}, "named twice"),
        ({"axes": (Axis("token", 4, 16), Axis("plane", 2, 8), Axis("dim", 8, 1))}, "named twice"),
        ({"nbytes": 2**63 - 1}, "sizes beyond"),
        ({"base_offset": 2**62 + 1}, "sizes beyond"),
        ({"layer_stride": 2**63}, "sizes beyond"),
        ({"num_slots": 2**31 + 1, "nbytes": 2**61}, "axis 'block' has size"),
        ({"num_slots": 0}, "axis 'block' has size 0"),
        ({"planes": ("k", "k")}, "plane 'k' of layer 1 is held twice"),
        ({"layers": (0,)}, "plane 'k' of layer 0 is held twice"),
        ({"layers": ()}, "axis 'layer' has size 0"),
        (
            {"axes": (Axis("token", 4, 16), Axis("head", 1, 8), Axis("dim", 8, 1))},
            "axis 'head' has",
        ),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(
    honest: CacheDescriptor, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(LayoutError, match=words):
        changed(honest, 1, **changes).check()


def test_heads_that_are_not_there_are_refused(honest: CacheDescriptor) -> None:
    for start, stop in ((0, 0), (-1, 1), (2, 1), (0, 3)):
        layout = msgspec.structs.replace(honest.layout, head_start=start, head_stop=stop)
        with pytest.raises(LayoutError, match="head"):
            layout.check()


def test_descriptors_must_cover_the_layout(honest: CacheDescriptor) -> None:
    honest.check()
    assert CacheDescriptor.decode(honest.encode()) == honest
    short = msgspec.structs.replace(honest.regions[1], nbytes=honest.regions[1].nbytes - 1)
    for regions in (
        honest.regions[:1],
        (*honest.regions, honest.regions[0]),
        (honest.regions[0], short),
    ):
        cache = CacheDescriptor(honest.layout, regions)
        with pytest.raises(LayoutError, match="region"):
            cache.check()
        with pytest.raises(LayoutError, match="region"):
            CacheDescriptor.decode(cache.encode())
        with TransferEngine() as engine:
            mine = engine.register_cache(KVLayout.from_tensors(tensors(), DIMS), tensors())
            with pytest.raises(LayoutError, match="region"):
                engine.plan(mine, cache)


@pytest.mark.parametrize(
    "lie",
    [
        {"key": b"short"},
        {"key": bytes(17)},
        {"region_id": -1},
        {"region_id": 2**32},
        {"address": -1},
        {"address": 2**63},
        {"nbytes": -1},
        {"nbytes": 2**63},
    ],
)
def test_descriptors_that_fit_no_header_do_not_decode(
    honest: CacheDescriptor, lie: dict[str, Any]
) -> None:
    bad = msgspec.structs.replace(honest.regions[0], **lie)
    with pytest.raises(LayoutError, match="not a cache descriptor"):
        CacheDescriptor.decode(CacheDescriptor(honest.layout, (bad, honest.regions[1])).encode())


def test_a_plane_that_one_side_lacks_is_an_error_not_a_silence(honest: CacheDescriptor) -> None:
    only_k = changed(honest, 1, planes=("k",)).layout
    only_k.check()
    with pytest.raises(
        LayoutError,
        match=r"planes of layer 1 differs: source has \['k', 'v'\], destination has \['k'\]",
    ):
        BlockPlan(TokenPlan(honest.layout, only_k))


def test_a_slice_of_an_opaque_axis_is_refused(honest: CacheDescriptor) -> None:
    """Equal sizes and strides, but other heads: only a part would move."""
    opaque = msgspec.structs.replace(honest.layout, codec="private", opaque=("head",))
    shifted = msgspec.structs.replace(opaque, head_start=1, head_stop=3)
    BlockPlan(TokenPlan(opaque, opaque))
    with pytest.raises(LayoutError, match="axis 'head' is opaque"):
        BlockPlan(TokenPlan(opaque, shifted))


def test_no_layers_are_no_bytes(honest: CacheDescriptor) -> None:
    plan = BlockPlan(TokenPlan(honest.layout, honest.layout))
    assert plan.nbytes(5, layers=[]) == 0
    assert len(plan.pieces([0, 1], [2, 3], layers=[]).nbytes) == 0


def test_planes_may_be_in_regions_of_their_own(honest: CacheDescriptor) -> None:
    """One pool for K and one for V here, both in one there."""
    pool = np.arange(6 * 4 * 2 * 8, dtype=np.uint8).reshape(6, 4, 2, 8)
    halves = [
        KVLayout.from_tensors([pool], "block token head dim", planes=[name]).regions[0]
        for name in ("k", "v")
    ]
    split = KVLayout(tuple(halves), (GroupLayout("full", (0, 1)),), "uint8", 0, 2)
    split.check()
    together = KVLayout.from_tensors(tensors(1), DIMS)
    pieces = BlockPlan(TokenPlan(split, together)).pieces([1], [5])
    assert pieces.src_region.tolist() == [0, 1]
    assert pieces.dst_offset.tolist() == [5 * 64, 6 * 64 + 5 * 64]


def test_a_cache_of_several_block_tables_is_refused_rather_than_half_moved() -> None:
    layout = KVLayout.from_tensors(tensors(), DIMS)
    both = (GroupLayout("full", (0,)), GroupLayout("swa", (1,), window=4))
    hybrid = msgspec.structs.replace(layout, groups=both)
    with TransferEngine() as engine, TransferEngine() as other:
        mine = engine.register_cache(hybrid, tensors())
        theirs = other.register_cache(hybrid, tensors()).descriptor
        plan = engine.plan(mine, theirs)
        link = engine.connect(other.address)
        with pytest.raises(PlanError, match="do not pair one to one"):
            link.write_blocks(plan, [0], [0])
        with pytest.raises(PlanError, match="1 source block tables, but group 1"):
            link.write_tokens(plan, [[0]], [[0], [0]], stop=4)


def test_a_cache_of_another_engine_here_cannot_be_planned(honest: CacheDescriptor) -> None:
    with TransferEngine() as engine, TransferEngine() as other:
        mine = other.register_cache(KVLayout.from_tensors(tensors(), DIMS), tensors())
        with pytest.raises(NotRegistered, match="another engine"):
            engine.plan(mine, honest)


def test_tables_that_name_too_much_are_refused() -> None:
    table = RegionTable("me")
    array = np.zeros(100, np.uint8)
    region = table.register(array)
    rows = np.zeros(1, tables.REGION_ROW)
    rows["region"], rows["key"] = region.region_id, np.frombuffer(region.descriptor.key, np.uint8)
    pieces = np.zeros(1, tables.PIECE_ROW)
    for offset, nbytes in (
        (0, 101),
        (100, 1),
        (2**63, 1),
        (0, 2**63),
        (2**64 - 1, 2),
        (2**63 - 1, 1),
    ):
        pieces["offset"], pieces["nbytes"] = offset, nbytes
        with pytest.raises(OutOfRange):
            tables.admit(table, rows.tobytes(), pieces.tobytes())
    for bad_rows, bad_pieces in (
        (rows.tobytes()[:-1], b""),
        (b"", pieces.tobytes()),
        (rows.tobytes() * (tables.MAX_REGIONS + 1), b""),
        (rows.tobytes(), pieces.tobytes() * (tables.MAX_PIECES + 1)),
        (rows.tobytes(), pieces.tobytes()[:-1]),
    ):
        with pytest.raises(EngineError):
            tables.admit(table, bad_rows, bad_pieces)
    assert region._uses == 0
