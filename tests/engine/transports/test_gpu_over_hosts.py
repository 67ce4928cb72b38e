"""GPU memory over the transports between hosts and processes, which stage it; a GPU is at either end.

Links, staging, frames and the peer are real. The GPU is `StandIn`: host memory, its kernels in Triton's
interpreter. In the machine of `kvferry rdma-vm` these tests run over RDMA devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.errors import ChecksumMismatch, EngineError, PlanError, RegionGone
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory import iovec
from kvferry.engine.transfer import compute_gate
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.kernels.cast import cast_reference
from tests.support.caches import PagedPool, expect_tokens
from tests.support.interpreted_gpu import Compute, StandIn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.link.link import Link
    from tests.conftest import Peer

pytest.importorskip("triton", reason="Triton exists for Linux alone")

SENTINEL = 0xA5
PATIENCE_S = 120.0  # the machine of `kvferry rdma-vm` is emulated
SIZES = np.array([1, 63, 100, 2000, 4097, 16, 30_001, 0, 7, 70_000])
NHD, HND = "plane block token head dim", "plane block head token dim"
ENDS = ["gpu to gpu", "gpu to host", "host to gpu"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.fixture(scope="module")
def peer(start_module_peer: Callable[..., Peer]) -> Peer:
    return start_module_peer(name="gpu peer", interpreted_gpu=True)


@pytest.fixture
def engine(gpu: StandIn) -> Iterator[TransferEngine]:
    with TransferEngine(name="here") as engine:
        yield engine


@pytest.fixture
def to_gpu(link: Link, peer: Peer) -> Iterator[Link]:
    yield link
    peer.call("gpu", registers=True, broken=False)


def place(gpu: StandIn, peer: Peer, ends: str, *, write: bool) -> None:
    """Where memory that is registered from now on lies."""
    first, last = ends.split(" to ")
    mine, theirs = (first, last) if write else (last, first)
    gpu.registers = mine == "gpu"
    peer.call("gpu", registers=theirs == "gpu")


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("write", [True, False])
def test_pieces_of_odd_sizes_land_and_nothing_else(
    engine: TransferEngine, to_gpu: Link, peer: Peer, gpu: StandIn, write: bool, ends: str
) -> None:
    place(gpu, peer, ends, write=write)
    random = np.random.default_rng(5)
    src, dst = (np.cumsum(SIZES + gap) - SIZES for gap in random.integers(1, 70, (2, len(SIZES))))
    span = int((SIZES + 70).sum())
    content = random.integers(0, 256, span, np.uint8)
    expected = np.full(span, SENTINEL, np.uint8)
    for a, b, n in zip(src, dst, SIZES, strict=True):
        expected[b : b + n] = content[a : a + n]
    total = int(SIZES.sum())
    mine = content.copy() if write else np.full(span, SENTINEL, np.uint8)
    region = engine.register(mine)
    theirs = peer.call("pool", span, SENTINEL)
    assert (region.kind, theirs.kind) == (
        "cuda" if gpu.registers else "host",
        "cuda" if ends.split(" to ")[write] == "gpu" else "host",
    )
    if write:
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=total, writes=1, timeout_s=PATIENCE_S)
        to_gpu.write(region, src, theirs, dst, SIZES, imm=imm, timeout_s=PATIENCE_S).wait()
        assert peer.call("wait", ticket) == total
        got = peer.contents(theirs)
    else:
        peer.call("poke", theirs.region_id, 0, content.tobytes())
        assert to_gpu.read(region, dst, theirs, src, SIZES, timeout_s=PATIENCE_S).wait() == total
        got = mine
    assert np.array_equal(got, expected)
    assert bool(gpu.moved) == gpu.registers  # by the GPU's kernels, and by nobody else


def cache(seed: int | None, blocks: int, dims: str) -> list[np.ndarray[Any, Any]]:
    sizes = {"plane": 2, "block": blocks, "token": 4, "head": 2, "dim": 256}
    shape = [sizes[name] for name in dims.split()]
    if seed is None:
        return [np.full(shape, 0xA5A5, np.uint16) for _ in range(2)]
    random = np.random.default_rng(seed)
    return [random.integers(0, 1 << 16, shape, np.uint16) for _ in range(2)]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("write", [True, False])
def test_blocks_of_several_frames_are_written_and_read(
    engine: TransferEngine, to_gpu: Link, peer: Peer, gpu: StandIn, write: bool, ends: str
) -> None:
    """640 KiB in blocks of 4 KiB a plane, scattered at both ends; the other blocks stay."""
    place(gpu, peer, ends, write=write)
    mine, theirs = cache(1 if write else None, 50, NHD), cache(None if write else 1, 50, NHD)
    source = [layer.copy() for layer in (mine if write else theirs)]
    local = engine.register_cache(KVLayout.from_tensors(mine, NHD), mine)
    remote = peer.call("cache", theirs, NHD)
    src_ids, dst_ids = np.random.default_rng(2).permutation(50)[:40], np.arange(3, 43)
    if write:
        plan = engine.plan(local, remote)
        to_gpu.prepare(plan)
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=plan.nbytes(40), timeout_s=PATIENCE_S)
        to_gpu.write_blocks(plan, src_ids, dst_ids, imm=imm, timeout_s=PATIENCE_S).wait()
        peer.call("wait", ticket)
        got = peer.call("peek_cache")
    else:
        plan = engine.plan(remote, local)
        to_gpu.read_blocks(plan, src_ids, dst_ids, timeout_s=PATIENCE_S).wait()
        got = mine
    assert plan.nbytes(40) > 512 << 10  # more than a frame of so small a transfer over RDMA
    for layer, content in zip(got, source, strict=True):
        expected = np.full_like(content, 0xA5A5)
        expected[:, dst_ids] = content[:, src_ids]
        assert np.array_equal(layer, expected)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("write", [True, False])
def test_tokens_change_blocks_and_type(
    engine: TransferEngine, to_gpu: Link, peer: Peer, gpu: StandIn, write: bool, ends: str
) -> None:
    place(gpu, peer, ends, write=write)
    shape: dict[str, Any] = {"layers": (0, 1), "num_blocks": 7, "heads": (0, 2), "dim": 8}
    src = PagedPool.make(tuple(NHD.split()), tokens=4, stacked=False, dtype=torch.float32, seed=3, **shape)  # fmt: skip
    dst = PagedPool.make(tuple(HND.split()), tokens=6, stacked=False, dtype=torch.float16, **shape)
    draw = torch.Generator().manual_seed(1)
    for tensor in src.tensors:
        tensor.copy_((torch.randint(-7, 8, tensor.shape, generator=draw) * 2).to(tensor.dtype))
    tables = [np.random.default_rng(i).permutation(7).tolist() for i in (1, 2)]
    one = torch.ones(1)
    truth = expect_tokens(
        src,
        dst,
        tables[0],
        tables[1],
        3,
        21,
        cast=lambda n, _: cast_reference(n, one, torch.float16),
    )
    mine, theirs = (src, dst) if write else (dst, src)
    arrays = mine.arrays()
    local = engine.register_cache(mine.layout, arrays)
    remote = peer.call("cache_of", theirs.arrays(), theirs.layout)
    plan = engine.plan(local, remote) if write else engine.plan(remote, local)
    if write:
        imm = peer.call("new_imm")
        nbytes = plan.tokens.nbytes(3, 21)
        ticket = peer.call("expect", imm, nbytes=nbytes, timeout_s=PATIENCE_S)
        to_gpu.write_tokens(plan, *tables, start=3, stop=21, imm=imm, timeout_s=PATIENCE_S).wait()
        peer.call("wait", ticket)
        got = peer.call("peek_cache")
    else:
        to_gpu.read_tokens(plan, *tables, start=3, stop=21, timeout_s=PATIENCE_S).wait()
        got = arrays
    for array, expected in zip(got, truth.arrays(), strict=True):
        assert np.array_equal(array, expected)


def test_each_layer_leaves_after_its_own_compute(
    engine: TransferEngine, to_gpu: Link, peer: Peer, gpu: StandIn
) -> None:
    mine = cache(None, 6, NHD)
    local = engine.register_cache(KVLayout.from_tensors(mine, NHD), mine)
    remote = peer.call("cache", cache(None, 6, NHD), NHD)
    plan = engine.plan(local, remote)
    ids = np.arange(6)
    streams = [Compute(), Compute()]
    imms = [peer.call("new_imm") for _ in streams]
    nbytes = plan.nbytes(6, layers=[0])
    arrivals = [peer.call("expect", i, nbytes=nbytes, timeout_s=PATIENCE_S) for i in imms]
    gated: Any = to_gpu.write_blocks  # streams that are stand-ins
    writes = [
        gated(plan, ids, ids, imm=imm, layers=[layer], stream=stream, timeout_s=PATIENCE_S)
        for layer, (imm, stream) in enumerate(zip(imms, streams, strict=True))
    ]
    for layer, content in enumerate(cache(7, 6, NHD)):
        later = streams[layer]
        later.asked.clear()
        assert later.asked.wait(PATIENCE_S)  # the gate goes on asking
        assert not writes[layer].done()
        mine[layer][...] = content  # the compute is late
        later.done = True
        writes[layer].wait()
        peer.call("wait", arrivals[layer])
        assert np.array_equal(peer.call("peek_cache")[layer], content)


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("ends", ENDS)
def test_checksums_are_those_of_what_travels(
    gpu: StandIn,
    peer: Peer,
    transport: str,
    write: bool,
    ends: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place(gpu, peer, ends, write=write)
    content = np.random.default_rng(3).integers(0, 256, 9000, np.uint8)
    with TransferEngine(name="here", verify=True) as engine:
        link = engine.connect(peer.address, transport=transport)
        peer.call("accept", engine.engine_id)
        region, theirs = engine.register(content.copy()), peer.call("pool", 9000, 7)
        offsets = np.arange(0, 9000, 1000)
        move: Any = link.write if write else link.read
        move(region, offsets, theirs, offsets, 900, timeout_s=PATIENCE_S).wait()
        right = iovec.checksum
        monkeypatch.setattr(iovec, "checksum", lambda pieces: right(pieces) ^ 1)
        with pytest.raises(ChecksumMismatch):
            move(region, offsets, theirs, offsets, 900, timeout_s=PATIENCE_S).wait()
        assert not link.closed


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("broken", ["here", "there"])
def test_a_gpu_that_fails_is_named_and_the_link_goes_on(
    engine: TransferEngine, to_gpu: Link, peer: Peer, gpu: StandIn, write: bool, broken: str
) -> None:
    content = np.random.default_rng(3).integers(0, 256, 9000, np.uint8)
    region, theirs = engine.register(content), peer.call("pool", 9000, SENTINEL)
    offsets = np.arange(0, 9000, 1000)
    move: Any = to_gpu.write if write else to_gpu.read
    gpu.broken = broken == "here"
    peer.call("gpu", broken=broken == "there")
    with pytest.raises(EngineError, match="it is broken"):
        move(region, offsets, theirs, offsets, 900, timeout_s=PATIENCE_S).wait()
    gpu.broken = False
    peer.call("gpu", broken=False)
    assert move(region, offsets, theirs, offsets, 900, timeout_s=PATIENCE_S).wait() == 8100
    assert not to_gpu.closed


def test_a_link_gives_its_staging_back(
    engine: TransferEngine, to_gpu: Link, peer: Peer, gpu: StandIn
) -> None:
    region, theirs = engine.register(np.zeros(9000, np.uint8)), peer.call("pool", 9000, 7)
    to_gpu.write(region, 0, theirs, 0, 9000, timeout_s=PATIENCE_S).wait()
    to_gpu.read(region, 0, theirs, 0, 9000, timeout_s=PATIENCE_S).wait()
    assert gpu.movers
    assert gpu.pinned
    to_gpu.close()
    to_gpu.quiesced.wait(PATIENCE_S)
    assert (gpu.movers, gpu.pinned) == (0, {})


def test_gpu_memory_takes_the_best_transport_by_itself(
    engine: TransferEngine, peer: Peer, transport: str
) -> None:
    engine.register(np.zeros(100, np.uint8))
    with TransferEngine(name="two", transports=(transport, "tcp")) as two:
        two.register(np.zeros(100, np.uint8))
        link = two.connect(peer.address)
        assert link.transport == transport
        link.close()


def test_a_cache_that_was_freed_is_noticed_before_any_byte_moves(
    gpu: StandIn, engine: TransferEngine, to_gpu: Link, peer: Peer
) -> None:
    shape = (2, 5, 4, 2, 8)
    tensors = [torch.ones(shape, dtype=torch.int16) for _ in range(2)]
    local = engine.register_cache(KVLayout.from_tensors(tensors, NHD), tensors)
    remote = peer.call("cache", [np.zeros(shape, np.int16) for _ in range(2)], NHD)
    plan = engine.plan(local, remote)
    assert local.device == 0
    to_gpu.write_blocks(plan, [1], [2]).wait(PATIENCE_S)
    check = local.watch([1])
    tensors[0].untyped_storage().resize_(0)
    moved = gpu.moved
    for layers in (None, [1]):  # a cache is given back as a whole
        with pytest.raises(RegionGone, match="freed or resized"):
            to_gpu.write_blocks(plan, [1], [2], layers=layers)
    with pytest.raises(RegionGone, match="freed or resized"):
        to_gpu.write_tokens(plan, [1], [2], start=0, stop=4)
    check()  # the other layer is where it was
    tensors[1].untyped_storage().resize_(1 << 20)
    with pytest.raises(RegionGone, match="freed or resized"):
        check()
    assert gpu.moved == moved


def test_a_stream_that_a_graph_is_captured_from_moves_nothing(
    gpu: StandIn, engine: TransferEngine, to_gpu: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_device: int, _stream: Any) -> Any:
        raise PlanError("a CUDA graph is being captured from this stream", operation="order")

    region = engine.register(torch.ones(4096, dtype=torch.uint8))
    theirs = peer.call("pool", 4096, SENTINEL)
    monkeypatch.setattr(compute_gate, "compute_event", refuse)
    for move in (to_gpu.write, to_gpu.read):
        ticket = move(region, 0, theirs, 0, 4096)
        with pytest.raises(PlanError, match="is being captured") as raised:
            ticket.wait(PATIENCE_S)
        assert (raised.value.operation, raised.value.peer) == (move.__name__, "gpu peer")
    assert gpu.moved == 0
    monkeypatch.undo()
    region.deregister()  # nothing uses it any more
    assert peer.call("peek", theirs.region_id) == bytes([SENTINEL]) * 4096
