"""The ceiling: the same pieces copied within one process, by the fastest of three ways."""

from __future__ import annotations

import collections
import ctypes
import itertools
from typing import TYPE_CHECKING

import numpy as np

from kvferry.tools.bench.transfer.driver import Driver
from kvferry.tools.bench.transfer.workload import Pool, block_ids, piece_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvferry.tools.bench.transfer.workload import Int64s, Shape

INDEX, TAKE, LIBC = "index", "take", "libc"
TAKE_NBYTES = 512 << 10  # what `take` gathers at a time: fits a core's second-level cache

# PyDLL keeps the interpreter lock: letting it go and taking it back costs more than 4 KiB do.
_memcpy = ctypes.PyDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcpy.restype = None


class MemcpyDriver(Driver):
    """Both ends at once. Its operations are the ways to copy.

    Pieces come in order of destination, which is the faster order, and their indices and addresses
    are computed before the clock runs: a ceiling has no request to build.
    """

    notifies = False

    def __init__(self, end: str, pool: Pool, shapes: Sequence[Shape]) -> None:
        super().__init__(end, pool, shapes)
        self._src = Pool(pool.nbytes)
        self._src.fill()
        self._pieces: dict[tuple[Shape, int], tuple[Int64s, Int64s]] = {}

    def prepare(self, shape: Shape, request: int) -> int:
        src, dst = block_ids(shape, request)
        order = np.argsort(dst)
        self._now = piece_numbers(shape, src[order]), piece_numbers(shape, dst[order])
        self._from = (self._src.address + self._now[0] * shape.block_nbytes).tolist()
        self._to = (self.pool.address + self._now[1] * shape.block_nbytes).tolist()
        return 0

    def transfer(self, shape: Shape, request: int, operation: str, token: int) -> None:
        if operation == LIBC:
            sizes = itertools.repeat(shape.block_nbytes)
            collections.deque(map(_memcpy, self._to, self._from, sizes), maxlen=0)
            return
        src, dst = self._now
        here, there = self._src.blocks(shape), self.pool.blocks(shape)
        if operation == INDEX:
            there[dst] = here[src]
            return
        step = max(1, TAKE_NBYTES // shape.block_nbytes)
        for start in range(0, len(src), step):
            part = slice(start, start + step)
            there[dst[part]] = here.take(src[part], axis=0)
