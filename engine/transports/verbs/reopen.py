"""Notices rails that get nowhere, and opens broken ones again, in the background, once both ends have
dealt with the old one.

dialing end                          the other
RailDown, RailClosed   ─────▶◀─────  RailDown, RailClosed      whoever notices first begins
RailOpen(my cards)     ─────▶        new queue pairs, connected
                       ◀─────        RailOpened(its cards)
RailReady              ─────▶        both send
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import EngineError, ProtocolError, RailError, RailStalled
from ...wire.messages import RailClosed, RailOpen, RailOpened, RailReady
from .cards import Offer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..base import PathHost
    from .cards import RailCard
    from .loop import Loop
    from .queue_pair import Batch, QueuePair
    from .rail import Rail

    RailMessage = RailClosed | RailOpen | RailOpened | RailReady

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 2.0
# A device gives up after seven tries, each of 268 ms to four times that (`queue_pair.py`): 7.5 s at most.
STALLED_S = 10.0
SLOWEST_NBYTES_PER_S = 1 << 20  # and so much longer as a batch takes on a wire that is this slow
SUSPECT_S = 1.0  # then the port is asked whether its packets have shrunk, which explains all
DOWN_S = 4.0  # a port that is down for less may be back before its device gives up
LONGEST_LOOK_S = 1.0  # more between two looks is time in which this process stood still itself


class Stall(NamedTuple):
    """A rail that gets nowhere, its batch that has waited longest, and why it is taken out."""

    rail: Rail
    batch: Batch
    error: RailStalled


class Watch:
    """Notices a rail that completes nothing of what is posted: a device that tries for ever.

    Most devices give up by themselves and say so. Software RoCE does not where its own interface takes
    no packet of the size that the two ends agreed on: it would hold a transfer's memory until the link
    went down. Used by the link's thread alone.
    """

    def __init__(self) -> None:
        self._looked_s = 0.0

    def look(self, rails: list[Rail], now_s: float) -> list[Stall]:
        """Return the rails to take out. While completions come, it compares two numbers a queue
        pair."""
        elapsed_s = min(now_s - self._looked_s, LONGEST_LOOK_S)
        self._looked_s = now_s
        found = []
        for rail in rails:
            for pair in rail.queues:
                why = _why_stalled(rail, pair, elapsed_s)
                if why:
                    error = RailStalled(why, operation="transfer")
                    found.append(Stall(rail, pair.flying[0], error))
                    break
        return found


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
        """Return how long the thread may sleep before `look` has something to do."""
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
        """Take a message about a rail."""
        if message.rail >= len(self._loop.rails):
            raise ProtocolError(f"there is no rail {message.rail}")
        rail = self._loop.rails[message.rail]
        if isinstance(message, RailOpen):
            self._answer(rail, message)
        elif message.epoch == rail.epoch:  # else about an earlier life of it
            self._handlers[type(message)](rail, message)

    def look(self, now_s: float) -> None:
        """Try the rails whose time has come."""
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
    """Return the card of the rail that is opened.

    Raises:
        ProtocolError: there is none, or more than one.
    """
    cards = Offer.decode(offer).rails
    if len(cards) != 1:
        raise ProtocolError(f"{len(cards)} rails are opened at once")
    return cards[0]


def _why_stalled(rail: Rail, pair: QueuePair, elapsed_s: float) -> str:
    if not pair.flying:
        pair.oldest = -1
        return ""
    oldest = pair.flying[0]
    if oldest.number != pair.oldest:
        pair.oldest, pair.waited_s = oldest.number, 0.0
        return ""
    pair.waited_s += elapsed_s
    if pair.waited_s < SUSPECT_S:
        return ""
    shrunk = why_too_small(rail)
    if shrunk:
        return shrunk
    posted = sum(batch.requests for batch in pair.flying)
    stalled = (
        f"nothing of {posted} posted work requests has completed for {pair.waited_s:.0f} s on rail "
        f"{rail.name}"
    )
    if pair.waited_s >= DOWN_S and not rail.device.active:
        return f"the port of {rail.device.name} is down: {stalled}"
    if pair.waited_s < STALLED_S + oldest.nbytes / SLOWEST_NBYTES_PER_S:
        return ""
    return (
        f"{stalled}, and its device does not give up: does every interface and switch on the "
        f"way take packets of {packet_nbytes(rail.mtu)} bytes (MTU), and what does the kernel's log say of it?"
    )


def why_too_small(rail: Rail) -> str:
    """That the port no longer takes packets of the size that was agreed on, or ""."""
    agreed_nbytes, now_nbytes = packet_nbytes(rail.mtu), packet_nbytes(rail.device.mtu)
    if now_nbytes >= agreed_nbytes:
        return ""
    return (
        f"{rail.device.name} now takes packets of {now_nbytes} bytes, and {agreed_nbytes} were "
        f"agreed on for rail {rail.name}: somebody has changed the interface's MTU"
    )


def packet_nbytes(mtu: int) -> int:
    """Return what the verbs' code of an MTU means: 1 to 5 are 256 to 4,096 bytes."""
    return 128 << mtu
