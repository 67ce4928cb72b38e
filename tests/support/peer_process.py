"""A peer in a process of its own: a transfer engine behind a command loop.

Started by `tests/conftest.py` with the number of an inherited pipe and the engine's options as
JSON. Takes `(command, arguments, options)` and answers `(ok, value or exception)`. Imports no torch.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.engine.errors import EngineError
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory import iovec
from kvferry.engine.transfer_engine import TransferEngine
from tests.support import shuffle
from tests.support.child import pipe_of_child, serve
from tests.support.leaks import LeakCheck

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.descriptors import CacheDescriptor, RegionDescriptor
    from kvferry.engine.memory.regions import MemoryRegion, RegisteredCache
    from kvferry.engine.transfer.ticket import Ticket


class Commands:
    """What a test can make the peer do: every public method is a command."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._gpu: Any = stand_in_gpu() if options.pop("interpreted_gpu", False) else None
        self._engine = TransferEngine(**options)
        self._arrays: dict[int, np.ndarray[Any, Any]] = {}
        self._regions: dict[int, MemoryRegion] = {}
        self._caches: list[tuple[RegisteredCache, list[np.ndarray[Any, Any]]]] = []
        self._tickets: list[Ticket] = []
        self._links: dict[str, Link] = {}
        self._checksum = iovec.checksum
        self._leaks = LeakCheck()

    def address(self) -> bytes:
        return self._engine.address.encode()

    # Memory.

    def pool(self, nbytes: int, fill: int) -> RegionDescriptor:
        array = np.full(nbytes, fill, np.uint8)
        region = self._engine.register(array)
        self._arrays[region.region_id], self._regions[region.region_id] = array, region
        return region.descriptor

    def unmapped(self, nbytes: int) -> RegionDescriptor:
        """Registers memory, and unmaps it behind the engine."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype, libc.mmap.argtypes = (
            ctypes.c_void_p,
            (
                ctypes.c_void_p,
                ctypes.c_size_t,
                *(ctypes.c_int,) * 3,
                ctypes.c_long,
            ),
        )
        libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        region = self._engine.register(iovec.bytes_at(address, nbytes))
        self._regions[region.region_id] = region
        assert libc.munmap(address, nbytes) == 0
        return region.descriptor

    def peek(self, region_id: int, start: int = 0, stop: int | None = None) -> bytes:
        return self._arrays[region_id][start:stop].tobytes()

    def poke(self, region_id: int, start: int, data: bytes) -> None:
        self._arrays[region_id][start : start + len(data)] = np.frombuffer(data, np.uint8)

    def cache(self, arrays: list[np.ndarray[Any, Any]], dims: str) -> CacheDescriptor:
        """Registers a cache with this content and these strides."""
        layout = KVLayout.from_tensors(arrays[0] if "layer" in dims.split() else arrays, dims)
        registered = self._engine.register_cache(layout, arrays)
        self._caches.append((registered, arrays))
        return registered.descriptor

    def cache_of(self, arrays: list[np.ndarray[Any, Any]], layout: KVLayout) -> CacheDescriptor:
        """Registers a cache of this layout with this content, given as bytes."""
        registered = self._engine.register_cache(layout, arrays)
        self._caches.append((registered, arrays))
        return registered.descriptor

    def peek_cache(self) -> list[np.ndarray[Any, Any]]:
        """The content of the latest cache."""
        return self._caches[-1][1]

    def gpu(self, **state: bool) -> tuple[int, int, int]:
        """Sets `registers` or `broken` of this process's GPU. Its movers, pinned bytes and moved
        pieces."""
        for name, value in state.items():
            setattr(self._gpu, name, value)
        return self._gpu.movers, sum(self._gpu.pinned.values()), self._gpu.moved

    def deregister(self, region_id: int, timeout_s: float = 10.0) -> None:
        """Deregisters a pool. Its memory stays, so that a test can see late writes in it."""
        self._regions[region_id].deregister(timeout_s)

    # Links and transfers.

    def accept(self, engine_id: str) -> str:
        """Takes the link from that engine as the current one; returns its transport."""
        self._links[engine_id] = link = self._engine.accept_link(engine_id)
        return link.transport

    def connect(self, address: bytes, transport: str) -> None:
        link = self._engine.connect(address, transport=transport)
        self._links[link.peer.engine_id] = link

    def write(
        self,
        to: str,
        src: int,
        src_offsets: Any,
        dst: RegionDescriptor,
        dst_offsets: Any,
        nbytes: Any,
        imm: int | None = None,
    ) -> int:
        link = self._links[to]
        return self._keep(
            link.write(self._regions[src], src_offsets, dst, dst_offsets, nbytes, imm=imm)
        )

    def read(
        self,
        to: str,
        dst: int,
        dst_offsets: Any,
        src: RegionDescriptor,
        src_offsets: Any,
        nbytes: Any,
    ) -> int:
        link = self._links[to]
        return self._keep(link.read(self._regions[dst], dst_offsets, src, src_offsets, nbytes))

    def signal(self, to: str, imm: int) -> int:
        return self._keep(self._links[to].signal(imm))

    def new_imm(self) -> int:
        return self._engine.new_imm()

    def expect(
        self,
        imm: int,
        *,
        nbytes: int | None = None,
        writes: int | None = None,
        linked: tuple[str, ...] = (),
        timeout_s: float = 30.0,
    ) -> int:
        links = [self._links[engine_id] for engine_id in linked]
        return self._keep(
            self._engine.expect(imm, nbytes=nbytes, writes=writes, links=links, timeout_s=timeout_s)
        )

    def wait(self, ticket: int, timeout_s: float = 15.0) -> int:
        return self._tickets[ticket].wait(timeout_s)

    def done(self, ticket: int) -> bool:
        return self._tickets[ticket].done()

    def cancel(self, ticket: int) -> bool:
        return self._tickets[ticket].cancel()

    def abort(self, to: str, imm: int, reason: str) -> None:
        self._links[to].abort(imm, reason)

    def close_link(self, to: str, timeout_s: float = 2.0) -> None:
        self._links[to].close(timeout_s)

    def link_down(self, to: str) -> EngineError | None:
        """Waits until the link to that engine has quiesced; says why it went down."""
        self._links[to].quiesced.wait(15.0)
        return self._links[to].error

    def late_writes(self) -> int:
        return self._engine.late_writes

    def close(self) -> None:
        self._engine.close()

    # The process itself.

    def spoil_checksums(self, spoil: bool) -> None:
        """Makes every checksum computed in this process wrong, or right again."""
        right = self._checksum
        iovec.checksum = (lambda iov: right(iov) ^ 1) if spoil else right

    def leaks(self) -> None:
        """Fails if more threads or descriptors stay than after the first call."""
        self._leaks.take()

    def limit_descriptors(self, limit: bool) -> None:
        """Leaves this process no descriptor, or as many as before."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if limit:
            lowest_free = os.dup(0)
            os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free if limit else hard, hard))

    def fork(self) -> int:
        """Makes a child that does nothing, until it is killed; returns its number."""
        child = os.fork()
        if not child:
            try:
                signal.pause()
            finally:
                os._exit(0)
        return child

    def hold_interpreter(self, seconds: float) -> None:
        """Lets no thread of this process run Python for so long."""
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))

    def busy(self, seconds: float) -> float:
        """The processor time that this process takes in so many seconds of doing nothing."""
        before = time.process_time()
        time.sleep(seconds)
        return time.process_time() - before

    def stream(self, to: str, src: int, dst: RegionDescriptor, nbytes: int) -> None:
        """Writes the whole pool again and again, in the background, until the link is down."""
        link, region = self._links[to], self._regions[src]

        def run() -> None:
            try:
                while True:
                    link.write(region, 0, dst, 0, nbytes).wait(15.0)
            except EngineError:
                return

        threading.Thread(target=run, daemon=True).start()

    def _keep(self, ticket: Ticket) -> int:
        self._tickets.append(ticket)
        return len(self._tickets) - 1


def stand_in_gpu() -> Any:
    """A GPU for this process whose kernels are interpreted. Needs torch and Triton."""
    import pytest

    from tests.support.interpreted_gpu import StandIn

    return StandIn(pytest.MonkeyPatch())


def main() -> None:
    shuffle.install()
    serve(pipe_of_child(), Commands(json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
