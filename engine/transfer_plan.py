"""A plan bound to memory: this engine's registered cache at one end, a peer's at the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .bound_pieces import MAX_PIECE_NBYTES, NO_PIECES, BoundPieces, bind
from .errors import LayoutError, PlanError
from .plan import Plan, have_neighbours

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from .memory import CacheDescriptor, RegisteredCache
    from .plan import BlockIds, Template

    Column = npt.NDArray[np.int64]

# Of so many recent block counts the columns that depend on nothing else are kept, if they are short:
# a small handoff is planned in a third of the time, and a large one does not notice.
KEPT_COUNTS = 16
KEPT_PIECES = 8192


class TransferPlan:
    """How blocks move between a registered cache and a peer's. Make it once, use it for ever.

    Attributes:
        local, remote: the two caches.
        writes: True if the local one is the source.
        plan: the pure plan between the two layouts.
    """

    def __init__(self, local: RegisteredCache, remote: CacheDescriptor, *, writes: bool) -> None:
        self.local = local
        self.remote = remote
        self.writes = writes
        self.remote_kind = "/".join(sorted({region.kind for region in remote.regions}))
        pair = (local.layout, remote.layout)
        self.plan = Plan(*pair) if writes else Plan(*reversed(pair))
        if len(local.layout.groups) > 1:
            raise LayoutError(
                f"a cache of {len(local.layout.groups)} groups has as many block tables: register "
                "and plan each group as a cache of its own",
                operation="plan",
            )
        self._addresses = np.array([region.address for region in local.regions], np.int64)
        self._bound: dict[tuple[int, ...] | None, _BoundTemplate] = {}

    def nbytes(self, num_blocks: int, *, layers: Sequence[int] | None = None) -> int:
        """Bytes that `num_blocks` blocks take: what the receiver must expect."""
        return self.plan.nbytes(num_blocks, layers=layers)

    def pieces(
        self, src_block_ids: BlockIds, dst_block_ids: BlockIds, layers: Sequence[int] | None
    ) -> BoundPieces:
        """Every piece, its addresses here and its ranges there, all of them checked.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: as for `Plan.pieces`.
        """
        key = None if layers is None else tuple(layers)
        bound = self._bound.get(key)
        if bound is None:
            template = self.plan.template(layers=layers)
            bound = self._bound[key] = _BoundTemplate(template, self._addresses, self.writes)
        src_ids, dst_ids = self.plan.check_ids(src_block_ids, dst_block_ids)
        if bound.uncut and not (bound.joins and have_neighbours(src_ids, dst_ids)):
            return bound.spread(src_ids, dst_ids)
        pieces = self.plan.multiply(src_ids, dst_ids, layers=layers)
        here, here_offset = pieces.src_region, pieces.src_offset
        there, there_offset = pieces.dst_region, pieces.dst_offset
        if not self.writes:
            here, here_offset, there, there_offset = there, there_offset, here, here_offset
        addresses = self._addresses[here] + here_offset
        return bind(addresses, pieces.nbytes, there, there_offset, self.remote.regions)


class _Columns(NamedTuple):
    """What the number of blocks alone decides."""

    nbytes: Column
    remote_index: Column
    total_nbytes: int


class _BoundTemplate:
    """A template whose source and destination are memory.

    Attributes:
        joins: whether blocks that are neighbours on both sides form one run.
        uncut: whether no piece of one block is empty or so long that it must be cut.
    """

    def __init__(self, template: Template, addresses: Column, writes: bool) -> None:
        local = (template.src_region, template.src_offset, template.src_stride)
        remote = (template.dst_region, template.dst_offset, template.dst_stride)
        if not writes:
            local, remote = remote, local
        self._writes = writes
        self._address = (addresses[local[0]] + local[1])[:, None]
        self._local_stride = local[2][:, None]
        self._remote_region = remote[0]
        self._remote_offset = remote[1][:, None]
        self._remote_stride = remote[2][:, None]
        self._nbytes = template.nbytes
        self._kept: dict[int, _Columns] = {}
        longest = int(template.nbytes.max(initial=0))
        self.joins = bool(template.joins.any())
        self.uncut = 0 < longest <= MAX_PIECE_NBYTES

    def spread(self, src_ids: Column, dst_ids: Column) -> BoundPieces:
        """The pieces of blocks of which none are joined.

        Their ranges need no further check: the plan has checked the template for the highest block
        id and the ids themselves, and `CacheDescriptor.check` that the regions are so large.
        """
        count, rows = len(src_ids), len(self._nbytes)
        if not count:
            return NO_PIECES
        columns = self._kept.get(count) or self._columns(count)
        mine, theirs = (src_ids, dst_ids) if self._writes else (dst_ids, src_ids)
        table = np.empty((rows, count, 2), np.int64)
        np.multiply(mine, self._local_stride, out=table[:, :, 0])
        table[:, :, 0] += self._address
        local = table.reshape(-1, 2)
        local[:, 1] = columns.nbytes
        offset = theirs * self._remote_stride
        offset += self._remote_offset
        return BoundPieces(
            local.view(np.uint64),
            columns.nbytes,
            columns.remote_index,
            offset.reshape(-1),
            columns.total_nbytes,
        )

    def _columns(self, count: int) -> _Columns:
        nbytes = np.repeat(self._nbytes, count)
        columns = _Columns(nbytes, np.repeat(self._remote_region, count), int(nbytes.sum()))
        if len(nbytes) <= KEPT_PIECES:
            while len(self._kept) >= KEPT_COUNTS:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[count] = columns
        return columns


def check_block_ids(plan: TransferPlan, src_block_ids: Any, dst_block_ids: Any) -> tuple[Any, Any]:
    """Ids as a transport's `submit_blocks` takes them: checked and ordered int64 rows.

    Two tensors on a GPU stay where they are, unread.

    Raises:
        BlockOutOfRange, OverlappingBlocks, PlanError: as for `Plan.pieces`.
    """
    on_gpu = [getattr(ids, "is_cuda", False) for ids in (src_block_ids, dst_block_ids)]
    if not any(on_gpu):
        return plan.plan.check_ids(src_block_ids, dst_block_ids)
    if not all(on_gpu) or src_block_ids.shape != dst_block_ids.shape or src_block_ids.dim() != 1:
        raise PlanError(
            "block ids on a GPU must be two equally long rows, both there", operation="plan"
        )
    return src_block_ids, dst_block_ids
