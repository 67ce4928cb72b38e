"""Key pairs, who is allowed in, and which addresses need neither.

A key pair is a small TOML file that only its owner may read, or a credential that systemd guards for
one service; an allow-list is a text file like
OpenSSH's `authorized_keys`: one public key a line, in hexadecimal, then options and any label. The
list is read again whenever it has changed.

    3f…9c role=agent names=decode-* decode servers
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from .errors import ConfigError, InsecureAddress

KEY_NBYTES = 32
MAX_LIST_NBYTES = 8 << 20  # 80,000 keys
ROLES = ("agent", "router", "operator")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a key: a file's name, and a word of a list
_OPTION = re.compile(r"(role|names)=(.*)")


class Keys(msgspec.Struct, frozen=True):
    """A CURVE key pair, and the file of those who may speak to its owner."""

    public: bytes
    secret: bytes
    allowed: str

    def __repr__(self) -> str:
        return f"<Keys {self.public.hex()[:12]}>"  # logs must not hold the secret

    @classmethod
    def load(cls, path: str | Path, allowed: str | Path = "") -> Keys:
        """Read a key file; the allow-list is `allowed_keys` beside it, unless another is named.

        Raises:
            ConfigError: a file is missing, is no key, or can be read by others, or not by this user.
        """
        path = Path(path)
        try:
            table = read_toml(path)
        except ConfigError as error:
            if isinstance(error.__cause__, PermissionError):
                raise _unreadable(path) from error
            raise
        keys = {}
        for name in ("public", "secret"):
            try:
                keys[name] = bytes.fromhex(str(table[name]))
            except (KeyError, ValueError):
                keys[name] = b""
            if len(keys[name]) != KEY_NBYTES:
                raise ConfigError(
                    f"{path} has no {name!r} of {KEY_NBYTES} bytes in hexadecimal: make a key "
                    "pair with `kvferry keys new`"
                )
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077 and not _is_credential(path, mode):
            raise ConfigError(
                f"{path} can be read by others (mode {mode:o}): run `chmod 600 {path}`"
            )
        chosen = Path(allowed) if allowed else path.with_name("allowed_keys")
        if not chosen.is_file():
            raise ConfigError(
                f"there is no allow-list {chosen}: write the public keys of all who may connect "
                "into it, one a line"
            )
        if not os.access(chosen, os.R_OK):
            raise _unreadable(chosen)
        return cls(keys["public"], keys["secret"], str(chosen))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file.

    Raises:
        ConfigError: the file cannot be read, or is no TOML; says why.
    """
    try:
        table: dict[str, Any] = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    return table


def _is_credential(path: Path, mode: int) -> bool:
    """Return whether systemd hands a file to this service, and to nobody else.

    On kernels whose tmpfs has access lists (6.4, systemd 254) a credential belongs to root and an
    entry of its list lets the service read it; its mode then shows that as the group's: 0440.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not folder or mode & 0o037:  # others may read it, or a group write it: nobody's credential
        return False
    try:
        inside = Path(folder).resolve() in path.resolve().parents
        return inside and not stat.S_IMODE(os.stat(folder).st_mode) & 0o007
    except OSError:
        return False


def _unreadable(path: Path) -> ConfigError:
    try:
        owner = f", it belongs to user {path.stat().st_uid}"
    except OSError:
        owner = ""
    return ConfigError(
        f"{path} cannot be read by user {os.geteuid()}{owner}: run as the user whose it is (in a "
        "container: `podman run --userns=keep-id:…`, `docker run --user …`), or `chown` it"
    )


def check_key_name(name: str) -> None:
    """Check that a name can be a file's and a word of an allow-list.

    Raises:
        ConfigError: it cannot.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name!r} is no name for a key: use letters, digits, and `-`, `_` or `.` after the "
            "first"
        )


