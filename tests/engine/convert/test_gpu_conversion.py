"""Numbers that a GPU converts for a transport that stages, its kernels in Triton's interpreter.

Links, chunks, staging and the peer are real; the memory is the host's. The interpreter truncates
bf16 and rounds fp8 wrongly, so what becomes such numbers here is exact in them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.engine.convert import conversion
from kvferry.engine.convert.gpu_workspace import GpuWorkspace
from kvferry.engine.convert.workspace import HostWorkspace
from kvferry.engine.errors import DeviceError, EngineError, PlanError
from kvferry.engine.layout.dtypes import QUANTISED, ElementType
from kvferry.kernels.cast import cast_reference
from tests.support.caches import AXES, PagedPool, expect_tokens
from tests.support.interpreted_gpu import InterpretedGpu, convert_as_on_a_gpu
from tests.support.scaled_caches import NUM_BLOCKS, Scaled, expect, fill_exactly

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.conftest import Peer

pytest.importorskip("triton", reason="Triton exists for Linux alone")

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
FP16, FP32 = torch.float16, torch.float32
TABLES = [np.random.default_rng(i).permutation(NUM_BLOCKS).tolist() for i in (1, 2)]
PAIRS = [
    ("bfloat16", "float8_e4m3fn"),
    ("float8_e4m3fn", "bfloat16"),
    ("float32", "int8"),
    ("int8", "float16"),
    ("float8_e5m2", "float32"),
]


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[InterpretedGpu]:
    return convert_as_on_a_gpu(monkeypatch)


def move(
    engine: TransferEngine,
    link: Link,
    peer: Peer,
    sides: tuple[Any, Any],
    span: tuple[int, int],
    write: bool,
) -> list[np.ndarray[Any, Any]]:
    """Moves tokens, compares what is counted, and returns the destination's bytes."""
    src, dst = sides
    mine, theirs = (src, dst) if write else (dst, src)
    local = engine.register_cache(mine.layout, mine.arrays())
    remote = peer.call("cache_of", theirs.arrays(), theirs.layout)
    plan = engine.plan(local, remote) if write else engine.plan(remote, local)
    start, stop = span
    nbytes = plan.tokens.nbytes(start, stop)
    if write:
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=nbytes, writes=None if nbytes else 1)
        assert link.write_tokens(plan, *TABLES, start=start, stop=stop, imm=imm).wait() == nbytes
        assert peer.call("wait", ticket) == nbytes
        got = peer.call("peek_cache")
    else:
        read = link.read_tokens(plan, *TABLES, start=start, stop=stop)
        read.wait()
        got = dst.arrays()
    local.deregister()
    return list(got)


def pools(
    orders: Any, tokens: Any, heads: Any, dim: int, dtypes: tuple[str, str], by_head: bool
) -> tuple[PagedPool, PagedPool, Any]:
    """Two caches of exact numbers, and the cast between them."""
    made, scales = [], []
    for side, dtype in enumerate(dtypes):
        count = 4 if by_head else 1
        drawn = np.exp2(np.random.default_rng(side).integers(-1, 2, (2, 2, count)))
        drawn = (
            drawn.astype(np.float32) if dtype in QUANTISED else np.ones((2, 2, count), np.float32)
        )
        low, high = heads[side] if by_head else (0, 1)
        held = drawn[:, :, low:high]
        made.append(
            PagedPool.make(
                orders[side],
                layers=(0, 1),
                num_blocks=NUM_BLOCKS,
                tokens=tokens[side],
                heads=heads[side],
                dim=dim,
                stacked="layer" in orders[side],
                dtype=getattr(torch, dtype),
                seed=None if side else 3,
                scales={"k": held[0], "v": held[1]} if dtype in QUANTISED else None,
            )
        )
        scales.append(drawn)
    draw = torch.Generator().manual_seed(1)
    for tensor in made[0].tensors:
        tensor.copy_((torch.randint(-7, 8, tensor.shape, generator=draw) * 2).to(tensor.dtype))
    low, high = max(heads[0][0], heads[1][0]), min(heads[0][1], heads[1][1])

    def cast(numbers: torch.Tensor, layer: int) -> torch.Tensor:
        factor = torch.from_numpy(scales[0][:, layer] / scales[1][:, layer])
        factor = factor[:, low:high] if by_head else factor
        return cast_reference(numbers, factor[:, :, None], made[1].tensors[0].dtype)

    return made[0], made[1], cast


@pytest.mark.parametrize("write", [True, False])
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    orders=st.tuples(*[st.permutations(AXES[:-1]).map(lambda order: (*order, "dim"))] * 2),
    tokens=st.tuples(*[st.sampled_from([1, 2, 3, 4, 6])] * 2),
    heads=st.tuples(*[st.sampled_from([(0, 4), (0, 2), (1, 3), (1, 2)])] * 2),
    dim=st.sampled_from([1, 8, 20]),
    dtypes=st.sampled_from(PAIRS),
    by_head=st.booleans(),
    span=st.tuples(st.integers(0, 13), st.integers(0, 13)).map(sorted),
    chunk_nbytes=st.sampled_from([100, 1 << 20]),
)
def test_any_layout_and_type_to_any(
    engine: TransferEngine,
    link: Link,
    peer: Peer,
    monkeypatch: pytest.MonkeyPatch,
    write: bool,
    orders: Any,
    tokens: Any,
    heads: Any,
    dim: int,
    dtypes: tuple[str, str],
    by_head: bool,
    span: list[int],
    chunk_nbytes: int,
) -> None:
    monkeypatch.setattr(conversion, "CHUNK_NBYTES", chunk_nbytes)
    src, dst, cast = pools(orders, tokens, heads, dim, dtypes, by_head)
    truth = expect_tokens(src, dst, TABLES[0], TABLES[1], span[0], span[1], cast=cast)
    got = move(engine, link, peer, (src, dst), (span[0], span[1]), write)
    for mine, then in zip(got, truth.arrays(), strict=True):
        assert np.array_equal(mine, then)


