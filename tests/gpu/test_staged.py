"""GPU memory over the host transports: staged at both ends, at one, in order, and to the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.errors import ChecksumMismatch, PeerLost, PlanError
from kvferry.engine.staging.thresholds import NEVER_DIRECT, DirectThresholds
from kvferry.engine.transfer_engine import TransferEngine
from tests.gpu.cuda_ipc.test_ipc import (
    HND,
    LAYERS_INSIDE,
    NHD,
    NUM_BLOCKS,
    SENTINEL,
    STACKED,
    canonical,
    moved,
    register,
    some_ids,
    two_caches,
)
from tests.gpu.cuda_ipc.test_tokens import check, shuffled
from tests.gpu.cuda_ipc.test_tokens import moved as tokens_moved
from tests.support.caches import PagedPool, expect_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.link.link import Link
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

TRANSPORTS = ("cuda_ipc", "cma", "tcp")
STAGED = DirectThresholds(direct_from_nbytes={"cuda_ipc": NEVER_DIRECT})
SIZES = np.array([1, 63, 100, 2000, 4097, (5 << 20) + 3, 16, 65536, 0, 7, 30 << 20])


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Every transport that stages; for cuda_ipc, direct paths are refused on purpose."""
    name: str = request.param
    return name


@pytest.fixture
def engine() -> Iterator[TransferEngine]:
    with TransferEngine(name="here", paths=STAGED) as fresh:
        yield fresh


@pytest.fixture
def link(engine: TransferEngine, peer: GpuPeer, transport: str) -> Iterator[Link]:
    fresh = engine.connect(peer.address, transport=transport)
    assert peer.call("accept", engine.engine_id) == transport
    yield fresh
    fresh.close()


def scattered() -> tuple[Any, Any, Any, Any]:
    """Content, a blank as large, and offsets of pieces of odd sizes in both."""
    random = np.random.default_rng(5)
    gaps = random.integers(1, 70, (2, len(SIZES)))
    src, dst = (np.cumsum(SIZES + gap) - SIZES for gap in gaps)
    span = int((SIZES + 70).sum())
    return random.integers(0, 256, span, np.uint8), np.full(span, SENTINEL, np.uint8), src, dst


@pytest.mark.parametrize("ends", ["gpu to gpu", "gpu to host", "host to gpu"])
@pytest.mark.parametrize("write", [True, False])
def test_pieces_of_odd_sizes_land_and_nothing_else(
    engine: TransferEngine, link: Link, peer: GpuPeer, write: bool, ends: str
) -> None:
    content, blank, src, dst = scattered()
    expected = blank.copy()
    for a, b, n in zip(src, dst, SIZES, strict=True):
        expected[b : b + n] = content[a : a + n]
    first, last = ends.split(" to ")
    here, there = (first, last) if write else (last, first)
    mine: Any = (content if write else blank).copy()
    mine = torch.from_numpy(mine).cuda() if here == "gpu" else mine
    region = engine.register(mine)
    if there == "gpu":
        theirs = peer.call("pool", (blank if write else content).tobytes())
    else:
        theirs = peer.call("host_memory", (blank if write else content).tobytes())
    if write:
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=int(SIZES.sum()), writes=1)
        assert link.write(region, src, theirs, dst, SIZES, imm=imm).wait(60) == SIZES.sum()
        assert peer.call("wait", ticket) == SIZES.sum()
        got = np.frombuffer(peer.call("peek", theirs.region_id), np.uint8)
    else:
        assert link.read(region, dst, theirs, src, SIZES).wait(60) == SIZES.sum()
        got = mine.cpu().numpy() if here == "gpu" else mine
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(("here", "there"), [(NHD, NHD), (NHD, HND), (STACKED, LAYERS_INSIDE)])
def test_blocks_are_written_and_read(
    engine: TransferEngine, link: Link, peer: GpuPeer, here: str, there: str
) -> None:
    tensors, local, remote = two_caches(engine, peer, here, there)
    src_ids, dst_ids = some_ids(11)
    plan = engine.plan(local, remote)
    link.prepare(plan)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=plan.nbytes(11))
    assert link.write_blocks(plan, src_ids, dst_ids, imm=imm).wait(60) == plan.nbytes(11)
    peer.call("wait", ticket)
    src = canonical([tensor.cpu() for tensor in tensors], here)
    got = canonical(peer.call("peek_cache"), there)
    assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))
    fresh = [torch.full_like(tensor, SENTINEL - 0x100) for tensor in tensors]
    back = engine.plan(remote, register(engine, fresh, here))
    link.read_blocks(back, dst_ids, src_ids).wait(60)
    again = canonical([tensor.cpu() for tensor in fresh], here)
    assert torch.equal(again, moved(src, src_ids, src_ids, range(3)))


