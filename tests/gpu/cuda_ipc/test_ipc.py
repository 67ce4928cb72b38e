"""GPU memory between processes: pieces, blocks of any pair of layouts, order, counters, endings."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.errors import (
    BlockOutOfRange,
    DeadlineExceeded,
    OutOfRange,
    OverlappingBlocks,
    PeerLost,
    PlanError,
    RegionGone,
)
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory.cuda_driver import driver
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.kernels.copy import copy_kernel

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.descriptors import CacheDescriptor
    from kvferry.engine.memory.regions import RegisteredCache
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

SENTINEL = 0xA5
NUM_BLOCKS = 23
SIZES = {"layer": 3, "plane": 2, "block": NUM_BLOCKS, "token": 16, "head": 4, "dim": 64}
NHD = "plane block token head dim"
HND = "plane block head token dim"
BLOCKS_FIRST = "block plane token head dim"
STACKED = "layer plane block token head dim"
LAYERS_INSIDE = "block layer plane head token dim"
LAYOUTS = [NHD, HND, BLOCKS_FIRST, STACKED, LAYERS_INSIDE]


def new_tensors(dims: str, *, seed: int | None, dtype: torch.dtype = torch.int16) -> Any:
    """A cache on the CPU: random, or sentinels throughout."""
    shape = [SIZES[name] for name in dims.split()]
    count = 1 if "layer" in dims.split() else SIZES["layer"]
    if seed is None:
        return [torch.full(shape, SENTINEL - 0x100, dtype=dtype) for _ in range(count)]
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(-9999, 9999, shape, generator=random).to(dtype) for _ in range(count)]


def canonical(arrays: Any, dims: str) -> torch.Tensor:
    """The same cache as `[layer, plane, block, token, head, dim]`."""
    names = dims.split()
    tensors = [torch.as_tensor(array) for array in arrays]
    whole = tensors[0] if "layer" in names else torch.stack(tensors)
    names = names if "layer" in names else ["layer", *names]
    return whole.permute([names.index(name) for name in STACKED.split()])


def register(engine: TransferEngine, tensors: list[torch.Tensor], dims: str) -> RegisteredCache:
    layout = KVLayout.from_tensors(tensors[0] if "layer" in dims.split() else tensors, dims)
    return engine.register_cache(layout, tensors)


def two_caches(
    engine: TransferEngine, peer: GpuPeer, here: str, there: str, *, fill_here: int | None = 1
) -> tuple[list[torch.Tensor], RegisteredCache, CacheDescriptor]:
    fill_there = None if fill_here is not None else 2
    tensors = [tensor.cuda() for tensor in new_tensors(here, seed=fill_here)]
    arrays = [tensor.numpy() for tensor in new_tensors(there, seed=fill_there)]
    remote = peer.call("cache", arrays, there)
    return tensors, register(engine, tensors, here), remote


def some_ids(count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    random = np.random.default_rng(seed)
    return (
        random.permutation(NUM_BLOCKS)[:count].tolist(),
        random.permutation(NUM_BLOCKS)[:count].tolist(),
    )


def moved(src: torch.Tensor, src_ids: list[int], dst_ids: list[int], layers: Any) -> torch.Tensor:
    """What a canonical destination of sentinels must hold afterwards."""
    expected = torch.full_like(src, SENTINEL - 0x100)
    for layer in layers:
        expected[layer][:, dst_ids] = src[layer][:, src_ids]
    return expected


@pytest.mark.parametrize("write", [True, False])
def test_pieces_of_odd_sizes_land_and_nothing_else(
    engine: TransferEngine, link: Link, peer: GpuPeer, write: bool
) -> None:
    random = np.random.default_rng(5)
    sizes = np.array([1, 63, 100, 2000, 4097, (5 << 20) + 3, 16, 65536, 0, 7])
    gaps = random.integers(1, 70, (2, len(sizes)))
    src, dst = ((np.cumsum(sizes + gap) - sizes) for gap in gaps)
    span = int((sizes + 70).sum())
    content = random.integers(0, 256, span, np.uint8)
    blank = np.full(span, SENTINEL, np.uint8)
    expected = blank.copy()
    for a, b, n in zip(src, dst, sizes, strict=True):
        expected[b : b + n] = content[a : a + n]
    mine = torch.from_numpy(content if write else blank).cuda()
    region = engine.register(mine)
    theirs = peer.call("pool", (blank if write else content).tobytes())
    if write:
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=int(sizes.sum()), writes=1)
        assert link.write(region, src, theirs, dst, sizes, imm=imm).wait(60) == sizes.sum()
        assert peer.call("wait", ticket) == sizes.sum()
        got = np.frombuffer(peer.call("peek", theirs.region_id), np.uint8)
    else:
        assert link.read(region, dst, theirs, src, sizes).wait(60) == sizes.sum()
        got = mine.cpu().numpy()
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize("here", LAYOUTS)
def test_blocks_move_between_any_two_layouts(
    engine: TransferEngine, link: Link, peer: GpuPeer, here: str, there: str
) -> None:
    tensors, local, remote = two_caches(engine, peer, here, there)
    plan = engine.plan(local, remote)
    src_ids, dst_ids = some_ids(11)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=plan.nbytes(11))
    assert link.write_blocks(plan, src_ids, dst_ids, imm=imm).wait(60) == plan.nbytes(11)
    assert peer.call("wait", ticket) == plan.nbytes(11)
    src = canonical([tensor.cpu() for tensor in tensors], here)
    got = canonical(peer.call("peek_cache"), there)
    assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))


@pytest.mark.parametrize(("here", "there"), [(NHD, NHD), (STACKED, HND)])
def test_blocks_are_read(
    engine: TransferEngine, link: Link, peer: GpuPeer, here: str, there: str
) -> None:
    tensors, local, remote = two_caches(engine, peer, here, there, fill_here=None)
    plan = engine.plan(remote, local)
    src_ids, dst_ids = some_ids(9)
    assert link.read_blocks(plan, src_ids, dst_ids).wait(60) == plan.nbytes(9)
    src = canonical(peer.call("peek_cache"), there)
    got = canonical([tensor.cpu() for tensor in tensors], here)
    assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))


def test_layers_go_one_by_one_and_only_those_that_were_named(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    tensors, local, remote = two_caches(engine, peer, NHD, NHD)
    plan = engine.plan(local, remote)
    src_ids, dst_ids = some_ids(5)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=plan.nbytes(5, layers=[0, 2]))
    for layer in (0, 2):
        link.write_blocks(plan, src_ids, dst_ids, imm=imm, layers=[layer])
    peer.call("wait", ticket)
    src = canonical([tensor.cpu() for tensor in tensors], NHD)
    got = canonical(peer.call("peek_cache"), NHD)
    assert torch.equal(got, moved(src, src_ids, dst_ids, [0, 2]))


def test_a_layer_is_read_only_after_it_was_computed(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    """Each layer is written by a slow stream; its transfer is enqueued long before it is done. The
    last layer is held back until the others have arrived: they went while it was computed."""
    tensors, local, remote = two_caches(engine, peer, NHD, NHD)
    wanted = [tensor + 1 for tensor in tensors]
    held = torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    plan = engine.plan(local, remote)
    src_ids, dst_ids = some_ids(NUM_BLOCKS)
    imms = [peer.call("new_imm") for _ in tensors]
    nbytes = plan.nbytes(NUM_BLOCKS, layers=[0])
    arrivals = [peer.call("expect", imm, nbytes=nbytes) for imm in imms]
    for layer in range(3):
        link.prepare(plan, layers=[layer])  # compiled from here on
        link.write_blocks(plan, src_ids, dst_ids, layers=[layer]).wait(60)
    compute, release = (torch.cuda.Stream() for _ in range(2))  # type: ignore[no-untyped-call]
    writes = []
    try:
        with torch.cuda.stream(compute):
            for layer, tensor in enumerate(tensors):
                torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
                if layer == 2:
                    driver().wait_value(0, compute.cuda_stream, held.data_ptr(), 1)
                tensor.copy_(wanted[layer])
                writes.append(
                    link.write_blocks(
                        plan, src_ids, dst_ids, imm=imms[layer], layers=[layer], stream=compute
                    )
                )
        for arrival in arrivals[:2]:
            assert peer.call("wait", arrival) == nbytes
        assert not writes[2].done()
    finally:
        driver().write_value(0, release.cuda_stream, held.data_ptr(), 1)
    assert peer.call("wait", arrivals[2]) == nbytes
    src = canonical([tensor.cpu() for tensor in wanted], NHD)
    got = canonical(peer.call("peek_cache"), NHD)
    assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))


@pytest.mark.parametrize("named", [False, True], ids=["counted there", "counted by hosts"])
def test_a_stream_of_the_peer_waits_for_the_bytes(
    engine: TransferEngine, link: Link, peer: GpuPeer, named: bool
) -> None:
    """The peer enqueues its copy first; the bytes are made late and in two halves."""
    tensors, local, remote = two_caches(engine, peer, NHD, HND)
    plan = engine.plan(local, remote)
    src_ids, dst_ids = some_ids(12)
    for _ in range(3):
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=plan.nbytes(12), named=named)
        copy = peer.call("copy_when_arrived", ticket)
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        for tensor in tensors:
            tensor += 1
        link.write_blocks(plan, src_ids[:5], dst_ids[:5], imm=imm)
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        link.write_blocks(plan, src_ids[5:], dst_ids[5:], imm=imm).wait(60)
        got = canonical(peer.call("copied", copy), HND)
        src = canonical([tensor.cpu() for tensor in tensors], NHD)
        assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))


def test_a_stream_goes_on_when_its_ticket_fails(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    two_caches(engine, peer, NHD, NHD)
    lost = peer.call("expect", peer.call("new_imm"), nbytes=64, named=True)
    late = peer.call("expect", peer.call("new_imm"), nbytes=64, timeout_s=2.0)
    copies = [peer.call("copy_when_arrived", ticket) for ticket in (lost, late)]
    link.close()
    for ticket, error in ((lost, PeerLost), (late, DeadlineExceeded)):
        with pytest.raises(error):
            peer.call("wait", ticket)
    for copy in copies:
        assert len(peer.call("copied", copy)) == 3


def test_ids_may_lie_on_the_gpu(engine: TransferEngine, link: Link, peer: GpuPeer) -> None:
    tensors, local, remote = two_caches(engine, peer, NHD, NHD)
    plan = engine.plan(local, remote)
    src_ids, dst_ids = some_ids(6)
    imm = peer.call("new_imm")
    ids: Any = [torch.tensor(ids, device="cuda", dtype=torch.int32) for ids in (src_ids, dst_ids)]
    link.write_blocks(plan, *ids, imm=imm).wait(60)
    assert peer.call("wait", peer.call("expect", imm, nbytes=plan.nbytes(6))) == plan.nbytes(6)
    src = canonical([tensor.cpu() for tensor in tensors], NHD)
    got = canonical(peer.call("peek_cache"), NHD)
    assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))
    ids[1][3] = NUM_BLOCKS
    with pytest.raises(BlockOutOfRange):
        link.write_blocks(plan, *ids).wait(60)
    ids[1][3] = 0
    link.write_blocks(plan, *ids).wait(60)


def test_bad_requests_are_refused_before_a_byte_moves(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    _, local, remote = two_caches(engine, peer, NHD, NHD)
    plan = engine.plan(local, remote)
    with pytest.raises(BlockOutOfRange):
        link.write_blocks(plan, [0], [NUM_BLOCKS])
    with pytest.raises(OutOfRange):
        link.write(local.regions[0], 0, remote.regions[0], remote.regions[0].nbytes - 1, 2)
    assert link.write_blocks(plan, [], []).wait(10) == 0
    blank = canonical(new_tensors(NHD, seed=None), NHD)
    assert torch.equal(canonical(peer.call("peek_cache"), NHD), blank)


@pytest.mark.parametrize("write", [True, False])
def test_strided_tensors_keep_what_lies_between_their_slots(
    engine: TransferEngine, link: Link, peer: GpuPeer, write: bool
) -> None:
    """Every other block, and the middle of every row, of a larger pool: the rest is nobody's."""
    random = torch.Generator().manual_seed(7)
    rows = torch.randint(-9999, 9999, (2, 12, 4, 3, 24), generator=random).to(torch.int16)
    whole = (rows if write else torch.full_like(rows, SENTINEL - 0x100)).cuda()
    before = whole.cpu()
    mine = whole[:, ::2, :, :, 8:16]
    layout = KVLayout.from_tensors([mine], "plane block token head dim")
    local = engine.register_cache(layout, [mine])
    content = torch.full((2, 6, 4, 3, 8), SENTINEL - 0x100, dtype=torch.int16)
    if not write:
        content = rows[:, :6, :, :, :8].clone()
    remote = peer.call("cache", [content.numpy()], "plane block token head dim")
    plan = engine.plan(local, remote) if write else engine.plan(remote, local)
    src_ids, dst_ids = [5, 0, 2], [1, 4, 3]
    move = link.write_blocks if write else link.read_blocks
    assert move(plan, src_ids, dst_ids).wait(60) == plan.nbytes(3)
    there = torch.from_numpy(peer.call("peek_cache")[0])
    if write:
        content[:, dst_ids] = before[:, ::2, :, :, 8:16][:, src_ids]
    else:
        expected = before[:, ::2, :, :, 8:16]
        expected[:, dst_ids] = content[:, src_ids]  # a view: `before` is what must be there
    assert torch.equal(there, content)
    assert torch.equal(whole.cpu(), before)