def write_keys(
    path: Path, public: bytes, secret: bytes, *, role: str = "", names: str = ""
) -> None:
    """Write a key file that only its owner may read, and allow the key itself beside it.

    Raises:
        ConfigError: the file's name is none for a key, `role` or `names` cannot stand in a list,
            there is a file already, or none can be written.
    """
    check_key_name(path.stem)
    if role and role not in ROLES:
        raise ConfigError(f"a key has no role {role!r}: choose one of {', '.join(ROLES)}")
    if re.search(r"[\s#]", names):
        raise ConfigError(
            f"the pattern of names {names!r} has a blank or a `#` in it: leave it out"
        )
    options = [f"{name}={value}" for name, value in (("role", role), ("names", names)) if value]
    text = (
        f"# A kvferry key pair. Others get the public half only.\n"
        f'public = "{public.hex()}"\nsecret = "{secret.hex()}"\n'
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path} is there already: a key is never overwritten") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    with os.fdopen(fd, "w") as file:
        file.write(text)
    with path.with_name("allowed_keys").open("a") as file:
        file.write(" ".join([public.hex(), *options, path.stem]) + "\n")


class Permit(msgspec.Struct, frozen=True):
    """What one line of an allow-list says of a key.

    Attributes:
        label: what the list calls it.
        role: one of `ROLES`, or "": all of them.
        names: pattern of the agents that it may be or command (`*`, `?`, `[…]`), or "": any.
    """

    label: str
    role: str = ""
    names: str = ""

    def covers(self, name: str) -> bool:
        """Return whether an agent of this name is one of the key's."""
        return not self.names or fnmatchcase(name, self.names)


class AllowList:
    """The public keys of one file, as it is now. Not thread-safe: one owner."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int] = (0, -1)
        self._permits: dict[bytes, Permit] = {}

    def permit(self, key: bytes) -> Permit | None:
        """Return what a key may do; None if it is not allowed. A file that is gone allows none."""
        try:
            status = os.stat(self._path)
            if (status.st_mtime_ns, status.st_size) != self._seen:
                self._seen = (status.st_mtime_ns, status.st_size)
                with open(self._path, encoding="utf-8", errors="replace") as file:
                    self._permits = _parse(file.read(MAX_LIST_NBYTES))
        except OSError:
            self._permits = {}
        return self._permits.get(key)


def _parse(text: str) -> dict[bytes, Permit]:
    permits = {}
    for line in text.splitlines():
        word, *words = line.partition("#")[0].split() or [""]
        try:
            key = bytes.fromhex(word)
        except ValueError:
            continue  # a line of somebody's notes lets nobody in
        options = {}
        while words and (option := _OPTION.fullmatch(words[0])):
            options[option[1]] = option[2]
            del words[0]
        # An option that says nothing known must not mean "everything".
        understood = all(options.values()) and options.get("role", "agent") in ROLES
        if len(key) == KEY_NBYTES and understood:
            permits[key] = Permit(" ".join(words) or word[:12], **options)
    return permits


def check_address(endpoint: str, keys: Keys | None, what: str) -> None:
    """Check that without keys an address is reachable from this machine only.

    Raises:
        InsecureAddress: it is not; names the fix.
    """
    if keys is None and not is_local(endpoint):
        raise InsecureAddress(
            f"{what} would be open to the network at {endpoint} without keys: make a key pair with "
            "`kvferry keys new` and give it, or use an address of 127.0.0.0/8"
        )


def is_local(endpoint: str) -> bool:
    """Return whether only processes of this machine reach a ZeroMQ endpoint, or a bare host."""
    scheme, separator, rest = endpoint.partition("://")
    if separator and scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0] if separator else endpoint
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def join_address(endpoint: str, public: bytes) -> str:
    """Return an endpoint and the key of whoever answers there: `tcp://host:port#key`."""
    return f"{endpoint}#{public.hex()}" if public else endpoint


def split_address(address: str) -> tuple[str, bytes]:
    """Return the endpoint and the key (or none) of an address.

    Raises:
        ConfigError: what follows `#` is no key.
    """
    endpoint, separator, word = address.partition("#")
    if not separator:
        return endpoint, b""
    try:
        key = bytes.fromhex(word)
    except ValueError:
        key = b""
    if len(key) != KEY_NBYTES:
        raise ConfigError(
            f"the address {address!r} ends in no public key of {KEY_NBYTES} bytes in hexadecimal"
        )
    return endpoint, key