def test_a_layer_is_read_only_after_it_was_computed(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    """Layers are computed slowly; each goes out, complete, while the next one still computes."""
    tensors, local, remote = two_caches(engine, peer, NHD, NHD)
    wanted = [tensor + 1 for tensor in tensors]
    plan = engine.plan(local, remote)
    src_ids, dst_ids = some_ids(NUM_BLOCKS)
    link.write_blocks(plan, src_ids, dst_ids).wait(60)  # compiled and pinned from here on
    torch.cuda.synchronize()
    imms = [peer.call("new_imm") for _ in tensors]
    nbytes = plan.nbytes(NUM_BLOCKS, layers=[0])
    arrivals = [peer.call("expect", imm, nbytes=nbytes) for imm in imms]
    compute = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    done, writes = [], []
    with torch.cuda.stream(compute):
        for layer, tensor in enumerate(tensors):
            torch.cuda._sleep(400_000_000)  # type: ignore[no-untyped-call]
            tensor.copy_(wanted[layer])
            writes.append(
                link.write_blocks(
                    plan, src_ids, dst_ids, imm=imms[layer], layers=[layer], stream=compute
                )
            )
            done.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            done[-1].record(compute)
    assert not writes[0].done()  # the host waited for nothing
    peer.call("wait", arrivals[0])
    assert not done[-1].query()  # type: ignore[no-untyped-call]
    # the first layer has arrived, the last is still computed
    for arrival in arrivals[1:]:
        peer.call("wait", arrival)
    src = canonical([tensor.cpu() for tensor in wanted], NHD)
    got = canonical(peer.call("peek_cache"), NHD)
    assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))


def test_a_read_waits_for_the_stream_that_used_its_memory(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    content = np.random.default_rng(1).integers(0, 256, 1 << 20, np.uint8)
    theirs = peer.call("pool", content.tobytes())
    mine = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    region = engine.register(mine)
    link.read(region, 0, theirs, 0, 1).wait(60)
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    before = mine.clone()  # on the caller's stream, after the sleep: must not see the read
    link.read(region, 0, theirs, 0, 1 << 20).wait(60)
    assert np.array_equal(mine.cpu().numpy(), content)
    assert int(before[1:].sum()) == 0


def test_a_stream_of_the_peer_waits_for_the_bytes(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    tensors, local, remote = two_caches(engine, peer, NHD, HND)
    plan = engine.plan(local, remote)
    src_ids, dst_ids = some_ids(12)
    link.write_blocks(plan, src_ids, dst_ids).wait(60)
    for _ in range(3):
        imm = peer.call("new_imm")
        copy = peer.call("copy_when_arrived", peer.call("expect", imm, nbytes=plan.nbytes(12)))
        for tensor in tensors:
            tensor += 1
        link.write_blocks(plan, src_ids[:5], dst_ids[:5], imm=imm)
        link.write_blocks(plan, src_ids[5:], dst_ids[5:], imm=imm).wait(60)
        got = canonical(peer.call("copied", copy), HND)
        src = canonical([tensor.cpu() for tensor in tensors], NHD)
        assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))


