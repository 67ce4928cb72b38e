"""What two ends tell each other before queue pairs are connected, and what they agree on.

A card describes one end of one rail. Cards cross once each way: inside the handshake for the rails
of a new link, on its control channel for a rail that is opened again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
from msgspec import Meta

from ...errors import ProtocolError, TransportUnavailable
from ...memory.fields import DECODE_ERRORS, Uint32, Uint63

if TYPE_CHECKING:
    from .topology import Gid

MAX_RAILS, MAX_QUEUES, MAX_GIDS = 64, 17, 64
ROCE_V2, ETHERNET = "RoCE v2", "Ethernet"
FAMILIES = ("ipv4", "ipv6", "link-local")  # in order of preference

Uint16 = Annotated[int, Meta(ge=0, le=2**16 - 1)]
Uint24 = Annotated[int, Meta(ge=0, le=2**24 - 1)]
Small = Annotated[int, Meta(ge=0, le=255)]


class GidCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One address of a port."""

    index: Small
    value: Annotated[str, Meta(pattern="^[0-9a-f]{4}(:[0-9a-f]{4}){7}$")]
    family: str


class QueueCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One queue pair: its number, and the packet number that it starts at."""

    number: Uint24
    psn: Uint24


class RailCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One end of one rail.

    Attributes:
        epoch: how often this rail has been opened.
        nic: position of its device among this end's, which is the one of its key in `Granted`.
        mtu: the verbs' code, 1 (256 bytes) to 5 (4,096).
        queues: the queue pair of the staged path, then those of the direct one.
        slots, slots_key: where this end's staging is, and its key there.
    """

    rail: Small
    epoch: Uint32
    nic: Small
    device: Annotated[str, Meta(max_length=64)]
    link_layer: str
    lid: Uint16
    mtu: Annotated[int, Meta(ge=1, le=5)]
    gids: Annotated[tuple[GidCard, ...], Meta(max_length=MAX_GIDS)]
    queues: Annotated[tuple[QueueCard, ...], Meta(min_length=2, max_length=MAX_QUEUES)]
    slots: Uint63
    slots_key: Uint32


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rails of one end, in order."""

    rails: Annotated[tuple[RailCard, ...], Meta(min_length=1, max_length=MAX_RAILS)]

    def encode(self) -> bytes:
        """MessagePack bytes, for the handshake."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Offer:
        """Read what `encode` wrote.

        Raises:
            ProtocolError: it is no offer.
        """
        try:
            return _offer_decoder.decode(data)
        except DECODE_ERRORS as error:
            raise ProtocolError(f"not an offer of rails: {error}", operation="connect") from error


# Made here and not where it is used: msgspec works a type out when it first meets it, and two threads
# that do so at once take the process down (msgspec 0.22: segmentation fault).
_offer_decoder = msgspec.msgpack.Decoder(Offer)


class GidPair(NamedTuple):
    """How one end of a rail reaches the other.

    Attributes:
        gid, gid_index: the peer's address, and which of one's own goes with it; None and 0 where
            a LID is enough.
    """

    lid: int
    gid: str | None
    gid_index: int
    mtu: int


def gid_cards(gids: list[Gid], link_layer: str) -> tuple[GidCard, ...]:
    """Return the addresses that a peer may use: on Ethernet those of RoCE v2, which routers pass
    on."""
    usable = [
        gid for gid in gids if gid.number < 256 and (link_layer != ETHERNET or gid.kind == ROCE_V2)
    ]
    return tuple(GidCard(gid.number, gid.value, gid.family) for gid in usable[:MAX_GIDS])


def route(mine: RailCard, theirs: RailCard) -> GidPair:
    """Return how my end of a rail reaches theirs. Both ends come to the same pair of addresses.

    Raises:
        TransportUnavailable: they have no kind of address in common.
    """
    mtu = min(mine.mtu, theirs.mtu)
    if mine.link_layer != theirs.link_layer:
        raise TransportUnavailable(
            f"{mine.device} is {mine.link_layer}, the peer's {theirs.device} is "
            f"{theirs.link_layer}: they are not on one network"
        )
    if mine.link_layer != ETHERNET and mine.lid and theirs.lid:
        return GidPair(theirs.lid, None, 0, mtu)
    for family in FAMILIES:
        pairs = [
            (-_common_bits(one.value, other.value), one.index + other.index, one, other)
            for one in mine.gids
            for other in theirs.gids
            if one.family == other.family == family
        ]
        if pairs:
            _, _, one, other = min(pairs, key=lambda pair: (pair[:2], _ordered(*pair[2:])))
            return GidPair(theirs.lid, other.value, one.index, mtu)
    raise TransportUnavailable(
        f"{mine.device} and the peer's {theirs.device} have no RoCE v2 address of one kind (IPv4, "
        "IPv6) in common: give both interfaces one"
    )


def _common_bits(one: str, other: str) -> int:
    """Length of the prefix that two GIDs share: addresses of one subnet come first."""
    left, right = (int(value.replace(":", ""), 16) for value in (one, other))
    return 128 - (left ^ right).bit_length()


def _ordered(one: GidCard, other: GidCard) -> tuple[str, ...]:
    """Break a tie alike at both ends."""
    return tuple(sorted((one.value, other.value)))
