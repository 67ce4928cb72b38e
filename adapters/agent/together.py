"""Several handoffs that are one request's: between ranks, each pair of ranks has one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .handoff import Handoff


def at_rest(handoffs: Sequence[Handoff]) -> bool:
    """Whether all ended and nobody can touch their blocks."""
    return all(each.done() and each.blocks_free.done() for each in handoffs)


def first_error(handoffs: Sequence[Handoff]) -> Exception | None:
    """What the first that failed failed with."""
    failed = [each for each in handoffs if each.error is not None]
    return min(failed, key=lambda each: each.finished_s).error if failed else None


def end_together(handoffs: Sequence[Handoff]) -> None:
    """Ends all if one failed: a request whose KV one rank cannot move is of no use to the others."""
    error = first_error(handoffs)
    for each in handoffs if error is not None else ():
        if not each.done():
            each.cancel(f"another rank failed: {error}")
