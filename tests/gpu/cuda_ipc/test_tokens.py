"""Tokens between GPU caches of any block size, order, heads and type, in two processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.errors import BlockOutOfRange, DeviceError, PlanError
from kvferry.engine.layout.dtypes import QUANTISED
from kvferry.kernels.cast import cast_reference
from tests.support.caches import PagedPool, expect_tokens

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
BLOCKS_FIRST = ("block", "layer", "plane", "token", "head", "dim")
SHAPE: dict[str, Any] = {"layers": (0, 1, 2), "num_blocks": 20}
CASES: list[Any] = [
    (NHD, 16, (0, 4), HND, 64, (0, 4), 64),
    (HND, 64, (0, 4), NHD, 16, (2, 4), 64),
    (NHD, 32, (1, 2), HND, 48, (0, 4), 128),
    (HND, 6, (0, 4), BLOCKS_FIRST, 9, (1, 4), 7),
    (BLOCKS_FIRST, 16, (0, 4), BLOCKS_FIRST, 16, (0, 4), 64),
]


def shuffled(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).permutation(20)


def moved(
    engine: TransferEngine,
    link: Link,
    peer: GpuPeer,
    src: PagedPool,
    dst: PagedPool,
    span: tuple[int, int],
    *,
    write: bool,
    on_gpu: bool = False,
) -> list[np.ndarray[Any, Any]]:
    """Moves tokens of a request with shuffled blocks; returns the destination's bytes."""
    mine, theirs = (src, dst) if write else (dst, src)
    tensors = [torch.from_numpy(array).cuda() for array in mine.arrays()]
    local = engine.register_cache(mine.layout, tensors)
    remote = peer.call("cache_of", theirs.arrays(), theirs.layout)
    tables: list[Any] = [shuffled(1), shuffled(2)]
    if on_gpu:
        tables = [torch.from_numpy(table).cuda() for table in tables]
    start, stop = span
    plan = engine.plan(local, remote) if write else engine.plan(remote, local)
    nbytes = plan.tokens.nbytes(start, stop)
    if write:
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=nbytes)
        sent = link.write_tokens(plan, *tables, start=start, stop=stop, imm=imm)
        assert sent.wait(60) == nbytes
        assert peer.call("wait", ticket) == nbytes
        got: list[np.ndarray[Any, Any]] = peer.call("peek_cache")
        return got
    assert link.read_tokens(plan, *tables, start=start, stop=stop).wait(60) == nbytes
    return [tensor.cpu().numpy() for tensor in tensors]


