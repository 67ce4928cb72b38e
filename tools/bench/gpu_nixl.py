"""NIXL (UCX) between two processes, GPU 0 to GPU 1, on the block lists of `gpu_measure`. Needs NIXL:

PYTHONPATH=src python3 -m kvferry.tools.bench.gpu_nixl
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

POOL_NBYTES = 4 << 30
SHAPES = ((1 << 20, 32 << 10), (64 << 20, 32 << 10), (256 << 20, 32 << 10))
SECONDS = 4.0


def _agent(name: str) -> Any:
    from nixl_cu13._api import nixl_agent, nixl_agent_config  # type: ignore[import-not-found]

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def serve(pipe: Connection[Any, Any]) -> None:
    """The receiving process."""
    import torch

    torch.cuda.set_device(1)
    pool = torch.zeros(POOL_NBYTES, dtype=torch.uint8, device="cuda:1")
    agent = _agent("server")
    agent.register_memory(pool)
    pipe.send((agent.get_agent_metadata(), pool.data_ptr()))
    agent.add_remote_agent(pipe.recv())
    pipe.send(None)
    while True:
        agent.get_new_notifs()
        if pipe.poll(0):
            request = pipe.recv()
            if request is None:
                os._exit(0)
            offset, nbytes = request
            pipe.send(pool[offset : offset + nbytes].cpu().numpy())


def _descriptors(base: int, ids: Any, nbytes: int, device: int) -> Any:
    rows = np.zeros((len(ids), 3), np.uint64)
    rows[:, 0] = np.uint64(base) + ids.astype(np.uint64) * np.uint64(nbytes)
    rows[:, 1], rows[:, 2] = nbytes, device
    return rows


def main() -> None:
    import torch

    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs,), daemon=True).start()
    torch.cuda.set_device(0)
    pool = torch.randint(0, 255, (POOL_NBYTES,), dtype=torch.uint8, device="cuda:0")
    agent = _agent("client")
    agent.register_memory(pool)
    if not pipe.poll(60):
        sys.exit("NIXL's server did not come up")
    metadata, there = pipe.recv()
    pipe.send(agent.get_agent_metadata())
    remote = agent.add_remote_agent(metadata)
    pipe.recv()
    random = np.random.default_rng(7)
    for total, nbytes in SHAPES:
        count, slots = total // nbytes, POOL_NBYTES // nbytes
        src, dst = (random.permutation(slots)[:count] for _ in range(2))
        mine = agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", _descriptors(pool.data_ptr(), src, nbytes, 0), "VRAM"
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
            if time.perf_counter() > stop_s and seconds:
                break
        pipe.send((int(dst[-1]) * nbytes, nbytes))
        wanted = pool[int(src[-1]) * nbytes :][:nbytes].cpu().numpy()
        right = bool(np.array_equal(pipe.recv(), wanted))
        micros = statistics.median(seconds) * 1e6
        row = {"total_nbytes": total, "piece_nbytes": nbytes, "us": micros, "right": right}
        print(json.dumps(row), flush=True)
    pipe.send(None)
    time.sleep(0.2)
    os._exit(0)


if __name__ == "__main__":
    main()
