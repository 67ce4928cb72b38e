"""What the parts of one link share: who is at the other end, how to tell it something or give it up,
and what its refusals end a transfer with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ChecksumMismatch, OutOfRange, RailError, RegionGone, RegionRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..context import EngineContext
    from ..errors import EngineError
    from ..transfer.ticket import Ticket
    from ..wire.identity import Identity
    from ..wire.messages import LinkMessage

_REFUSALS = {kind.__name__: kind for kind in (ChecksumMismatch, RegionGone, OutOfRange, RailError)}


@dataclass(frozen=True, eq=False)
class LinkContext:
    """No part of a link knows the link: it knows this.

    Attributes:
        send: sends a control message; never blocks.
        fail: takes the link down because of an error.
        suspect: a socket ended without a goodbye: the progress thread finds out why, then fails.
        down, quiesced: as in `Link`.
    """

    core: EngineContext
    peer: Identity
    transport: str
    send: Callable[[LinkMessage], None]
    fail: Callable[[EngineError], None]
    suspect: Callable[[], None]
    down: Ticket
    quiesced: Ticket


def refused(ticket: Ticket, error: str, reason: str) -> EngineError:
    """Return the error of an operation that the peer refused with an error of this class name."""
    return ticket._make_error(_REFUSALS.get(error, RegionRefused), f"the peer refused: {reason}")


def region_gone(ticket: Ticket, region_id: int) -> RegionGone:
    """Return the error of an operation on a region that its owner has deregistered."""
    return ticket._make_error(RegionGone, f"the peer has deregistered region {region_id}")
