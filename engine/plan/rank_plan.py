"""Two sets of ranks that hold one model's cache: who sends what to whom.

A rank's layout says which layers and heads it holds, so tensor and pipeline parallelism of any
degree are only ranges here. What several source ranks hold alike (replicated heads, an MLA latent)
is sent by exactly one of them to each destination rank. Which one is worked out evenly and from the
layouts alone, so both sides come to the same answer without a word about it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from ..errors import LayoutMismatch
from ..layout.block_scales import is_scale
from .token_plan import TokenPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..layout.kv_layout import KVLayout
    from .planes import Key

    Range = tuple[int, int]
    _Held = dict[Key, dict[int, Range]]  # by plane of a layer: each rank's heads


class RankPair(NamedTuple):
    """What one source rank sends to one destination rank.

    Attributes:
        src, dst: positions in the sets of ranks.
        keys: the planes of layers, `(layer, plane)`, ascending.
        plan: for exactly these: pieces, byte counts, kernel arguments.
    """

    src: int
    dst: int
    keys: tuple[Key, ...]
    plan: TokenPlan


class RankPlan:
    """How a cache spread over `src` ranks becomes one spread over `dst` ranks.

    Attributes:
        routes: all of them, by destination and then source.

    Raises:
        LayoutError: heads or layers that nobody holds, that several hold in part, or that one side
            alone knows; two layouts that cannot be reconciled. Names both values.
    """

    def __init__(self, src: Sequence[KVLayout], dst: Sequence[KVLayout]) -> None:
        self.src = tuple(src)
        self.dst = tuple(dst)
        _check_replicas("source", self.src)
        _check_replicas("destination", self.dst)
        held = [_held(side) for side in (self.src, self.dst)]
        for mine, theirs in (held, held[::-1]):
            for key in [key for key in mine if key not in theirs and is_scale((key[1],))]:
                del mine[key]  # made, or used up, where numbers are converted
        _check_sets(held[0], held[1])
        keys: dict[tuple[int, int], list[Key]] = defaultdict(list)
        for cell in _cells(held[0], held[1]):
            for (source, target), some in _share(cell).items():
                keys[target, source] += some
        self.routes = tuple(
            RankPair(source, target, tuple(sorted(some)), self._plan(source, target, some))
            for (target, source), some in sorted(keys.items())
        )

    def _plan(self, source: int, target: int, keys: list[Key]) -> TokenPlan:
        return TokenPlan(self.src[source], self.dst[target], frozenset(keys))

    def to(self, dst: int) -> tuple[RankPair, ...]:
        """Return what a destination rank gets: the source ranks that it talks to, and no others."""
        return tuple(route for route in self.routes if route.dst == dst)

    def of(self, src: int) -> tuple[RankPair, ...]:
        """Return what a source rank sends."""
        return tuple(route for route in self.routes if route.src == src)

    def nbytes(self, dst: int, start: int, stop: int, *, states: int = 1) -> dict[int, int]:
        """Bytes that a destination rank must count from each of its source ranks."""
        return {route.src: route.plan.nbytes(start, stop, states=states) for route in self.to(dst)}


def check_covers(src: KVLayout, dst: KVLayout) -> None:
    """Check that one source alone can fill a destination.

    Raises:
        LayoutMismatch: the destination holds layers or heads that the source lacks.
    """
    have, want = _held((src,)), _held((dst,))
    lacking = sorted({layer for layer, _ in want} - {layer for layer, _ in have})
    if lacking:
        raise LayoutMismatch(
            f"the destination has layers {lacking}, which the source lacks: where a cache is "
            "spread over several agents, each says so with `ranks`"
        )
    for key in sorted(key for key in want if key in have and not is_scale((key[1],))):
        mine, theirs = have[key][0], want[key][0]
        if not mine[0] <= theirs[0] < theirs[1] <= mine[1]:
            raise LayoutMismatch(
                f"axis 'head' of layer {key[0]}: the source has {_text(mine)}, the destination "
                f"{_text(theirs)}: where a cache is spread over several agents, each says so with "
                "`ranks`"
            )


class _Cell(NamedTuple):
    """Planes of layers that are held, and wanted, by the same ranks: sources are chosen for all.

    Attributes:
        sources: the alternatives; each holds all heads of the cell.
        targets: every rank that wants them.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    keys: tuple[Key, ...]


