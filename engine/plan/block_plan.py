"""Plans: which bytes of one cache go where in another, for any list of block ids.

Computed once for a pair of layouts, a plan holds a template: the pieces that move one block.
For a request only block ids go in, and NumPy multiplies the template out. A piece is one maximal
run that is contiguous on both sides: neighbouring layers, planes and blocks are merged when, and
only when, they are neighbours in both caches.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LayoutMismatch, PlanError
from .block_tables import FEW_IDS, as_ids, check_distinct, check_ids
from .template import Pieces, Template, join, merge, product, runs
from .token_plan import layer_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .block_tables import BlockIds, Row
    from .token_plan import TokenPlan

# Marking each block of the cache finds doubled ids in half the time of a sort, up to such a cache.
_MARKS_A_BLOCK, _FEWEST_MARKS = 32, 1 << 14


class BlockPlan:
    """How blocks of `src` become blocks of `dst`. Immutable; safe to use from any thread.

    Args:
        tokens: how the two layouts go together.

    Raises:
        LayoutError: blocks do not pair one to one; says why.
    """

    def __init__(self, tokens: TokenPlan) -> None:
        if tokens.unpaired:
            raise LayoutMismatch(tokens.unpaired)
        self.src, self.dst = tokens.src, tokens.dst
        self._tokens = tokens
        self._templates: dict[tuple[int, ...] | None, Template] = {}
        self._block_nbytes: dict[tuple[int, ...] | None, int] = {}
        self.layers = tokens.layers
        pair = tokens.pairs[0]
        self._limits = pair.src_slots, pair.dst_slots  # of the ids at source and destination
        self._template(None)

    def nbytes(self, num_blocks: int, *, layers: Sequence[int] | None = None) -> int:
        """Count the bytes of `num_blocks` blocks: what a counter must reach. Reads no block ids.

        Raises:
            PlanError: it is no number from 0.
        """
        try:
            number = operator.index(num_blocks)
        except TypeError:
            number = -1
        if number < 0:
            raise PlanError(
                f"num_blocks is how many blocks, from 0, not {num_blocks!r}: of a list of ids, its len()"
            )
        key = layer_key(layers)
        block_nbytes = self._block_nbytes.get(key)
        if block_nbytes is None:
            block_nbytes = self._block_nbytes[key] = int(self._template(key).nbytes.sum())
        return block_nbytes * number

    def pieces(
        self,
        src_block_ids: BlockIds,
        dst_block_ids: BlockIds,
        *,
        layers: Sequence[int] | None = None,
    ) -> Pieces:
        """Return the pieces that move `src_block_ids[i]` into `dst_block_ids[i]`, for all i.

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
        src_ids: Row,
        dst_ids: Row,
        *,
        layers: Sequence[int] | None = None,
    ) -> Pieces:
        """`pieces` for ids that `check_ids` has checked and ordered."""
        template = self._template(layer_key(layers))
        if not len(dst_ids):
            return join([])
        if bool(template.joins.all()):
            return _spread(template, *runs(src_ids, dst_ids, 1))
        if not bool(template.joins.any()):
            return _spread(template, src_ids, dst_ids, None)
        joined, apart = (
            Template._make(column[rows] for column in template)
            for rows in (template.joins, ~template.joins)
        )
        parts = (
            _spread(joined, *runs(src_ids, dst_ids, 1)),
            _spread(apart, src_ids, dst_ids, None),
        )
        return join(parts)

    def template(self, *, layers: Sequence[int] | None = None) -> Template:
        """Return the pieces of one block, for a transport that multiplies them out by itself."""
        return self._template(layer_key(layers))

    def check_ids(
        self,
        src_block_ids: BlockIds,
        dst_block_ids: BlockIds,
        *,
        ordered: bool = True,
    ) -> tuple[Row, Row]:
        """Both id lists as int64, ordered by destination: pages are then walked in one direction,
        which is worth 10 to 20 % to `process_vm_writev` on 4 KiB pieces.

        Not `ordered`, they come back as they are, and checking them takes half the time.
        """
        src_ids = as_ids("source block ids", src_block_ids)
        dst_ids = as_ids("destination block ids", dst_block_ids)
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

    def _order_few(self, src_ids: Row, dst_ids: Row) -> tuple[Row, Row] | None:
        """Return what `check_ids` does, for a few ids; None if anything is wrong with them."""
        dst = dst_ids.tolist()
        few = self.order_few(src_ids.tolist(), dst)
        if few is None:
            return None
        if few[1] is dst:
            return src_ids, dst_ids
        return np.array(few[0], np.int64), np.array(few[1], np.int64)

    def order_few(self, src: list[int], dst: list[int]) -> tuple[list[int], list[int]] | None:
        """Return a few ids, ordered as by `check_ids`, as the same lists if they were; None if
        anything is wrong with them, which `check_ids` says."""
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


def _spread(template: Template, src_ids: Row, dst_ids: Row, lengths: Row | None) -> Pieces:
    """Multiply a template out over runs of blocks."""
    src = src_ids * template.src_stride[:, None]
    dst = dst_ids * template.dst_stride[:, None]
    return product(template, template.nbytes, src, dst, lengths)


def _make_template(tokens: TokenPlan, layers: tuple[int, ...] | None) -> Template:
    """Return the pieces of one unit of tokens, which is a block here, and of what moves by whole
    blocks."""
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
                    row.elements * row.copy_group.dst_elem,
                ],
                axis=1,
            )
            for row in rows
        ]
        or [np.zeros((0, 5), np.int64)]
    )
    table = table[np.lexsort((table[:, 3], table[:, 1], table[:, 2], table[:, 0]))]
    table = merge(table)
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
