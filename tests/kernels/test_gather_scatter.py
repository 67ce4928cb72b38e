"""Gather and scatter against their references, in every way they run, for every shape of cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kvferry.kernels.errors import BlockIdError, ShapeError
from kvferry.kernels.gather import gather, gather_reference
from kvferry.kernels.paged import PagedCache
from kvferry.kernels.scatter import scatter, scatter_reference
from kvferry.kernels.tiles import Tuning
from tests.kernels.conftest import Case, Pool, as_bytes, need_cuda, padded_staging, sentinels_intact

if TYPE_CHECKING:
    from collections.abc import Callable

SOME_IDS = [(0, torch.int64), (1, torch.int32), (3, torch.int64), (3, torch.int32)]
TINY = Tuning(tile_nbytes=512, num_warps=1)


def ids_of(num_ids: int, case: Case, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Different blocks in no order; again from the front where a gather wants more than there are."""
    generator = torch.Generator().manual_seed(num_ids)
    order = torch.randperm(case.num_blocks, generator=generator)
    return order.repeat(-(-num_ids // case.num_blocks) or 1)[:num_ids].to(device, dtype)


@pytest.mark.parametrize(("num_ids", "id_dtype"), SOME_IDS)
def test_gather_equals_its_reference(
    case: Case, device: str, num_ids: int, id_dtype: torch.dtype
) -> None:
    pool = Pool(case, device, seed=1)
    before = pool.clone()
    ids = ids_of(num_ids, case, device, id_dtype)
    raw, staging = padded_staging(pool.cache, num_ids)
    gather(pool.cache, ids, staging)
    assert torch.equal(as_bytes(staging), as_bytes(gather_reference(pool.cache, ids)))
    assert sentinels_intact(raw)
    assert pool.equals(before)


@pytest.mark.parametrize(("num_ids", "id_dtype"), SOME_IDS)
def test_scatter_writes_its_blocks_and_no_other_byte(
    case: Case, device: str, num_ids: int, id_dtype: torch.dtype
) -> None:
    source = Pool(case, device, seed=2)
    pool = Pool(case, device, seed=None)
    expected = pool.clone()
    ids = ids_of(num_ids, case, device, id_dtype)
    staging = gather_reference(source.cache, ids)
    scatter_reference(staging, expected.cache, ids)
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
    raw, staging = padded_staging(pool.cache, num_ids)
    gather(pool.cache, ids, staging, max_programs=max_programs, tuning=TINY)
    assert torch.equal(as_bytes(staging), as_bytes(gather_reference(pool.cache, ids)))
    assert sentinels_intact(raw)
    scatter(staging, other.cache, ids, max_programs=max_programs, tuning=TINY)
    scatter_reference(staging, expected.cache, ids)
    assert other.equals(expected)


def test_two_thousand_blocks(device: str) -> None:
    case = Case("two thousand", "block token dim", (2048, 1, 24), torch.uint8, num_tensors=1)
    pool, other = Pool(case, device, seed=4), Pool(case, device, seed=None)
    expected = other.clone()
    ids = ids_of(2000, case, device, torch.int64)
    raw, staging = padded_staging(pool.cache, 2000)
    gather(pool.cache, ids, staging)
    assert torch.equal(staging, gather_reference(pool.cache, ids))
    assert sentinels_intact(raw)
    scatter(staging, other.cache, ids)
    scatter_reference(staging, expected.cache, ids)
    assert other.equals(expected)


@pytest.mark.parametrize("offset_nbytes", [2, 4, 8, 24, 32])
def test_staging_need_not_be_aligned(device: str, offset_nbytes: int) -> None:
    case = Case("offset", "plane block token dim", (2, 9, 4, 64))
    pool, other = Pool(case, device, seed=5), Pool(case, device, seed=None)
    expected = other.clone()
    ids = ids_of(7, case, device, torch.int64)
    raw, staging = padded_staging(pool.cache, 7, offset_nbytes=offset_nbytes)
    gather(pool.cache, ids, staging)
    assert torch.equal(as_bytes(staging), as_bytes(gather_reference(pool.cache, ids)))
    assert sentinels_intact(raw, offset_nbytes=offset_nbytes)
    scatter(staging, other.cache, ids)
    scatter_reference(staging, expected.cache, ids)
    assert other.equals(expected)


def test_from_one_stride_order_to_the_other(device: str) -> None:
    nhd = Pool(Case("nhd", "plane block token head dim", (2, 9, 4, 3, 8)), device, seed=6)
    hnd = Pool(Case("hnd", "plane block head token dim", (2, 9, 3, 4, 8)), device, seed=None)
    ids = torch.tensor([8, 0, 5], device=device)
    staging = torch.empty(nhd.cache.staging_shape(3), dtype=torch.bfloat16, device=device)
    gather(nhd.cache, ids, staging)
    scatter(staging, hnd.cache, ids)
    for here, there in zip(nhd.owners, hnd.owners, strict=True):
        nhd_blocks = here.view(torch.bfloat16).view(2, 9, 4, 3, 8)[:, ids]
        hnd_blocks = there.view(torch.bfloat16).view(2, 9, 3, 4, 8)[:, ids]
        assert torch.equal(as_bytes(nhd_blocks.transpose(2, 3)), as_bytes(hnd_blocks))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 3), (0, 3)])
