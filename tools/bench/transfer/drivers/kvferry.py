"""kvferry's own driver: a plan once, block ids a request, the receiver's counter as completion."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory.descriptors import CacheDescriptor
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.wire.identity import EngineAddress
from kvferry.tools.bench.transfer.driver import READ, TIMEOUT_S, WRITE, Driver
from kvferry.tools.bench.transfer.workload import block_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.regions import RegisteredCache
    from kvferry.engine.transfer.plan import TransferPlan
    from kvferry.engine.transfer.ticket import Ticket
    from kvferry.tools.bench.transfer.workload import Pool, Shape


class KvferryDriver(Driver):
    """One transfer engine with one transport and one link."""

    def __init__(
        self,
        end: str,
        pool: Pool,
        shapes: Sequence[Shape],
        *,
        transport: str,
        rails: int = 1,
        verify: bool = False,
    ) -> None:
        super().__init__(end, pool, shapes)
        self._engine = TransferEngine(
            transports=(transport,), rails=rails, verify=verify, name=f"bench-{end}"
        )
        self._caches = {shape: self._register(shape) for shape in shapes}
        self._remote_caches: dict[str, CacheDescriptor] = {}
        self._plans: dict[tuple[Shape, str], TransferPlan] = {}
        self._link: Link
        self._expected: Ticket

    def publish(self) -> dict[str, Any]:
        return {
            "address": _text(self._engine.address.encode()),
            "caches": {
                shape.name: _text(cache.descriptor.encode())
                for shape, cache in self._caches.items()
            },
        }

    def _register(self, shape: Shape) -> RegisteredCache:
        axes = (shape.num_planes, shape.num_layers, shape.pool_blocks, shape.block_nbytes)
        view = self.pool.bytes[: shape.pool_nbytes].reshape(axes)
        planes = [f"plane{number}" for number in range(shape.num_planes)]
        layout = KVLayout.from_tensors(view, "plane layer block dim", planes=planes)
        return self._engine.register_cache(layout, view)

    def meet(self, other: dict[str, Any]) -> None:
        address = EngineAddress.decode(_bytes(other["address"]))
        if self.end == "src":
            self._link = self._engine.connect(address)
        else:
            self._link = self._engine.accept_link(address.engine_id)
        self._remote_caches = {
            name: CacheDescriptor.decode(_bytes(text)) for name, text in other["caches"].items()
        }

    def select(self, shape: Shape) -> None:
        operation = WRITE if self.end == "src" else READ
        if (shape, operation) in self._plans:
            return
        mine, theirs = self._caches[shape], self._remote_caches[shape.name]
        if operation == WRITE:
            self._plans[shape, operation] = self._engine.plan(mine, theirs)
        else:
            self._plans[shape, operation] = self._engine.plan(theirs, mine)

    def prepare(self, shape: Shape, request: int) -> int:
        if self.end == "src":
            return 0  # serves a read, of which it knows nothing
        imm = self._engine.new_imm()
        self._expected = self._engine.expect(
            imm, nbytes=shape.nbytes, links=(self._link,), timeout_s=TIMEOUT_S
        )
        return imm

    def transfer(self, shape: Shape, request: int, operation: str, token: int) -> None:
        plan = self._plans[shape, operation]
        src_ids, dst_ids = block_ids(shape, request)
        if operation == WRITE:
            ticket = self._link.write_blocks(plan, src_ids, dst_ids, imm=token, timeout_s=TIMEOUT_S)
        else:
            ticket = self._link.read_blocks(plan, src_ids, dst_ids, timeout_s=TIMEOUT_S)
        ticket.wait()

    def arrived(self, shape: Shape, request: int) -> None:
        self._expected.wait()

    def close(self) -> None:
        self._engine.close()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
