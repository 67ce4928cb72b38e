"""Tokens of one cache into another's blocks, whatever the two layouts are.

A request's tokens lie in blocks of one size at the source and of another at the destination. Cut
at every multiple of the largest common divisor of both sizes, they fall into *units* that never
leave a block on either side, so a unit is to two caches of different blocks what a block is to two
of equal ones. A block table alone says where unit `u` lies: in block `table[u // r]`, as its
`u % r`-th part, where a block has `r` units.

A *template* holds the pieces of one unit at both ends; a request multiplies it out over its units.
The first and the last unit may be partial: they have templates of their own.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .block_scales import SCALE_NBYTES
from .block_tables import block_table, check_distinct, check_ids, state_ids
from .errors import LayoutError, PlanError
from .plan import Pieces
from .reconcile import reconcile

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import numpy.typing as npt

    from .layout import KVLayout, RegionLayout
    from .reconcile import Bundle, Key, Step, TablePair

    BlockTable = Sequence[int] | npt.NDArray[np.integer]
    Ids = npt.NDArray[np.int64]


_NONE = np.zeros(0, np.int64)


class Rows(NamedTuple):
    """Pieces of one unit that move alike, as columns; at unit 0 of block 0 on both sides.

    Attributes:
        elements: of each piece.
        factor: what its numbers are multiplied by; None where bits are moved.
        entry, head: of the bundle, where numbers are converted.
    """

    bundle: Bundle
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
        bundle: says which types.
        factor: of each piece; None where bits are moved.
        entry, head, src_block, dst_block: of each piece, where scales differ from block to block.
    """

    pieces: Pieces
    bundle: Bundle
    factor: npt.NDArray[np.float32] | None
    entry: Ids
    head: Ids
    src_block: Ids
    dst_block: Ids