def test_some_layers_alone(device: str, start: int, stop: int) -> None:
    case = Case("layers", "plane block token dim", (2, 9, 4, 8))
    source, pool = Pool(case, device, seed=7), Pool(case, device, seed=None)
    ids = torch.tensor([2, 7], device=device)
    part = source.cache.select_layers(start, stop)
    staging = torch.empty(part.staging_shape(2), dtype=torch.bfloat16, device=device)
    gather(part, ids, staging)
    whole = gather_reference(source.cache, ids)
    assert torch.equal(as_bytes(staging), as_bytes(whole[start:stop]))
    before = pool.clone()
    scatter(staging, pool.cache.select_layers(start, stop), ids)
    for layer in range(3):
        assert torch.equal(pool.owners[layer], before.owners[layer]) != (start <= layer < stop)


def test_offsets_beyond_2_to_the_31(
    device: str, sparse_bytes: Callable[[int], torch.Tensor]
) -> None:
    stride = (3 << 30) + 1  # bytes, and words of one byte: nothing larger divides it
    if device == "cuda":
        flat = torch.empty(2 * stride + 64, dtype=torch.uint8, device=device)
    else:
        flat = sparse_bytes(2 * stride + 64)
    blocks = flat.as_strided((3, 5), (stride, 1))
    blocks.copy_(torch.arange(15, dtype=torch.uint8).view(3, 5))
    around = torch.tensor([stride + 5, 2 * stride - 1, 2 * stride + 5], device=device)
    flat[around] = 0x5A
    cache = PagedCache.from_tensors([blocks], "block dim")
    staging = torch.empty(cache.staging_shape(2), dtype=torch.uint8, device=device)
    gather(cache, torch.tensor([2, 1], device=device), staging)
    assert staging.flatten().tolist() == [10, 11, 12, 13, 14, 5, 6, 7, 8, 9]
    scatter(staging, cache, torch.tensor([1, 2], device=device))
    assert blocks.tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [5, 6, 7, 8, 9]]
    assert flat[around].tolist() == [0x5A] * 3


