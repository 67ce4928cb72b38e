"""Which transports an engine offers, and which of them serve a pair of engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import TransportUnavailable
from .cma import path as cma
from .cuda_ipc import path as cuda_ipc
from .tcp import path as tcp
from .verbs import path as verbs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..memory.regions import RegionTable
    from ..wire.identity import EngineAddress
    from .base import Availability
    from .verbs.device import Nics

TRANSPORTS = ("cuda_ipc", "cma", "verbs", "tcp")  # in order of preference
LOCAL = ("cuda_ipc", "cma")  # between processes of one host, over a Unix socket


class TransportSelection:
    """The transports of one engine. Does not change once it is made.

    Args:
        wanted: which to offer; those that do not work here are left out.
        nics: the RDMA devices that `verbs` would use.

    Attributes:
        nics: as given.
        offered: those that are offered, best first.
        unavailable: why each of the others that were wanted is not.

    Raises:
        TransportUnavailable: one is unknown, or none works here.
    """

    def __init__(self, wanted: Sequence[str], nics: Nics) -> None:
        if isinstance(wanted, str):
            raise TransportUnavailable(
                f"transports={wanted!r} is one text: give a list of names, [{wanted!r}]",
                operation="start",
            )
        unknown = set(wanted) - set(TRANSPORTS)
        if unknown:
            raise TransportUnavailable(
                f"transport {min(unknown)!r} is unknown: use {' or '.join(TRANSPORTS)}",
                operation="start",
            )
        self.nics = nics
        self.unavailable: dict[str, str] = {}
        self.offered = tuple(name for name in TRANSPORTS if name in wanted and self._works(name))
        if not self.offered:
            raise TransportUnavailable(
                "; ".join(f"{name}: {why}" for name, why in self.unavailable.items())
                or "no transport was asked for",
                operation="start",
            )

    @property
    def local(self) -> bool:
        """Whether any is for processes of this host alone."""
        return bool(set(LOCAL) & set(self.offered))

    @property
    def remote(self) -> bool:
        """Whether any reaches other hosts."""
        return bool({"tcp", "verbs"} & set(self.offered))

    def mismatch(self, name: str, address: EngineAddress, host_id: str) -> str:
        """Return why a transport cannot serve this engine, of host `host_id`, and that one, or
        ""."""
        if name not in TRANSPORTS:
            return f"unknown: use {' or '.join(TRANSPORTS)}"
        if name not in self.offered:
            return self.unavailable.get(name, "not enabled in this engine")
        if name in LOCAL:
            if not address.unix_name:
                return "not enabled in the peer"
            if address.identity.host_id != host_id:
                return "the peer runs on another host, or in another process namespace"
        elif not (address.nics if name == "verbs" else address.tcp_port):
            return "not enabled in the peer"
        return ""

    def _works(self, name: str) -> bool:
        probes: dict[str, Callable[[], Availability]] = {
            "cuda_ipc": cuda_ipc.available,
            "cma": cma.probe,
            "verbs": lambda: verbs.ready(self.nics),
            "tcp": tcp.probe,
        }
        ok, reason = probes[name]()
        if not ok:
            self.unavailable[name] = reason
        return ok


def unsuited(name: str, regions: RegionTable) -> str:
    """Return why a transport is not tried unless it is asked for, with what is registered, or
    ""."""
    if name == "cuda_ipc" and not regions.gpus():
        return "no GPU memory is registered in this engine yet"
    return ""
