"""NIXL (UCX) between two processes, GPU 0 to GPU 1, on blocks like those of `measure.py`.

Runs in any environment that has NIXL for CUDA 12 or 13 and NumPy; of kvferry it needs the driver's
functions alone, and no torch:

PYTHONPATH=src python3 -m kvferry.tools.bench.gpu.nixl

Prints a row of JSON a shape, or why there is none.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.engine.errors import DeviceError
from kvferry.engine.memory.cuda_driver import driver
from kvferry.tools.bench.peers import Peer, PeerEnded

if TYPE_CHECKING:
    from collections.abc import Sequence

POOL_NBYTES = 1 << 30  # four times what moves at most: the L2 is cold
SHAPES = ((1 << 20, 32 << 10), (64 << 20, 32 << 10), (256 << 20, 32 << 10))
SECONDS = 4.0
DISTRIBUTIONS = ("nixl_cu13", "nixl_cu12", "nixl")  # the last one chooses between the others


class NoNixl(Exception):
    """NIXL is not there, or does not start; one sentence."""


def import_api(names: Sequence[str] = DISTRIBUTIONS) -> Any:
    """NIXL's Python module, of whichever wheel is installed.

    Raises:
        NoNixl: none is, or none can be loaded.
    """
    reasons = []
    for name in names:
        try:
            return importlib.import_module(f"{name}._api")
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise NoNixl(
        f"{sys.executable} has no NIXL ({'; '.join(reasons)}): install nixl-cu12 or nixl-cu13 there, "
        "or name the Python that has it with --peer-python"
    )


def _agent(name: str) -> Any:
    api = import_api()
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))


class Pool:
    """Memory of one GPU, registered with an agent; its device's context becomes the thread's."""

    def __init__(self, device: int, name: str) -> None:
        self.device = device
        driver().enter(device)
        self.address = driver().allocate(device, POOL_NBYTES)
        self.agent = _agent(name)
        self.agent.register_memory([(self.address, POOL_NBYTES, device, "")], "VRAM")

    def fill(self) -> None:
        """With random bytes."""
        words = np.random.default_rng(1).integers(0, 1 << 63, POOL_NBYTES // 8, np.int64)
        driver().copy(self.device, self.address, words.ctypes.data, POOL_NBYTES, 0)
        driver().synchronize(self.device)

    def digest(self, ids: Any, nbytes: int) -> bytes:
        """Of these blocks, in this order."""
        blocks = np.empty((len(ids), nbytes), np.uint8)
        for row, block in zip(blocks, ids.tolist(), strict=True):
            there = self.address + block * nbytes
            driver().copy(self.device, row.ctypes.data, there, nbytes, 0)
        driver().synchronize(self.device)
        return hashlib.blake2b(blocks.data).digest()


class Server(Pool):
    """The receiving process."""

    def __init__(self) -> None:
        super().__init__(1, "server")

    def meet(self, metadata: bytes) -> tuple[bytes, int]:
        """Know the other agent; what it must know of this one, and the pool's address."""
        self.agent.add_remote_agent(metadata)
        return self.agent.get_agent_metadata(), self.address

    def idle(self) -> None:
        """Let the library work."""
        self.agent.get_new_notifs()

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None
        if failed:
            traceback.print_exc()
        os._exit(failed)  # not through the interpreter's exit, at which its libraries may crash


def _descriptors(base: int, ids: Any, nbytes: int, device: int) -> Any:
    rows = np.zeros((len(ids), 3), np.uint64)
    rows[:, 0] = np.uint64(base) + ids.astype(np.uint64) * np.uint64(nbytes)
    rows[:, 1], rows[:, 2] = nbytes, device
    return rows


def main() -> None:
    try:
        measure()
    except (NoNixl, DeviceError) as error:
        print(json.dumps({"left_out": str(error)}), flush=True)
        os._exit(0)


def measure() -> None:
    """Print a row a shape.

    Raises:
        NoNixl: it does not come up.
    """
    import_api()
    if driver().device_count() < 2:
        raise NoNixl("two GPUs are needed")
    peer = Peer(Server)
    pool = Pool(0, "client")
    pool.fill()
    agent = pool.agent
    try:
        peer.tell("meet", agent.get_agent_metadata())
        metadata, there = peer.answer(60)
    except PeerEnded as error:
        raise NoNixl(f"NIXL does not come up: {error}") from None
    remote = agent.add_remote_agent(metadata)
    random = np.random.default_rng(7)
    for total, nbytes in SHAPES:
        count, slots = total // nbytes, POOL_NBYTES // nbytes
        src, dst = (random.permutation(slots)[:count] for _ in range(2))
        mine = agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", _descriptors(pool.address, src, nbytes, 0), "VRAM"
        )
        yours = agent.prep_xfer_dlist(remote, _descriptors(there, dst, nbytes, 1), "VRAM")
        index = np.arange(count, dtype=np.int32)
        seconds: list[float] = []
        stop_s = time.perf_counter() + SECONDS
        for turn in range(30):
            start_s = time.perf_counter()
            handle = agent.make_prepped_xfer("WRITE", mine, index, yours, index)
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if turn >= 3:
                seconds.append(time.perf_counter() - start_s)
            handle.release()
            if state != "DONE":
                raise NoNixl(f"NIXL ended a transfer of {total >> 20} MiB with {state}")
            if time.perf_counter() > stop_s and seconds:
                break
        right = peer.call("digest", dst, nbytes) == pool.digest(src, nbytes)
        micros = statistics.median(seconds) * 1e6
        row = {"total_nbytes": total, "piece_nbytes": nbytes, "us": micros, "right": right}
        print(json.dumps(row), flush=True)
    peer.close()
    os._exit(0)


if __name__ == "__main__":
    main()