@pytest.mark.gpu
def test_a_graph_holds_both() -> None:
    need_cuda()
    case = Case("graph", "plane block token head dim", (2, 64, 16, 4, 64))
    source, pool = Pool(case, "cuda", seed=8), Pool(case, "cuda", seed=None)
    expected = pool.clone()
    ids = torch.arange(32, device="cuda")
    staging = torch.empty(source.cache.staging_shape(32), dtype=torch.bfloat16, device="cuda")
    gather(source.cache, ids, staging)  # compiles, which a capture must not
    scatter(staging, Pool(case, "cuda", seed=None).cache, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather(source.cache, ids, staging)
        scatter(staging, pool.cache, ids)
    for order in (torch.randperm(64), torch.arange(64).flip(0)):
        ids.copy_(order[:32])
        graph.replay()
        scatter_reference(gather_reference(source.cache, ids), expected.cache, ids)
        assert pool.equals(expected)


class TestWhatTheWrappersRefuse:
    """Each by the name of what is wrong, before anything is launched."""

    @pytest.fixture
    def pool(self) -> Pool:
        return Pool(Case("small", "plane block token head dim", (2, 9, 4, 3, 8)), "cpu", seed=9)

    @pytest.mark.parametrize(
        ("ids", "position", "block_id"),
        [([0, 9], 1, 9), ([-1], 0, -1), ([1, 2, 1 << 40], 2, 1 << 40)],
    )
    def test_ids_out_of_range(
        self, pool: Pool, ids: list[int], position: int, block_id: int
    ) -> None:
        staging = torch.zeros(pool.cache.staging_shape(len(ids)), dtype=torch.bfloat16)
        words = rf"ids\[{position}\] is {block_id}, outside the 9 blocks"
        with pytest.raises(BlockIdError, match=words) as caught:
            gather(pool.cache, torch.tensor(ids), staging)
        assert (caught.value.position, caught.value.block_id) == (position, block_id)
        before = pool.clone()
        with pytest.raises(BlockIdError, match=words):
            scatter(staging, pool.cache, torch.tensor(ids))
        assert pool.equals(before)

    @pytest.mark.parametrize(
        ("axis", "name"), list(enumerate(["layer", "plane", "block", "token", "head", "dim"]))
    )
    def test_staging_of_another_shape(self, pool: Pool, axis: int, name: str) -> None:
        shape = list(pool.cache.staging_shape(2))
        shape[axis] += 1
        staging = torch.empty(shape, dtype=torch.bfloat16)
        with pytest.raises(ShapeError, match=rf"staging dim '{name}' is {shape[axis]}"):
            gather(pool.cache, torch.tensor([1, 2]), staging)
        with pytest.raises(ShapeError, match=rf"staging dim '{name}' is {shape[axis]}"):
            scatter(staging, pool.cache, torch.tensor([1, 2]))

    def test_staging_of_another_kind(self, pool: Pool) -> None:
        shape = pool.cache.staging_shape(2)
        ids = torch.tensor([1, 2])
        with pytest.raises(ShapeError, match=r"staging is torch\.float16"):
            gather(pool.cache, ids, torch.empty(shape, dtype=torch.float16))
        with pytest.raises(ShapeError, match="staging must be contiguous"):
            gather(pool.cache, ids, torch.empty((*shape[:5], 16), dtype=torch.bfloat16)[..., :8])
        with pytest.raises(ShapeError, match="not 1 dims"):
            gather(pool.cache, ids, torch.empty(8, dtype=torch.bfloat16))

    @pytest.mark.parametrize(
        "ids",
        [torch.tensor([1.0]), torch.tensor([[1]]), torch.arange(8)[::2], torch.tensor([True])],
        ids=["float", "two-dimensional", "strided", "bool"],
    )
    def test_ids_of_another_kind(self, pool: Pool, ids: torch.Tensor) -> None:
        staging = torch.empty(pool.cache.staging_shape(ids.numel()), dtype=torch.bfloat16)
        with pytest.raises(ShapeError, match="ids must be contiguous int32 or int64"):
            gather(pool.cache, ids, staging)

    def test_a_flag_of_another_kind(self, pool: Pool) -> None:
        staging = torch.empty(pool.cache.staging_shape(1), dtype=torch.bfloat16)
        with pytest.raises(ShapeError, match=r"bad_ids must be int32 \[1\]"):
            gather(
                pool.cache, torch.tensor([1]), staging, bad_ids=torch.zeros(1, dtype=torch.int64)
            )
