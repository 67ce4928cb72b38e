"""A rail: one device here, one at the peer, and the queue pairs between them; and how rails come to be.

A rail is opened, used and taken out as a whole. Its epoch says how often it has been opened, so that
a message about an earlier life is not taken for one about this.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

from ...errors import ProtocolError, RailError, TransportUnavailable
from . import cards as verbs_cards
from . import topology
from .cards import MAX_RAILS, Offer, RailCard
from .queue_pair import RECEIVE_DEPTH, SEND_DEPTH, QueuePair
from .slots import Slots

if TYPE_CHECKING:
    from .device import Device, Nics

DEFAULT_QUEUES = 1  # one fills a device; more are for networks with several paths

POLL_AT_ONCE = 64
FLUSH_S = 0.2  # a device takes microseconds to flush a stopped queue; one that is gone never does


class Rail:
    """One end of one rail. Its link's thread uses it; `stop` and `poll` are for any thread.

    Attributes:
        number: the same at both ends.
        nic: position of its device among this end's.
        device: which it is.
        name: for people: number and device.
        up: both ends are connected.
        mtu: the verbs' code of the packets that the two ends agreed on.
        error: why it is out; None while it is not.
        staged, direct: its queue pairs.
        sent_nbytes, received_nbytes: over all its lives.
    """

    def __init__(self, number: int, nic: int, device: Device, slots: Slots, queues: int) -> None:
        self.number = number
        self.nic = nic
        self.device = device
        self.name = f"{number} ({device.name})"
        self.epoch = 0
        self.up = False
        self.error: RailError | None = None
        self.mtu = 1
        self.peer_nic = 0
        self.peer_slots = (0, 0)
        self.sent_nbytes = 0
        self.received_nbytes = 0
        self.open = False
        self.fd = -1
        self._slots = slots
        self._num_queues = queues
        self._depth = (1 + queues) * (SEND_DEPTH + RECEIVE_DEPTH)  # of its completions
        self._lock = threading.Lock()
        self._channel: Any = None
        self._completions: Any = None
        self.staged: QueuePair | None = None
        self.direct: list[QueuePair] = []

    @property
    def queues(self) -> list[QueuePair]:
        """All queue pairs, the staged path's first."""
        return [self.staged, *self.direct] if self.staged is not None else []

    @property
    def most_polls(self) -> int:
        """After how many polls all completions have come that there were at the first."""
        return -(-self._depth // POLL_AT_ONCE) + 1

    def create(self) -> None:
        """Make the queue pairs, not connected yet.

        Raises:
            TransportUnavailable: the device does not give them.
        """
        library = self.device.library
        self.device.acquire()
        self.open = True
        self.error = None
        try:
            pad = (self._slots.address, self._slots.keys(self.device)[0])
            self._channel, self.fd = self.device.channel()
            self._completions = library.cq.CQ(self.device.context, self._depth, None, self._channel)
            pairs = [
                QueuePair(self.device, self._completions, pad=pad)
                for _ in range(1 + self._num_queues)
            ]
        except library.error as error:
            self.close()
            raise TransportUnavailable(
                f"RDMA device {self.device.name} gives no queue pair: {error}"
            ) from error
        self.staged, *self.direct = pairs

    def card(self) -> RailCard:
        """Return what the peer needs to connect its end."""
        nic = self.device.nic
        return RailCard(
            rail=self.number,
            epoch=self.epoch,
            nic=self.nic,
            device=nic.name,
            link_layer=nic.link_layer,
            lid=nic.lid,
            mtu=self.device.mtu,
            gids=verbs_cards.gid_cards(topology.gids(nic), nic.link_layer),
            queues=tuple(pair.card for pair in self.queues),
            slots=self._slots.inbox,
            slots_key=self._slots.keys(self.device)[1],
        )

    def connect(self, mine: RailCard, theirs: RailCard) -> None:
        """Connect the queue pairs; they receive from now on.

        Raises:
            TransportUnavailable: the two ends do not reach each other.
        """
        if len(theirs.queues) != len(self.queues):
            raise TransportUnavailable(
                f"rail {self.number} has {len(self.queues)} queue pairs here and "
                f"{len(theirs.queues)} at the peer"
            )
        way = verbs_cards.route(mine, theirs)
        try:
            for pair, card in zip(self.queues, theirs.queues, strict=True):
                pair.connect(way, card)
            self._completions.req_notify()
        except self.device.library.error as error:
            raise TransportUnavailable(f"rail {self.name} does not connect: {error}") from error
        self.mtu = way.mtu
        self.peer_nic = theirs.nic
        self.peer_slots = (theirs.slots, theirs.slots_key)

    def poll(self) -> list[Any]:
        """Return the completions that have come, up to a limit. From any thread."""
        with self._lock:
            if self._completions is None:
                return []
            completions: list[Any] = self._completions.poll(POLL_AT_ONCE)[1]
            return completions

    def arm(self) -> None:
        """Ask for an event with the next completion. What came before it gives none."""
        with self._lock:
            if self._completions is not None:
                with contextlib.suppress(self.device.library.error):  # `poll` finds out
                    self._completions.req_notify()

    def take_event(self) -> None:
        """Take the event that its descriptor announced."""
        with self._lock, contextlib.suppress(self.device.library.error):
            if self._completions is not None:
                self._channel.get_cq_event(self._completions)
                self._completions.ack_events(1)

    def stop(self) -> None:
        """Nothing is sent or received over it any more. From any thread."""
        self.up = False
        for pair in self.queues:
            pair.stop()

    def flushed(self) -> list[Any]:
        """Of a stopped rail, the completions that are left, bounded in time: what arrived before it
        stopped is counted, so that the two ends agree on it."""
        left: list[Any] = []
        deadline_s = time.monotonic() + FLUSH_S
        receives = sum(pair.posted for pair in self.queues)
        while receives > 0 and time.monotonic() < deadline_s and not self.device.lost:
            try:
                some = self.poll()
            except self.device.library.error:
                break
            receives -= sum(1 for completion in some if completion.wr_id >> 62)
            left += some
        return left

    def close(self) -> None:
        """Give everything back to the device. Safe to call twice."""
        if not self.open:
            return
        self.open = False
        self.up = False
        for pair in self.queues:
            pair.close()
        self.staged, self.direct = None, []
        with self._lock:
            for thing in (self._completions, self._channel):
                if thing is not None:
                    with contextlib.suppress(self.device.library.error):
                        thing.close()
            self._completions = self._channel = None
            self.fd = -1
        if self.device.lost:
            self._slots.release(self.device)
        self.device.release()


class Meeting:
    """One end's rails of a link that is being opened, inside the handshake; its path takes them over.

    There are as many rails as the end with more devices has: rail i joins device i of each end, modulo
    how many it has. So the two ends need not have equally many, and every device has its share.

    Attributes:
        devices: this end's, in the order in which its cards and keys name them.
        dialed: whether this end opened the link; it opens rails again, too.
    """

    def __init__(self, nics: Nics, *, dialed: bool) -> None:
        self.dialed = dialed
        self.devices: list[Device] = nics.devices()
        self.slots = Slots()
        self.rails: list[Rail] = []
        self._mine: tuple[RailCard, ...] = ()

    def offer(self, peer_nics: int, queues: int = DEFAULT_QUEUES) -> bytes:
        """Return the dialing end's cards, for a peer with so many devices; `queues` for direct
        writes on each rail.

        Raises:
            TransportUnavailable: a device does not give what it takes.
        """
        return self._create(min(MAX_RAILS, max(len(self.devices), peer_nics)), queues)

    def answer(self, data: bytes) -> bytes:
        """Return the other end's cards, connected to those that came.

        Raises:
            ProtocolError, TransportUnavailable: these are none, or they do not reach each other.
        """
        theirs = Offer.decode(data)
        mine = self._create(len(theirs.rails), len(theirs.rails[0].queues) - 1)
        self._connect(theirs)
        return mine

    def take(self, data: bytes) -> None:
        """Connect the dialing end's rails to the answer.

        Raises:
            ProtocolError, TransportUnavailable: as for `answer`.
        """
        self._connect(Offer.decode(data))
        for rail in self.rails:
            rail.up = True

    def close(self) -> None:
        """Give everything back: the link did not come to be, or is down."""
        for rail in self.rails:
            rail.stop()
            rail.close()
        self.slots.close()

    def _create(self, num_rails: int, queues: int) -> bytes:
        for number in range(num_rails):
            nic = number % len(self.devices)
            rail = Rail(number, nic, self.devices[nic], self.slots, queues)
            self.rails.append(rail)
            rail.create()
        self._mine = tuple(rail.card() for rail in self.rails)
        return Offer(self._mine).encode()

    def _connect(self, theirs: Offer) -> None:
        if [card.rail for card in theirs.rails] != [rail.number for rail in self.rails]:
            raise ProtocolError("the peer's rails are not those of this link", operation="connect")
        refused: list[str] = []
        for rail, mine, card in zip(self.rails, self._mine, theirs.rails, strict=True):
            try:
                rail.connect(mine, card)
            except TransportUnavailable as error:
                refused.append(error.message)
        if refused:
            raise TransportUnavailable("; ".join(refused))
