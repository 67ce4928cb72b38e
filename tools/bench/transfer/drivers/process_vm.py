"""The limit of cma: `process_vm_writev` on lists that were made beforehand, no engine at all."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from typing import TYPE_CHECKING, Any

from kvferry.engine.memory import iovec
from kvferry.engine.transports.cma.path import permit_peers
from kvferry.tools.bench.transfer.drivers.plain_socket import SocketDriver
from kvferry.tools.bench.transfer.workload import NUM_REQUESTS, block_ids, piece_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvferry.tools.bench.transfer.workload import Pool, Shape


class VmDriver(SocketDriver):
    """System calls alone, by the caller's thread and `threads - 1` others; a byte says the end."""

    def __init__(self, end: str, pool: Pool, shapes: Sequence[Shape], *, threads: int) -> None:
        super().__init__(end, pool, shapes)
        permit_peers()
        self._threads = threads
        self._peer: dict[str, Any] = {}
        self._lists: dict[tuple[Shape, int], list[tuple[iovec.Iovec, iovec.Iovec]]] = {}
        self._tasks: queue.SimpleQueue[tuple[iovec.Iovec, iovec.Iovec] | None]
        self._tasks = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._workers = [threading.Thread(target=self._work) for _ in range(threads - 1)]
        for worker in self._workers:
            worker.start()

    def publish(self) -> dict[str, Any]:
        return super().publish() | {"pid": os.getpid(), "address": self.pool.address}

    def meet(self, other: dict[str, Any]) -> None:
        super().meet(other)
        self._peer = other

    def select(self, shape: Shape) -> None:
        if self.end == "src" and (shape, 0) not in self._lists:
            for request in range(NUM_REQUESTS):
                self._lists[shape, request] = self._cut(shape, request)

    def transfer(self, shape: Shape, request: int, operation: str, token: int) -> None:
        parts = self._lists[shape, request % NUM_REQUESTS]
        for part in parts[1:]:
            self._tasks.put(part)
        self._copy(*parts[0])
        for _ in parts[1:]:
            self._ends.get()
        self._socket.sendall(b"\0")

    def arrived(self, shape: Shape, request: int) -> None:
        if not self._socket.recv(1):
            raise ConnectionError("the sender closed")

    def close(self) -> None:
        for _ in self._workers:
            self._tasks.put(None)
        for worker in self._workers:
            worker.join()
        super().close()

    def _cut(self, shape: Shape, request: int) -> list[tuple[iovec.Iovec, iovec.Iovec]]:
        """Return a part for each thread; blocks in the order of their destinations, as kvferry
        does."""
        src_ids, dst_ids = block_ids(shape, request)
        order = dst_ids.argsort()
        src = piece_numbers(shape, src_ids[order]) * shape.block_nbytes + self.pool.address
        dst = piece_numbers(shape, dst_ids[order]) * shape.block_nbytes + self._peer["address"]
        nbytes = (src * 0) + shape.block_nbytes
        bounds = [len(src) * number // self._threads for number in range(self._threads + 1)]
        return [
            (iovec.make(src[a:b], nbytes[a:b]), iovec.make(dst[a:b], nbytes[a:b]))
            for a, b in itertools.pairwise(bounds)
        ]

    def _copy(self, local: iovec.Iovec, remote: iovec.Iovec) -> None:
        nbytes = int(local[:, 1].sum())
        iovec.process_vm(self._peer["pid"], local.copy(), remote.copy(), nbytes, write=True)

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            self._copy(*task)
            self._ends.put(None)
