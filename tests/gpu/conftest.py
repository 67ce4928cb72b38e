"""What the GPU tests share: an engine here, a peer in a process of its own, on one GPU or on two.

Each test runs with both ends on one GPU; where there are two, with an end on each besides. What needs
two by itself says so (`two_gpus`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.wire.identity import EngineAddress
from tests.support.child import Child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.link.link import Link

ANSWER_S = 90.0  # how long a peer may take: kernels are compiled in it


class GpuPeer(Child):
    """A transfer engine with GPU memory in another process."""

    def __init__(self, device: int, environment: dict[str, str], **options: Any) -> None:
        super().__init__(
            "tests.gpu.gpu_peer",
            str(device),
            json.dumps(options),
            answer_s=ANSWER_S,
            environment=environment,
        )
        self.address = EngineAddress.decode(self.call("address"))


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch sees none")


def _arrangements() -> list[str]:
    return ["one GPU", "two GPUs"] if torch.cuda.device_count() > 1 else ["one GPU"]


@pytest.fixture(params=_arrangements(), scope="session")
def peer_device(request: pytest.FixtureRequest) -> int:
    """The peer's GPU; ours is 0."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch sees none")
    return int(request.param == "two GPUs")


@pytest.fixture
def two_gpus() -> None:
    """For what no arrangement on one GPU shows."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs 2 CUDA devices; torch sees {count}")


@pytest.fixture
def start_peer() -> Iterator[Callable[..., GpuPeer]]:
    """Starts peers that a test may kill."""
    started: list[GpuPeer] = []

    def start(device: int, environment: dict[str, str] | None = None, **options: Any) -> GpuPeer:
        started.append(GpuPeer(device, environment or {}, **options))
        return started[-1]

    yield start
    for peer in started:
        peer.end()


@pytest.fixture(scope="session")
def peer(peer_device: int) -> Iterator[GpuPeer]:
    """One peer for all tests that leave it alive."""
    process = GpuPeer(peer_device, {}, name="peer")
    yield process
    process.end()


@pytest.fixture
def engine() -> Iterator[TransferEngine]:
    with TransferEngine(name="here") as fresh:
        yield fresh


@pytest.fixture
def link(engine: TransferEngine, peer: GpuPeer) -> Iterator[Link]:
    """A fresh link to the peer over CUDA IPC."""
    fresh = engine.connect(peer.address, transport="cuda_ipc")
    assert peer.call("accept", engine.engine_id) == "cuda_ipc"
    yield fresh
    fresh.close()
