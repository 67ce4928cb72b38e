"""The receiving process of the GPU benchmarks, and the pools of blocks at both ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.transfer_engine import TransferEngine

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.descriptors import CacheDescriptor
    from kvferry.engine.memory.regions import RegisteredCache

DIMS = "plane block dim"
NUM_LAYERS, NUM_PLANES = 16, 2


class WrongBytes(Exception):
    """Bytes arrived wrong: no figure is worth printing."""


def make_pool(
    total_nbytes: int, piece_nbytes: int, where: str, *, random: bool, factor: int
) -> tuple[list[torch.Tensor], int]:
    """Make layers of blocks of one piece, `factor` times what moves; and how many blocks move."""
    rows = NUM_LAYERS * NUM_PLANES
    num_ids = max(1, total_nbytes // (rows * piece_nbytes))
    layers = NUM_LAYERS if total_nbytes >= rows * piece_nbytes else 1
    shape = (NUM_PLANES if layers > 1 else 1, factor * num_ids, piece_nbytes // 8)
    tensors = [torch.zeros(shape, dtype=torch.int64, device=where) for _ in range(layers)]
    for tensor in tensors if random else ():
        tensor.random_()
    torch.cuda.synchronize()
    return tensors, num_ids


class Receiver:
    """An engine with one cache at a time, and one link."""

    def __init__(self, device: int, **options: Any) -> None:
        torch.cuda.set_device(device)
        self.device = device
        self.engine = TransferEngine(name="decode", **options)
        self.link: Link
        self.cache: RegisteredCache | None = None
        self.tensors: list[torch.Tensor] = []

    def address(self) -> bytes:
        return self.engine.address.encode()

    def accept(self, engine_id: Any) -> None:
        self.link = self.engine.accept_link(engine_id)

    def make_cache(
        self, total_nbytes: int, piece_nbytes: int, factor: int, on_gpu: bool
    ) -> CacheDescriptor:
        """Put an empty cache in the place of the last one."""
        if self.cache is not None:
            self.cache.deregister()
        self.cache, self.tensors = None, []
        where = f"cuda:{self.device}" if on_gpu else "cpu"
        self.tensors, _ = make_pool(total_nbytes, piece_nbytes, where, random=False, factor=factor)
        layout = KVLayout.from_tensors(self.tensors, DIMS)
        self.cache = self.engine.register_cache(layout, self.tensors)
        return self.cache.descriptor

    def close(self) -> None:
        self.engine.close()
