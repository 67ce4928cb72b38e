"""How a verbs link's rails come to be: one end offers, the other answers, inside the handshake.

There are as many rails as the end with more devices has: rail i joins device i of each end, modulo
how many it has. So the two ends need not have equally many, and every device has its share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ProtocolError, TransportUnavailable
from .cards import MAX_RAILS, Offer
from .rail import Rail
from .slots import Slots

if TYPE_CHECKING:
    from .device import Device, Nics

DEFAULT_QUEUES = 1  # one fills a device; more are for networks with several paths


class Meeting:
    """One end's rails of a link that is being opened. The link's path takes them over.

    Attributes:
        devices: this end's, in the order in which its cards and keys name them.
        dialed: whether this end opened the link; it opens rails again, too.
    """

    def __init__(self, nics: Nics, *, dialed: bool) -> None:
        self.dialed = dialed
        self.devices: list[Device] = nics.devices()
        self.slots = Slots()
        self.rails: list[Rail] = []
        self._mine: tuple[Offer, ...] = ()

    def offer(self, peer_nics: int, queues: int = DEFAULT_QUEUES) -> bytes:
        """The dialing end's cards, for a peer with so many devices; `queues` for direct writes on each
        rail.

        Raises:
            TransportUnavailable: a device does not give what it takes.
        """
        self._create(min(MAX_RAILS, max(len(self.devices), peer_nics)), queues)
        return self._mine[0].encode()

    def answer(self, data: bytes) -> bytes:
        """The other end's cards, connected to those that came.

        Raises:
            ProtocolError, TransportUnavailable: these are none, or they do not reach each other.
        """
        theirs = Offer.decode(data)
        self._create(len(theirs.rails), len(theirs.rails[0].queues) - 1)
        self._connect(theirs)
        return self._mine[0].encode()

    def take(self, data: bytes) -> None:
        """Connects the dialing end's rails to the answer.

        Raises:
            ProtocolError, TransportUnavailable: as for `answer`.
        """
        self._connect(Offer.decode(data))
        for rail in self.rails:
            rail.up = True

    def close(self) -> None:
        """Gives everything back: the link did not come to be, or is down."""
        for rail in self.rails:
            rail.stop()
            rail.close()
        self.slots.close()

    def _create(self, num_rails: int, queues: int) -> None:
        for number in range(num_rails):
            nic = number % len(self.devices)
            rail = Rail(number, nic, self.devices[nic], self.slots, queues)
            self.rails.append(rail)
            rail.create()
        self._mine = (Offer(tuple(rail.card() for rail in self.rails)),)

    def _connect(self, theirs: Offer) -> None:
        if [card.rail for card in theirs.rails] != [rail.number for rail in self.rails]:
            raise ProtocolError("the peer's rails are not those of this link", operation="connect")
        refused: list[str] = []
        for rail, mine, card in zip(self.rails, self._mine[0].rails, theirs.rails, strict=True):
            try:
                rail.connect(mine, card)
            except TransportUnavailable as error:
                refused.append(error.message)
        if refused:
            raise TransportUnavailable("; ".join(refused), operation="connect")
