"""The daemon's settings: command line, then environment, then a TOML file, then defaults."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..cluster.store import parse_store
from ..errors import ConfigError
from ..keys import Keys, check_address, read_toml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..cluster.store import Store

ENVIRONMENT = "KVFERRY_DAEMON_"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one daemon runs."""

    bind: str = "tcp://127.0.0.1:7717"
    publish: str = "tcp://127.0.0.1:7718"
    keys: str = ""
    allowed: str = ""
    http: str = ""
    store: str = ""
    log_level: str = "info"


HELP = {
    "bind": "ZeroMQ endpoint for requests",
    "publish": "ZeroMQ endpoint for changes",
    "keys": "key file, from `kvferry keys new`; without one, loopback addresses only",
    "allowed": "allow-list of public keys; `allowed_keys` beside the key file if not given",
    "http": "host:port, or a port of this machine, for the page, /metrics, /healthz and /readyz; "
    "not served if empty",
    "store": "etcd://host:port to share the members with other daemons; kept in memory if empty",
    "log_level": "debug, info, warning or error",
}
LOG_LEVELS = ("debug", "info", "warning", "error")


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Return the settings that hold, with everything that can be wrong with them checked.

    Raises:
        ConfigError: one of them cannot be; names it and where it came from.
        SystemExit: from the command line's parser, for `--help` and unknown flags.
    """
    parser = argparse.ArgumentParser(
        prog="kvferry daemon",
        description="Knows which agents are there and which pair takes a request. Flags win over "
        f"environment variables ({ENVIRONMENT}BIND and so on), these over the file.",
    )
    parser.add_argument("--config", help="TOML file with the same names as the flags")
    for name in Settings.__struct_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", help=HELP[name])
    flags = vars(parser.parse_args(list(arguments)))
    path = flags.pop("config") or environment.get(f"{ENVIRONMENT}CONFIG", "")
    merged: dict[str, Any] = {}
    if path:
        merged.update(_checked(read_toml(Path(path)), path))
    for name in Settings.__struct_fields__:
        variable = ENVIRONMENT + name.upper()
        if variable in environment:
            merged.update(_checked({name: environment[variable]}, variable))
    given = {name: value for name, value in flags.items() if value is not None}
    merged.update(_checked(given, "the command line"))
    settings = Settings(**merged)
    if settings.log_level not in LOG_LEVELS:
        raise ConfigError(f"log_level is {settings.log_level!r}: use {', '.join(LOG_LEVELS)}")
    return settings


def load_keys(settings: Settings) -> Keys | None:
    """Return the keys that the settings name, and a check of every address that needs them.

    Raises:
        ConfigError: a file is wrong. InsecureAddress: there are no keys, and an address needs them.
    """
    keys = Keys.load(settings.keys, settings.allowed) if settings.keys else None
    check_address(settings.bind, keys, "the daemon")
    check_address(settings.publish, keys, "the daemon's publisher")
    return keys


def open_store(settings: Settings) -> Store | None:
    """Return the store that the settings name, if any; nothing is connected yet.

    Raises:
        ConfigError: it is none, or its client library is not installed.
    """
    if not settings.store:
        return None
    address = parse_store(settings.store)
    try:
        # Imported here: the client library takes 20 MiB and 0.2 s, which a daemon without it saves.
        from ..cluster.etcd import EtcdStore
    except ImportError as error:
        raise ConfigError(
            f"the store {settings.store!r} needs a library that is not installed ({error.name}): "
            "pip install 'kvferry[etcd]'"
        ) from error
    return EtcdStore(address)


def _checked(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the table if it names settings only, each of its type."""
    for name, value in table.items():
        if name not in Settings.__struct_fields__:
            known = ", ".join(Settings.__struct_fields__)
            raise ConfigError(f"{where} sets {name!r}, which is no setting: use {known}")
        if not isinstance(value, str):
            raise ConfigError(f"{where} sets {name} to {value!r}: it is a text")
    return table
