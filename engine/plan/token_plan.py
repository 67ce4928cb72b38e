"""Tokens of one cache into another's blocks, whatever the two layouts are.

A request's tokens lie in blocks of one size at the source and of another at the destination. Cut
at every multiple of the largest common divisor of both sizes, they fall into *units* that never
leave a block on either side, so a unit is to two caches of different blocks what a block is to two
of equal ones. A block table alone says where unit `u` lies: in block `table[u // r]`, as its
`u % r`-th part, where a block has `r` units.

The pieces themselves are made in `template.py`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LayoutMismatch, PlanError
from ..layout.block_scales import SCALE_NBYTES
from .block_tables import block_table, check_distinct, check_ids, state_ids
from .reconcile import reconcile
from .template import join, make_rows, spread, stretches

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import numpy.typing as npt

    from ..layout.kv_layout import KVLayout
    from ..layout.region import RegionLayout
    from .block_tables import BlockIds
    from .planes import Key
    from .reconcile import CopyGroup, TablePair
    from .template import Moves, Pieces, Rows

    Ids = npt.NDArray[np.int64]


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
        copy_groups = [copy_group for pair in self.pairs for copy_group in pair.copy_groups]
        self.layers = tuple(sorted({layer for b in copy_groups for layer in b.layer.tolist()}))
        self.converts = any(copy_group.converts for copy_group in copy_groups)
        for pair in self.pairs:
            _check_bounds(self, pair)
        self.template = functools.lru_cache(maxsize=256)(self._template)
        self._per_layer = functools.lru_cache(maxsize=256)(self._nbytes_of)

    @functools.cached_property
    def unpaired(self) -> str:
        """Why a list of block ids for each side would not say what moves; "" if it does."""
        src, dst = self.src, self.dst
        if self.converts:
            types = sorted({(b.src_dtype, b.dst_dtype) for p in self.pairs for b in p.copy_groups})
            return f"dtype differs: source and destination have {types}"
        if len(src.groups) > 1 or len(dst.groups) > 1:
            return f"they have {len(src.groups)} and {len(dst.groups)} block tables a request"
        for pair in self.pairs:
            if pair.src_tokens != pair.dst_tokens:
                return (
                    f"block size in tokens differs: source has {pair.src_tokens}, destination has "
                    f"{pair.dst_tokens}"
                )
        if len({*map(src.region_dtype, range(len(src.regions)))}) > 1:
            return "regions of one cache differ in dtype"
        return ""

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

        Raises:
            PlanError: there is no such range.
        """
        if not 0 <= start <= stop or states < 0:
            raise PlanError(
                f"tokens [{start}, {stop}) and {states} states: numbers from 0, the last not below the "
                "first"
            )
        key = layer_key(layers)
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
        src_tables: Sequence[BlockIds],
        dst_tables: Sequence[BlockIds],
        start: int,
        stop: int,
        *,
        layers: Sequence[int] | None = None,
    ) -> Iterator[Moves]:
        """Return the pieces that move tokens `[start, stop)`.

        Args:
            src_tables, dst_tables: a block table for each group of its side's layout. Entry `i`
                holds tokens `[i * B, (i + 1) * B)` of the request, where `B` is the block size
                there; entries outside `[start, stop)` and outside a window are not looked at.
                Of state, the pages to be moved, in order; null slots on both sides are skipped.
            layers: global layer indices to move; all if None.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: before any piece is made.
        """
        key = layer_key(layers)
        checked = [self.check(pair, src_tables, dst_tables, start, stop) for pair in self.pairs]
        for number, (pair, (src_ids, dst_ids)) in enumerate(zip(self.pairs, checked, strict=True)):
            if not pair.unit:
                for rows in self.template(number, 0, 0, key):
                    yield spread(rows, src_ids, dst_ids, (0, 0), (0, 0))
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
                    if rows.copy_group.token is not None:
                        yield spread(rows, where[0][0], where[1][0], where[0][1], where[1][1])
            if first < stop:
                slots = np.arange(first // pair.dst_tokens, -(-stop // pair.dst_tokens))
                there = slots * pair.dst_tokens // pair.src_tokens
                for rows in self.template(number, 0, 0, key):
                    yield spread(rows, src_ids[there], dst_ids[slots], (0, 0), (0, 0))

    def pieces(
        self,
        src_tables: Sequence[BlockIds],
        dst_tables: Sequence[BlockIds],
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
            raise PlanError("numbers change their type: there are no pieces")
        found = self.moves(src_tables, dst_tables, start, stop, layers=layers)
        return join([moves.pieces for moves in found])

    def check(
        self,
        pair: TablePair,
        src_tables: Sequence[BlockIds],
        dst_tables: Sequence[BlockIds],
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
            raise PlanError(f"tokens [{start}, {stop}) are no range")
        first = window_start(pair, start, stop)
        if pair.aligned and first % pair.dst_tokens:
            raise PlanError(
                f"token {first} is inside a block of {pair.dst_tokens} tokens, and {pair.aligned}: "
                "begin at a block boundary"
            )
        for side, ids, tokens, slots, null in (
            ("source", src_ids, pair.src_tokens, pair.src_slots, pair.src_null),
            ("destination", dst_ids, pair.dst_tokens, pair.dst_slots, pair.dst_null),
        ):
            used = ids[first // tokens : -(-stop // tokens)] if stop > first else ids[:0]
            if stop > first and len(ids) * tokens < stop:
                raise PlanError(
                    f"{len(ids)} {side} blocks of {tokens} tokens do not hold token {stop - 1}"
                )
            check_ids(side, used, slots, null)
            if side == "destination":
                check_distinct(used)
        return src_ids, dst_ids

    def _nbytes_of(self, pair: int, layers: tuple[int, ...] | None) -> tuple[int, int]:
        """Bytes of one token, and of one block of what is moved by whole blocks."""
        found = [0, 0]
        for copy_group in self.pairs[pair].copy_groups:
            entries = (
                len(copy_group.layer) if layers is None else int(copy_group.chosen(layers).sum())
            )
            found[copy_group.token is None] += entries * copy_group.run_nbytes
            found[1] += entries * copy_group.scales_per_block * SCALE_NBYTES
        return found[0], found[1]

    def _template(
        self, pair: int, low: int, high: int, layers: tuple[int, ...] | None
    ) -> tuple[Rows, ...]:
        """Pieces of one unit's tokens `[low, high)`; of one whole slot for `[0, 0)`."""
        missing = set(layers or ()) - set(self.layers)
        if missing:
            raise PlanError(f"layer {min(missing)} is not held by both sides")
        whole = low == high
        found: dict[tuple[int, ...], list[CopyGroup]] = {}
        for copy_group in self.pairs[pair].copy_groups:
            if (copy_group.token is None) == whole and (
                layers is None or copy_group.chosen(layers).any()
            ):
                kind = (
                    copy_group.src_slot_stride,
                    copy_group.dst_slot_stride,
                    *((0, 0) if copy_group.token is None else copy_group.token[2:]),
                    id(copy_group) if copy_group.converts else copy_group.dst_elem,
                )
                found.setdefault(kind, []).append(copy_group)
        return tuple(make_rows(same, low, high, layers) for same in found.values())


def window_start(pair: TablePair, start: int, stop: int) -> int:
    """Return the first token that a group needs: a sliding window sends its window alone.

    Where blocks move whole, all of the block in which the window begins.
    """
    if not pair.window:
        return start
    first = max(0, stop - pair.window)
    if pair.aligned:
        first -= first % pair.dst_tokens
    return max(start, first)


def layer_key(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """Name a choice of layers, in whatever order it is given; None for all."""
    return None if layers is None else tuple(sorted({int(layer) for layer in layers}))


def _check_bounds(plan: TokenPlan, pair: TablePair) -> None:
    """Every piece of every block lies inside its region: a peer's layout must not make this
    process touch other memory of its own."""
    sides = (
        ("source", plan.src, pair.src_tokens),
        ("destination", plan.dst, pair.dst_tokens),
    )
    for copy_group in pair.copy_groups:
        columns = (
            (copy_group.src_region, copy_group.src_start),
            (copy_group.dst_region, copy_group.dst_start),
        )
        for number, (side, layout, tokens) in enumerate(sides):
            strides = [(step.size - 1, step[2:][number]) for step in copy_group.steps]
            if copy_group.token is not None:
                strides.append((tokens - 1, copy_group.token[2:][number]))
            reach = copy_group.elements * (copy_group.src_elem, copy_group.dst_elem)[number]
            reach += sum(count * stride for count, stride in strides)
            for region, start in zip(*(column.tolist() for column in columns[number]), strict=True):
                shape: RegionLayout = layout.regions[region]
                end = start + reach + (shape.num_slots - 1) * shape.slot_stride
                if start < 0 or end > shape.nbytes:
                    raise LayoutMismatch(
                        f"pieces of the {side}'s region {region} end at byte {end} of "
                        f"{shape.nbytes}"
                    )
