"""How a launch is cut up: what merges, how wide the accesses are, and that blocks are covered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.kernels.paged import Geometry
from kvferry.kernels.tiles import LARGE, SMALL, Strides, Tuning, plan_tiles

TILE_16K = Tuning(16 << 10, 8)


def nhd(tokens: int, heads: int, dim_nbytes: int, *, alignment_nbytes: int = 16) -> Geometry:
    """A plain cache of 10 blocks."""
    head, token = dim_nbytes, heads * dim_nbytes
    return Geometry(10, tokens, heads, dim_nbytes, tokens * token, token, head, alignment_nbytes)


def hnd(tokens: int, heads: int, dim_nbytes: int) -> Geometry:
    """The same with each head's tokens together."""
    token, head = dim_nbytes, tokens * dim_nbytes
    return Geometry(10, tokens, heads, dim_nbytes, heads * head, token, head, 16)


def test_a_plain_block_is_one_piece() -> None:
    plan = plan_tiles(nhd(16, 8, 256), None, 16, LARGE)
    assert (plan.outer, plan.inner, plan.piece_words) == (1, 1, 16 * 8 * 256 // 8)
    assert plan.src == Strides(2048, 0, 0)
    assert plan.dst.block == 2048


def test_a_block_merges_only_as_far_as_both_sides_do() -> None:
    assert plan_tiles(nhd(16, 8, 256), nhd(16, 8, 256), 16, LARGE).piece_words == 4096
    mixed = plan_tiles(nhd(16, 8, 256), hnd(16, 8, 256), 16, LARGE)
    assert (mixed.outer, mixed.inner, mixed.piece_words) == (16, 8, 32)
    sliced = nhd(16, 4, 256)._replace(block_stride_nbytes=32768, outer_stride_nbytes=2048)
    half = plan_tiles(sliced, nhd(16, 4, 256), 16, LARGE)
    assert (half.outer, half.inner, half.piece_words) == (16, 1, 128)
    assert half.src == Strides(2048, 128, 0)
    assert half.dst == Strides(1024, 64, 0)


def test_one_head_merges_whatever_its_stride() -> None:
    one = nhd(16, 1, 256)._replace(inner_stride_nbytes=999)
    assert plan_tiles(one, None, 16, LARGE).piece_words == 16 * 256 // 8


@pytest.mark.parametrize(
    ("src", "alignment_nbytes", "unit_nbytes", "word_nbytes"),
    [
        (nhd(16, 8, 256), 16, 16, 8),
        (nhd(16, 8, 256), 8, 8, 8),
        (nhd(16, 8, 256), 2, 2, 2),
        (nhd(16, 8, 256, alignment_nbytes=4), 16, 4, 4),
        (nhd(3, 1, 126), 16, 2, 2),
        (nhd(3, 1, 63), 16, 1, 1),
        (nhd(16, 8, 256)._replace(block_stride_nbytes=32776), 16, 8, 8),
    ],
)
def test_accesses_are_as_wide_as_everything_allows(
    src: Geometry, alignment_nbytes: int, unit_nbytes: int, word_nbytes: int
) -> None:
    plan = plan_tiles(src, None, alignment_nbytes, LARGE)
    assert (plan.unit_nbytes, plan.word_nbytes) == (unit_nbytes, word_nbytes)


def test_short_pieces_share_a_tile_and_long_ones_spread() -> None:
    short = plan_tiles(nhd(1, 1, 1024), None, 16, TILE_16K)
    assert (short.words, short.chunks, short.piece_chunks) == (128, 16, 1)
    long = plan_tiles(nhd(16, 16, 256), None, 16, TILE_16K)
    assert (long.words, long.chunks, long.piece_chunks) == (2048, 1, 4)
    assert plan_tiles(nhd(1, 1, 1152), None, 16, TILE_16K).words == 32  # of 144: 160 lanes, not 256


@settings(derandomize=True, database=None, deadline=None)
@given(
    tokens=st.integers(1, 64),
    heads=st.integers(1, 16),
    dim_nbytes=st.integers(1, 600),
    alignment_nbytes=st.sampled_from([1, 2, 4, 8, 16]),
    tuning=st.sampled_from([SMALL, TILE_16K, Tuning(512, 1)]),
)
def test_pieces_and_chunks_cover_a_block(
    tokens: int, heads: int, dim_nbytes: int, alignment_nbytes: int, tuning: Tuning
) -> None:
    src = nhd(tokens, heads, dim_nbytes)
    plan = plan_tiles(src, hnd(tokens, heads, dim_nbytes), alignment_nbytes, tuning)
    piece_nbytes = plan.piece_words * plan.word_nbytes
    assert plan.outer * plan.inner * piece_nbytes == src.block_entry_nbytes
    assert (plan.piece_chunks - 1) * plan.words < plan.piece_words <= plan.piece_chunks * plan.words
    assert plan.block_chunks == plan.outer * plan.inner * plan.piece_chunks
    for power in (plan.words, plan.chunks):
        assert power & (power - 1) == 0
    assert plan.words * plan.chunks >= tuning.num_warps * 32
