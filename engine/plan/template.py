"""The pieces of one unit of tokens, or of one block, and many of them.

A *template* is the pieces of one unit at both ends, as rows. A request multiplies it out over its
units; the first and the last unit may be partial and have templates of their own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from .reconcile import CopyGroup, Step

    Ids = npt.NDArray[np.int64]


_NONE = np.zeros(0, np.int64)


class Pieces(NamedTuple):
    """Pieces as columns; row i moves `nbytes[i]` bytes. Regions are positions in the layouts."""

    src_region: npt.NDArray[np.int64]
    src_offset: npt.NDArray[np.int64]
    dst_region: npt.NDArray[np.int64]
    dst_offset: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]

    @property
    def total_nbytes(self) -> int:
        """Bytes of all pieces together."""
        return int(self.nbytes.sum())


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


class Rows(NamedTuple):
    """Pieces of one unit that move alike, as columns; at unit 0 of block 0 on both sides.

    Attributes:
        elements: of each piece.
        factor: what its numbers are multiplied by; None where bits are moved.
        entry, head: of the copy group, where numbers are converted.
    """

    copy_group: CopyGroup
    src_region: Ids
    src_offset: Ids
    dst_region: Ids
    dst_offset: Ids
    elements: Ids
    factor: npt.NDArray[np.float32] | None
    entry: Ids
    head: Ids


class Stretch(NamedTuple):
    """Units `first` to `last` (not included), of each of which tokens `[low, high)` are moved."""

    first: int
    last: int
    low: int
    high: int


class Moves(NamedTuple):
    """Pieces whose numbers all are of one type on each side.

    Attributes:
        pieces: with the destination's `nbytes`.
        copy_group: says which types.
        factor: of each piece; None where bits are moved.
        entry, head, src_block, dst_block: of each piece, where scales differ from block to block.
    """

    pieces: Pieces
    copy_group: CopyGroup
    factor: npt.NDArray[np.float32] | None = None
    entry: Ids = _NONE
    head: Ids = _NONE
    src_block: Ids = _NONE
    dst_block: Ids = _NONE


def stretches(start: int, stop: int, unit: int) -> list[Stretch]:
    """Tokens `[start, stop)` as a partial first unit, whole ones, and a partial last one."""
    found = []
    first, last = start // unit, stop // unit
    if start >= stop:
        return []
    if first == last:
        return [Stretch(first, first + 1, start % unit, stop % unit)]
    if start % unit:
        found.append(Stretch(first, first + 1, start % unit, unit))
        first += 1
    if first < last:
        found.append(Stretch(first, last, 0, unit))
    if stop % unit:
        found.append(Stretch(last, last + 1, 0, stop % unit))
    return found


# Templates.


def make_rows(
    copy_groups: list[CopyGroup], low: int, high: int, layers: tuple[int, ...] | None
) -> Rows:
    """Return the pieces of one unit for copy groups whose blocks and tokens lie alike."""
    tables = []
    factors: list[npt.NDArray[np.float32]] = []
    entry = head = np.zeros(0, np.int64)
    for copy_group in copy_groups:
        inner, of_head = _inner(copy_group, low, high)
        chosen = slice(None) if layers is None else copy_group.chosen(layers)
        starts = np.stack(
            [
                copy_group.src_region,
                copy_group.src_start,
                copy_group.dst_region,
                copy_group.dst_start,
            ],
            axis=1,
        )[chosen]
        table = np.empty((len(starts), len(inner), 5), np.int64)
        table[:, :, 0], table[:, :, 2] = starts[:, None, 0], starts[:, None, 2]
        table[:, :, 1] = starts[:, None, 1] + inner[:, 0]
        table[:, :, 3] = starts[:, None, 3] + inner[:, 1]
        table[:, :, 4] = inner[:, 2]
        tables.append(table.reshape(-1, 5))
        if copy_group.factors is not None:
            of_entry = copy_group.factors[chosen]
            wide = of_entry.shape[1] > 1
            factors.append(of_entry[:, of_head if wide else of_head * 0].ravel())
            numbers = np.arange(len(copy_group.layer))[chosen]
            entry = np.repeat(numbers, len(inner))
            head = np.tile(of_head, len(numbers))
    whole = np.concatenate(tables)
    # By place at the destination: small pieces that are neighbours there can then be joined.
    order = np.lexsort((whole[:, 1], whole[:, 3], whole[:, 2], whole[:, 0]))
    whole = whole[order]
    first = copy_groups[0]
    factor = np.concatenate(factors)[order] if factors else None
    if factor is None:
        whole = merge(whole, first.src_elem, first.dst_elem)
    return Rows(
        first,
        whole[:, 0].copy(),
        whole[:, 1].copy(),
        whole[:, 2].copy(),
        whole[:, 3].copy(),
        whole[:, 4].copy(),
        factor,
        entry if factor is None else entry[order],
        head if factor is None else head[order],
    )


def _inner(copy_group: CopyGroup, low: int, high: int) -> tuple[Ids, Ids]:
    """Rows (source offset, destination offset, elements) of one unit of an entry, and their heads."""
    src_start = dst_start = 0
    steps: list[Step] = list(copy_group.steps)
    if copy_group.token is not None:
        token = copy_group.token
        src_start, dst_start = low * token.src_stride, low * token.dst_stride
        steps.append(token._replace(size=high - low))
    steps.sort(key=lambda step: (step.src_stride, step.dst_stride))
    by_head = copy_group.by_head
    count = copy_group.elements
    rest: list[Step] = []
    for step in steps:
        dense = (count * copy_group.src_elem, count * copy_group.dst_elem)
        joined = not rest and (step.src_stride, step.dst_stride) == dense
        if step.size == 1 and step.name != "head":
            continue
        if joined and not (by_head and step.name == "head"):
            count *= step.size
        else:
            rest.append(step)
    sizes = [step.size for step in reversed(rest)]
    grids = np.indices(sizes, np.int64).reshape(len(rest), math.prod(sizes))
    src = np.full(grids.shape[1], src_start, np.int64)
    dst = np.full(grids.shape[1], dst_start, np.int64)
    head = np.zeros(grids.shape[1], np.int64)
    for index, step in zip(grids, reversed(rest), strict=True):
        src += index * step.src_stride
        dst += index * step.dst_stride
        if step.name == "head":
            head = index
    return np.stack([src, dst, np.full(len(src), count, np.int64)], axis=1), head


def merge(table: Ids, src_elem: int = 1, dst_elem: int = 1) -> Ids:
    """Join rows that are neighbours on both sides.

    Args:
        table: rows of source region and offset, destination region and offset, and elements.
    """
    if len(table) < 2:
        return table
    before, after = table[:-1], table[1:]
    joined = (
        (before[:, 0] == after[:, 0])
        & (before[:, 2] == after[:, 2])
        & (before[:, 1] + before[:, 4] * src_elem == after[:, 1])
        & (before[:, 3] + before[:, 4] * dst_elem == after[:, 3])
    )
    starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    merged: Ids = table[starts]
    merged[:, 4] = np.add.reduceat(table[:, 4], starts)
    return merged


# Multiplying out.


def join(parts: Sequence[Pieces]) -> Pieces:
    """Put several lists of pieces one behind the other."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Pieces(_NONE, _NONE, _NONE, _NONE, _NONE)
    return Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def runs(src: Ids, dst: Ids, step: int) -> tuple[Ids, Ids, Ids | None]:
    """Find runs of numbers that rise by `step` on both sides: the first of each on either side, and
    the runs' lengths, or None where every run is of one."""
    breaks = (src[1:] - src[:-1] != step) | (dst[1:] - dst[:-1] != step)
    if bool(breaks.all()):  # scattered, the usual case: nothing to join, so nothing to copy
        return src, dst, None
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    return src[starts], dst[starts], np.append(starts[1:], len(src)) - starts


