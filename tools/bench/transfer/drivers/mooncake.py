"""Mooncake's driver: its transfer engine over tcp, lists of addresses a request.

Runs in an environment that has Mooncake and NumPy, and needs nothing else of kvferry.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from kvferry.tools.bench.transfer.driver import WRITE, Driver
from kvferry.tools.bench.transfer.workload import sides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvferry.tools.bench.transfer.workload import Pool, Shape


class MooncakeDriver(Driver):
    """One transfer engine. The receiver of a write is told nothing: its sender's status counts."""

    notifies = False

    def __init__(
        self, end: str, pool: Pool, shapes: Sequence[Shape], *, protocol: str = "tcp"
    ) -> None:
        super().__init__(end, pool, shapes)
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "2")
        # By default a batch of 4,096 pieces is refused: its queue is shorter.
        longest = max(8192, *(shape.num_pieces for shape in shapes))
        os.environ.setdefault("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", str(longest))
        api: Any = importlib.import_module("mooncake.engine")
        self._engine = api.TransferEngine()
        _check(self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", protocol, ""), "initialize")
        _check(self._engine.register_memory(pool.address, pool.nbytes), "register_memory")
        self._peer = ""
        self._peer_address = 0

    def publish(self) -> dict[str, Any]:
        return {
            "address": self.pool.address,
            "name": f"127.0.0.1:{self._engine.get_rpc_port()}",
        }

    def meet(self, other: dict[str, Any]) -> None:
        self._peer, self._peer_address = other["name"], other["address"]

    def transfer(self, shape: Shape, request: int, operation: str, token: int) -> None:
        here, there = sides(shape, request, write=operation == WRITE)
        status = getattr(self._engine, f"batch_transfer_sync_{operation}")(
            self._peer,
            (self.pool.address + here * shape.block_nbytes).tolist(),
            (self._peer_address + there * shape.block_nbytes).tolist(),
            [shape.block_nbytes] * shape.num_pieces,
        )
        _check(status, f"batch_transfer_sync_{operation}")

    def close(self) -> None:
        self._engine.unregister_memory(self.pool.address)


def _check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"Mooncake's {call} returned {status}")
