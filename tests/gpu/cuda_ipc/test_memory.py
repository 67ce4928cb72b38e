"""GPU memory of the engine's own: work that another stream still has to do must not reach into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory.cuda_driver import driver
from kvferry.engine.transfer_engine import TransferEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gpu

ROUNDS = 25
NUM_IDS = (400, 1000, 2000, 4000)  # each the first that needs scratch of its size
SLEEP_CYCLES = 200_000_000  # 0.1 s: what is enqueued behind it is pending while a transfer is begun
NUM_BLOCKS = 4096
DIMS = "layer plane block dim"


@pytest.fixture
def engines() -> Iterator[tuple[TransferEngine, TransferEngine]]:
    with TransferEngine(name="one") as one, TransferEngine(name="other") as other:
        yield one, other


def leave_work_behind(nbytes: int) -> None:
    """Gives torch's allocator memory back that the current stream is still going to clear."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # Scratch is taken several at once: whatever number that is, memory of its size is there.
    freed = [
        torch.empty(nbytes * many, dtype=torch.uint8, device="cuda") for many in (8, 16, 32, 64)
    ]
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    for tensor in freed:
        tensor.zero_()


def test_ids_are_safe_from_work_that_is_pending_on_the_callers_stream(
    engines: tuple[TransferEngine, TransferEngine],
) -> None:
    """Zeros in the place of ids are valid ids: block 0 would be moved, and all bytes counted."""
    one, other = engines
    src = torch.arange(NUM_BLOCKS, dtype=torch.int32, device="cuda").view(1, 1, -1, 1)
    src = src.expand(2, 2, NUM_BLOCKS, 64).contiguous()
    dst = torch.empty_like(src)
    here = one.register_cache(KVLayout.from_tensors(src, DIMS), src)
    there = other.register_cache(KVLayout.from_tensors(dst, DIMS), dst)
    plan = one.plan(here, there.descriptor)
    wrong = []
    for number in range(ROUNDS):
        link = one.connect(other.address, transport="cuda_ipc")  # a lane, and scratch, of its own
        link.prepare(plan)
        for count in NUM_IDS:
            ids = (torch.randperm(NUM_BLOCKS - 1)[:count] + 1).tolist()
            dst.fill_(-1)
            leave_work_behind(8 * (1 << (2 * count - 1).bit_length()))
            link.write_blocks(plan, ids, ids).wait(60)
            torch.cuda.synchronize()
            expected = torch.full_like(dst, -1)
            expected[:, :, ids] = src[:, :, ids]
            if not torch.equal(dst, expected):
                wrong.append((number, count))
        link.close()
    assert not wrong


def test_cleared_memory_is_clear_when_it_is_handed_out() -> None:
    """Counters: what a peer adds to them must not be cleared behind work of the default stream."""
    cuda = driver()
    stream = cuda.new_stream(0)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    address = cuda.allocate(0, 4096)
    cuda.write_value(0, stream, address, 7)
    cuda.destroy_stream(0, stream)
    torch.cuda.synchronize()
    assert cuda.read_word(0, address) == 7
    held = torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    default = torch.cuda.default_stream().cuda_stream
    cuda.wait_value(0, default, held.data_ptr(), 1)
    assert cuda.read_word(0, address) == 7  # whatever the default stream waits for
    release = cuda.new_stream(0)
    cuda.write_value(0, release, held.data_ptr(), 1)
    torch.cuda.synchronize()
    cuda.destroy_stream(0, release)
    cuda.free(0, address)
