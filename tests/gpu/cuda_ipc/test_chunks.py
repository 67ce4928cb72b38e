"""GPU memory without an IPC handle: torch's expandable segments go by file descriptors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kvferry.engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.engine.transfer_engine import TransferEngine
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

SETTING = "PYTORCH_CUDA_ALLOC_CONF"
NBYTES = 50 << 20  # of two chunks and a half, if it begins with one
PIECE = 96 << 10


@pytest.fixture
def expandable(start_peer: Callable[..., GpuPeer], peer_device: int) -> GpuPeer:
    """A peer whose GPU memory is mapped in chunks."""
    return start_peer(peer_device, {SETTING: "expandable_segments:True"}, name="expandable")


def descriptors(peer: GpuPeer) -> int:
    return len(os.listdir(f"/proc/{peer.process.pid}/fd"))


def test_chunks_are_written_read_and_given_back(
    engine: TransferEngine, expandable: GpuPeer
) -> None:
    random = np.random.default_rng(3)
    expected, mine = (random.integers(0, 256, NBYTES, np.uint8) for _ in range(2))
    before = descriptors(expandable)
    remote = expandable.call("pool", expected.tobytes())
    assert not remote.cuda.handle
    assert len(remote.cuda.chunks) > 1
    assert descriptors(expandable) >= before + len(remote.cuda.chunks)
    own = torch.from_numpy(mine).cuda()
    region = engine.register(own)
    link = engine.connect(expandable.address, transport="cuda_ipc")
    expandable.call("accept", engine.engine_id)
    opened = descriptors(expandable)
    places = random.permutation(NBYTES // PIECE) * PIECE
    half = len(places) // 2
    for src, dst in zip(places[:half], places[half:], strict=False):
        expected[dst : dst + PIECE] = mine[src : src + PIECE]
    link.write(region, places[:half], remote, places[half : 2 * half], PIECE).wait(30)
    assert expandable.call("peek", remote.region_id) == expected.tobytes()
    link.read(region, 0, remote, 0, NBYTES).wait(30)
    assert own.cpu().numpy().tobytes() == expected.tobytes()
    expandable.call("deregister", remote.region_id)
    assert descriptors(expandable) == opened - len(remote.cuda.chunks)
    with pytest.raises(EngineError):
        link.read(region, 0, remote, 0, NBYTES).wait(30)
    again = expandable.call("pool", mine.tobytes())
    link.read(region, 0, again, 0, NBYTES).wait(30)
    assert own.cpu().numpy().tobytes() == mine.tobytes()


def test_a_peer_that_writes_from_chunks(engine: TransferEngine, expandable: GpuPeer) -> None:
    content = np.random.default_rng(4).integers(0, 256, NBYTES, np.uint8).tobytes()
    theirs = expandable.call("pool", content)
    own = torch.zeros(NBYTES, dtype=torch.uint8, device="cuda")
    region = engine.register(own)
    engine.connect(expandable.address, transport="cuda_ipc")
    expandable.call("accept", engine.engine_id)
    imm = engine.new_imm()
    ticket = engine.expect(imm, nbytes=NBYTES)
    expandable.call("write", theirs.region_id, region.descriptor, NBYTES, imm)
    assert ticket.wait(30) == NBYTES
    assert own.cpu().numpy().tobytes() == content


@pytest.mark.parametrize("transports", ["cuda_ipc", "tcp"])
def test_what_cannot_be_shared_is_refused_where_it_would_be_shared(transports: str) -> None:
    code = (
        "import torch\n"
        "from kvferry.engine.transfer_engine import TransferEngine\n"
        f"with TransferEngine(transports=({transports!r},)) as engine:\n"
        "    try: print(engine.register(torch.zeros(1 << 20, device='cuda')))\n"
        "    except Exception as error: print(error)\n"
    )
    environment = os.environ | {
        SETTING: "backend:cudaMallocAsync",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    wanted = SETTING if transports == "cuda_ipc" else "MemoryRegion"
    assert wanted in done.stdout, done.stdout + done.stderr
