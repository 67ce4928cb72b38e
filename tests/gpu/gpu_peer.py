"""A peer in a process of its own, with GPU memory: a transfer engine behind a command loop.

Started by `tests/gpu/conftest.py` with the number of an inherited pipe, a device and the engine's
options as JSON. Takes `(command, arguments, options)` and answers `(ok, value or exception)`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.engine.errors import DeadlineExceeded, EngineError
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.transfer import stream_wait
from kvferry.engine.transfer_engine import TransferEngine
from tests.support.child import pipe_of_child, serve

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.descriptors import CacheDescriptor, RegionDescriptor
    from kvferry.engine.memory.regions import RegisteredCache
    from kvferry.engine.transfer.ticket import Ticket

MAX_NBYTES = 1 << 20


class Commands:
    """What a test can make the peer do: every public method is a command."""

    def __init__(self, device: int, options: dict[str, Any]) -> None:
        torch.cuda.set_device(device)
        self._device = f"cuda:{device}"
        self._engine = TransferEngine(**options)
        self._pools: dict[int, torch.Tensor] = {}
        self._regions: dict[int, Any] = {}
        self._caches: list[tuple[RegisteredCache, list[torch.Tensor]]] = []
        self._tickets: list[Ticket] = []
        self._copies: list[tuple[torch.cuda.Stream, list[torch.Tensor]]] = []
        self._link: Link | None = None

    def address(self) -> bytes:
        return self._engine.address.encode()

    def pool(self, content: bytes) -> RegionDescriptor:
        pool = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self._device)
        torch.cuda.synchronize()
        region = self._engine.register(pool)
        self._pools[region.region_id], self._regions[region.region_id] = pool, region
        return region.descriptor

    def peek(self, region_id: int) -> bytes:
        return self._pools[region_id].cpu().numpy().tobytes()

    def host_pool(self, nbytes: int, fill: int) -> RegionDescriptor:
        array = np.full(nbytes, fill, np.uint8)
        region = self._engine.register(array)
        self._pools[region.region_id] = torch.from_numpy(array)
        return region.descriptor

    def host_memory(self, content: bytes) -> RegionDescriptor:
        array = np.frombuffer(bytearray(content), np.uint8)
        region = self._engine.register(array)
        self._pools[region.region_id] = torch.from_numpy(array)
        return region.descriptor

    def deregister(self, region_id: int) -> None:
        self._regions[region_id].deregister()

    def cache(self, arrays: list[np.ndarray[Any, Any]], dims: str) -> CacheDescriptor:
        """Registers a cache on this peer's device with this content."""
        own = [torch.from_numpy(array.copy()).to(self._device) for array in arrays]
        torch.cuda.synchronize()
        layout = KVLayout.from_tensors(own[0] if "layer" in dims.split() else own, dims)
        registered = self._engine.register_cache(layout, own)
        self._caches.append((registered, own))
        return registered.descriptor

    def cache_of(self, arrays: list[np.ndarray[Any, Any]], layout: KVLayout) -> CacheDescriptor:
        """Registers a cache of this layout with this content, given as bytes."""
        own = [torch.from_numpy(array.copy()).to(self._device) for array in arrays]
        torch.cuda.synchronize()
        registered = self._engine.register_cache(layout, own)
        self._caches.append((registered, own))
        return registered.descriptor

    def views(
        self,
        memory: np.ndarray[Any, Any],
        places: list[tuple[tuple[int, ...], tuple[int, ...], int]],
        layout: KVLayout,
    ) -> CacheDescriptor:
        """Registers a cache whose tensors are views (sizes, strides, offset) of one memory."""
        whole = torch.from_numpy(memory.copy()).to(self._device)
        torch.cuda.synchronize()
        own = [whole.as_strided(*place) for place in places]
        registered = self._engine.register_cache(layout, own)
        self._caches.append((registered, own))
        return registered.descriptor

    def host_cache_of(
        self, arrays: list[np.ndarray[Any, Any]], layout: KVLayout
    ) -> CacheDescriptor:
        """As `cache_of`, in host memory."""
        own = [torch.from_numpy(array.copy()) for array in arrays]
        registered = self._engine.register_cache(layout, own)
        self._caches.append((registered, own))
        return registered.descriptor

    def deregister_cache(self) -> None:
        self._caches[-1][0].deregister()

    def peek_cache(self) -> list[np.ndarray[Any, Any]]:
        return [tensor.cpu().numpy() for tensor in self._caches[-1][1]]

    def accept(self, engine_id: str) -> str:
        self._link = self._engine.accept_link(engine_id)
        return self._link.transport

    def new_imm(self) -> int:
        return self._engine.new_imm()

    def expect(self, imm: int, *, named: bool = False, **options: Any) -> int:
        """Expects bytes of anybody, which a word of the GPU counts too; or of the named link alone,
        which only hosts count."""
        links = [self._link] if named and self._link is not None else []
        self._tickets.append(self._engine.expect(imm, links=links, **options))
        return len(self._tickets) - 1

    def wait(self, ticket: int, timeout_s: float = 20.0) -> int:
        return self._tickets[ticket].wait(timeout_s)

    def spin(self, ticket: int) -> int:
        return self._tickets[ticket].wait(spin=True)

    def obstacles(self) -> list[str]:
        """Why kernels of this peer do not reach the test's memory; nothing if they do."""
        known: Any = self._link
        return sorted({reason for _, reason in known._path._reach._known.values() if reason})

    def late_writes(self) -> int:
        return self._engine.late_writes

    def write(self, region_id: int, dst: RegionDescriptor, nbytes: int, imm: int) -> int:
        """Writes the start of a pool into the start of a region of the test's engine."""
        assert self._link is not None
        return self._link.write(self._regions[region_id], 0, dst, 0, nbytes, imm=imm).wait(20.0)

    def copy_when_arrived(self, ticket: int) -> int:
        """Enqueues a copy of the cache behind the ticket, on a stream; the host goes on."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            self._tickets[ticket].wait_on(stream)
            copies = [tensor.clone() for tensor in self._caches[-1][1]]
        self._copies.append((stream, copies))
        return len(self._copies) - 1

    def copied(self, copy: int) -> list[np.ndarray[Any, Any]]:
        stream, copies = self._copies[copy]
        stream.synchronize()
        return [tensor.cpu().numpy() for tensor in copies]

    def stream_writes(self, region_id: int, dst: RegionDescriptor, nbytes: int) -> None:
        """Writes the pool again and again, many at a time, until the link is down."""
        link, region = self._link, self._regions[region_id]
        assert link is not None

        def run() -> None:
            try:
                while True:
                    tickets = [link.write(region, 0, dst, 0, nbytes) for _ in range(4)]
                    for ticket in tickets:
                        ticket.wait(15.0)
            except EngineError:
                return

        threading.Thread(target=run, daemon=True).start()

    def crowd(self, dst: CacheDescriptor, count: int, timeout_s: float) -> list[str]:
        """Writes a block so often that neither the stream before the writes nor the lane's has room
        for all: the first one waits for words that a thread of this process writes, in `timeout_s`.
        What ended otherwise than well."""
        link, local = self._link, self._caches[-1][0]
        assert link is not None
        plan = self._engine.plan(local, dst)
        link.prepare(plan)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        number = torch.zeros(1, device=self._device)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            number += 1  # loaded from here on
        link.write_blocks(plan, [1], [2], stream=stream).wait(60.0)
        stream.synchronize()
        by_host, on_gpu = (
            self._engine.expect(self._engine.new_imm(), timeout_s=timeout_s, **what)  # type: ignore[arg-type]
            for what in ({"writes": 1}, {"nbytes": 1})
        )
        by_host.wait_on(stream)
        tickets = []
        with torch.cuda.stream(stream):
            for turn in range(count):
                number += 1
                tickets.append(link.write_blocks(plan, [1], [2], stream=stream, timeout_s=60.0))
                if turn % 100 == 0:
                    with contextlib.suppress(DeadlineExceeded):  # it may have ended by now
                        on_gpu.wait_on(stream)
        for ticket in tickets:
            with contextlib.suppress(EngineError):
                ticket.wait(60.0)
        stream.synchronize()
        wrong = [repr(ticket) for ticket in tickets if ticket.exception() is not None]
        wrong += [f"{number.item()} additions"] if number.item() != count + 1 else []
        return wrong

    def wait_often(self, count: int, at_once: int, timeout_s: float) -> int:
        """Lets a stream wait for many expects that nobody fulfils, more than the engine has words for
        at once; how many streams' waits ended."""
        stream_wait._PAGE_WORDS = at_once
        stream_wait._free.clear()
        streams = []
        for _ in range(count):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            ticket = self._engine.expect(self._engine.new_imm(), writes=1, timeout_s=timeout_s)
            with contextlib.suppress(DeadlineExceeded):
                ticket.wait_on(stream)
            streams.append(stream)
        for stream in streams:
            stream.synchronize()
        return len(streams)

    def close(self) -> None:
        self._engine.close()


def main() -> None:
    serve(pipe_of_child(), Commands(int(sys.argv[2]), json.loads(sys.argv[3])))


if __name__ == "__main__":
    main()
