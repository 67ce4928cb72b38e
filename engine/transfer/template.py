"""A plan's template bound to memory: where the pieces of any blocks lie, here and at the peer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..memory import iovec
from ..plan.block_tables import as_list
from .pieces import MAX_PIECE_NBYTES, NO_PIECES, BoundPieces

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from ..plan.block_tables import Ids
    from ..plan.template import Template

    Column = npt.NDArray[np.int64]


# Of so many recent requests' sizes the shares are kept.
KEPT_SHARES = 16


class Share(NamedTuple):
    """Some rows of a template for some of the blocks: consecutive ones of each.

    Of few blocks it has all: only a row that is too long for one share is cut by blocks.
    """

    rows: slice
    blocks: slice
    nbytes: int


class BoundBlocks(NamedTuple):
    """What block ids add to a template's addresses: `[1 or row, block, 2]`, the lengths' column 0."""

    local: npt.NDArray[np.int64]
    remote: npt.NDArray[np.int64]


class BoundTemplate:
    """A template whose source and destination are memory.

    Nothing that it multiplies out needs a further check: the plan has checked the template for the
    highest block id, `BlockPlan.check_ids` the ids, and `CacheDescriptor.check` that the regions are as
    large as their layout says.

    Args:
        local_addresses: where this process's regions begin.
        remote_addresses: where the peer's do, in its own address space.
        writes: whether the local side is the source.

    Attributes:
        joins: whether blocks that are neighbours on both sides form one run; this class does not
            join them.
        uncut: whether no piece of one block is empty or so long that it must be cut.
        num_rows: pieces of one block.
    """

    everything = Share(slice(None), slice(None), 0)

    def __init__(
        self, template: Template, local_addresses: Column, remote_addresses: Column, *, writes: bool
    ) -> None:
        local = (template.src_region, template.src_offset, template.src_stride)
        remote = (template.dst_region, template.dst_offset, template.dst_stride)
        if not writes:
            local, remote = remote, local
        self._writes = writes
        self._local = _Side(local_addresses[local[0]] + local[1], local[2], template.nbytes)
        self._remote = _Side(remote_addresses[remote[0]] + remote[1], remote[2], template.nbytes)
        self._remote_region = remote[0]
        self._remote_range = _Side(remote[1], remote[2], template.nbytes)
        self._nbytes = template.nbytes
        self._ends = np.cumsum(template.nbytes)
        self.num_rows = len(template.nbytes)
        self._few: list[tuple[int, ...]] | None = None
        self._shares: dict[tuple[int, int, int], list[Share]] = {}
        longest = int(template.nbytes.max(initial=0))
        self.joins = bool(template.joins.any())
        self.uncut = 0 < longest <= MAX_PIECE_NBYTES

    def pieces(self, src_ids: Ids, dst_ids: Ids) -> BoundPieces:
        """Return all pieces of these blocks."""
        count = len(src_ids)
        if not count:
            return NO_PIECES
        mine, theirs = (src_ids, dst_ids) if self._writes else (dst_ids, src_ids)
        everything = slice(None)
        ranges = self._remote_range.iovec(self._remote_range.steps(theirs), everything, everything)
        return BoundPieces(
            self._local.iovec(self._local.steps(mine), everything, everything).view(np.uint64),
            np.repeat(self._nbytes, count),
            np.repeat(self._remote_region, count),
            np.ascontiguousarray(ranges[:, 0]),
            int(self._ends[-1]) * count,
        )

    def shares(self, num_blocks: int, limit_nbytes: int, limit: int) -> list[Share]:
        """Cut the pieces of so many blocks into shares of about `limit_nbytes` and at most `limit`
        pieces."""
        key = (num_blocks, limit_nbytes, limit)
        shares = self._shares.get(key)
        if shares is None:
            shares = list(self._cut(*key))
            while len(self._shares) >= KEPT_SHARES:
                self._shares.pop(next(iter(self._shares)), None)
            self._shares[key] = shares
        return shares

    def blocks(self, src_ids: Ids, dst_ids: Ids) -> BoundBlocks:
        """Block ids as steps in memory, for `iovecs`."""
        mine, theirs = (src_ids, dst_ids) if self._writes else (dst_ids, src_ids)
        return BoundBlocks(self._local.steps(mine), self._remote.steps(theirs))

    def iovecs(self, share: Share, blocks: BoundBlocks) -> tuple[Column, Column]:
        """Return a share's pieces as `int64[n, 2]`: virtual addresses in this process and in the
        peer's, and lengths."""
        return (
            self._local.iovec(blocks.local, share.rows, share.blocks),
            self._remote.iovec(blocks.remote, share.rows, share.blocks),
        )

    def few(self, src_ids: Ids, dst_ids: Ids) -> tuple[iovec.FewEntries, iovec.FewEntries]:
        """`iovecs` of everything, for a few pieces: without NumPy."""
        if self._few is None:
            sides = (self._local.columns(), self._remote.columns())
            self._few = [
                (*here, *there[:2])
                for here, there in zip(*(s.tolist() for s in sides), strict=True)
            ]
        mine, theirs = (src_ids, dst_ids) if self._writes else (dst_ids, src_ids)
        blocks = list(zip(as_list(mine), as_list(theirs), strict=True))
        local: list[int] = []
        remote: list[int] = []
        for here, here_step, nbytes, there, there_step in self._few:
            for my_id, their_id in blocks:
                local += (here + here_step * my_id, nbytes)
                remote += (there + there_step * their_id, nbytes)
        return iovec.few(local), iovec.few(remote)

    def _cut(self, num_blocks: int, limit_nbytes: int, limit: int) -> Iterator[Share]:
        ends = self._ends
        first = done = 0
        while first < len(ends):
            stop = int(np.searchsorted(ends, done + limit_nbytes // num_blocks, side="right"))
            stop = max(first + 1, min(stop, first + max(1, limit // num_blocks), len(ends)))
            row_nbytes = int(ends[stop - 1]) - done
            step = num_blocks
            if stop == first + 1:
                step = min(num_blocks, max(1, limit_nbytes // row_nbytes), limit)
            for block in range(0, num_blocks, step):
                last = min(num_blocks, block + step)
                yield Share(slice(first, stop), slice(block, last), row_nbytes * (last - block))
            first, done = stop, int(ends[stop - 1])


class _Side:
    """Where a template's rows begin for block 0, and what each block id adds.

    Addresses and lengths are added as pairs: after a copy that has flushed the caches, each NumPy
    call costs 10 to 20 microseconds, and this is the fewest of them.
    """

    def __init__(self, start: Column, stride: Column, nbytes: Column) -> None:
        self._rows = np.stack([start, nbytes], axis=1)[:, None, :]
        self._stride = stride[:, None]
        self._one_stride = bool((stride == stride[:1]).all())
        if self._one_stride:
            self._stride = self._stride[:1]

    def columns(self) -> Column:
        """Return where each row begins, what an id adds, and the row's length."""
        stride = np.broadcast_to(self._stride, (len(self._rows), 1))
        start, nbytes = self._rows[:, 0, :1], self._rows[:, 0, 1:]
        return np.concatenate((start, stride, nbytes), axis=1)

    def steps(self, ids: Ids) -> npt.NDArray[np.int64]:
        """Return what these ids add to a row: `[1 or row, id, 2]`."""
        steps = np.zeros((len(self._stride), len(ids), 2), np.int64)
        np.multiply(self._stride, ids, out=steps[:, :, 0])
        return steps

    def iovec(self, steps: npt.NDArray[np.int64], rows: slice, blocks: slice) -> Column:
        """Addresses and lengths of these rows for these blocks."""
        mine = steps[:, blocks] if self._one_stride else steps[rows, blocks]
        return (self._rows[rows] + mine).reshape(-1, 2)