class TokenPlan:
    """How tokens of `src` become tokens of `dst`. Immutable; safe to use from any thread.

    Args:
        keys: the planes of layers to move; all that both hold if None.

    Attributes:
        pairs: what goes where, a pair of block tables each.
        layers: global indices of the layers that move, ascending.
        converts: whether any numbers change their type.

    Raises:
        LayoutError: the two layouts cannot be reconciled; names what differs and both values.
    """

    def __init__(self, src: KVLayout, dst: KVLayout, keys: Collection[Key] | None = None) -> None:
        self.src = src
        self.dst = dst
        self.pairs = reconcile(src, dst, keys)
        bundles = [bundle for pair in self.pairs for bundle in pair.bundles]
        self.layers = tuple(sorted({layer for b in bundles for layer in b.layer.tolist()}))
        self.converts = any(bundle.converts for bundle in bundles)
        for pair in self.pairs:
            _check_bounds(self, pair)
        self.template = functools.lru_cache(maxsize=256)(self._template)
        self._per_layer = functools.lru_cache(maxsize=256)(self._nbytes_of)

    def nbytes(
        self,
        start: int,
        stop: int,
        *,
        layers: Sequence[int] | None = None,
        states: int = 1,
    ) -> int:
        """Bytes that tokens `[start, stop)` of a request take at the destination: what a counter
        must reach. Reads no block ids.

        Args:
            layers: global layer indices; all if None.
            states: pages of each group whose slots are moved whole.
        """
        key = _layer_key(layers)
        total = 0
        for number, pair in enumerate(self.pairs):
            token_nbytes, slot_nbytes = self._per_layer(number, key)
            if not pair.unit:
                total += slot_nbytes * states
                continue
            first = window_start(pair, start, stop)
            if stop > first:
                total += token_nbytes * (stop - first)
                total += slot_nbytes * (-(-stop // pair.dst_tokens) - first // pair.dst_tokens)
        return total

    def moves(
        self,
        src_tables: Sequence[BlockTable],
        dst_tables: Sequence[BlockTable],
        start: int,
        stop: int,
        *,
        layers: Sequence[int] | None = None,
    ) -> Iterator[Moves]:
        """The pieces that move tokens `[start, stop)`.

        Args:
            src_tables, dst_tables: a block table for each group of its side's layout. Entry `i`
                holds tokens `[i * B, (i + 1) * B)` of the request, where `B` is the block size
                there; entries outside `[start, stop)` and outside a window are not looked at.
                Of state, the pages to be moved, in order; null slots on both sides are skipped.
            layers: global layer indices to move; all if None.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: before any piece is made.
        """
        key = _layer_key(layers)
        checked = [self.check(pair, src_tables, dst_tables, start, stop) for pair in self.pairs]
        for number, (pair, (src_ids, dst_ids)) in enumerate(zip(self.pairs, checked, strict=True)):
            if not pair.unit:
                for rows in self.template(number, 0, 0, key):
                    yield _spread(rows, src_ids, dst_ids, (0, 0), (0, 0))
                continue
            first = window_start(pair, start, stop)
            for stretch in stretches(first, stop, pair.unit):
                units = np.arange(stretch.first, stretch.last)
                where = [
                    (ids[units // per], units % per * pair.unit)
                    for ids, per in (
                        (src_ids, pair.src_tokens // pair.unit),
                        (dst_ids, pair.dst_tokens // pair.unit),
                    )
                ]
                if stretch.last - stretch.first > 1:
                    # By destination: pages are then walked in one direction, and runs are found.
                    order = np.argsort(where[1][0], kind="stable")
                    where = [(blocks[order], tokens[order]) for blocks, tokens in where]
                for rows in self.template(number, stretch.low, stretch.high, key):
                    if rows.bundle.token is not None:
                        yield _spread(rows, where[0][0], where[1][0], where[0][1], where[1][1])
            if first < stop:
                slots = np.arange(first // pair.dst_tokens, -(-stop // pair.dst_tokens))
                there = slots * pair.dst_tokens // pair.src_tokens
                for rows in self.template(number, 0, 0, key):
                    yield _spread(rows, src_ids[there], dst_ids[slots], (0, 0), (0, 0))

    def pieces(
        self,
        src_tables: Sequence[BlockTable],
        dst_tables: Sequence[BlockTable],
        start: int,
        stop: int,
        *,
        layers: Sequence[int] | None = None,
    ) -> Pieces:
        """`moves` as one table, for a plan that moves bits alone.

        Raises:
            PlanError: numbers change their type; and as for `moves`.
        """
        if self.converts:
            raise PlanError("numbers change their type: there are no pieces", operation="plan")
        found = self.moves(src_tables, dst_tables, start, stop, layers=layers)
        parts = [moves.pieces for moves in found]
        if not parts:
            empty = np.zeros(0, np.int64)
            return Pieces(empty, empty, empty, empty, empty)
        return Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def check(
        self,
        pair: TablePair,
        src_tables: Sequence[BlockTable],
        dst_tables: Sequence[BlockTable],
        start: int,
        stop: int,
    ) -> tuple[Ids, Ids]:
        """Both block tables of a pair as int64, checked as far as they are used.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: naming the side and the id.
        """
        src_ids = block_table("source", src_tables, pair.src_group)
        dst_ids = block_table("destination", dst_tables, pair.dst_group)
        if not pair.unit:
            return state_ids(pair, src_ids, dst_ids)
        if not 0 <= start <= stop:
            raise PlanError(f"tokens [{start}, {stop}) are no range", operation="plan")
        first = window_start(pair, start, stop)
        if pair.aligned and first % pair.dst_tokens:
            raise PlanError(
                f"token {first} is inside a block of {pair.dst_tokens} tokens, and {pair.aligned}: "
                "begin at a block boundary",
                operation="plan",
            )
        for side, ids, tokens, slots, null in (
            ("source", src_ids, pair.src_tokens, pair.src_slots, pair.src_null),
            ("destination", dst_ids, pair.dst_tokens, pair.dst_slots, pair.dst_null),
        ):
            used = ids[first // tokens : -(-stop // tokens)] if stop > first else ids[:0]
            if stop > first and len(ids) * tokens < stop:
                raise PlanError(
                    f"{len(ids)} {side} blocks of {tokens} tokens do not hold token {stop - 1}",
                    operation="plan",
                )
            check_ids(side, used, slots, null)
            if side == "destination":
                check_distinct(used)
        return src_ids, dst_ids

    def _nbytes_of(self, pair: int, layers: tuple[int, ...] | None) -> tuple[int, int]:
        """Bytes of one token, and of one block of what is moved by whole blocks."""
        found = [0, 0]
        for bundle in self.pairs[pair].bundles:
            entries = len(bundle.layer) if layers is None else int(bundle.chosen(layers).sum())
            found[bundle.token is None] += entries * bundle.run_nbytes
            found[1] += entries * bundle.scales_per_block * SCALE_NBYTES
        return found[0], found[1]

    def _template(
        self, pair: int, low: int, high: int, layers: tuple[int, ...] | None
    ) -> tuple[Rows, ...]:
        """Pieces of one unit's tokens `[low, high)`; of one whole slot for `[0, 0)`."""
        missing = set(layers or ()) - set(self.layers)
        if missing:
            raise PlanError(f"layer {min(missing)} is not held by both sides", operation="plan")
        whole = low == high
        found: dict[tuple[int, ...], list[Bundle]] = {}
        for bundle in self.pairs[pair].bundles:
            if (bundle.token is None) == whole and (layers is None or bundle.chosen(layers).any()):
                kind = (
                    bundle.src_slot_stride,
                    bundle.dst_slot_stride,
                    *((0, 0) if bundle.token is None else bundle.token[2:]),
                    id(bundle) if bundle.converts else bundle.dst_elem,
                )
                found.setdefault(kind, []).append(bundle)
        return tuple(_make_rows(same, low, high, layers) for same in found.values())


def window_start(pair: TablePair, start: int, stop: int) -> int:
    """The first token that a group needs: a sliding window sends its window alone."""
    return max(start, stop - pair.window) if pair.window else start


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


def _layer_key(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if layers is None else tuple(sorted({int(layer) for layer in layers}))


# Templates.


def _make_rows(bundles: list[Bundle], low: int, high: int, layers: tuple[int, ...] | None) -> Rows:
    """The pieces of one unit for bundles whose blocks and tokens lie alike."""
    tables = []
    factors: list[npt.NDArray[np.float32]] = []
    entry = head = np.zeros(0, np.int64)
    for bundle in bundles:
        inner, of_head = _inner(bundle, low, high)
        chosen = slice(None) if layers is None else bundle.chosen(layers)
        starts = np.stack(
            [bundle.src_region, bundle.src_start, bundle.dst_region, bundle.dst_start], axis=1
        )[chosen]
        table = np.empty((len(starts), len(inner), 5), np.int64)
        table[:, :, 0], table[:, :, 2] = starts[:, None, 0], starts[:, None, 2]
        table[:, :, 1] = starts[:, None, 1] + inner[:, 0]
        table[:, :, 3] = starts[:, None, 3] + inner[:, 1]
        table[:, :, 4] = inner[:, 2]
        tables.append(table.reshape(-1, 5))
        if bundle.factors is not None:
            of_entry = bundle.factors[chosen]
            wide = of_entry.shape[1] > 1
            factors.append(of_entry[:, of_head if wide else of_head * 0].ravel())
            numbers = np.arange(len(bundle.layer))[chosen]
            entry = np.repeat(numbers, len(inner))
            head = np.tile(of_head, len(numbers))
    whole = np.concatenate(tables)
    order = np.lexsort((whole[:, 3], whole[:, 1], whole[:, 2], whole[:, 0]))
    whole = whole[order]
    first = bundles[0]
    factor = np.concatenate(factors)[order] if factors else None
    if factor is None:
        whole = _merge(whole, first.src_elem, first.dst_elem)
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


def _inner(bundle: Bundle, low: int, high: int) -> tuple[Ids, Ids]:
    """Rows (source offset, destination offset, elements) of one unit of an entry, and their heads."""
    src_start = dst_start = 0
    steps: list[Step] = list(bundle.steps)
    if bundle.token is not None:
        token = bundle.token
        src_start, dst_start = low * token.src_stride, low * token.dst_stride
        steps.append(token._replace(size=high - low))
    steps.sort(key=lambda step: (step.src_stride, step.dst_stride))
    by_head = bundle.by_head
    count = bundle.elements
    rest: list[Step] = []
    for step in steps:
        dense = (count * bundle.src_elem, count * bundle.dst_elem)
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


def _merge(table: Ids, src_elem: int, dst_elem: int) -> Ids:
    """Joins rows that are neighbours on both sides."""
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


def _spread(
    rows: Rows,
    src_blocks: Ids,
    dst_blocks: Ids,
    src_tokens: Ids | tuple[int, int],
    dst_tokens: Ids | tuple[int, int],
) -> Moves:
    """Multiplies rows out over units: the one in `src_blocks[i]` from token `src_tokens[i]` on."""
    bundle = rows.bundle
    src, dst = src_blocks * bundle.src_slot_stride, dst_blocks * bundle.dst_slot_stride
    if bundle.token is not None:
        src = src + np.asarray(src_tokens) * bundle.token.src_stride
        dst = dst + np.asarray(dst_tokens) * bundle.token.dst_stride
    if bundle.src_scales is not None or bundle.dst_scales is not None:
        units, each = len(src), len(rows.elements)
        return _product(rows, src, dst, None)._replace(
            entry=np.repeat(rows.entry, units),
            head=np.repeat(rows.head, units),
            src_block=np.tile(src_blocks, each),
            dst_block=np.tile(dst_blocks, each),
        )
    if rows.factor is not None or len(src) < 2:
        return _product(rows, src, dst, None)
    parts = []
    for elements in sorted(set(rows.elements.tolist())):
        same = _where(rows, rows.elements == elements)
        parts.append(_product(same, *_runs(src, dst, elements * bundle.src_elem)).pieces)
    if len(parts) == 1:
        return Moves(parts[0], bundle, None, _NONE, _NONE, _NONE, _NONE)
    together = Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return Moves(together, bundle, None, _NONE, _NONE, _NONE, _NONE)


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


def _runs(src: Ids, dst: Ids, nbytes: int) -> tuple[Ids, Ids, Ids | None]:
    """First source and destination address and length of each run of neighbours on both sides."""
    breaks = (src[1:] - src[:-1] != nbytes) | (dst[1:] - dst[:-1] != nbytes)
    if bool(breaks.all()):  # scattered, the usual case: nothing to join, so nothing to copy
        return src, dst, None
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    return src[starts], dst[starts], np.append(starts[1:], len(src)) - starts


def _product(rows: Rows, src: Ids, dst: Ids, lengths: Ids | None) -> Moves:
    units = len(src)
    row_nbytes = rows.elements * rows.bundle.dst_elem
    nbytes = np.repeat(row_nbytes, units) if lengths is None else np.outer(row_nbytes, lengths)
    pieces = Pieces(
        np.repeat(rows.src_region, units),
        (rows.src_offset[:, None] + src).ravel(),
        np.repeat(rows.dst_region, units),
        (rows.dst_offset[:, None] + dst).ravel(),
        nbytes.ravel(),
    )
    factor = None if rows.factor is None else np.repeat(rows.factor, units)
    return Moves(pieces, rows.bundle, factor, _NONE, _NONE, _NONE, _NONE)


def _check_bounds(plan: TokenPlan, pair: TablePair) -> None:
    """Every piece of every block lies inside its region: a peer's layout must not make this
    process touch other memory of its own."""
    sides = (
        ("source", plan.src, pair.src_tokens),
        ("destination", plan.dst, pair.dst_tokens),
    )
    for bundle in pair.bundles:
        columns = (bundle.src_region, bundle.src_start), (bundle.dst_region, bundle.dst_start)
        for number, (side, layout, tokens) in enumerate(sides):
            strides = [(step.size - 1, step[2:][number]) for step in bundle.steps]
            if bundle.token is not None:
                strides.append((tokens - 1, bundle.token[2:][number]))
            reach = bundle.elements * (bundle.src_elem, bundle.dst_elem)[number]
            reach += sum(count * stride for count, stride in strides)
            for region, start in zip(*(column.tolist() for column in columns[number]), strict=True):
                shape: RegionLayout = layout.regions[region]
                end = start + reach + (shape.num_slots - 1) * shape.slot_stride
                if start < 0 or end > shape.nbytes:
                    raise LayoutError(
                        f"pieces of the {side}'s region {region} end at byte {end} of "
                        f"{shape.nbytes}",
                        operation="plan",
                    )
