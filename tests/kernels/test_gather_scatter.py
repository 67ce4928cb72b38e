"""Gather and scatter against their references, in every way they run, for every shape of cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.kernels.tiles import Tuning
from kvferry.tools.bench.kernels.operations import (
    Side,
    copy_blocks,
    gather_reference,
    scatter_reference,
)
from tests.kernels.conftest import (
    Case,
    Pool,
    as_bytes,
    cache_of,
    need_cuda,
    padded_staging,
    sentinels_intact,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.kernels.paged import PagedCache

SOME_IDS = [(0, torch.int64), (1, torch.int32), (3, torch.int64), (3, torch.int32)]
TINY = Tuning(tile_nbytes=512, num_warps=1)


def gather(cache: PagedCache, ids: torch.Tensor, staging: torch.Tensor, **options: Any) -> None:
    copy_blocks(Side(cache, ids), Side(staging, None), len(ids), **options)


def scatter(staging: torch.Tensor, cache: PagedCache, ids: torch.Tensor, **options: Any) -> None:
    copy_blocks(Side(staging, None), Side(cache, ids), len(ids), **options)


def ids_of(num_ids: int, case: Case, kernel_device: str, dtype: torch.dtype) -> torch.Tensor:
    """Different blocks in no order; again from the front where a gather wants more than there are."""
    generator = torch.Generator().manual_seed(num_ids)
    order = torch.randperm(case.num_blocks, generator=generator)
    return order.repeat(-(-num_ids // case.num_blocks) or 1)[:num_ids].to(kernel_device, dtype)


@pytest.mark.parametrize(("num_ids", "id_dtype"), SOME_IDS)
def test_gather_equals_its_reference(
    case: Case, kernel_device: str, num_ids: int, id_dtype: torch.dtype
) -> None:
    pool = Pool(case, kernel_device, seed=1)
    before = pool.clone()
    ids = ids_of(num_ids, case, kernel_device, id_dtype)
    raw, staging = padded_staging(pool, num_ids)
    gather(pool.cache, ids, staging)
    assert torch.equal(as_bytes(staging), as_bytes(gather_reference(pool.entries, ids)))
    assert sentinels_intact(raw)
    assert pool.equals(before)


@pytest.mark.parametrize(("num_ids", "id_dtype"), SOME_IDS)
def test_scatter_writes_its_blocks_and_no_other_byte(
    case: Case, kernel_device: str, num_ids: int, id_dtype: torch.dtype
) -> None:
    source = Pool(case, kernel_device, seed=2)
    pool = Pool(case, kernel_device, seed=None)
    expected = pool.clone()
    ids = ids_of(num_ids, case, kernel_device, id_dtype)
    staging = gather_reference(source.entries, ids)
    scatter_reference(staging, expected.entries, ids)
    scatter(staging, pool.cache, ids)
    assert pool.equals(expected)


@pytest.mark.parametrize(
    ("num_ids", "max_programs"), [(63, None), (100, None), (63, 1), (63, 3), (63, 1000)]
)
def test_many_tiles_and_any_number_of_programs(
    kernel_device: str, num_ids: int, max_programs: int | None
) -> None:
    case = Case("many", "plane block token head dim", (2, 128, 3, 1, 12), num_tensors=2)
    pool, other = Pool(case, kernel_device, seed=3), Pool(case, kernel_device, seed=None)
    expected = other.clone()
    ids = ids_of(num_ids, case, kernel_device, torch.int32)
    raw, staging = padded_staging(pool, num_ids)
    gather(pool.cache, ids, staging, max_programs=max_programs, tuning=TINY)
    assert torch.equal(as_bytes(staging), as_bytes(gather_reference(pool.entries, ids)))
    assert sentinels_intact(raw)
    scatter(staging, other.cache, ids, max_programs=max_programs, tuning=TINY)
    scatter_reference(staging, expected.entries, ids)
    assert other.equals(expected)


def test_two_thousand_blocks(kernel_device: str) -> None:
    case = Case("two thousand", "block token dim", (2048, 1, 24), torch.uint8, num_tensors=1)
    pool, other = Pool(case, kernel_device, seed=4), Pool(case, kernel_device, seed=None)
    expected = other.clone()
    ids = ids_of(2000, case, kernel_device, torch.int64)
    raw, staging = padded_staging(pool, 2000)
    gather(pool.cache, ids, staging)
    assert torch.equal(staging, gather_reference(pool.entries, ids))
    assert sentinels_intact(raw)
    scatter(staging, other.cache, ids)
    scatter_reference(staging, expected.entries, ids)
    assert other.equals(expected)


@pytest.mark.parametrize("offset_nbytes", [2, 4, 8, 24, 32])
def test_staging_need_not_be_aligned(kernel_device: str, offset_nbytes: int) -> None:
    case = Case("offset", "plane block token dim", (2, 9, 4, 64))
    pool, other = Pool(case, kernel_device, seed=5), Pool(case, kernel_device, seed=None)
    expected = other.clone()
    ids = ids_of(7, case, kernel_device, torch.int64)
    raw, staging = padded_staging(pool, 7, offset_nbytes=offset_nbytes)
    gather(pool.cache, ids, staging)
    assert torch.equal(as_bytes(staging), as_bytes(gather_reference(pool.entries, ids)))
    assert sentinels_intact(raw, offset_nbytes=offset_nbytes)
    scatter(staging, other.cache, ids)
    scatter_reference(staging, expected.entries, ids)
    assert other.equals(expected)


def test_from_one_stride_order_to_the_other(kernel_device: str) -> None:
    nhd = Pool(Case("nhd", "plane block token head dim", (2, 9, 4, 3, 8)), kernel_device, seed=6)
    hnd = Pool(Case("hnd", "plane block head token dim", (2, 9, 3, 4, 8)), kernel_device, seed=None)
    ids = torch.tensor([8, 0, 5], device=kernel_device)
    staging = torch.empty((6, 3, 4, 3, 8), dtype=torch.bfloat16, device=kernel_device)
    gather(nhd.cache, ids, staging)
    scatter(staging, hnd.cache, ids)
    for here, there in zip(nhd.owners, hnd.owners, strict=True):
        nhd_blocks = here.view(torch.bfloat16).view(2, 9, 4, 3, 8)[:, ids]
        hnd_blocks = there.view(torch.bfloat16).view(2, 9, 3, 4, 8)[:, ids]
        assert torch.equal(as_bytes(nhd_blocks.transpose(2, 3)), as_bytes(hnd_blocks))


def test_offsets_beyond_2_to_the_31(
    kernel_device: str, sparse_bytes: Callable[[int], torch.Tensor]
) -> None:
    stride = (3 << 30) + 1  # bytes, and words of one byte: nothing larger divides it
    if kernel_device == "cuda":
        flat = torch.empty(2 * stride + 64, dtype=torch.uint8, device=kernel_device)
    else:
        flat = sparse_bytes(2 * stride + 64)
    blocks = flat.as_strided((3, 5), (stride, 1))
    blocks.copy_(torch.arange(15, dtype=torch.uint8).view(3, 5))
    around = torch.tensor([stride + 5, 2 * stride - 1, 2 * stride + 5], device=kernel_device)
    flat[around] = 0x5A
    cache = cache_of([blocks[:, None, None]])
    staging = torch.empty(2 * 5, dtype=torch.uint8, device=kernel_device)
    gather(cache, torch.tensor([2, 1], device=kernel_device), staging)
    assert staging.tolist() == [10, 11, 12, 13, 14, 5, 6, 7, 8, 9]
    scatter(staging, cache, torch.tensor([1, 2], device=kernel_device))
    assert blocks.tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [5, 6, 7, 8, 9]]
    assert flat[around].tolist() == [0x5A] * 3


@pytest.mark.gpu
def test_a_graph_holds_both() -> None:
    need_cuda()
    case = Case("graph", "plane block token head dim", (2, 64, 16, 4, 64))
    source, pool = Pool(case, "cuda", seed=8), Pool(case, "cuda", seed=None)
    expected = pool.clone()
    ids = torch.arange(32, device="cuda")
    staging = padded_staging(source, 32)[1]
    gather(source.cache, ids, staging)  # compiles, which a capture must not
    scatter(staging, Pool(case, "cuda", seed=None).cache, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather(source.cache, ids, staging)
        scatter(staging, pool.cache, ids)
    for order in (torch.randperm(64), torch.arange(64).flip(0)):
        ids.copy_(order[:32])
        graph.replay()
        scatter_reference(gather_reference(source.entries, ids), expected.entries, ids)
        assert pool.equals(expected)
