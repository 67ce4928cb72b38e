"""The two processes of the GPU benchmarks: engines, the pools of blocks at both ends, and their check."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.tools.bench.figures import WrongBytes
from kvferry.tools.bench.peers import Peer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.descriptors import CacheDescriptor
    from kvferry.engine.memory.regions import RegisteredCache

DIMS = "plane block dim"
NUM_LAYERS, NUM_PLANES = 16, 2


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

    def sums(self, block_ids: Any) -> tuple[bool, list[Any]]:
        """Return whether all other blocks are blank, and the sums of these."""
        ids = torch.from_numpy(block_ids).to(self.tensors[0].device)
        blank = all(_blank_elsewhere(tensor, ids) for tensor in self.tensors)
        return blank, [_sums(tensor, ids).cpu().numpy() for tensor in self.tensors]

    def close(self) -> None:
        self.engine.close()


class Sender:
    """The process that sends, and the receiver that it calls; a context manager."""

    def __init__(self, receiver: type[Receiver], *arguments: Any) -> None:
        self.peer = Peer(receiver, *arguments)
        self._address = self.peer.call("address")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()

    @contextlib.contextmanager
    def link(self, transport: str, **options: Any) -> Iterator[tuple[TransferEngine, Link]]:
        """Return an engine with these options, and its link to the receiver's."""
        with TransferEngine(name="prefill", **options) as engine:
            # The warm-up of a link prepares the GPUs whose memory is registered by then.
            anchor = engine.register(torch.zeros(64, device="cuda:0"))
            link = engine.connect(self._address, transport=transport)
            self.peer.call("accept", engine.engine_id)
            yield engine, link
            link.close()
            anchor.deregister()

    def caches(
        self,
        engine: TransferEngine,
        shape: tuple[int, int],
        factor: int,
        on_gpu: tuple[bool, bool] = (True, True),
    ) -> Any:
        """Return a cache at each end for so many bytes in pieces of that size: tensors, the cache
        here, the plan, and the ids of the blocks that move."""
        remote = self.peer.call("make_cache", *shape, factor, on_gpu[1])
        where = "cuda:0" if on_gpu[0] else "cpu"
        tensors, num_ids = make_pool(*shape, where, random=True, factor=factor)
        local = engine.register_cache(KVLayout.from_tensors(tensors, DIMS), tensors)
        random = np.random.default_rng(sum(shape))
        ids = tuple(random.permutation(factor * num_ids)[:num_ids] for _ in range(2))
        return tensors, local, engine.plan(local, remote), ids

    def check(self, tensors: list[torch.Tensor], ids: Any) -> None:
        """Compare every block that moved, and look for bytes where none belong.

        Raises:
            WrongBytes: some arrived wrong, or elsewhere.
        """
        src, dst = (np.ascontiguousarray(side) for side in ids)
        blank, there = self.peer.call("sums", dst)
        src_ids = torch.from_numpy(src).to(tensors[0].device)
        for mine, theirs in zip(tensors, there, strict=True):
            if not torch.equal(_sums(mine, src_ids).cpu(), torch.from_numpy(theirs)):
                raise WrongBytes
        if not blank:
            raise WrongBytes


def _sums(tensor: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return a checksum of each of these blocks, `[plane, block]`: every word has an odd factor of
    its own, so that no word that is wrong alone, or in another place, goes unseen."""
    random = torch.Generator().manual_seed(1)
    factors = torch.randint(-(1 << 62), 1 << 62, tensor.shape[-1:], generator=random) * 2 + 1
    return (tensor[:, ids] * factors.to(tensor.device)).sum(-1)


def _blank_elsewhere(tensor: torch.Tensor, ids: torch.Tensor) -> bool:
    """Return whether all blocks but these are zero, as they were made."""
    touched = tensor.any(-1)
    touched[:, ids] = False
    return not bool(touched.any())