SCALED = [
    (NHD, 4, FP32, HND, 6, INT8, True),
    (NHD, 4, FP16, NHD, 8, INT8, False),
    (NHD, 4, BF16, HND, 6, FP8, True),
    (HND, 6, FP8, NHD, 4, FP32, True),
]


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("case", SCALED, ids=lambda case: f"{case[2]} to {case[5]}")
def test_scales_of_blocks_are_chosen_written_and_used(
    engine: TransferEngine,
    link: Link,
    peer: Peer,
    case: Any,
    write: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversion, "CHUNK_NBYTES", 400)
    src_order, src_tokens, src_type, dst_order, dst_tokens, dst_type, by_head = case
    src = Scaled(src_order, src_tokens, src_type, by_head=by_head, seed=3)
    dst = Scaled(dst_order, dst_tokens, dst_type, by_head=by_head)
    fill_exactly(src, dst)
    span = (2 * dst_tokens, 2 * dst_tokens + 17)
    truth = expect(src, dst, TABLES, *span)
    got = move(engine, link, peer, (src, dst), span, write)
    for mine, then in zip(got, truth, strict=True):
        assert np.array_equal(mine, then)


def test_a_link_gives_its_gpus_memory_back(
    engine: TransferEngine, link: Link, peer: Peer, gpus: list[InterpretedGpu]
) -> None:
    for _ in range(2):
        src, dst = Scaled(NHD, 4, FP32, seed=3).pool, Scaled(HND, 6, FP16).pool
        move(engine, link, peer, (src, dst), (0, 24), True)
    assert 1 <= len(gpus) <= conversion.AHEAD  # lent anew, not made anew
    link.close()
    link.quiesced.wait(30)
    assert all(gpu.closed and not gpu.memory for gpu in gpus)


@pytest.mark.parametrize("write", [True, False])
def test_what_fails_on_the_gpu_ends_the_transfer_by_name(
    engine: TransferEngine, link: Link, peer: Peer, write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("an illegal address")

    src, dst = Scaled(NHD, 4, FP32, seed=3), Scaled(HND, 6, INT8)
    monkeypatch.setattr(InterpretedGpu, "upload", fail)
    with pytest.raises(DeviceError, match="on a GPU failed: an illegal address"):
        move(engine, link, peer, (src, dst), (0, 24), write)
    monkeypatch.undo()
    assert link.error is None


def test_a_link_that_goes_down_waits_for_those_who_convert(
    engine: TransferEngine, link: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they read and write is nobody else's until they have left."""
    reached, leave = threading.Event(), threading.Event()
    finish = GpuWorkspace.finish

    def wait(place: GpuWorkspace) -> None:
        reached.set()
        assert leave.wait(30)
        finish(place)

    monkeypatch.setattr(GpuWorkspace, "finish", wait)
    src, dst = Scaled(NHD, 4, BF16, seed=3).pool, Scaled(HND, 6, FP16).pool
    local = engine.register_cache(src.layout, src.arrays())
    plan = engine.plan(local, peer.call("cache_of", dst.arrays(), dst.layout))
    ticket = link.write_tokens(plan, *TABLES, stop=24)
    assert reached.wait(30)
    link.close(timeout_s=0.2)
    assert not link.quiesced.done()
    assert not ticket.done()
    leave.set()
    link.quiesced.wait(30)
    with pytest.raises(EngineError):
        ticket.wait(30)
    local.deregister()


def test_a_workspace_is_made_ready_beforehand(gpus: list[InterpretedGpu]) -> None:
    gpu = InterpretedGpu()
    place = GpuWorkspace(gpu)
    place.reserve(1 << 14)
    types = ElementType("bfloat16", 2), ElementType("float8_e4m3fn", 1)
    place.try_out(types, converts=True, scaled=True)
    place.try_out((types[0], types[0]), converts=False, scaled=False)
    place.close()
    assert gpu.closed
    assert not gpu.memory


def test_tables_grow_and_are_used_again() -> None:
    """More rows than the tables hold at first, in several launches before anybody waits."""
    gpu = InterpretedGpu()
    place, host = GpuWorkspace(gpu), HostWorkspace()
    for count in (10, 70_000, 10):
        numbers = np.arange(count, dtype=np.float32)
        there = np.zeros(count, np.float32)
        src, dst = (a.ctypes.data + 4 * np.arange(count) for a in (numbers, there))
        if count < 100:
            place.put_floats(dst, host.floats(src) + 1)
            assert np.array_equal(place.floats(dst), numbers + 1)
        else:
            assert place._room(20 * count) == 0
            place._used_nbytes = len(place._here) - 100
    place.close()
    assert gpu.closed
    assert not gpu.memory


def test_numbers_where_no_kernel_reads_are_refused() -> None:
    gpu = InterpretedGpu()
    place = GpuWorkspace(gpu)
    place.reserve(4096)
    types = ElementType("bfloat16", 2), ElementType("float8_e4m3fn", 1)
    one = np.ones(1, np.float32)
    with pytest.raises(PlanError, match="source do not lie at multiples of 2 bytes"):
        place.convert(np.array([place.address + 1]), np.array([place.address]), 4, types, one)
    place.close()
