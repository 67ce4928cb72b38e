"""Tokens go from any layout to any other: what a slow reference moves, and not a byte more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.engine.errors import BlockOutOfRange, LayoutError, OverlappingBlocks, PlanError
from kvferry.engine.layout.dtypes import convert_bytes
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.plan.template import stretches
from kvferry.engine.plan.token_plan import TokenPlan
from tests.support.caches import AXES, PagedPool, expect_tokens

orders = st.permutations(AXES[:-1]).map(lambda order: (*order, "dim"))
ranges = st.tuples(st.integers(0, 5), st.integers(1, 6)).filter(lambda r: r[0] < r[1])


def move(
    plan: TokenPlan,
    src: PagedPool,
    dst: PagedPool,
    tables: tuple[list[int], list[int]],
    span: tuple[int, int],
    layers: tuple[int, ...] | None = None,
) -> int:
    """The slow mover: one slice a piece. Returns the bytes written."""
    here, there = src.arrays(), dst.arrays()
    total = 0
    for moves in plan.moves([tables[0]], [tables[1]], *span, layers=layers):
        copy_group = moves.copy_group
        for row, (src_region, src_offset, dst_region, dst_offset, nbytes) in enumerate(
            zip(*moves.pieces, strict=True)
        ):
            read = nbytes // copy_group.dst_elem * copy_group.src_elem
            part = here[src_region][src_offset : src_offset + read]
            assert len(part) == read > 0
            if moves.factor is not None:
                factor = moves.factor[row : row + 1]
                part = convert_bytes(
                    np.ascontiguousarray(part)[None],
                    factor,
                    copy_group.src_dtype,
                    copy_group.dst_dtype,
                )[0]
            there[dst_region][dst_offset : dst_offset + nbytes] = part
            total += int(nbytes)
    return total


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_layout_to_any_layout(data: st.DataObject) -> None:
    draw = data.draw
    dim, stop = draw(st.sampled_from([1, 4])), draw(st.integers(1, 23))
    start = draw(st.integers(0, stop))
    pools: list[PagedPool] = []
    tables: list[list[int]] = []
    src_heads = draw(ranges)
    shared = draw(st.integers(src_heads[0], src_heads[1] - 1))
    dst_heads = (draw(st.integers(0, shared)), draw(st.integers(shared + 1, 7)))
    window = draw(st.sampled_from([0, 0, 3, 8]))
    for heads in (src_heads, dst_heads):
        tokens = draw(st.sampled_from([1, 2, 3, 4, 6]))
        needed = -(-stop // tokens)
        slots = max(needed, -(-window // tokens)) + 3
        layers = draw(st.sampled_from([(0, 1, 2), (1, 2), (2, 0, 1), (1,)]))
        pools.append(
            PagedPool.make(
                draw(orders),
                layers=layers,
                heads=heads,
                num_blocks=slots,
                tokens=tokens,
                dim=dim,
                stacked=draw(st.booleans()),
                seed=len(pools) * 100 if not pools else None,
                kind="swa" if window else "full",
                window=window,
            )
        )
        table = draw(st.permutations(range(slots)))[:needed]
        tables.append(sorted(table) if draw(st.booleans()) else list(table))
    src, dst = pools
    common = tuple(sorted(set(src.layers) & set(dst.layers)))
    chosen = draw(st.none() | st.sets(st.sampled_from(common), min_size=1).map(sorted).map(tuple))
    plan = TokenPlan(src.layout, dst.layout)
    first = max(start, stop - window) if window else start
    expected = expect_tokens(src, dst, tables[0], tables[1], first, stop, layers=chosen)
    moved = move(plan, src, dst, (tables[0], tables[1]), (start, stop), chosen)
    assert dst.equals(expected)  # what was not named is untouched
    assert moved == plan.nbytes(start, stop, layers=chosen)


@pytest.mark.parametrize(("src_tokens", "dst_tokens"), [(16, 64), (64, 16), (32, 48), (16, 16)])
def test_common_block_sizes_with_a_prefix_and_a_partial_end(
    src_tokens: int, dst_tokens: int
) -> None:
    nhd = ("plane", "block", "token", "head", "dim")
    hnd = ("plane", "block", "head", "token", "dim")
    shape: dict[str, Any] = {"layers": (0, 1), "heads": (0, 2), "dim": 8, "stacked": False}
    for order in (nhd, hnd):
        src = PagedPool.make(order, num_blocks=20, tokens=src_tokens, seed=1, **shape)
        dst = PagedPool.make(nhd, num_blocks=20, tokens=dst_tokens, **shape)
        tables = (list(np.random.default_rng(0).permutation(20)), list(range(19, -1, -1)))
        for span in ((0, 192), (7, 185), (64, 65), (100, 100)):
            expected = expect_tokens(src, dst, *tables, *span)
            plan = TokenPlan(src.layout, dst.layout)
            assert move(plan, src, dst, tables, span) == plan.nbytes(*span)
            assert dst.equals(expected)


def test_blocks_that_are_equal_and_neighbours_are_one_piece() -> None:
    flat = ("block", "layer", "plane", "token", "head", "dim")
    shape: dict[str, Any] = {"layers": (0, 1, 2), "heads": (0, 2), "dim": 8, "num_blocks": 16}
    src = PagedPool.make(flat, tokens=4, seed=1, **shape)
    dst = PagedPool.make(flat, tokens=4, **shape)
    block = src.layout.block_nbytes
    plan = TokenPlan(src.layout, dst.layout)
    pieces = plan.pieces([[3, 4, 5, 9]], [[7, 8, 9, 2]], 0, 16)
    assert sorted(pieces.nbytes.tolist()) == [block, 3 * block]


def test_small_blocks_beside_each_other_join_in_a_large_one() -> None:
    nhd = ("plane", "block", "token", "head", "dim")
    shape: dict[str, Any] = {"layers": (0,), "heads": (0, 2), "dim": 8, "stacked": False}
    src = PagedPool.make(nhd, tokens=16, num_blocks=9, seed=1, **shape)
    dst = PagedPool.make(nhd, tokens=64, num_blocks=3, **shape)
    pieces = TokenPlan(src.layout, dst.layout).pieces([[2, 3, 4, 8]], [[1]], 0, 64)
    assert sorted(pieces.nbytes.tolist()) == [16 * 16, 16 * 16, 48 * 16, 48 * 16]


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 0, []),
        (0, 8, [(0, 2, 0, 4)]),
        (1, 3, [(0, 1, 1, 3)]),
        (1, 4, [(0, 1, 1, 4)]),
        (3, 9, [(0, 1, 3, 4), (1, 2, 0, 4), (2, 3, 0, 1)]),
    ],
)
def test_tokens_are_cut_into_a_beginning_a_middle_and_an_end(
    start: int, stop: int, expected: list[tuple[int, ...]]
) -> None:
    assert [tuple(stretch) for stretch in stretches(start, stop, 4)] == expected


def test_a_hundred_thousand_tokens() -> None:
    nhd, hnd = "plane block token head dim", "plane block head token dim"
    src = KVLayout.from_tensors([np.zeros((2, 9000, 16, 2, 1), np.uint8)], nhd)
    dst = KVLayout.from_tensors([np.zeros((2, 2100, 2, 64, 1), np.uint8)], hnd)
    plan = TokenPlan(src, dst)
    random = np.random.default_rng(0)
    tables = random.permutation(9000)[:8192], random.permutation(2100)[:2048]
    pieces = plan.pieces([tables[0]], [tables[1]], 0, 131072)
    assert pieces.total_nbytes == plan.nbytes(0, 131072) == 2 * 2 * 131072
    places = pieces.dst_offset[pieces.dst_offset < 2100 * 2 * 64]  # one plane's
    assert len(np.unique(places)) == len(places) == 2 * 131072


def paged(**changes: Any) -> KVLayout:
    options: dict[str, Any] = {"layers": (0,), "heads": (0, 2), "num_blocks": 8, "tokens": 4}
    options |= {"dim": 8, "stacked": False} | changes
    order = options.pop("order", ("plane", "block", "token", "head", "dim"))
    return PagedPool.make(order, **options).layout


@pytest.mark.parametrize(
    ("tables", "span", "error", "says"),
    [
        (([[0]], [[0]]), (0, 5), PlanError, "1 source blocks of 4 tokens do not hold token 4"),
        (([[0, 1]], [[0]]), (0, 5), PlanError, "1 destination blocks of 4 tokens do not hold"),
        (([[8]], [[0]]), (0, 4), BlockOutOfRange, "source block id 8 is not in a cache of 8"),
        (([[0]], [[-1]]), (0, 4), BlockOutOfRange, "destination block id -1"),
        (([[0, 1]], [[3, 3]]), (0, 8), OverlappingBlocks, "destination block id 3 is named twice"),
        (([[0.5]], [[1]]), (0, 4), PlanError, "must be one row of integers"),
        (([], [[1]]), (0, 4), PlanError, "0 source block tables, but group 0"),
        (([[0]], [[0]]), (3, 2), PlanError, r"tokens \[3, 2\) are no range"),
    ],
)
def test_tables_that_cannot_be_moved_are_named(
    tables: Any, span: tuple[int, int], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        TokenPlan(paged(), paged()).pieces(tables[0], tables[1], *span)


def test_null_blocks_outside_a_window_are_not_looked_at() -> None:
    layout = paged(kind="swa", window=6, null_slot=0)
    plan = TokenPlan(layout, layout)
    assert plan.nbytes(0, 14) == plan.nbytes(8, 14)
    pieces = plan.pieces([[0, 0, 3, 5]], [[0, 0, 2, 1]], 0, 14)
    assert pieces.total_nbytes == plan.nbytes(0, 14)
    with pytest.raises(BlockOutOfRange, match="block id 0 stands for no block"):
        plan.pieces([[0, 0, 0, 5]], [[0, 0, 2, 1]], 0, 14)


def test_a_window_of_opaque_blocks_is_moved_from_the_block_that_it_begins_in() -> None:
    shape: dict[str, Any] = {"layers": (0, 1), "heads": (0, 2), "dim": 8, "num_blocks": 9}
    order = ("block", "layer", "plane", "token", "head", "dim")
    opaque: dict[str, Any] = {"codec": "vec", "opaque": ("token", "dim")}
    opaque |= {"kind": "swa", "window": 6, "null_slot": 0}
    src = PagedPool.make(order, tokens=4, seed=1, **shape, **opaque)
    dst = PagedPool.make(order, tokens=4, **shape, **opaque)
    plan = TokenPlan(src.layout, dst.layout)
    tables = ([0, 7, 3, 5], [0, 4, 2, 1])  # of 15 tokens, 9 to 14 are in the window
    expected = expect_tokens(src, dst, [0, 0, 3, 5], [0, 0, 2, 1], 8, 16)
    moved = move(plan, src, dst, tables, (4, 15))
    assert moved == plan.nbytes(4, 15) == plan.nbytes(0, 15) == plan.nbytes(8, 15)
    assert moved == 2 * src.layout.block_nbytes
    assert dst.equals(expected)
    with pytest.raises(BlockOutOfRange, match="block id 0 stands for no block"):
        plan.pieces([[0, 0, 0, 5]], [[0, 0, 2, 1]], 0, 15)
    assert plan.nbytes(12, 15) == src.layout.block_nbytes, "what is here already is not moved"


def test_state_is_moved_by_whole_pages_without_tokens() -> None:
    pages = [
        torch.arange(5 * 6, dtype=torch.uint8).view(5, 6) + 1,
        torch.zeros(7, 6, dtype=torch.uint8),
    ]
    layouts = [
        KVLayout.from_tensors([page], "block dim", planes=["state"], kind="ssm", null_slot=0)
        for page in pages
    ]
    plan = TokenPlan(layouts[0], layouts[1])
    pieces = plan.pieces([[0, 3, 2]], [[0, 6, 1]], 0, 1000)
    assert pieces.total_nbytes == plan.nbytes(0, 1000, states=2) == 12
    flat = [page.view(-1).numpy() for page in pages]
    for _, src_offset, _, dst_offset, nbytes in zip(*pieces, strict=True):
        flat[1][dst_offset : dst_offset + nbytes] = flat[0][src_offset : src_offset + nbytes]
    assert torch.equal(pages[1][[6, 1]], pages[0][[3, 2]])
    assert int(pages[1].sum()) == int(pages[0][[3, 2]].sum())


def test_layouts_that_cannot_be_reconciled_are_refused_by_name() -> None:
    half: dict[str, Any] = {"dtype": torch.bfloat16}
    small: dict[str, Any] = {"dtype": torch.float8_e4m3fn}
    pairs = [
        (paged(), paged(dim=16), "axis 'dim' differs: source has 8, destination has 16"),
        (paged(), paged(**half), "dtype differs: source has uint8, destination has bfloat16"),
        (paged(planes=1), paged(), r"planes of layer 0 differs: source has \['latent'\]"),
        (paged(), paged(layers=(5,)), "no layer is held by both"),
        (paged(), paged(heads=(2, 4)), "no head in common"),
        (paged(), paged(codec="x"), "codec differs: source has plain, destination has x"),
        (paged(), paged(kind="swa", window=8), "group kind differs"),
        (
            paged(kind="swa", window=4),
            paged(kind="swa", window=8),
            "window differs: source has 4, destination has 8",
        ),
        (
            paged(**half),
            paged(**small),
            "scales of plane 'k' of layer 0 are missing at the destination: dtype is bfloat16 at "
            "the source and float8_e4m3fn at the destination",
        ),
        (
            paged(**small, scales={"k": 0.5, "v": 1.0}),
            paged(**small, scales={"k": 0.25, "v": 1.0}),
            r"scales of plane 'k' of layer 0 differ: source has \(0.5,\), destination has \(0.25,\)",
        ),
        (
            paged(model_heads=8),
            paged(model_heads=4),
            "number of KV heads of the model differs: source has 8, destination has 4",
        ),
        (
            paged(codec="vec", opaque=("token",)),
            paged(codec="vec", opaque=("token",), tokens=8),
            "axis 'token' is opaque in codec 'vec', so the block size cannot change from 4 to 8",
        ),
        (
            paged(codec="vec", opaque=("head",)),
            paged(codec="vec", opaque=("head",), heads=(0, 1)),
            "axis 'head' is opaque in codec 'vec'",
        ),
    ]
    for ours, theirs, says in pairs:
        with pytest.raises(LayoutError, match=says):
            TokenPlan(ours, theirs)


def test_a_window_larger_than_its_blocks_is_refused() -> None:
    with pytest.raises(
        LayoutError, match="a window of 33 tokens is larger than the group's blocks"
    ):
        paged(kind="swa", window=33)


def test_opaque_tokens_move_by_whole_blocks_and_heads_still_split() -> None:
    shape: dict[str, Any] = {"layers": (0,), "dim": 8, "num_blocks": 6, "tokens": 4}
    codec: dict[str, Any] = {"codec": "vec", "opaque": ("token", "dim"), "stacked": False}
    order = ("block", "head", "plane", "token", "dim")
    src = PagedPool.make(order, heads=(0, 4), seed=1, **shape, **codec)
    dst = PagedPool.make(order, heads=(2, 4), **shape, **codec)
    plan = TokenPlan(src.layout, dst.layout)
    tables = ([4, 0, 3], [1, 5, 2])
    expected = expect_tokens(src, dst, *tables, 4, 12)  # the whole last block
    assert move(plan, src, dst, tables, (4, 10)) == plan.nbytes(4, 10)
    assert dst.equals(expected)
    with pytest.raises(PlanError, match="token 5 is inside a block of 4 tokens"):
        plan.pieces([tables[0]], [tables[1]], 5, 10)
