"""Conformance: tokens between caches of any block size, order, heads and type, over every transport.

The truth goes through the logical cache, token by token (`caches.py`); both caches are compared
whole, and the receiver's counter with what the plan says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.errors import PlanError
from kvferry.engine.layout.dtypes import QUANTISED
from kvferry.kernels.cast import cast_reference
from tests.support.caches import PagedPool, expect_tokens

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.descriptors import CacheDescriptor
    from kvferry.engine.memory.regions import RegisteredCache
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.conftest import Peer

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
BLOCKS_FIRST = ("block", "layer", "plane", "token", "head", "dim")
SHAPE: dict[str, Any] = {"layers": (0, 1, 2), "num_blocks": 40, "dim": 16}
CASES = [
    (NHD, 4, (0, 4), HND, 16, (0, 4)),
    (HND, 16, (0, 4), NHD, 4, (0, 4)),
    (HND, 6, (0, 4), NHD, 9, (1, 3)),
    (NHD, 4, (2, 4), BLOCKS_FIRST, 5, (0, 4)),
    (BLOCKS_FIRST, 5, (0, 4), HND, 5, (3, 4)),
]
SPANS = [(0, 36), (7, 31), (3, 4)]


def cross(
    engine: TransferEngine, peer: Peer, src: PagedPool, dst: PagedPool, write: bool
) -> tuple[RegisteredCache, CacheDescriptor]:
    """Registers the source here and the destination at the peer, or the other way round."""
    mine, theirs = (src, dst) if write else (dst, src)
    local = engine.register_cache(mine.layout, mine.arrays())
    remote: CacheDescriptor = peer.call("cache_of", theirs.arrays(), theirs.layout)
    return local, remote


def moved(
    engine: TransferEngine,
    link: Link,
    peer: Peer,
    pools: tuple[PagedPool, PagedPool],
    span: tuple[int, int],
    write: bool,
    expected: PagedPool,
) -> None:
    """Moves tokens of a request with shuffled blocks, and compares everything."""
    src, dst = pools
    tables = shuffled(src, 1), shuffled(dst, 2)
    local, remote = cross(engine, peer, src, dst, write)
    start, stop = span
    if write:
        plan = engine.plan(local, remote)
        imm = peer.call("new_imm")
        nbytes = plan.tokens.nbytes(start, stop)
        ticket = peer.call("expect", imm, nbytes=nbytes, writes=1)
        assert link.write_tokens(plan, *tables, start=start, stop=stop, imm=imm).wait() == nbytes
        assert peer.call("wait", ticket) == nbytes
        got = peer.call("peek_cache")
    else:
        plan = engine.plan(remote, local)
        link.read_tokens(plan, *tables, start=start, stop=stop).wait()
        got = dst.arrays()
    for mine, truth in zip(got, expected.arrays(), strict=True):
        assert np.array_equal(mine, truth)
    local.deregister()


def shuffled(pool: PagedPool, seed: int) -> list[int]:
    count = pool.layout.num_blocks
    ids: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return ids


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("write", [True, False])
def test_tokens_move_between_blocks_of_any_size(
    engine: TransferEngine, link: Link, peer: Peer, write: bool, case: Any, span: tuple[int, int]
) -> None:
    src_order, src_tokens, src_heads, dst_order, dst_tokens, dst_heads = case
    src = PagedPool.make(
        src_order, tokens=src_tokens, heads=src_heads, stacked="layer" in src_order, seed=5, **SHAPE
    )
    dst = PagedPool.make(
        dst_order, tokens=dst_tokens, heads=dst_heads, stacked="layer" in dst_order, **SHAPE
    )
    expected = expect_tokens(src, dst, shuffled(src, 1), shuffled(dst, 2), *span)
    moved(engine, link, peer, (src, dst), span, write, expected)


PAIRS = [
    ("bfloat16", "float8_e4m3fn"),
    ("float8_e4m3fn", "bfloat16"),
    ("float16", "float8_e5m2"),
    ("float32", "int8"),
    ("int8", "float16"),
    ("float32", "bfloat16"),
    ("float8_e4m3fn", "int8"),
]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtypes", PAIRS, ids=" to ".join)
@pytest.mark.parametrize("write", [True, False])
def test_numbers_change_their_type_as_torch_casts_them(
    engine: TransferEngine,
    link: Link,
    peer: Peer,
    write: bool,
    dtypes: tuple[str, str],
    per_head: bool,
) -> None:
    scales = []
    for side, dtype in enumerate(dtypes):
        drawn = np.random.default_rng(side).uniform(0.02, 0.2, (2, 3, 4)).astype(np.float32)
        values = drawn if per_head else drawn[:, :, :1]
        scales.append(values if dtype in QUANTISED else np.ones_like(values))
    src, dst = (
        PagedPool.make(
            order,
            tokens=tokens,
            heads=(0, 4),
            stacked=False,
            dtype=getattr(torch, dtype),
            seed=seed,
            scales={"k": values[0], "v": values[1]} if dtype in QUANTISED else None,
            **SHAPE,
        )
        for order, tokens, dtype, seed, values in (
            (NHD, 4, dtypes[0], 3, scales[0]),
            (HND, 6, dtypes[1], None, scales[1]),
        )
    )

    def cast(numbers: torch.Tensor, layer: int) -> torch.Tensor:
        factor = torch.from_numpy(scales[0][:, layer] / scales[1][:, layer])[:, :, None]
        return cast_reference(numbers, factor, getattr(torch, dtypes[1]))

    expected = expect_tokens(src, dst, shuffled(src, 1), shuffled(dst, 2), 5, 33, cast=cast)
    moved(engine, link, peer, (src, dst), (5, 33), write, expected)


def test_blocks_that_do_not_pair_are_refused_by_their_sizes(
    engine: TransferEngine, link: Link, peer: Peer
) -> None:
    src, dst = (
        PagedPool.make(NHD, tokens=tokens, heads=(0, 1), stacked=False, **SHAPE)
        for tokens in (4, 8)
    )
    local, remote = cross(engine, peer, src, dst, True)
    plan = engine.plan(local, remote)
    with pytest.raises(
        PlanError, match=r"do not pair .*source has 4, destination has 8.*write_tokens"
    ):
        link.write_blocks(plan, [0], [0])
    local.deregister()