def check(got: list[np.ndarray[Any, Any]], truth: PagedPool) -> None:
    for mine, theirs in zip(got, truth.arrays(), strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_tokens_move_between_blocks_of_any_size(
    engine: TransferEngine, link: Link, peer: GpuPeer, case: Any, write: bool
) -> None:
    src_order, src_tokens, src_heads, dst_order, dst_tokens, dst_heads, dim = case
    src, dst = (
        PagedPool.make(
            order, tokens=tokens, heads=heads, dim=dim, stacked="layer" in order, seed=seed, **SHAPE
        )
        for order, tokens, heads, seed in (
            (src_order, src_tokens, src_heads, 5),
            (dst_order, dst_tokens, dst_heads, None),
        )
    )
    span = (5, 17 * min(src_tokens, dst_tokens) + 3)
    truth = expect_tokens(src, dst, shuffled(1).tolist(), shuffled(2).tolist(), *span)
    check(moved(engine, link, peer, src, dst, span, write=write, on_gpu=write), truth)


@pytest.mark.parametrize(
    "dtypes",
    [("bfloat16", "float8_e4m3fn"), ("float8_e4m3fn", "bfloat16"), ("float16", "int8")],
    ids=" to ".join,
)
def test_numbers_change_their_type_as_torch_casts_them(
    engine: TransferEngine, link: Link, peer: GpuPeer, dtypes: tuple[str, str]
) -> None:
    scales = [
        np.random.default_rng(side).uniform(0.02, 0.2, (2, 3, 4)).astype(np.float32)
        if dtype in QUANTISED
        else np.ones((2, 3, 4), np.float32)
        for side, dtype in enumerate(dtypes)
    ]
    src, dst = (
        PagedPool.make(
            order,
            tokens=tokens,
            heads=(0, 4),
            dim=64,
            stacked=False,
            dtype=getattr(torch, dtype),
            seed=seed,
            scales={"k": values[0], "v": values[1]} if dtype in QUANTISED else None,
            **SHAPE,
        )
        for order, tokens, dtype, seed, values in (
            (NHD, 16, dtypes[0], 3, scales[0]),
            (HND, 64, dtypes[1], None, scales[1]),
        )
    )

    def cast(numbers: torch.Tensor, layer: int) -> torch.Tensor:
        factor = torch.from_numpy(scales[0][:, layer] / scales[1][:, layer])[:, :, None]
        return cast_reference(numbers, factor, getattr(torch, dtypes[1]))

    span = (5, 300)
    truth = expect_tokens(src, dst, shuffled(1).tolist(), shuffled(2).tolist(), *span, cast=cast)
    check(moved(engine, link, peer, src, dst, span, write=True), truth)


def two_pools(
    engine: TransferEngine, peer: GpuPeer
) -> tuple[PagedPool, PagedPool, list[torch.Tensor], Any]:
    """Blocks of 16 here, of 64 there; both sides, this one's tensors, and a plan for writing."""
    src, dst = (
        PagedPool.make(
            order, tokens=tokens, heads=(0, 4), dim=64, stacked=False, seed=seed, **SHAPE
        )
        for order, tokens, seed in ((NHD, 16, 5), (HND, 64, None))
    )
    tensors = [torch.from_numpy(array).cuda() for array in src.arrays()]
    local = engine.register_cache(src.layout, tensors)
    return src, dst, tensors, engine.plan(local, peer.call("cache_of", dst.arrays(), dst.layout))


def test_tables_on_the_gpu_that_are_bad_harm_nothing(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    src, dst, _, plan = two_pools(engine, peer)
    tables = [torch.from_numpy(shuffled(seed)).cuda() for seed in (1, 2)]
    for side, bad in ((0, 20), (1, 20), (0, -1), (1, -(1 << 40)), (1, 1 << 40)):
        wrong = [table.clone() for table in tables]
        wrong[side][1] = bad
        with pytest.raises(BlockOutOfRange):
            link.write_tokens(plan, *wrong, start=5, stop=130).wait(60)
    with pytest.raises(DeviceError, match="dst_table has 1 blocks"):
        link.write_tokens(plan, tables[0], tables[1][:1], start=5, stop=130).wait(60)
    with pytest.raises(PlanError, match="must all be there"):
        link.write_tokens(plan, tables[0], shuffled(2), start=5, stop=130)
    # What was right about them has moved, and the link is as well as before.
    span = (5, 130)
    link.write_tokens(plan, *tables, start=span[0], stop=span[1]).wait(60)
    truth = expect_tokens(src, dst, shuffled(1).tolist(), shuffled(2).tolist(), *span)
    check(peer.call("peek_cache"), truth)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_no_tokens_at_all_are_a_write_too(
    engine: TransferEngine, link: Link, peer: GpuPeer, on_gpu: bool
) -> None:
    _, dst, _, plan = two_pools(engine, peer)
    tables: list[Any] = [shuffled(1), shuffled(2)]
    if on_gpu:
        tables = [torch.from_numpy(table).cuda() for table in tables]
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=0, writes=1)
    assert link.write_tokens(plan, *tables, start=17, stop=17, imm=imm).wait(60) == 0
    assert peer.call("wait", ticket) == 0
    check(peer.call("peek_cache"), dst)
