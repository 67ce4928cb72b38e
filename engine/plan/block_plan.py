"""Plans: which bytes of one cache go where in another, for any list of block ids.

Computed once for a pair of layouts, a plan holds a template: the pieces that move one block.
For a request only block ids go in, and NumPy multiplies the template out. A piece is one maximal
run that is contiguous on both sides: neighbouring layers, planes and blocks are merged when, and
only when, they are neighbours in both caches.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import LayoutError, PlanError
from .block_tables import check_distinct, check_ids
from .pieces import Pieces

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeGuard

    import numpy.typing as npt

    from .token_plan import TokenPlan

    BlockIds = Sequence[int] | npt.NDArray[np.integer]
    Ids = list[int] | npt.NDArray[np.int64]  # checked and ordered; a few may be a list


# Up to so many ids Python's own sort and comparisons are quicker than NumPy's ten calls, which cost
# 10 to 20 microseconds each when the caches are cold.
FEW_IDS = 32

# Marking each block of the cache finds doubled ids in half the time of a sort, up to such a cache.
_MARKS_A_BLOCK, _FEWEST_MARKS = 32, 1 << 14


class Template(NamedTuple):
    """The pieces of one block, at block id 0 on both sides, and what each id adds."""

    src_region: npt.NDArray[np.int64]
    src_offset: npt.NDArray[np.int64]
    src_stride: npt.NDArray[np.int64]
    dst_region: npt.NDArray[np.int64]
    dst_offset: npt.NDArray[np.int64]
    dst_stride: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]
    joins: npt.NDArray[np.bool_]  # whether blocks that are neighbours on both sides form one run

    def where(self, rows: npt.NDArray[np.bool_]) -> Template:
        """The template's chosen rows."""
        return Template(
            self.src_region[rows],
            self.src_offset[rows],
            self.src_stride[rows],
            self.dst_region[rows],
            self.dst_offset[rows],
            self.dst_stride[rows],
            self.nbytes[rows],
            self.joins[rows],
        )


