"""GPU memory and peers that die, restart, or never send what they were asked for."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from kvferry.engine.errors import DeadlineExceeded, NotRegistered, PeerLost
from kvferry.engine.layout.kv_layout import KVLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

NBYTES = 64 << 20
DRIVER_NBYTES = 2 << 20  # what the driver takes and gives back at a time, now and then


def free_nbytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what torch keeps is not lost
    return torch.cuda.mem_get_info(0)[0]


def lose(
    engine: TransferEngine, victim: GpuPeer, mine: torch.Tensor, region: object, writer_dies: bool
) -> None:
    """Kills a peer while many transfers run between it and this process."""
    theirs = victim.call("pool", bytes(NBYTES))
    link = engine.connect(victim.address, transport="cuda_ipc")
    victim.call("accept", engine.engine_id)
    link.write(region, 0, theirs, 0, NBYTES).wait(60)  # type: ignore[arg-type]
    writes = []
    if writer_dies:
        victim.call("stream_writes", theirs.region_id, region.descriptor, NBYTES)  # type: ignore[attr-defined]
    else:
        writes = [link.write(region, 0, theirs, 0, NBYTES) for _ in range(300)]  # type: ignore[arg-type]
    lost = engine.expect(engine.new_imm(), nbytes=1, links=[link])
    victim.kill()
    with pytest.raises(PeerLost):
        lost.wait(2)
    with pytest.raises(PeerLost):
        link.write(region, 0, theirs, 0, 1)  # type: ignore[arg-type]
    link.quiesced.wait(20)
    assert all(write.done() for write in writes)
    errors = {type(write.exception()) for write in writes}
    assert errors <= {type(None), PeerLost}
    mine.fill_(3)  # this process's GPU is well, and nobody writes here any more
    assert int((mine == 3).sum()) == NBYTES


@pytest.mark.parametrize("writer_dies", [True, False], ids=["writer", "receiver"])
@pytest.mark.parametrize(("rounds", "peers"), [(2, 4), pytest.param(5, 10, marks=pytest.mark.soak)])
def test_peers_die_in_mid_transfer_and_leave_nothing_behind(
    engine: TransferEngine,
    start_peer: Callable[..., GpuPeer],
    peer_device: int,
    rounds: int,
    peers: int,
    writer_dies: bool,
) -> None:
    """And one round more, in which is allocated what is allocated once."""
    mine = torch.zeros(NBYTES, dtype=torch.uint8, device="cuda")
    region = engine.register(mine)
    free = []
    with ThreadPoolExecutor(peers) as starters:
        for _ in range(rounds + 1):
            # They start at the same time, and none is left when memory is looked at.
            for victim in starters.map(start_peer, [peer_device] * peers):
                lose(engine, victim, mine, region, writer_dies)
            free.append(free_nbytes())
    assert free[0] - free[-1] <= DRIVER_NBYTES, free
    survivor = start_peer(peer_device)
    theirs = survivor.call("pool", bytes(4096))
    link = engine.connect(survivor.address, transport="cuda_ipc")
    link.write(region, 0, theirs, 0, 4096).wait(60)
    assert survivor.call("peek", theirs.region_id) == bytes([3]) * 4096


def test_what_a_restarted_peer_had_given_is_never_used(
    engine: TransferEngine, start_peer: Callable[..., GpuPeer], peer_device: int
) -> None:
    region = engine.register(torch.ones(4096, dtype=torch.uint8, device="cuda"))
    cache = torch.ones((2, 8, 64), dtype=torch.int16, device="cuda")
    local = engine.register_cache(KVLayout.from_tensors([cache], "plane block dim"), [cache])
    first = start_peer(peer_device, name="peer")
    old = first.call("pool", bytes(4096))
    old_plan = engine.plan(local, first.call("cache", [cache.cpu().numpy()], "plane block dim"))
    link = engine.connect(first.address, transport="cuda_ipc")
    link.write(region, 0, old, 0, 4096).wait(60)
    first.kill()
    link.quiesced.wait(20)
    second = start_peer(peer_device, name="peer")
    new = second.call("pool", bytes(4096))
    with pytest.raises(PeerLost):
        link.write(region, 0, old, 0, 4096)
    link = engine.connect(second.address, transport="cuda_ipc")
    with pytest.raises(NotRegistered, match="has restarted"):
        link.write(region, 0, old, 0, 4096)
    with pytest.raises(NotRegistered, match="has restarted"):
        link.write_blocks(old_plan, [0], [1])
    with pytest.raises(NotRegistered, match="has restarted"):
        link.prepare(old_plan)
    assert second.call("peek", new.region_id) == bytes(4096)
    link.write(region, 0, new, 0, 4096).wait(60)
    assert second.call("peek", new.region_id) == bytes([1]) * 4096


def test_a_counter_that_never_completes_ends_by_its_deadline(
    engine: TransferEngine, link: Link, peer: GpuPeer
) -> None:
    """Its blocks stay in danger until the link is down, and what comes late completes nothing."""
    mine = torch.zeros(8192, dtype=torch.uint8, device="cuda")
    region = engine.register(mine)
    theirs = peer.call("pool", bytes([9]) * 8192)
    imm = engine.new_imm()
    ticket = engine.expect(imm, nbytes=8192, links=[link], timeout_s=0.3)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    ticket.wait_on(stream)
    assert peer.call("write", theirs.region_id, region.descriptor, 4096, imm) == 4096
    with pytest.raises(DeadlineExceeded):
        ticket.wait(10)
    stream.synchronize()  # it goes on
    assert not link.quiesced.done()
    assert peer.call("write", theirs.region_id, region.descriptor, 4096, imm) == 4096
    with pytest.raises(DeadlineExceeded):
        ticket.wait(0)
    slots = 1 << 16  # the word that the late bytes went to is nobody else's
    assert imm % slots not in {engine.new_imm() % slots for _ in range(100)}
    link.close()
    link.quiesced.wait(20)
    mine.fill_(3)
    torch.cuda.synchronize()
    assert int((mine == 3).sum()) == 8192
