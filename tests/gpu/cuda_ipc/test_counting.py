"""Who counts bytes on a GPU: the kernels of its peers, or, where they may not add there, its host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kvferry.engine.memory.cuda_driver import driver
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.transports.cuda_ipc.peer_memory import PeerMappings
from tests.gpu.cuda_ipc.test_graph_write import Repeated
from tests.gpu.cuda_ipc.test_ipc import HND, NHD, canonical, moved, some_ids, two_caches

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

WRITES = 200


@pytest.fixture
def _without_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of this process add to nobody's counters."""
    monkeypatch.setattr(PeerMappings, "counted", lambda *_: False)


@pytest.mark.usefixtures("_without_atomics")
def test_without_native_atomics_hosts_count(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    """Streams of the peer and threads that wait awake go on all the same, behind the bytes."""
    tensors, local, remote = two_caches(engine, peer, NHD, HND)
    plan = engine.plan(local, remote)
    src_ids, dst_ids = some_ids(12)
    late = peer.call("late_writes")
    for turn in range(4):
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=plan.nbytes(12))
        copy = peer.call("copy_when_arrived", ticket)
        for tensor in tensors:
            tensor += 1
        link.write_blocks(plan, src_ids[:5], dst_ids[:5], imm=imm)
        if turn % 2:
            link.write_tokens(plan, src_ids[5:], dst_ids[5:], stop=16 * len(src_ids[5:]), imm=imm)
        else:
            link.write_blocks(plan, src_ids[5:], dst_ids[5:], imm=imm)
        assert peer.call("spin", ticket) == plan.nbytes(12)
        got = canonical(peer.call("copied", copy), HND)
        src = canonical([tensor.cpu() for tensor in tensors], NHD)
        assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))
    assert peer.call("late_writes") == late


@pytest.mark.usefixtures("_without_atomics")
def test_without_native_atomics_a_graph_is_counted_by_hosts(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    work = Repeated(engine, link, peer, [None])
    before = work.there()
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=work.plan.nbytes(2))
    work.replay(imm, [1, 2], [3, 4])
    assert peer.call("wait", ticket) == work.plan.nbytes(2)
    assert torch.equal(work.there(), work.expected(before, [1, 2], [3, 4]))


@pytest.mark.usefixtures("two_gpus")
def test_kernels_of_two_gpus_add_to_one_counter() -> None:
    """Nothing is lost between them, and a stream that has waited sees all they have written."""
    nbytes = 4096
    cuda = driver()
    print(f"native atomics from GPU 0 to GPU 1: {cuda.adds_at(0, 1)}; flushes: {cuda.flushes(1)}")
    with (
        TransferEngine(name="far") as far,
        TransferEngine(name="near") as near,
        TransferEngine(name="there") as there,
    ):
        dst = torch.zeros((2, WRITES, nbytes), dtype=torch.uint8, device="cuda:1")
        torch.cuda.synchronize(1)
        theirs = there.register(dst)
        imm = there.new_imm()
        ticket = there.expect(imm, nbytes=2 * WRITES * nbytes)
        stream = torch.cuda.Stream(device=1)  # type: ignore[no-untyped-call]
        sources = []
        for number, engine in enumerate((far, near)):
            device = f"cuda:{number}"
            src = torch.full((nbytes,), 7, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(number)
            region = engine.register(src)
            link = engine.connect(there.address, transport="cuda_ipc")
            link.write(region, 0, theirs.descriptor, 0, 1).wait(60)
            sources.append((link, region))
        ticket.wait_on(stream)
        with torch.cuda.stream(stream):
            seen = dst.clone()
        for turn in range(WRITES):
            for number, (link, region) in enumerate(sources):
                offset = (number * WRITES + turn) * nbytes
                link.write(region, 0, theirs.descriptor, offset, nbytes, imm=imm)
        assert ticket.wait(60) == 2 * WRITES * nbytes
        stream.synchronize()
        assert int((seen == 7).sum()) == seen.numel()
