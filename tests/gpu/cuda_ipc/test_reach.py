"""GPU memory of a peer that kernels do not reach, or whose GPU is hidden: the bytes arrive all the same."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.engine.errors import DeviceError, PlanError
from kvferry.engine.memory import cuda_driver as cuda
from kvferry.engine.transports.verbs import topology
from tests.gpu.cuda_ipc.test_ipc import HND, NHD, canonical, moved, some_ids, two_caches
from tests.gpu.cuda_ipc.test_tokens import check, shuffled
from tests.gpu.cuda_ipc.test_tokens import moved as tokens_moved
from tests.support.caches import PagedPool, expect_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

NBYTES = 1 << 20


@pytest.fixture(params=["no peer access", "not mapped"])
def unreached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """From here on kernels of this process do not reach the peer's memory."""

    def refuse(_driver: Any, _device: int, _handle: bytes) -> int:
        raise DeviceError("cuIpcOpenMemHandle failed: refused on purpose", operation="cuda")

    if request.param == "no peer access":
        monkeypatch.setattr(cuda.Driver, "can_access", lambda _driver, _device, _peer: False)
    else:
        monkeypatch.setattr(cuda.Driver, "open", refuse)
    name: str = request.param
    return name


def test_an_engine_knows_where_its_gpu_is(engine: TransferEngine) -> None:
    """So it uses the RDMA devices that are near."""
    assert engine._core.regions.gpu_addresses() == set()
    engine.register(torch.zeros(1, dtype=torch.uint8, device="cuda"))
    (address,) = engine._core.regions.gpu_addresses()
    assert address in [gpu.address for gpu in topology.gpus()]


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("write", [True, False])
def test_pieces_are_staged_after_the_compute(
    engine: TransferEngine, link: Link, peer: GpuPeer, write: bool
) -> None:
    """The first transfer of a link, begun before anybody knows that it has to be staged."""
    mine = torch.zeros(NBYTES, dtype=torch.uint8, device="cuda")
    region = engine.register(mine)
    theirs = peer.call("pool", bytes([9]) * NBYTES)
    torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
    mine.fill_(7)
    if not write:
        seen = mine.clone()
        assert link.read(region, 64, theirs, 0, 4096).wait(60) == 4096
        assert bytes(mine[64:4160].cpu().numpy()) == bytes([9]) * 4096
        assert int((mine == 7).sum()) == NBYTES - 4096
        assert int((seen == 7).sum()) == NBYTES
        return
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=4096)
    assert link.write(region, 0, theirs, 64, 4096, imm=imm).wait(60) == 4096
    assert peer.call("wait", ticket) == 4096
    got = peer.call("peek", theirs.region_id)
    assert got == bytes([9]) * 64 + bytes([7]) * 4096 + bytes([9]) * (NBYTES - 4160)


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("prepared", [True, False])
def test_blocks_are_staged(
    engine: TransferEngine, link: Link, peer: GpuPeer, prepared: bool
) -> None:
    tensors, local, remote = two_caches(engine, peer, NHD, HND)
    plan = engine.plan(local, remote)
    if prepared:
        link.prepare(plan)
    src_ids, dst_ids = some_ids(11)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=plan.nbytes(11))
    assert link.write_blocks(plan, src_ids, dst_ids, imm=imm).wait(60) == plan.nbytes(11)
    peer.call("wait", ticket)
    src = canonical([tensor.cpu() for tensor in tensors], NHD)
    got = canonical(peer.call("peek_cache"), HND)
    assert torch.equal(got, moved(src, src_ids, dst_ids, range(3)))
    ids: Any = torch.tensor([1], device="cuda")
    with pytest.raises(PlanError, match="block ids on a GPU"):
        link.write_blocks(plan, ids, ids)  # so it was no kernel that moved them


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("write", [True, False])
def test_tokens_are_staged(engine: TransferEngine, link: Link, peer: GpuPeer, write: bool) -> None:
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
    again = dst.clone()
    with pytest.raises(PlanError, match="block tables on a GPU"):
        tokens_moved(engine, link, peer, src, again, (5, 275), write=write, on_gpu=True)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_the_peer_does_not_see(
    engine: TransferEngine, start_peer: Callable[..., GpuPeer]
) -> None:
    """Engines with a GPU each see their own alone. Whether the driver maps a hidden GPU's memory or
    it is staged, bytes arrive, both ways."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1"
    peer = start_peer(0, {"CUDA_VISIBLE_DEVICES": visible.split(",")[1]}, name="masked")
    mine = torch.full((NBYTES,), 3, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    region = engine.register(mine)
    theirs = peer.call("pool", bytes([9]) * NBYTES)
    link = engine.connect(peer.address, transport="cuda_ipc")
    assert peer.call("accept", engine.engine_id) == "cuda_ipc"
    imm = engine.new_imm()
    ticket = engine.expect(imm, nbytes=4096, links=[link])
    assert peer.call("write", theirs.region_id, region.descriptor, 4096, imm) == 4096
    assert ticket.wait(60) == 4096
    assert bytes(mine[:4096].cpu().numpy()) == bytes([9]) * 4096
    assert int((mine == 3).sum()) == NBYTES - 4096
    link.write(region, 4096, theirs, 8192, 4096).wait(60)
    got = peer.call("peek", theirs.region_id)
    assert got == bytes([9]) * 8192 + bytes([3]) * 4096 + bytes([9]) * (NBYTES - 12288)
    obstacles = peer.call("obstacles")
    print("memory of a hidden GPU is", f"staged: {obstacles}" if obstacles else "mapped")
    link.close()
