"""Push and pull: against their references, their counter, and ids that point outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from kvferry.kernels.copy import Side, launch_copy
from kvferry.kernels.errors import BlockIdError, ShapeError
from kvferry.kernels.paged import PagedCache
from kvferry.kernels.pull import pull, pull_reference
from kvferry.kernels.push import push, push_reference
from kvferry.kernels.signal import Signal
from kvferry.kernels.tiles import Tuning
from tests.kernels.conftest import Case, Pool, need_cuda

if TYPE_CHECKING:
    from collections.abc import Callable

TINY = Tuning(tile_nbytes=512, num_warps=1)
SMALL_CASE = Case("small", "plane block token head dim", (2, 9, 4, 3, 8), num_tensors=2)


def by_address(cache: PagedCache, device: str | None = None) -> PagedCache:
    """The same cache as a peer that mapped it sees it."""
    return PagedCache.from_addresses(
        cache.bases.tolist(),
        cache.geometry,
        num_layers=cache.num_layers,
        num_planes=cache.num_planes,
        dtype=cache.dtype,
        device=device or cache.device,
        names=cache.names,
    )


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
@pytest.mark.parametrize(
    ("operation", "reference"), [(push, push_reference), (pull, pull_reference)]
)
def test_equals_its_reference(
    case: Case,
    device: str,
    operation: Callable[..., None],
    reference: Callable[..., None],
    num_ids: int,
) -> None:
    source, pool = Pool(case, device, seed=1), Pool(case, device, seed=None)
    before, expected = source.clone(), pool.clone()
    src_ids = torch.tensor([4, 0, 3, 1], device=device)[:num_ids]
    dst_ids = torch.tensor([2, 4, 1, 0], device=device, dtype=torch.int32)[:num_ids]
    if operation is push:
        operation(source.cache, src_ids, pool.cache, dst_ids)
        reference(source.cache, src_ids, expected.cache, dst_ids)
    else:
        operation(pool.cache, dst_ids, source.cache, src_ids)
        reference(expected.cache, dst_ids, source.cache, src_ids)
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
    push(source.cache, src_ids, by_address(pool.cache), dst_ids)
    push_reference(source.cache, src_ids, expected.cache, dst_ids)
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
            by_address(pool.cache),
            dst_ids[:num_ids],
            signal=counter.signal,
            max_programs=max_programs,
            tuning=TINY,
        )
        total += source.cache.nbytes(num_ids)
        assert counter.counted() == total
        assert counter.signal.state.tolist() == [0, 0]
    push_reference(source.cache, src_ids, expected.cache, dst_ids)
    assert pool.equals(expected)


def test_a_pull_tells_the_peer_that_it_has_read(kernel_device: str) -> None:
    source, pool = (
        Pool(SMALL_CASE, kernel_device, seed=4),
        Pool(SMALL_CASE, kernel_device, seed=None),
    )
    expected = pool.clone()
    counter = Counter.on(kernel_device)
    src_ids = torch.tensor([8, 1], device=kernel_device)
    dst_ids = torch.tensor([0, 7], device=kernel_device)
    pull(pool.cache, dst_ids, by_address(source.cache), src_ids, signal=counter.signal)
    pull_reference(expected.cache, dst_ids, source.cache, src_ids)
    assert pool.equals(expected)
    assert counter.counted() == source.cache.nbytes(2)


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
    push_reference(source.cache, src_ids[good], expected.cache, dst_ids[good])
    (src_ids if side == "src" else dst_ids)[1] = bad
    # The wrapper would read ids in host memory; the kernel is on its own with those of a device.
    launch_copy(
        Side(source.cache, src_ids), Side(by_address(pool.cache), dst_ids), 3, signal=counter.signal
    )
    assert pool.equals(expected)
    finished, bad = counter.signal.state.tolist()
    assert finished == 0
    assert bad > 0
    assert counter.counted() == 0


def test_a_bad_id_leaves_zeros_in_staging_and_a_flag(kernel_device: str) -> None:
    source = Pool(SMALL_CASE, kernel_device, seed=6)
    shape = source.cache.staging_shape(3)
    staging = torch.full(shape, 3.0, dtype=torch.bfloat16, device=kernel_device)
    flag = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    ids = torch.tensor([0, 9, 2], device=kernel_device)
    launch_copy(Side(source.cache, ids), Side(staging, None), 3, bad_ids=flag)
    assert flag.tolist() == [1]
    assert not staging[:, :, 1].any()
    flag.zero_()
    pool = Pool(SMALL_CASE, kernel_device, seed=None)
    expected = pool.clone()
    launch_copy(Side(staging, None), Side(pool.cache, ids), 3, bad_ids=flag)
    push_reference(source.cache, ids[::2], expected.cache, ids[::2])
    assert flag.tolist() == [1]
    assert pool.equals(expected)


@pytest.mark.gpu
def test_from_one_gpu_to_another() -> None:
    need_cuda()
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 CUDA devices; torch sees {torch.cuda.device_count()}")
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
    remote = by_address(pool.cache, "cuda:0")
    push(source.cache, src_ids, remote, dst_ids, signal=signal)
    torch.cuda.synchronize(0)
    for here, there in zip(source.cache.tensor_views(), expected.cache.tensor_views(), strict=True):
        there[ids[32:].to("cuda:1")] = here[src_ids].to("cuda:1")
    assert pool.equals(expected)
    assert counter.counted() == source.cache.nbytes(32)


class TestWhatTheWrappersRefuse:
    """Each by the name of what is wrong, before anything is launched."""

    @pytest.fixture
    def pool(self) -> Pool:
        return Pool(SMALL_CASE, "cpu", seed=8)

    @pytest.mark.parametrize(
        ("shape", "num_tensors", "name"),
        [
            ((2, 9, 4, 3, 8), 1, "layer"),
            ((1, 9, 4, 3, 8), 2, "plane"),
            ((2, 9, 5, 3, 8), 2, "token"),
            ((2, 9, 4, 2, 8), 2, "head"),
            ((2, 9, 4, 3, 9), 2, "dim"),
        ],
    )
    def test_caches_of_two_shapes(
        self, pool: Pool, shape: tuple[int, ...], num_tensors: int, name: str
    ) -> None:
        case = Case("other", "plane block token head dim", shape, num_tensors=num_tensors)
        other = Pool(case, "cpu", seed=None)
        ids = torch.tensor([1])
        with pytest.raises(ShapeError, match=rf"dim '{name}' is \d in src and \d in dst"):
            push(pool.cache, ids, other.cache, ids)
        with pytest.raises(ShapeError, match=rf"dim '{name}' is \d in src and \d in dst"):
            pull(pool.cache, ids, other.cache, ids)

    def test_lists_of_two_lengths(self, pool: Pool) -> None:
        with pytest.raises(ShapeError, match="dim 'block' is 2 in src and 1 in dst"):
            push(pool.cache, torch.tensor([1, 2]), pool.cache, torch.tensor([3]))

    def test_ids_out_of_range_name_their_side(self, pool: Pool) -> None:
        ids, bad = torch.tensor([1, 2]), torch.tensor([1, 9])
        with pytest.raises(BlockIdError, match=r"src_ids\[1\] is 9"):
            push(pool.cache, bad, pool.cache, ids)
        with pytest.raises(BlockIdError, match=r"dst_ids\[1\] is 9"):
            pull(pool.cache, bad, pool.cache, ids)

    def test_another_dtype_or_order(self, pool: Pool) -> None:
        ids = torch.tensor([1])
        half = Pool(SMALL_CASE._replace(dtype=torch.float16), "cpu", seed=None)
        with pytest.raises(ShapeError, match=r"src is torch\.bfloat16, dst torch\.float16"):
            push(pool.cache, ids, half.cache, ids)
        turned = Pool(SMALL_CASE._replace(order=("head", "token")), "cpu", seed=None)
        with pytest.raises(ShapeError, match="order"):
            push(pool.cache, ids, turned.cache, ids)

    def test_signals_that_cannot_work(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = torch.tensor([1])
        signal = Counter.on("cpu").signal
        with pytest.raises(ShapeError, match="a signal needs a GPU"):
            push(pool.cache, ids, pool.cache, ids, signal=signal)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        flag = torch.zeros(1, dtype=torch.int32)
        with pytest.raises(ShapeError, match="either bad_ids or a signal"):
            push(pool.cache, ids, pool.cache, ids, signal=signal, bad_ids=flag)
        for wrong, words in (
            (signal._replace(state=torch.zeros(1, dtype=torch.int32)), r"int32 \[2\], not .*\[1\]"),
            (signal._replace(state=torch.zeros(2)), r"not torch\.float32"),
            (signal._replace(counter_address=0), "no multiple of 8"),
            (signal._replace(counter_address=signal.counter_address + 4), "no multiple of 8"),
        ):
            with pytest.raises(ShapeError, match=words):
                push(pool.cache, ids, pool.cache, ids, signal=wrong)
