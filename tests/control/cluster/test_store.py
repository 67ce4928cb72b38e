"""The address of a store, and what is taken from one."""

from __future__ import annotations

import base64
import math
from typing import Any

import msgspec
import pytest

from kvferry.control.cluster.etcd import EtcdStore
from kvferry.control.cluster.messages import Member, Registration
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


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"floor": 1 << 63},
        {"lease_s": math.nan},
        {"key": b"x" * 33},
        {"value": b"\xc1"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_no_record_of_its_name_is_passed_over(change: dict[str, Any]) -> None:
    """Whoever reaches the store may write anything there: it costs that name alone."""
    store = EtcdStore(parse_store("etcd://127.0.0.1"))

    def told(change: dict[str, Any]) -> Any:
        there = Registration(change.get("name", "p0"), "prefill", 1, "tcp://127.0.0.1:9")
        fields = {"member": Member(there, 1), "key": b"", "lease_s": 3.0, "floor": 0} | change
        fields.pop("name", None)
        value = change.get("value") or msgspec.msgpack.encode(fields)
        key = base64.b64encode(b"kvferry/members/p0").decode()
        found = {"key": key, "value": base64.b64encode(value).decode(), "mod_revision": "7"}
        return store._event(found, gone=False)

    assert told({}).record.member.name == "p0"
    assert told(change) is None