def test_host_memory_goes_over_the_same_link(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    content = np.random.default_rng(3).integers(0, 256, 10_000, np.uint8)
    there = peer.call("host_pool", 10_000, SENTINEL)
    link.write(engine.register(content), 7, there, 100, 5000).wait(10)
    got = np.frombuffer(peer.call("peek", there.region_id), np.uint8)
    assert np.array_equal(got[100:5100], content[7:5007])
    assert bool((got[:100] == SENTINEL).all() and (got[5100:] == SENTINEL).all())


def test_connect_prefers_cuda_ipc_once_gpu_memory_is_registered(
    engine: TransferEngine, peer: GpuPeer
) -> None:
    with contextlib.closing(engine.connect(peer.address)) as link:
        assert link.transport == "cma"
    region = engine.register(torch.zeros(64, device="cuda"))
    with contextlib.closing(engine.connect(peer.address)) as link:
        assert link.transport == "cuda_ipc"
    region.deregister()


def test_a_region_that_was_taken_back_is_not_written(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    region = engine.register(torch.ones(4096, dtype=torch.uint8, device="cuda"))
    theirs = peer.call("pool", bytes(4096))
    link.write(region, 0, theirs, 0, 4096).wait(60)
    peer.call("deregister", theirs.region_id)
    with pytest.raises(RegionGone):
        link.write(region, 0, theirs, 0, 4096).wait(60)
    again = peer.call("pool", bytes(4096))
    link.write(region, 0, again, 0, 4096).wait(60)
    assert peer.call("peek", again.region_id) == bytes([1]) * 4096


def test_two_engines_of_one_process(peer_device: int) -> None:
    with TransferEngine(name="one") as one, TransferEngine(name="other") as other:
        src = torch.arange(100_000, device="cuda:0")
        dst = torch.zeros(100_000, dtype=torch.int64, device=f"cuda:{peer_device}")
        torch.cuda.synchronize(peer_device)
        here, there = one.register(src), other.register(dst)
        link = one.connect(other.address, transport="cuda_ipc")
        imm = other.new_imm()
        ticket = other.expect(imm, nbytes=src.nbytes)
        link.write(here, 0, there.descriptor, 0, src.nbytes, imm=imm).wait(60)
        ticket.wait(10)
        assert torch.equal(src.cpu(), dst.cpu())


@pytest.mark.parametrize("dtypes", [("int64", "int32"), ("int32", "int64"), None])
def test_ids_are_uploaded_once_for_many_transfers(
    engine: TransferEngine, link: Link, peer: GpuPeer, dtypes: tuple[str, str] | None
) -> None:
    """Out of lists, and out of tensors on the GPU, whose values nobody reads."""
    tensors, local, remote = two_caches(engine, peer, NHD, HND)
    plan = engine.plan(local, remote)
    src_ids, dst_ids = some_ids(9)
    given: Any = (src_ids, dst_ids)
    if dtypes is not None:
        given = [
            torch.tensor(ids, dtype=getattr(torch, dtype), device="cuda")
            for ids, dtype in zip(given, dtypes, strict=True)
        ]
        link.write_blocks(plan, *given).wait(60)
    ids = link.upload_ids(plan, *given)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=plan.nbytes(9))
    for layer in range(3):
        link.write_blocks(plan, ids, imm=imm, layers=[layer])
    peer.call("wait", ticket)
    src = canonical([tensor.cpu() for tensor in tensors], NHD)
    got = canonical(peer.call("peek_cache"), HND)
    assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))


