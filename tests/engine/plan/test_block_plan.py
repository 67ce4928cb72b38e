"""Plans move exactly the bytes that a slow reference moves, in as few pieces as there are."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.engine.errors import BlockOutOfRange, LayoutError, OverlappingBlocks, PlanError
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.plan.block_plan import BlockPlan
from kvferry.engine.plan.block_tables import FEW_IDS, are_few
from kvferry.engine.plan.token_plan import TokenPlan

if TYPE_CHECKING:
    from kvferry.engine.plan.template import Pieces

Array = np.ndarray[Any, Any]
AXES = ("layer", "plane", "block", "token", "head", "dim")


def cache(
    order: tuple[str, ...], sizes: dict[str, int], *, stacked: bool, fill: int | None
) -> tuple[list[Array], str]:
    """Tensors whose axes lie in memory in this order, and their dims."""
    shape = tuple(sizes[name] for name in order)
    whole = np.full(shape, 0xEE, np.uint8)
    if fill is not None:
        rng = np.random.default_rng(fill)
        whole[...] = rng.integers(0, 256, shape, np.uint8)
    if stacked:
        return [whole], " ".join(order)
    layer = order.index("layer")
    rest = tuple(name for name in order if name != "layer")
    return [np.ascontiguousarray(part) for part in np.moveaxis(whole, layer, 0)], " ".join(rest)


def logical(tensors: list[Array], dims: str) -> Array:
    """A view `[layer, plane, block, token, head, dim]`."""
    names = dims.split()
    if "layer" in names:
        whole: Array = tensors[0].transpose([names.index(name) for name in AXES])
        return whole
    return np.stack([t.transpose([names.index(name) for name in AXES[1:]]) for t in tensors])


def move(pieces: Pieces, src: list[Array], dst: list[Array]) -> None:
    """The slow reference mover: one slice a piece."""
    flat_src = [t.reshape(-1) for t in src]
    flat_dst = [t.reshape(-1) for t in dst]
    for src_region, src_offset, dst_region, dst_offset, nbytes in zip(*pieces, strict=True):
        part = flat_src[src_region][src_offset : src_offset + nbytes]
        assert len(part) == nbytes
        flat_dst[dst_region][dst_offset : dst_offset + nbytes] = part


orders = st.permutations(AXES[:-1]).map(lambda order: (*order, "dim"))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    src_order=orders,
    dst_order=orders,
    stacked=st.tuples(st.booleans(), st.booleans()),
    sizes=st.tuples(*[st.integers(1, 3)] * 3),
    blocks=st.integers(1, 6),
    data=st.data(),
)
def test_any_order_to_any_order(
    src_order: tuple[str, ...],
    dst_order: tuple[str, ...],
    stacked: tuple[bool, bool],
    sizes: tuple[int, int, int],
    blocks: int,
    data: st.DataObject,
) -> None:
    layers, tokens, heads = sizes
    shape = {"layer": layers, "plane": 2, "token": tokens, "head": heads, "dim": 4}
    src, src_dims = cache(src_order, shape | {"block": 8}, stacked=stacked[0], fill=1)
    dst, dst_dims = cache(dst_order, shape | {"block": 7}, stacked=stacked[1], fill=None)
    src_layout = KVLayout.from_tensors(src[0] if stacked[0] else src, src_dims)
    dst_layout = KVLayout.from_tensors(dst[0] if stacked[1] else dst, dst_dims)
    src_ids = data.draw(st.lists(st.integers(0, 7), min_size=blocks, max_size=blocks))
    dst_ids = data.draw(st.lists(st.integers(0, 6), min_size=blocks, max_size=blocks, unique=True))
    chosen = data.draw(st.none() | st.sets(st.integers(0, layers - 1), min_size=1))
    plan = BlockPlan(TokenPlan(src_layout, dst_layout))
    pieces = plan.pieces(src_ids, dst_ids, layers=None if chosen is None else sorted(chosen))
    expected = logical(dst, dst_dims).copy()
    which = list(range(layers)) if chosen is None else sorted(chosen)
    source = logical(src, src_dims)
    for layer, (s, d) in itertools.product(which, zip(src_ids, dst_ids, strict=True)):
        expected[layer, :, d] = source[layer, :, s]
    move(pieces, src, dst)
    assert np.array_equal(logical(dst, dst_dims), expected)  # what was not named is untouched
    assert pieces.total_nbytes == plan.nbytes(blocks, layers=which)
    assert int(pieces.nbytes.min()) > 0


def nhd(num_blocks: int = 16, heads: int = 2, **options: Any) -> KVLayout:
    pool = np.zeros((2, num_blocks, 4, heads, 8), np.uint8)
    return KVLayout.from_tensors([pool], "plane block token head dim", **options)


def test_neighbours_on_both_sides_are_one_piece() -> None:
    plan = BlockPlan(TokenPlan(nhd(), nhd()))
    slot = 4 * 2 * 8
    pieces = plan.pieces([3, 4, 5, 9], [7, 8, 9, 10])
    assert sorted(pieces.nbytes.tolist()) == [slot, slot, 3 * slot, 3 * slot]
    assert plan.pieces([3, 5], [7, 8]).nbytes.tolist() == [slot] * 4  # neighbours on one side only
    whole = plan.pieces(range(16), range(16))
    assert whole.nbytes.tolist() == [16 * slot] * 2


def test_planes_and_layers_that_are_neighbours_on_both_sides_are_one_piece() -> None:
    pool = np.zeros((5, 3, 2, 4, 2, 8), np.uint8)
    layout = KVLayout.from_tensors(pool, "block layer plane token head dim")
    pieces = BlockPlan(TokenPlan(layout, layout)).pieces([0, 2], [4, 1])
    assert pieces.nbytes.tolist() == [pool[0].nbytes] * 2
    assert BlockPlan(TokenPlan(layout, layout)).pieces([0], [4], layers=[1, 2]).nbytes.tolist() == [
        pool[0, 1:].nbytes
    ]
    assert len(BlockPlan(TokenPlan(layout, layout)).pieces([0], [4], layers=[0, 2]).nbytes) == 2


def test_heads_that_both_sides_hold_are_moved() -> None:
    src = np.random.default_rng(3).integers(0, 256, (2, 5, 4, 6, 8), np.uint8)  # heads 0 to 5
    dst = np.full((2, 5, 4, 3, 8), 0xEE, np.uint8)  # heads 4 to 6
    dims = "plane block token head dim"
    plan = BlockPlan(
        TokenPlan(
            KVLayout.from_tensors([src], dims), KVLayout.from_tensors([dst], dims, head_start=4)
        )
    )
    move(plan.pieces([1, 3], [4, 0]), [src], [dst])
    assert np.array_equal(dst[:, [4, 0], :, :2], src[:, [1, 3], :, 4:])
    assert (dst[:, :, :, 2:] == 0xEE).all()
    assert (dst[:, 1:4] == 0xEE).all()


def test_a_hundred_thousand_ids() -> None:
    layout = nhd(num_blocks=200_000)
    rng = np.random.default_rng(0)
    src_ids, dst_ids = rng.permutation(200_000)[:100_000], rng.permutation(200_000)[:100_000]
    pieces = BlockPlan(TokenPlan(layout, layout)).pieces(src_ids, dst_ids)
    assert pieces.total_nbytes == 100_000 * layout.block_nbytes
    order = np.argsort(dst_ids)
    first_plane = pieces.dst_offset < layout.regions[0].plane_stride
    moved = np.repeat(pieces.src_offset[first_plane], pieces.nbytes[first_plane] // 64) // 64
    starts = np.flatnonzero(np.diff(moved, prepend=-1) != 0)
    assert np.array_equal(np.sort(moved[starts]), np.sort(moved[starts]))
    assert int(pieces.dst_offset[first_plane][0]) == int(dst_ids[order[0]]) * 64


def test_no_blocks_are_no_pieces() -> None:
    pieces = BlockPlan(TokenPlan(nhd(), nhd())).pieces([], [])
    assert pieces.total_nbytes == 0
    assert len(pieces.nbytes) == 0


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "error", "says"),
    [
        ([1, 2], [3], PlanError, "2 source block ids but 1 destination block ids"),
        ([16], [0], BlockOutOfRange, "source block id 16 is not in a cache of 16 blocks"),
        ([0], [-1], BlockOutOfRange, "destination block id -1"),
        ([0], [2**64 - 1], BlockOutOfRange, f"destination block ids: {2**64 - 1} is"),
        ([0, 1, 2], [5, 3, 5], OverlappingBlocks, "destination block id 5 is named twice"),
        ([0.5], [1], PlanError, "source block ids must be one row of integers"),
        ([[1, 2]], [[1, 2]], PlanError, "one row of integers"),
    ],
)
def test_ids_that_cannot_be_moved_are_named(
    src_ids: Any, dst_ids: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        BlockPlan(TokenPlan(nhd(), nhd())).pieces(src_ids, dst_ids)


@pytest.mark.parametrize("count", [-1, 1.5, [7, 2, 33], np.array([7, 2, 33]), "3"])
def test_what_is_no_number_of_blocks_has_no_bytes(count: Any) -> None:
    tokens = TokenPlan(nhd(), nhd())
    plan = BlockPlan(tokens)
    with pytest.raises(PlanError, match=r"how many blocks.* its len\(\)"):
        plan.nbytes(count)
    assert plan.nbytes(np.int64(3)) == 3 * plan.nbytes(1) == tokens.nbytes(0, 3 * 4)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 1), (0, -5)])
def test_what_is_no_range_of_tokens_has_no_bytes(start: int, stop: int) -> None:
    with pytest.raises(PlanError, match=rf"tokens \[{start}, {stop}\)"):
        TokenPlan(nhd(), nhd()).nbytes(start, stop)


def test_layers_that_are_not_there_are_named() -> None:
    plan = BlockPlan(TokenPlan(nhd(), nhd()))
    with pytest.raises(PlanError, match="layer 1 is not held by both sides"):
        plan.pieces([0], [0], layers=[1])


def test_layouts_that_cannot_be_reconciled_are_refused_by_name() -> None:
    dims = "plane block token head dim"
    ours = nhd()
    wide = KVLayout.from_tensors([np.zeros((2, 16, 4, 2, 16), np.uint8)], dims)
    long = KVLayout.from_tensors([np.zeros((2, 16, 8, 2, 8), np.uint8)], dims)
    real = KVLayout.from_tensors([np.zeros((2, 16, 4, 2, 8), np.float16)], dims)
    latent = KVLayout.from_tensors([np.zeros((16, 4, 2, 8), np.uint8)], "block token head dim")
    pairs = [
        (wide, "axis 'dim' differs: source has 8, destination has 16"),
        (long, "block size in tokens differs: source has 4, destination has 8"),
        (real, "dtype differs: source has uint8, destination has float16"),
        (latent, "planes of layer 0 differs"),
        (nhd(layers=[5]), "no layer is held by both"),
        (nhd(head_start=2), "no head in common"),
        (nhd(codec="private"), "codec differs: source has plain, destination has private"),
        (nhd(kind="swa", window=8), "group kind differs"),
    ]
    for theirs, says in pairs:
        with pytest.raises(LayoutError, match=says):
            BlockPlan(TokenPlan(ours, theirs))


def test_an_opaque_axis_may_not_change() -> None:
    hnd = np.zeros((2, 16, 2, 4, 8), np.uint8)
    options: dict[str, Any] = {"codec": "cpu_attn/vec", "opaque": ("token", "dim")}
    ours = nhd(**options)
    theirs = KVLayout.from_tensors([hnd], "plane block head token dim", **options)
    BlockPlan(TokenPlan(ours, ours))
    with pytest.raises(LayoutError, match="axis 'token' is opaque in codec 'cpu_attn/vec'"):
        BlockPlan(TokenPlan(ours, theirs))


@pytest.mark.parametrize("num_blocks", [100, 1_000_000], ids=["marked", "sorted"])
def test_ids_that_need_no_order_are_checked_all_the_same(num_blocks: int) -> None:
    layout = KVLayout.from_tensors([np.zeros((num_blocks, 1), np.uint8)], "block dim")
    plan = BlockPlan(TokenPlan(layout, layout))
    src, dst = np.arange(50), np.arange(50)[::-1].copy()
    ids = plan.check_ids(src, dst, ordered=False)
    assert dict(zip(ids[1].tolist(), ids[0].tolist(), strict=True)) == {
        i: 49 - i for i in range(50)
    }
    dst[7] = 3
    with pytest.raises(OverlappingBlocks, match="block id 3 is named twice"):
        plan.check_ids(src, dst, ordered=False)
    for bad in (-1, num_blocks):
        dst[7] = bad
        with pytest.raises(BlockOutOfRange, match=f"block id {bad} is not"):
            plan.check_ids(src, dst, ordered=False)


def test_a_few_ids_of_pythons_own_are_ordered_like_rows() -> None:
    layout = KVLayout.from_tensors([np.zeros((20, 1), np.uint8)], "block dim")
    plan = BlockPlan(TokenPlan(layout, layout))
    rng = np.random.default_rng(3)
    for _ in range(300):
        count = int(rng.integers(1, 5))
        src, dst = (rng.integers(-1, 21, count).tolist() for _ in range(2))
        few = plan.order_few(src, dst)
        if {*src, *dst} <= set(range(20)) and len(set(dst)) == count:
            assert few is not None
            assert list(zip(few[1], few[0], strict=True)) == sorted(zip(dst, src, strict=True))
        else:
            assert few is None
            with pytest.raises((BlockOutOfRange, OverlappingBlocks)):
                plan.check_ids(src, dst)
    assert plan.order_few([1, 2], [1]) is None
    assert not are_few([1, True])
    assert not are_few(list(range(FEW_IDS + 1)))
