"""One session with one peer, as an agent keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...control.handoff.session import UP

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ...control.handoff.session import Session
    from ...engine.errors import EngineError
    from ...engine.link.link import Link
    from ...engine.memory.descriptors import CacheDescriptor
    from ...engine.transfer.plan import TransferPlan
    from .event_loop import Timer
    from .messaging import Route


class Acquaintance:
    """One session with one peer.

    Attributes:
        session, route: who it is, and how messages reach it.
        endpoint: what this side dialled; "" if the peer did.
        waiter: ends with the peer's name, or with why there is none.
        peer_cache: the peer's cache, once it has described it.
        write_plan, read_plan: from our cache to the peer's, and back, as far as roles need them;
            None also where, of two sets of ranks, these two have nothing to move.
        link: the link, once it is there.
        down: whether the link was there and is no more.
        quiesced: whether the peer can reach nothing any more.
    """

    def __init__(
        self, session: Session, route: Route, endpoint: str, waiter: Future[str] | None
    ) -> None:
        self.session = session
        self.route = route
        self.endpoint = endpoint
        self.waiter = waiter
        self.engine_id = ""
        self.token = b""  # what lets the peer open its link to us, once
        self.peer_cache: CacheDescriptor | None = None
        self.write_plan: TransferPlan | None = None
        self.read_plan: TransferPlan | None = None
        self.link: Link | None = None
        self.down = False
        self.quiesced = False
        self.failure: EngineError | None = None  # why the link could not be opened
        self.patient = False  # the peer leaves, and acknowledgements may still be on their way
        self.parting = ""  # why the session ended, if that came before the link went down
        self.timers: dict[str, Timer] = {}

    @property
    def up(self) -> bool:
        """Whether handoffs may begin."""
        return self.session.state == UP and not self.down
