"""How two ends of a rail find addresses that reach each other, and refuse by name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvferry.engine.errors import ProtocolError, TransportUnavailable
from kvferry.engine.transports.verbs.cards import (
    GidCard,
    GidPair,
    Offer,
    QueueCard,
    RailCard,
    gid_cards,
    route,
)
from kvferry.engine.transports.verbs.topology import Gid


def ipv4(last: int, subnet: int = 1) -> str:
    return f"0000:0000:0000:0000:0000:ffff:0a00:{subnet:02x}{last:02x}"


def card(*gids: GidCard, **changes: Any) -> RailCard:
    plain = RailCard(
        rail=0,
        epoch=0,
        nic=0,
        device="mlx5_0",
        link_layer="Ethernet",
        lid=0,
        mtu=5,
        gids=gids,
        queues=(QueueCard(17, 1), QueueCard(18, 2)),
        slots=1 << 40,
        slots_key=7,
    )
    return msgspec.structs.replace(plain, **changes)


LOCAL = GidCard(0, "fe80:0000:0000:0000:0000:0000:0000:0001", "link-local")
GLOBAL = GidCard(2, "2001:0db8:0000:0000:0000:0000:0000:0001", "ipv6")


def test_ipv4_comes_before_ipv6_and_both_before_link_local() -> None:
    mine = card(LOCAL, GidCard(3, ipv4(1), "ipv4"), GLOBAL)
    theirs = card(LOCAL, GLOBAL, GidCard(5, ipv4(2), "ipv4"), mtu=3)
    assert route(mine, theirs) == GidPair(0, ipv4(2), 3, 3)
    assert route(theirs, mine) == GidPair(0, ipv4(1), 5, 3)
    only_ipv6 = card(LOCAL, GLOBAL)
    assert route(mine, only_ipv6) == GidPair(0, GLOBAL.value, 2, 5)
    assert route(mine, card(LOCAL)).gid == LOCAL.value


def test_of_several_addresses_those_of_one_subnet_are_taken_by_both_ends() -> None:
    mine = card(GidCard(1, ipv4(1, subnet=1), "ipv4"), GidCard(2, ipv4(1, subnet=2), "ipv4"))
    theirs = card(GidCard(1, ipv4(9, subnet=7), "ipv4"), GidCard(4, ipv4(9, subnet=2), "ipv4"))
    assert route(mine, theirs) == GidPair(0, ipv4(9, subnet=2), 2, 5)
    assert route(theirs, mine) == GidPair(0, ipv4(1, subnet=2), 4, 5)


def test_infiniband_needs_no_more_than_lids() -> None:
    mine, theirs = (card(link_layer="InfiniBand", lid=lid) for lid in (3, 8))
    assert route(mine, theirs) == GidPair(8, None, 0, 5)


def test_ends_that_cannot_meet_say_why() -> None:
    with pytest.raises(TransportUnavailable, match="no RoCE v2 address of one kind"):
        route(card(GLOBAL), card(GidCard(1, ipv4(1), "ipv4")))
    with pytest.raises(TransportUnavailable, match="not on one network"):
        route(card(GLOBAL), card(link_layer="InfiniBand", lid=4))


def test_only_roce_v2_is_offered_on_ethernet() -> None:
    gids = [
        Gid(0, LOCAL.value, "IB/RoCE v1"),
        Gid(1, LOCAL.value, "RoCE v2"),
        Gid(300, "x", "RoCE v2"),
    ]
    assert gid_cards(gids, "Ethernet") == (GidCard(1, LOCAL.value, "link-local"),)
    assert [gid.index for gid in gid_cards(gids, "InfiniBand")] == [0, 1]


def test_an_offer_survives_the_wire_and_nonsense_does_not() -> None:
    offer = Offer((card(LOCAL, GLOBAL),))
    assert Offer.decode(offer.encode()) == offer
    bad = msgspec.structs.replace(offer.rails[0], queues=(QueueCard(1 << 30, 0),) * 2)
    for data in (b"", b"\xc1", offer.encode()[:-1], Offer((bad,)).encode(), Offer(()).encode()):
        with pytest.raises(ProtocolError):
            Offer.decode(data)
