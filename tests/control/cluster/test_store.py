"""The address of a store."""

from __future__ import annotations

import pytest

from kvferry.control.cluster.store import parse_store
from kvferry.control.errors import ConfigError


def test_one_or_several_servers_and_a_name() -> None:
    address = parse_store("etcd://a,b:1,[::1]:2/blue?ca=/x&cert=/y&key=/z")
    assert address.endpoints == (("a", 2379), ("b", 1), ("::1", 2))
    assert (address.cluster, address.ca, address.cert) == ("blue", "/x", "/y")
    assert parse_store("etcd://a").cluster == "kvferry"


@pytest.mark.parametrize(
    "text",
    ["redis://a", "etcd://", "a:1", "etcd://a:x", "etcd://a:0", "etcd://a/b/c", "etcd://a?b=c"],
)
def test_what_is_no_store_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="the store"):
        parse_store(text)
