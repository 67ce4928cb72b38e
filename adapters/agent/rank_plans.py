"""Which plan two agents have: of everything that both hold, or of their part as ranks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ...engine.plan.rank_plan import RankPlan

if TYPE_CHECKING:
    from ...engine.layout.kv_layout import KVLayout
    from ...engine.memory.descriptors import CacheDescriptor
    from ...engine.memory.regions import RegisteredCache
    from ...engine.transfer.plan import TransferPlan
    from ...engine.transfer_engine import TransferEngine


def plan_between(
    engine: TransferEngine,
    cache: RegisteredCache,
    mine: CacheDescriptor,
    theirs: CacheDescriptor,
    *,
    writes: bool,
) -> TransferPlan | None:
    """The plan from this agent's cache to a peer's, or back; None if they have nothing to move.

    Raises:
        LayoutError: the two caches, or the two sets of ranks, cannot be reconciled.
    """
    pair = (cache, theirs) if writes else (theirs, cache)
    if not mine.ranks and not theirs.ranks:
        return engine.plan(*pair)
    src, dst = (mine, theirs) if writes else (theirs, mine)
    for route in rank_plan(_ranks(src), _ranks(dst)).to(dst.rank):
        if route.src == src.rank:
            return engine.plan(*pair, keys=route.keys)
    return None


def rank_plan_of(src: CacheDescriptor, dst: CacheDescriptor) -> RankPlan:
    """Who sends what to whom between the ranks of two engines."""
    return rank_plan(_ranks(src), _ranks(dst))


@functools.lru_cache(maxsize=64)
def rank_plan(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...]) -> RankPlan:
    """As `RankPlan`, remembered: every rank of a set asks for the same."""
    return RankPlan(src, dst)


def _ranks(cache: CacheDescriptor) -> tuple[KVLayout, ...]:
    return cache.ranks or (cache.layout,)