def product(
    rows: Rows | Template, nbytes: Ids, src: Ids, dst: Ids, lengths: Ids | None = None
) -> Pieces:
    """Multiply rows out over units.

    Args:
        nbytes: of each row.
        src, dst: what a unit adds to every row, or `[row, unit]`.
        lengths: by how many units in a row each one stands for; 1 if None.
    """
    units = src.shape[-1]
    return Pieces(
        np.repeat(rows.src_region, units),
        (rows.src_offset[:, None] + src).ravel(),
        np.repeat(rows.dst_region, units),
        (rows.dst_offset[:, None] + dst).ravel(),
        np.repeat(nbytes, units) if lengths is None else np.outer(nbytes, lengths).ravel(),
    )


def spread(
    rows: Rows,
    src_blocks: Ids,
    dst_blocks: Ids,
    src_tokens: Ids | tuple[int, int],
    dst_tokens: Ids | tuple[int, int],
) -> Moves:
    """Multiply rows out over units: the one in `src_blocks[i]` from token `src_tokens[i]` on."""
    copy_group = rows.copy_group
    src, dst = src_blocks * copy_group.src_slot_stride, dst_blocks * copy_group.dst_slot_stride
    if copy_group.token is not None:
        src = src + np.asarray(src_tokens) * copy_group.token.src_stride
        dst = dst + np.asarray(dst_tokens) * copy_group.token.dst_stride
    nbytes = rows.elements * copy_group.dst_elem
    if rows.factor is not None or len(src) < 2:
        pieces = product(rows, nbytes, src, dst)
        if rows.factor is None:
            return Moves(pieces, copy_group)
        units, each = len(src), len(nbytes)
        factor = np.repeat(rows.factor, units)
        if copy_group.src_scales is None and copy_group.dst_scales is None:
            return Moves(pieces, copy_group, factor)
        return Moves(
            pieces,
            copy_group,
            factor,
            np.repeat(rows.entry, units),
            np.repeat(rows.head, units),
            np.tile(src_blocks, each),
            np.tile(dst_blocks, each),
        )
    parts = []
    for elements in sorted(set(rows.elements.tolist())):
        same = _where(rows, rows.elements == elements)
        found = runs(src, dst, elements * copy_group.src_elem)
        parts.append(product(same, same.elements * copy_group.dst_elem, *found))
    return Moves(join(parts), copy_group)


def _where(rows: Rows, chosen: npt.NDArray[np.bool_]) -> Rows:
    if bool(chosen.all()):
        return rows
    return rows._replace(
        src_region=rows.src_region[chosen],
        src_offset=rows.src_offset[chosen],
        dst_region=rows.dst_region[chosen],
        dst_offset=rows.dst_offset[chosen],
        elements=rows.elements[chosen],
    )
