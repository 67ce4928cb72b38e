"""NIXL's driver: descriptor lists prepared once, indices a request, a notification as completion.

Runs in an environment that has NIXL and NumPy, and needs nothing else of kvferry.
"""

from __future__ import annotations

import base64
import importlib
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.tools.bench.transfer.driver import TIMEOUT_S, WRITE, Driver, poll_s
from kvferry.tools.bench.transfer.workload import sides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvferry.tools.bench.transfer.workload import Pool, Shape

HOST = "DRAM"


class NixlDriver(Driver):
    """One agent with the UCX backend and its progress thread, which is how engines run it."""

    def __init__(self, end: str, pool: Pool, shapes: Sequence[Shape], *, ucx_tls: str = "") -> None:
        super().__init__(end, pool, shapes)
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        if ucx_tls:
            os.environ["UCX_TLS"] = ucx_tls
        api: Any = importlib.import_module("nixl._api")
        config = api.nixl_agent_config(enable_prog_thread=True, backends=["UCX"])
        self._agent = api.nixl_agent(end, config)
        whole = [(pool.address, pool.nbytes, 0, "")]
        self._registration = self._agent.register_memory(whole, HOST)
        self._lists: dict[Shape, tuple[Any, Any]] = {}
        self._peer = ""
        self._peer_address = 0

    def publish(self) -> dict[str, Any]:
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode("ascii")
        return {"metadata": metadata, "address": self.pool.address}

    def meet(self, other: dict[str, Any]) -> None:
        self._peer = self._agent.add_remote_agent(base64.b64decode(other["metadata"]))
        self._agent.make_connection(self._peer)
        self._peer_address = other["address"]

    def select(self, shape: Shape) -> None:
        if shape not in self._lists:
            self._lists[shape] = (
                self._prepare_list("NIXL_INIT_AGENT", self.pool.address, shape),
                self._prepare_list(self._peer, self._peer_address, shape),
            )

    def transfer(self, shape: Shape, request: int, operation: str, token: int) -> None:
        numbers = sides(shape, request, write=operation == WRITE)
        here, there = (each.astype(np.int32) for each in numbers)
        local, remote = self._lists[shape]
        note = b"done" if operation == WRITE else b""
        handle = self._agent.make_prepped_xfer(operation.upper(), local, here, remote, there, note)
        state = self._agent.transfer(handle)
        pause_s, deadline_s = poll_s(shape), time.monotonic() + TIMEOUT_S
        while state == "PROC" and time.monotonic() < deadline_s:
            time.sleep(pause_s)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL ended a transfer with {state}")
        handle.release()

    def arrived(self, shape: Shape, request: int) -> None:
        pause_s, deadline_s = poll_s(shape), time.monotonic() + TIMEOUT_S
        while not self._agent.get_new_notifs():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no notification in {TIMEOUT_S} s")
            time.sleep(pause_s)

    def close(self) -> None:
        for lists in self._lists.values():
            for handle in lists:
                handle.release()
        self._agent.deregister_memory(self._registration)
        self._agent.remove_remote_agent(self._peer)

    def _prepare_list(self, agent: str, address: int, shape: Shape) -> Any:
        count = shape.num_rows * shape.pool_blocks
        table = np.zeros((count, 3), np.uint64)  # address, nbytes, device
        table[:, 0] = address + np.arange(count, dtype=np.uint64) * np.uint64(shape.block_nbytes)
        table[:, 1] = shape.block_nbytes
        return self._agent.prep_xfer_dlist(agent, table, HOST)