def heads_of_rank(num_heads: int, tp_size: int, tp_rank: int) -> Range:
    """Return the KV heads that tensor parallelism gives a rank; ranks beyond the number of heads
    share them.

    As vLLM and SGLang split them.
    """
    start = tp_rank * num_heads // tp_size
    return start, start + max(1, num_heads // tp_size)


def _held(side: tuple[KVLayout, ...]) -> _Held:
    """Who holds which heads of what; a plane without heads counts as one head that all hold."""
    found: _Held = defaultdict(dict)
    for rank, layout in enumerate(side):
        for index, region in enumerate(layout.regions):
            heads = layout.region_heads(index) if region.axis("head") else (0, 1)
            for key in region.keys:
                found[key][rank] = heads
    return found


def _check_replicas(side: str, layouts: tuple[KVLayout, ...]) -> None:
    """Ranks that split heads between them hold none twice."""
    seen: dict[tuple[Key, Range], int] = {}
    for rank, layout in enumerate(layouts):
        if layout.tp_mode == "replicate":
            continue
        for index, region in enumerate(layout.regions):
            if region.axis("head") is None:
                continue
            heads = layout.region_heads(index)
            for key in region.keys:
                other = seen.setdefault((key, heads), rank)
                if other != rank:
                    raise LayoutMismatch(
                        f"axis 'head' of layer {key[0]}: {side} ranks {other} and {rank} both hold "
                        f"{_text(heads)}; replicas say so with tp_mode='replicate'"
                    )


def _check_sets(src: _Held, dst: _Held) -> None:
    for key in sorted({*src, *dst}):
        layer, plane = key
        if key not in src or key not in dst:
            side, other = ("source", "destination") if key in src else ("destination", "source")
            raise LayoutMismatch(
                f"plane {plane!r} of layer {layer} is held by the {side} ranks "
                f"{sorted((src if key in src else dst)[key])} and by no {other} rank"
            )
        spans = []
        for side, held in (("source", src[key]), ("destination", dst[key])):
            spans.append(_check_ranges(side, layer, held))
        if spans[0] != spans[1]:
            raise LayoutMismatch(
                f"axis 'head' of layer {layer}: the source ranks hold {_text(spans[0])}, the "
                f"destination ranks {_text(spans[1])}"
            )


def _check_ranges(side: str, layer: int, held: dict[int, Range]) -> Range:
    """Return the heads that a set of ranks holds together: ranges may be equal, else they must
    adjoin."""
    ranges = sorted({heads: rank for rank, heads in held.items()}.items())
    for (one, rank), (other, next_rank) in itertools.pairwise(ranges):
        if one[1] != other[0]:
            what = "overlaps" if other[0] < one[1] else "leaves a gap to"
            raise LayoutMismatch(
                f"axis 'head' of layer {layer}: {side} rank {rank} holds {_text(one)}, which "
                f"{what} {_text(other)} of rank {next_rank}"
            )
    return ranges[0][0][0], ranges[-1][0][1]


def _text(heads: Range) -> str:
    return f"[{heads[0]}, {heads[1]})"


def _cells(src: _Held, dst: _Held) -> list[_Cell]:
    """Return the alternatives for every head, gathered where they are the same for several
    planes."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Key]] = defaultdict(list)
    for key in sorted(src):
        sources: dict[Range, list[int]] = defaultdict(list)
        for rank, heads in sorted(src[key].items()):
            sources[heads].append(rank)
        for heads, ranks in sources.items():
            targets = tuple(
                rank
                for rank, wanted in sorted(dst[key].items())
                if max(heads[0], wanted[0]) < min(heads[1], wanted[1])
            )
            found[tuple(ranks), targets].append(key)
    return [_Cell(*ranks, tuple(keys)) for ranks, keys in found.items()]


def _share(cell: _Cell) -> dict[tuple[int, int], list[Key]]:
    """Return one source for each target and plane, all sources as busy as the others.

    The layers of the first target, then those of the second and so on, are dealt out to the sources
    in equal runs: a source that serves several targets may share one of them with the next source.
    """
    found: dict[tuple[int, int], list[Key]] = {}
    layers = sorted({layer for layer, _ in cell.keys})
    num_sources, num_shares = len(cell.sources), len(cell.targets) * len(layers)
    for number, source in enumerate(cell.sources):
        first = number * num_shares // num_sources
        last = (number + 1) * num_shares // num_sources
        for position, target in enumerate(cell.targets):
            begin = position * len(layers)
            some = set(layers[max(first - begin, 0) : max(last - begin, 0)])
            if some:
                found[source, target] = [key for key in cell.keys if key[0] in some]
    return found