def test_ids_on_the_gpu_are_refused_by_name(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    _, local, remote = two_caches(engine, peer, NHD, NHD)
    plan = engine.plan(local, remote)
    ids: Any = torch.tensor([1], device="cuda")
    with pytest.raises(PlanError, match="block ids on a GPU"):
        link.write_blocks(plan, ids, ids)


@pytest.mark.parametrize("write", [True, False])
def test_tokens_go_by_the_host_and_tables_on_the_gpu_are_refused(
    engine: TransferEngine, link: Link, peer: GpuPeer, write: bool
) -> None:
    src, dst = (
        PagedPool.make(
            ("plane", "block", *inner, "dim"),
            layers=(0, 1, 2),
            num_blocks=20,
            tokens=tokens,
            heads=(0, 4),
            dim=64,
            stacked=False,
            seed=seed,
        )
        for inner, tokens, seed in ((("token", "head"), 16, 5), (("head", "token"), 64, None))
    )
    truth = expect_tokens(src, dst, shuffled(1).tolist(), shuffled(2).tolist(), 5, 275)
    check(tokens_moved(engine, link, peer, src, dst, (5, 275), write=write), truth)
    with pytest.raises(PlanError, match="block tables on a GPU"):
        tokens_moved(engine, link, peer, src, dst, (5, 275), write=write, on_gpu=True)


@pytest.mark.parametrize("write", [True, False])
def test_verify_checks_staged_bytes(
    start_peer: Callable[..., GpuPeer],
    peer_device: int,
    transport: str,
    write: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvferry.engine.memory import iovec

    careful = start_peer(peer_device, name="careful", verify=True)
    with TransferEngine(name="here", verify=True) as engine:  # which stages by itself
        mine = torch.arange(1000, dtype=torch.int32, device="cuda")
        region = engine.register(mine)
        theirs = careful.call("pool", bytes(4000))
        link = engine.connect(careful.address, transport=transport)
        careful.call("accept", engine.engine_id)
        link.write(region, 0, theirs, 0, 4000).wait(60)
        assert careful.call("peek", theirs.region_id) == mine.cpu().numpy().tobytes()
        right = iovec.checksum
        monkeypatch.setattr(iovec, "checksum", lambda iov: right(iov) ^ 1)
        move = link.write if write else link.read
        with pytest.raises(ChecksumMismatch):
            move(region, 0, theirs, 0, 4000).wait(60)
        monkeypatch.undo()


@pytest.mark.parametrize("writer_dies", [True, False])
def test_a_peer_dies_in_mid_transfer(
    engine: TransferEngine,
    start_peer: Callable[..., GpuPeer],
    peer_device: int,
    transport: str,
    writer_dies: bool,
) -> None:
    nbytes = 256 << 20
    mine = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    region = engine.register(mine)
    victim = start_peer(peer_device, name="victim")
    theirs = victim.call("pool", bytes(nbytes))
    link = engine.connect(victim.address, transport=transport)
    victim.call("accept", engine.engine_id)
    link.write(region, 0, theirs, 0, nbytes).wait(60)
    lost = engine.expect(engine.new_imm(), nbytes=1, links=[link])
    writes = []
    if writer_dies:
        victim.call("stream_writes", theirs.region_id, region.descriptor, nbytes)
    else:
        writes = [link.write(region, 0, theirs, 0, nbytes) for _ in range(20)]
    victim.kill()
    for ticket in [lost, *writes]:
        with pytest.raises(PeerLost):
            ticket.wait(20)
    link.quiesced.wait(20)
    mine.fill_(3)  # this process's GPU is well, and nobody writes here any more
    assert int((mine == 3).sum()) == nbytes
    survivor = start_peer(peer_device, name="survivor")
    again = survivor.call("pool", bytes(4096))
    link = engine.connect(survivor.address, transport=transport)
    survivor.call("accept", engine.engine_id)
    link.write(region, 0, again, 0, 4096).wait(60)
    assert survivor.call("peek", again.region_id) == bytes([3]) * 4096
