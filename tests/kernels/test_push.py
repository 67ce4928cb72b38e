"""A push, which the other way round is a pull: its reference, its counter, and ids that point outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from kvferry.kernels.signal import Signal
from kvferry.kernels.tiles import Tuning
from kvferry.tools.bench.kernels.operations import Side, copy_blocks, push_reference
from tests.kernels.conftest import Case, Pool, need_cuda

if TYPE_CHECKING:
    from kvferry.kernels.paged import PagedCache

TINY = Tuning(tile_nbytes=512, num_warps=1)
SMALL_CASE = Case("small", "plane block token head dim", (2, 9, 4, 3, 8), num_tensors=2)


def push(
    src: PagedCache, src_ids: torch.Tensor, dst: PagedCache, dst_ids: torch.Tensor, **options: Any
) -> None:
    copy_blocks(Side(src, src_ids), Side(dst, dst_ids), len(src_ids), **options)


class Counter(NamedTuple):
    """A receiver's counter with a sentinel on both sides."""

    words: torch.Tensor
    signal: Signal

    @classmethod
    def on(cls, device: str) -> Counter:
        words = torch.tensor([-7, 1000, -7], device=device)
        state = torch.zeros(2, dtype=torch.int32, device=device)
        return cls(words, Signal(state, words[1:].data_ptr()))

    def counted(self) -> int:
        before, count, after = self.words.tolist()
        assert (before, after) == (-7, -7)
        return int(count) - 1000


@pytest.mark.parametrize("num_ids", [0, 1, 4])
def test_equals_its_reference(case: Case, kernel_device: str, num_ids: int) -> None:
    source, pool = Pool(case, kernel_device, seed=1), Pool(case, kernel_device, seed=None)
    before, expected = source.clone(), pool.clone()
    src_ids = torch.tensor([4, 0, 3, 1], device=kernel_device)[:num_ids]
    dst_ids = torch.tensor([2, 4, 1, 0], device=kernel_device, dtype=torch.int32)[:num_ids]
    push(source.cache, src_ids, pool.cache, dst_ids)
    push_reference(source.entries, src_ids, expected.entries, dst_ids)
    assert pool.equals(expected)
    assert source.equals(before)


def test_strides_of_the_two_ends_may_differ(kernel_device: str) -> None:
    source = Pool(SMALL_CASE, kernel_device, seed=2)
    crop = (slice(None), slice(1, 18, 2), slice(None), slice(2, 5), slice(3, 11))
    wide = Case("wide", "plane block token head dim", (2, 18, 4, 6, 12), num_tensors=2, crop=crop)
    pool = Pool(wide, kernel_device, seed=None)
    expected = pool.clone()
    src_ids = torch.tensor([8, 1, 5], device=kernel_device)
    dst_ids = torch.tensor([0, 7, 3], device=kernel_device)
    push(source.cache, src_ids, pool.cache, dst_ids)
    push_reference(source.entries, src_ids, expected.entries, dst_ids)
    assert pool.equals(expected)


@pytest.mark.parametrize("max_programs", [None, 1, 3, 1000])
def test_each_launch_adds_its_bytes_once(kernel_device: str, max_programs: int | None) -> None:
    source, pool = (
        Pool(SMALL_CASE, kernel_device, seed=3),
        Pool(SMALL_CASE, kernel_device, seed=None),
    )
    expected = pool.clone()
    counter = Counter.on(kernel_device)
    src_ids = torch.tensor([8, 1, 5, 2, 0], device=kernel_device)
    dst_ids = torch.tensor([0, 7, 3, 8, 1], device=kernel_device)
    total = 0
    for num_ids in (5, 1, 3):
        push(
            source.cache,
            src_ids[:num_ids],
            pool.cache,
            dst_ids[:num_ids],
            signal=counter.signal,
            max_programs=max_programs,
            tuning=TINY,
        )
        total += source.cache.nbytes(num_ids)
        assert counter.counted() == total
        assert counter.signal.state.tolist() == [0, 0]
    push_reference(source.entries, src_ids, expected.entries, dst_ids)
    assert pool.equals(expected)


@pytest.mark.parametrize("bad", [-1, 9, 1 << 31, -(1 << 40), (1 << 63) - 1])
@pytest.mark.parametrize("side", ["src", "dst"])
def test_a_bad_id_on_the_device_is_skipped_flagged_and_not_counted(
    kernel_device: str, side: str, bad: int
) -> None:
    source, pool = (
        Pool(SMALL_CASE, kernel_device, seed=5),
        Pool(SMALL_CASE, kernel_device, seed=None),
    )
    expected = pool.clone()
    counter = Counter.on(kernel_device)
    src_ids = torch.tensor([8, 1, 5], device=kernel_device)
    dst_ids = torch.tensor([0, 7, 3], device=kernel_device)
    good = torch.tensor([0, 2], device=kernel_device)
    push_reference(source.entries, src_ids[good], expected.entries, dst_ids[good])
    (src_ids if side == "src" else dst_ids)[1] = bad
    copy_blocks(Side(source.cache, src_ids), Side(pool.cache, dst_ids), 3, signal=counter.signal)
    assert pool.equals(expected)
    finished, bad = counter.signal.state.tolist()
    assert finished == 0
    assert bad > 0
    assert counter.counted() == 0


def test_a_bad_id_leaves_zeros_in_staging_and_a_flag(kernel_device: str) -> None:
    source = Pool(SMALL_CASE, kernel_device, seed=6)
    staging = torch.full((4, 3, 4, 3, 8), 3.0, dtype=torch.bfloat16, device=kernel_device)
    flag = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    ids = torch.tensor([0, 9, 2], device=kernel_device)
    copy_blocks(Side(source.cache, ids), Side(staging, None), 3, bad_ids=flag)
    assert flag.tolist() == [1]
    assert not staging[:, 1].any()
    flag.zero_()
    pool = Pool(SMALL_CASE, kernel_device, seed=None)
    expected = pool.clone()
    copy_blocks(Side(staging, None), Side(pool.cache, ids), 3, bad_ids=flag)
    push_reference(source.entries, ids[::2], expected.entries, ids[::2])
    assert flag.tolist() == [1]
    assert pool.equals(expected)


@pytest.mark.gpu
def test_from_one_gpu_to_another() -> None:
    need_cuda()
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 CUDA devices, torch sees {torch.cuda.device_count()}")
    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("needs peer access between CUDA devices 0 and 1")
    case = Case("gpus", "plane block token head dim", (2, 64, 16, 8, 128), num_tensors=4)
    source, pool = Pool(case, "cuda:0", seed=7), Pool(case, "cuda:1", seed=None)
    expected = pool.clone()
    torch.empty(1, device="cuda:0").to("cuda:1")  # enables access of GPU 0 to GPU 1, this way only
    ids = torch.randperm(64)
    src_ids, dst_ids = ids[:32].to("cuda:0"), ids[32:].to("cuda:0")
    counter = Counter.on("cuda:1")
    signal = counter.signal._replace(state=torch.zeros(2, dtype=torch.int32, device="cuda:0"))
    remote = pool.cache._replace(bases=pool.cache.bases.to("cuda:0"))
    push(source.cache, src_ids, remote, dst_ids, signal=signal)
    torch.cuda.synchronize(0)
    for here, there in zip(source.entries, expected.entries, strict=True):
        there[ids[32:].to("cuda:1")] = here[src_ids].to("cuda:1")
    assert pool.equals(expected)
    assert counter.counted() == source.cache.nbytes(32)
