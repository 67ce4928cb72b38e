"""What the GPU tests share: an engine here, a peer in a process of its own, on one GPU or on two."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.engine.handshake import EngineAddress
from kvferry.engine.transfer import TransferEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.link import Link

ANSWER_S = 90.0  # how long a peer may take: kernels are compiled in it
ROOT = Path(__file__).parent.parent.parent


class GpuPeer:
    """A transfer engine with GPU memory in another process."""

    def __init__(self, device: int, environment: dict[str, str], **options: Any) -> None:
        ours, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "tests" / "gpu" / "gpu_peer.py"),
                    str(theirs.fileno()),
                    str(device),
                    json.dumps(options),
                ],
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
            )
        self._pipe = ours
        self.address = EngineAddress.decode(self.call("address"))

    def call(self, command: str, *arguments: Any, **options: Any) -> Any:
        """Runs a command of `gpu_peer.py` there; raises what it raised."""
        self._pipe.send((command, arguments, options))
        assert self._pipe.poll(ANSWER_S), f"the peer does not answer {command}"
        ok, value = self._pipe.recv()
        if not ok:
            raise value
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            if self.process.poll() is None:
                self.call("close")
        self.kill()
        self._pipe.close()


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(params=["one GPU", "two GPUs"], scope="session")
def peer_device(request: pytest.FixtureRequest) -> int:
    """The peer's GPU; ours is 0."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    device = int(request.param == "two GPUs")
    if device >= torch.cuda.device_count():
        pytest.skip("torch sees one CUDA device only")
    return device


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
