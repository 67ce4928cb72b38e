"""Opens broken rails again, in the background, once both ends have dealt with the old one.

dialing end                          the other
RailDown, RailClosed   ─────▶◀─────  RailDown, RailClosed      whoever notices first begins
RailOpen(my cards)     ─────▶        new queue pairs, connected
                       ◀─────        RailOpened(its cards)
RailReady              ─────▶        both send
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from ...errors import EngineError, ProtocolError, RailError
from ...wire.messages import RailClosed, RailOpen, RailOpened, RailReady
from .cards import Offer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..base import PathHost
    from .cards import RailCard
    from .loop import Loop
    from .rail import Rail

    RailMessage = RailClosed | RailOpen | RailOpened | RailReady

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 2.0


class Reopener:
    """The state of one link's broken rails. Used by the link's thread alone."""

    def __init__(
        self,
        link: PathHost,
        loop: Loop,
        *,
        dialed: bool,
        closed_there: Callable[[Rail], None],
        up: Callable[[Rail], None],
        broke: Callable[[Rail, RailError], None],
    ) -> None:
        """`dialed`: whether this end opens rails. `closed_there`: the peer has dealt with all that came
        over a rail. `up`: it is connected at both ends. `broke`: it cannot be connected."""
        self._link = link
        self._loop = loop
        self._dialed = dialed
        self._peer_closed = closed_there
        self._up = up
        self._broke = broke
        self._handlers: dict[type[RailMessage], Callable[[Rail, Any], None]] = {
            RailClosed: self._closed,
            RailOpened: self._opened,
            RailReady: self._ready,
        }
        self._closed_here: dict[int, int] = {}  # rail: the epoch that is dealt with
        self._closed_there: dict[int, int] = {}
        self._cards: dict[int, RailCard] = {}
        self._next_s: dict[int, float] = {}
        self._wait_s: dict[int, float] = {}

    def patience_s(self) -> float:
        """How long the thread may sleep before `look` has something to do."""
        if not self._next_s:
            return math.inf
        return max(0.0, min(self._next_s.values()) - time.monotonic())

    def closed_here(self, rail: Rail) -> None:
        """This end has dealt with all that came over a rail that is out."""
        if self._closed_here.get(rail.number) == rail.epoch:
            return
        self._closed_here[rail.number] = rail.epoch
        self._link.send(RailClosed(rail.number, rail.epoch))
        self._plan(rail)

    def handle(self, message: RailMessage) -> None:
        """Takes a message about a rail."""
        if message.rail >= len(self._loop.rails):
            raise ProtocolError(f"there is no rail {message.rail}")
        rail = self._loop.rails[message.rail]
        if isinstance(message, RailOpen):
            self._answer(rail, message)
        elif message.epoch == rail.epoch:  # else about an earlier life of it
            self._handlers[type(message)](rail, message)

    def look(self, now_s: float) -> None:
        """Tries the rails whose time has come."""
        for number in [number for number, when_s in self._next_s.items() if when_s <= now_s]:
            del self._next_s[number]
            self._try(self._loop.rails[number])
        rails = self._loop.rails
        if all(not rail.open and rail.device.lost for rail in rails):
            error = rails[0].error
            self._link.fail(
                RailError(
                    f"every rail's device is gone: {error.message if error else 'unplugged'}",
                    operation="link",
                    rail=rails[0].name,
                )
            )

    def _plan(self, rail: Rail) -> None:
        done = self._closed_here.get(rail.number) == self._closed_there.get(rail.number)
        if done and self._dialed and not rail.open and not rail.device.lost:
            wait_s = self._wait_s.get(rail.number, FIRST_WAIT_S)
            self._wait_s[rail.number] = min(2 * wait_s, LONGEST_WAIT_S)
            self._next_s[rail.number] = time.monotonic() + wait_s

    def _try(self, rail: Rail) -> None:
        if rail.open or rail.device.lost:
            return
        if not rail.device.active:
            self._plan(rail)
            return
        rail.epoch += 1
        self._closed_here[rail.number] = self._closed_there[rail.number] = rail.epoch
        try:
            rail.create()
        except EngineError:
            self._plan(rail)
            return
        self._cards[rail.number] = card = rail.card()
        self._link.send(RailOpen(rail.number, Offer((card,)).encode()))

    def _answer(self, rail: Rail, message: RailOpen) -> None:
        theirs = _one_card(message.offer)
        if theirs.rail != rail.number or theirs.epoch <= rail.epoch or self._dialed:
            raise ProtocolError(f"rail {rail.number} is opened out of turn")
        reason = ""
        if rail.open or self._closed_here.get(rail.number) != rail.epoch:
            reason = "the old one is not dealt with"
        elif not rail.device.active:
            reason = f"{rail.device.name} is not active"
        mine = None
        if not reason:
            try:
                rail.epoch = theirs.epoch
                rail.create()
                mine = rail.card()
                rail.connect(mine, theirs)
            except EngineError as error:
                rail.close()
                reason = error.message
                self._closed_here[rail.number] = rail.epoch
        if reason or mine is None:
            self._link.send(RailOpened(rail.number, theirs.epoch, refused=reason))
            return
        self._loop.watch(rail)
        self._link.send(RailOpened(rail.number, rail.epoch, Offer((mine,)).encode()))

    def _closed(self, rail: Rail, _: RailClosed) -> None:
        self._closed_there[rail.number] = rail.epoch
        self._peer_closed(rail)
        self._plan(rail)

    def _ready(self, rail: Rail, _: RailReady) -> None:
        if rail.open and rail.error is None and not rail.up:
            self._up(rail)

    def _opened(self, rail: Rail, message: RailOpened) -> None:
        if not rail.open or rail.up:
            return
        card = self._cards.pop(rail.number, None)
        if card is None:
            raise ProtocolError(f"rail {rail.number} is answered without a question")
        if message.refused:
            rail.close()
            self._plan(rail)
            return
        theirs = _one_card(message.offer)
        self._closed_here.pop(rail.number, None)
        self._closed_there.pop(rail.number, None)
        self._loop.watch(rail)
        try:
            rail.connect(card, theirs)
        except EngineError as error:
            self._broke(rail, RailError(error.message))
            return
        self._wait_s.pop(rail.number, None)
        self._link.send(RailReady(rail.number, rail.epoch))
        self._up(rail)


def _one_card(offer: bytes) -> RailCard:
    """The card of the rail that is opened.

    Raises:
        ProtocolError: there is none, or more than one.
    """
    cards = Offer.decode(offer).rails
    if len(cards) != 1:
        raise ProtocolError(f"{len(cards)} rails are opened at once")
    return cards[0]
