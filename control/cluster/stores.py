"""Which store an address means.

--store etcd://HOST[:PORT][,HOST[:PORT]…][/CLUSTER][?ca=FILE&cert=FILE&key=FILE]
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from ..errors import ConfigError
from .store import StoreAddress

if TYPE_CHECKING:
    from .store import Store

ETCD_PORT = 2379
EXAMPLE = "etcd://10.0.0.1:2379,10.0.0.2:2379/cluster"
FILES = ("ca", "cert", "key")


def parse_store(text: str) -> StoreAddress:
    """The address of a store.

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


def open_store(text: str) -> Store:
    """The store at an address; nothing is connected yet.

    Raises:
        ConfigError: there is none, or its client library is not installed.
    """
    address = parse_store(text)
    try:
        # Imported here: the client library takes 20 MiB and 0.2 s, which a daemon without it saves.
        from .etcd import EtcdStore
    except ImportError as error:
        raise ConfigError(
            f"the store {text!r} needs a library that is not installed ({error.name}): "
            "pip install 'kvferry[etcd]'"
        ) from error
    return EtcdStore(address)