class Plan:
    """How blocks of `src` become blocks of `dst`. Immutable; safe to use from any thread.

    Args:
        tokens: how the two layouts go together.

    Raises:
        LayoutError: blocks do not pair one to one; says why.
    """

    def __init__(self, tokens: TokenPlan) -> None:
        if tokens.unpaired:
            raise LayoutError(tokens.unpaired, operation="plan")
        self.src, self.dst = tokens.src, tokens.dst
        self._tokens = tokens
        self._templates: dict[tuple[int, ...] | None, Template] = {}
        self._block_nbytes: dict[tuple[int, ...] | None, int] = {}
        self._finest_nbytes: dict[tuple[int, ...] | None, int] = {}
        self.layers = tokens.layers
        pair = tokens.pairs[0]
        self._limits = pair.src_slots, pair.dst_slots  # of the ids at source and destination
        self._template(None)

    def nbytes(self, num_blocks: int, *, layers: Sequence[int] | None = None) -> int:
        """Bytes that `num_blocks` blocks take: what a counter must reach. Reads no block ids."""
        key = _layer_key(layers)
        block_nbytes = self._block_nbytes.get(key)
        if block_nbytes is None:
            block_nbytes = self._block_nbytes[key] = int(self._template(key).nbytes.sum())
        return block_nbytes * num_blocks

    def finest_nbytes(self, *, layers: Sequence[int] | None = None) -> int:
        """Bytes of the smallest piece of a block."""
        key = _layer_key(layers)
        finest = self._finest_nbytes.get(key)
        if finest is None:
            nbytes = self._template(key).nbytes
            finest = self._finest_nbytes[key] = int(nbytes.min()) if len(nbytes) else 0
        return finest

    def pieces(
        self,
        src_block_ids: BlockIds,
        dst_block_ids: BlockIds,
        *,
        layers: Sequence[int] | None = None,
    ) -> Pieces:
        """The pieces that move `src_block_ids[i]` into `dst_block_ids[i]`, for all i.

        Args:
            src_block_ids, dst_block_ids: equally many block ids, any order; the destinations
                must differ from each other, a source may be read several times.
            layers: global layer indices to move; all that both sides hold, if not given.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: before anything is computed.
        """
        ids = self.check_ids(src_block_ids, dst_block_ids)
        return self.multiply(*ids, layers=layers)

    def multiply(
        self,
        src_ids: npt.NDArray[np.int64],
        dst_ids: npt.NDArray[np.int64],
        *,
        layers: Sequence[int] | None = None,
    ) -> Pieces:
        """`pieces` for ids that `check_ids` has checked and ordered."""
        template = self._template(_layer_key(layers))
        if not len(dst_ids):
            empty = np.zeros(0, np.int64)
            return Pieces(empty, empty, empty, empty, empty)
        if bool(template.joins.all()):
            return _spread(template, *_runs(src_ids, dst_ids))
        ones = np.ones(len(src_ids), np.int64)
        if not bool(template.joins.any()):
            return _spread(template, src_ids, dst_ids, ones)
        joined, apart = template.where(template.joins), template.where(~template.joins)
        parts = (
            _spread(joined, *_runs(src_ids, dst_ids)),
            _spread(apart, src_ids, dst_ids, ones),
        )
        return Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def template(self, *, layers: Sequence[int] | None = None) -> Template:
        """The pieces of one block, for a transport that multiplies them out by itself."""
        return self._template(_layer_key(layers))

    def check_ids(
        self,
        src_block_ids: BlockIds,
        dst_block_ids: BlockIds,
        *,
        ordered: bool = True,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Both id lists as int64, ordered by destination: pages are then walked in one direction,
        which is worth 10 to 20 % to `process_vm_writev` on 4 KiB pieces.

        Not `ordered`, they come back as they are, and checking them takes half the time.
        """
        src_ids = _as_ids("source", src_block_ids)
        dst_ids = _as_ids("destination", dst_block_ids)
        if len(src_ids) != len(dst_ids):
            raise PlanError(
                f"{len(src_ids)} source block ids but {len(dst_ids)} destination block ids"
            )
        if not len(dst_ids):
            return src_ids, dst_ids
        if len(dst_ids) <= FEW_IDS:
            few = self._order_few(src_ids, dst_ids)
            if few is not None:
                return few
        for side, ids, limit in zip(
            ("source", "destination"), (src_ids, dst_ids), self._limits, strict=True
        ):
            if int(ids.view(np.uint64).max()) >= limit:  # a negative id is a huge one
                check_ids(side, ids, limit, None)
        if not ordered and limit <= _MARKS_A_BLOCK * len(dst_ids) + _FEWEST_MARKS:
            marks = np.zeros(limit, np.bool_)
            marks[dst_ids] = True
            if np.count_nonzero(marks) == len(dst_ids):
                return src_ids, dst_ids
        if not bool((dst_ids[1:] > dst_ids[:-1]).all()):
            # One sort of packed pairs takes a tenth of the time of an argsort and two look-ups.
            pairs = np.sort((dst_ids << 32) | src_ids)
            src_ids, dst_ids = pairs & 0xFFFFFFFF, pairs >> 32
            steps = dst_ids[1:] - dst_ids[:-1]  # np.diff takes ten times as long for a few ids
            if not bool(steps.all()):
                check_distinct(dst_ids)
        return src_ids, dst_ids

    def _order_few(
        self, src_ids: npt.NDArray[np.int64], dst_ids: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        """What `check_ids` does, for a few ids; None if anything is wrong with them."""
        dst = dst_ids.tolist()
        few = self.order_few(src_ids.tolist(), dst)
        if few is None:
            return None
        if few[1] is dst:
            return src_ids, dst_ids
        return np.array(few[0], np.int64), np.array(few[1], np.int64)

    def order_few(self, src: list[int], dst: list[int]) -> tuple[list[int], list[int]] | None:
        """A few ids, ordered as by `check_ids`, as the same lists if they were; None if anything is
        wrong with them, which `check_ids` says."""
        limits = self._limits
        if not dst or len(src) != len(dst):
            return None
        if min(src) < 0 or max(src) >= limits[0] or min(dst) < 0 or max(dst) >= limits[1]:
            return None
        ordered = sorted(set(dst))
        if len(ordered) < len(dst):
            return None
        if ordered == dst:
            return src, dst
        pairs = sorted(zip(dst, src, strict=True))
        return [src_id for _, src_id in pairs], ordered

    def _template(self, layers: tuple[int, ...] | None) -> Template:
        template = self._templates.get(layers)
        if template is None:
            template = self._templates[layers] = _make_template(self._tokens, layers)
        return template


def _layer_key(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if layers is None else tuple(sorted({int(layer) for layer in layers}))


def _as_ids(side: str, ids: BlockIds) -> npt.NDArray[np.int64]:
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PlanError(
            f"{side} block ids must be one row of integers, not {array.dtype} of shape "
            f"{array.shape}"
        )
    return array.astype(np.int64, copy=False)


def are_few(ids: object) -> TypeGuard[list[int]]:
    """Whether ids are a list of a few of Python's own numbers."""
    return type(ids) is list and 0 < len(ids) <= FEW_IDS and {*map(type, ids)} == {int}


def as_list(ids: Ids) -> list[int]:
    """Ids that `check_ids` or `order_few` has returned, as Python's own numbers."""
    return ids if isinstance(ids, list) else ids.tolist()


def have_neighbours(src_ids: Ids, dst_ids: Ids) -> bool:
    """Whether any two blocks that follow each other are neighbours on both sides."""
    if len(src_ids) < 2:
        return False
    if isinstance(src_ids, list) or isinstance(dst_ids, list) or len(src_ids) <= FEW_IDS:
        ids = list(zip(as_list(src_ids), as_list(dst_ids), strict=True))
        return any(a + 1 == c and b + 1 == d for (a, b), (c, d) in itertools.pairwise(ids))
    return bool(((src_ids[1:] - src_ids[:-1] == 1) & (dst_ids[1:] - dst_ids[:-1] == 1)).any())


def _runs(
    src_ids: npt.NDArray[np.int64], dst_ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First source id, first destination id and length of each run of neighbours on both sides."""
    breaks = (src_ids[1:] - src_ids[:-1] != 1) | (dst_ids[1:] - dst_ids[:-1] != 1)
    if bool(breaks.all()):  # scattered, the usual case: nothing to join, so nothing to copy
        return src_ids, dst_ids, np.ones(len(src_ids), np.int64)
    starts = np.concatenate(([0], breaks.nonzero()[0] + 1))
    lengths = np.append(starts[1:], len(src_ids)) - starts
    return src_ids[starts], dst_ids[starts], lengths


def _spread(
    template: Template,
    src_ids: npt.NDArray[np.int64],
    dst_ids: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
) -> Pieces:
    """Multiplies the template out over runs of blocks."""
    count = len(src_ids)
    return Pieces(
        np.repeat(template.src_region, count),
        (template.src_offset[:, None] + src_ids * template.src_stride[:, None]).ravel(),
        np.repeat(template.dst_region, count),
        (template.dst_offset[:, None] + dst_ids * template.dst_stride[:, None]).ravel(),
        (template.nbytes[:, None] * lengths).ravel(),
    )


def _make_template(tokens: TokenPlan, layers: tuple[int, ...] | None) -> Template:
    """The pieces of one unit of tokens, which is a block here, and of what moves by whole blocks."""
    src, dst = tokens.src, tokens.dst
    rows = [
        row
        for stop in sorted({0, tokens.pairs[0].unit})
        for row in tokens.template(0, 0, stop, layers)
    ]
    table = np.concatenate(
        [
            np.stack(
                [
                    row.src_region,
                    row.src_offset,
                    row.dst_region,
                    row.dst_offset,
                    row.elements * row.bundle.dst_elem,
                ],
                axis=1,
            )
            for row in rows
        ]
        or [np.zeros((0, 5), np.int64)]
    )
    table = table[np.lexsort((table[:, 3], table[:, 1], table[:, 2], table[:, 0]))]
    table = _merge(table)
    src_stride = np.array([region.slot_stride for region in src.regions], np.int64)[table[:, 0]]
    dst_stride = np.array([region.slot_stride for region in dst.regions], np.int64)[table[:, 2]]
    return Template(
        src_region=table[:, 0].copy(),
        src_offset=table[:, 1].copy(),
        src_stride=src_stride,
        dst_region=table[:, 2].copy(),
        dst_offset=table[:, 3].copy(),
        dst_stride=dst_stride,
        nbytes=table[:, 4].copy(),
        joins=(table[:, 4] == src_stride) & (table[:, 4] == dst_stride),
    )


def _merge(table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Joins rows that are neighbours on both sides."""
    if len(table) < 2:
        return table
    before, after = table[:-1], table[1:]
    joined = (
        (before[:, 0] == after[:, 0])
        & (before[:, 2] == after[:, 2])
        & (before[:, 1] + before[:, 4] == after[:, 1])
        & (before[:, 3] + before[:, 4] == after[:, 3])
    )
    starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    merged: npt.NDArray[np.int64] = table[starts]
    merged[:, 4] = np.add.reduceat(table[:, 4], starts)
    return merged
