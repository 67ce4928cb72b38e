"""What the parts of one link share: who is at the other end, and how to tell it something or give it up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..context import EngineContext
    from ..errors import EngineError
    from ..transfer.ticket import Ticket
    from ..wire.identity import Identity
    from ..wire.messages import LinkMessage


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
