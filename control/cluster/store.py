"""A store that several daemons share: where it is, what it is asked for, and what it tells.

--store etcd://HOST[:PORT][,HOST[:PORT]…][/CLUSTER][?ca=FILE&cert=FILE&key=FILE]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Union
from urllib.parse import parse_qsl, urlsplit

import msgspec

from ..errors import ConfigError
from .membership import Proposal, Record  # noqa: TC001 - msgspec reads them

if TYPE_CHECKING:
    from collections.abc import Callable

ETCD_PORT = 2379
EXAMPLE = "etcd://10.0.0.1:2379,10.0.0.2:2379/cluster"
FILES = ("ca", "cert", "key")


class StoreAddress(msgspec.Struct, frozen=True):
    """Where a store is.

    Attributes:
        endpoints: its servers, any of which will do.
        cluster: the name under which these daemons keep everything.
        ca, cert, key: files for TLS; without a `ca` the connection is plain.
    """

    endpoints: tuple[tuple[str, int], ...]
    cluster: str = "kvferry"
    ca: str = ""
    cert: str = ""
    key: str = ""


def parse_store(text: str) -> StoreAddress:
    """Return the address of a store.

    Raises:
        ConfigError: it is none; says what one looks like.
    """
    parts = urlsplit(text)
    if parts.scheme != "etcd" or not parts.netloc or "/" in parts.path[1:]:
        raise ConfigError(f"the store {text!r} is none that is known: use {EXAMPLE}, or nothing")
    endpoints = []
    for endpoint in parts.netloc.split(","):
        host, colon, port = endpoint.rpartition(":")
        if not colon or endpoint.endswith("]"):
            host, port = endpoint, str(ETCD_PORT)
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"the store {text!r} names no server by {endpoint!r}: use {EXAMPLE}")
        endpoints.append((host.strip("[]"), int(port)))
    files = dict(parse_qsl(parts.query))
    for name in files:
        if name not in FILES:
            raise ConfigError(f"the store {text!r} sets {name!r}: use {', '.join(FILES)}")
    return StoreAddress(tuple(endpoints), parts.path[1:] or "kvferry", **files)


class Peer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Another daemon of the cluster: where it publishes, and its public key if it has one."""

    daemon: int
    publisher: str
    public_key: bytes = b""


# What a store tells, in the order in which it came about -----------------------------------------


class Picture(msgspec.Struct, frozen=True):
    """All that the store has, with each record's revision; and whatever else was heard is void."""

    revision: int
    floor: int
    records: dict[str, tuple[Record, int]]
    peers: dict[int, Peer]


class Seen(msgspec.Struct, frozen=True):
    """A name has this record now, or none."""

    revision: int
    name: str
    record: Record | None


class PeerSeen(msgspec.Struct, frozen=True):
    """A daemon came, or went."""

    revision: int
    daemon: int
    peer: Peer | None


class Settled(msgspec.Struct, frozen=True):
    """A proposal holds from `revision` on; or, with revision 0, something else came before it."""

    ticket: int
    revision: int


class Failed(msgspec.Struct, frozen=True):
    """Nobody knows what became of a proposal: the store does not answer."""

    ticket: int
    reason: str


class Away(msgspec.Struct, frozen=True):
    """The store does not answer."""

    reason: str


class Back(msgspec.Struct, frozen=True):
    """It answers again."""


StoreEvent = Union[Picture, Seen, PeerSeen, Settled, Failed, Away, Back]  # noqa: UP007


class Store(Protocol):
    """What `replication.py` needs of a store. Nothing here blocks or raises."""

    def start(self, me: Peer, wake: Callable[[], None]) -> None:
        """Begin to follow the store, as this daemon; `wake` is called when there are events."""

    def propose(self, ticket: int, proposal: Proposal) -> None:
        """Ask for a change; a `Settled` or `Failed` of this number follows."""

    def events(self) -> list[StoreEvent]:
        """Return what has come since the last call."""

    def close(self) -> None:
        """Leave the cluster: what this daemon vouched for stays until its leases end."""