def test_ids_that_cannot_be_used_are_refused_by_name(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    _, local, remote = two_caches(engine, peer, NHD, NHD)
    plan, other = (
        engine.plan(local, remote),
        engine.plan(two_caches(engine, peer, HND, NHD)[1], remote),
    )
    row = torch.arange(4, device="cuda")
    for bad in ([0, 1, 2, 3], row.cpu(), row[:3], row[::2], row.float(), row.view(2, 2)):
        with pytest.raises(PlanError, match="block ids on a GPU must be"):
            link.write_blocks(plan, row, bad)
    with pytest.raises(PlanError, match="the plan they were uploaded for"):
        link.write_blocks(other, link.upload_ids(plan, [1], [2]))
    with pytest.raises(PlanError, match="destination block ids are missing"):
        link.write_blocks(plan, [1])
    with pytest.raises(OverlappingBlocks, match="id 5 is named twice"):
        link.write_blocks(plan, [1, 2, 3], [5, 4, 5])
    with pytest.raises(BlockOutOfRange, match="id -1 is not"):
        link.write_blocks(plan, [1, -1], [5, 4])


def test_a_thread_of_the_peer_waits_awake_for_the_bytes(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    _, local, remote = two_caches(engine, peer, NHD, NHD)
    plan = engine.plan(local, remote)
    late = peer.call("late_writes")  # of other tests
    for _ in range(5):
        src_ids, dst_ids = some_ids(7)
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=plan.nbytes(7))
        torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
        writes = [
            link.write_blocks(plan, src_ids[part], dst_ids[part], imm=imm)
            for part in (slice(0, 3), slice(3, 7))
        ]
        assert peer.call("spin", ticket) == plan.nbytes(7)
        for write in writes:
            write.wait(20)
    # What was seen before it was announced is no late write, and the words are as they seem.
    assert peer.call("late_writes") == late
    never = peer.call("expect", peer.call("new_imm"), nbytes=1, timeout_s=0.3)
    with pytest.raises(DeadlineExceeded):
        peer.call("spin", never)


def test_a_thread_may_have_used_no_gpu_before(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    _, local, remote = two_caches(engine, peer, NHD, NHD)
    plan = engine.plan(local, remote)
    done: list[int] = []
    thread = threading.Thread(
        target=lambda: done.append(link.write_blocks(plan, [1, 2], [3, 4]).wait())
    )
    thread.start()
    thread.join(60)
    assert done == [plan.nbytes(2)]


def test_a_first_transfer_compiles_nothing_after_the_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a shape that no other test has: 7 heads of 24 numbers."""
    layout_of = "plane block token head dim"
    caches = [
        [torch.zeros(2, 9, 5, 7, 24, dtype=torch.int16, device="cuda") for _ in range(3)]
        for _ in range(2)
    ]
    for tensor in caches[0]:
        tensor.random_(generator=torch.Generator("cuda").manual_seed(1))
    layout = KVLayout.from_tensors(caches[0], layout_of)
    compiled: list[object] = []
    do_compile = copy_kernel._do_compile

    def seen(*arguments: Any, **options: Any) -> Any:
        compiled.append(arguments)
        return do_compile(*arguments, **options)

    monkeypatch.setattr(copy_kernel, "_do_compile", seen)
    with TransferEngine(name="one") as one, TransferEngine(name="other") as other:
        src, dst = (
            each.register_cache(layout, tensors)
            for each, tensors in zip((one, other), caches, strict=True)
        )
        one.warm_up(src)
        assert compiled
        compiled.clear()
        link = one.connect(other.address, transport="cuda_ipc")
        plan = one.plan(src, dst.descriptor)
        few = link.write_blocks(plan, [1, 2], [3, 4], layers=[1])
        many = link.write_blocks(plan, np.arange(9), np.arange(9), imm=other.new_imm())
        few.wait(60), many.wait(60)
        assert not compiled
    torch.cuda.synchronize()
    assert all(map(torch.equal, *caches))
