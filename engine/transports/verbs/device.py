"""The RDMA devices that an engine uses, opened once, and the memory registered with each.

A region is registered with a device when a transfer or a peer first needs it there, and once,
whatever the number of links; it is taken back when the engine's owner deregisters the region.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import NotRegistered, TransportUnavailable
from ...runtime import fork
from . import library as verbs_library
from . import topology

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from ...memory.regions import MemoryRegion
    from .topology import Nic

NICS_VARIABLE = "KVFERRY_NICS"  # names of the devices to use, with commas between them
_VERBS_CLASS = Path("/sys/class/infiniband_verbs")
_CHANNEL_LINK = "anon_inode:[infinibandevent]"

_descriptors = threading.Lock()


class Keys(NamedTuple):
    """What registering memory with a device yields: the key for this side, and for the peer."""

    local: int
    remote: int


class Device:
    """One port of an RDMA device, opened. Thread-safe.

    Attributes:
        nic, name: what sysfs says of it.
        lost: the device is gone: unplugged, or its driver removed.
        max_sge: scatter-gather entries that a work request may have.
    """

    def __init__(self, nic: Nic) -> None:
        self.nic = nic
        self.name = nic.name
        self.library = verbs_library.load()
        enums = self.library.enums
        self.access = (
            enums.IBV_ACCESS_LOCAL_WRITE
            | enums.IBV_ACCESS_REMOTE_WRITE
            | enums.IBV_ACCESS_REMOTE_READ
        )
        self._node = _verbs_node(nic.name)
        self._node_id = _inode(self._node)
        self._lock = threading.RLock()
        self._regions: dict[int, Any] = {}
        self._users = 0
        self._closing = self._closed = False
        try:
            self.context = self.library.device.Context(name=nic.name)
            self.pd = self.library.pd.PD(self.context)
            attributes = self.context.query_device()
            self._mtu = int(self.context.query_port(nic.port).active_mtu)
        except self.library.error as error:
            raise TransportUnavailable(
                f"RDMA device {nic.name} does not open: {error}", operation="start"
            ) from error
        self.max_sge = min(16, int(attributes.max_sge))
        self.max_reads = min(16, int(attributes.max_qp_rd_atom))
        self._descriptor = int(self.context.cmd_fd)
        fork.disown_in_child(self)

    @property
    def lost(self) -> bool:
        """Whether the device that was opened is there no more."""
        return _inode(self._node) != self._node_id

    @property
    def active(self) -> bool:
        """Whether the port can send now."""
        return not self.lost and any(
            nic.active
            for nic in topology.nics()
            if (nic.name, nic.port) == (self.nic.name, self.nic.port)
        )

    @property
    def mtu(self) -> int:
        """The verbs' code of the largest packet that the port takes now, 1 to 5."""
        with self._lock, contextlib.suppress(self.library.error):  # it is gone: what it last took
            if self._closed:
                return self._mtu
            self._mtu = int(self.context.query_port(self.nic.port).active_mtu)
        return self._mtu

    def acquire(self) -> None:
        """Begin one rail's use: the device stays open until it ends.

        Raises:
            TransportUnavailable: the device is closed.
        """
        with self._lock:
            if self._closing:
                raise TransportUnavailable(f"RDMA device {self.name} is closed in this engine")
            self._users += 1

    def release(self) -> None:
        """End one rail's use. A device that is gone closes with its last one: its driver waits."""
        with self._lock:
            self._users -= 1
            last = not self._users and self._closing
        if last or self.lost:
            self.close()

    def register(self, region: MemoryRegion) -> Keys:
        """Return the keys of a region of host memory, registered now or before. May take long: its
        pages are pinned.

        Raises:
            NotRegistered: the device does not take it; says why.
        """
        with self._lock:
            entry = self._regions.get(region.region_id)
            if entry is None:
                entry = self.pin(region.address, region.nbytes)
                self._regions[region.region_id] = entry
            return Keys(entry.lkey, entry.rkey)

    def pin(self, address: int, nbytes: int) -> Any:
        """Return a memory region of the library over this host memory; the caller closes it.

        Raises:
            NotRegistered: the device does not take it; says why.
        """
        try:
            with self._lock:
                if self._closed:  # the library would not refuse what is closed, but crash
                    raise NotRegistered(f"RDMA device {self.name} is closed in this engine")
                return self.library.mr.MR(self.pd, nbytes, self.access, address=address)
        except self.library.error as error:
            raise NotRegistered(
                f"RDMA device {self.name} does not register {nbytes} bytes ({error}): is there "
                "room under `ulimit -l`?"
            ) from error

    def channel(self) -> tuple[Any, int]:
        """Return a completion channel and its descriptor, which pyverbs 44 does not tell."""
        with _descriptors:
            before = _channels()
            channel = self.library.cq.CompChannel(self.context)
            own = getattr(channel, "fd", None)
            fd = own if own is not None else next(iter(_channels() - before))
        os.set_blocking(fd, False)
        return channel, fd

    def forget(self, region_id: int) -> None:
        """Take back a region's registration; no transfer and no peer uses it any more."""
        with self._lock:
            entry = self._regions.pop(region_id, None)
        if entry is not None:
            with contextlib.suppress(self.library.error):  # the device itself is gone
                entry.close()

    def close(self) -> None:
        """Close the device: now, or when the last rail that is open on it ends its use. A rail
        whose link goes down slowly may outlive its engine's patience. Safe to call twice."""
        with self._lock:
            self._closing = True
            if self._users or self._closed:
                return
            self._closed = True
            regions, self._regions = self._regions, {}
        for entry in (*regions.values(), self.pd, self.context):
            with contextlib.suppress(self.library.error):
                entry.close()

    def forked(self) -> list[int]:
        """Return what a child shares with this process: the kernel keeps the device's objects, and
        the peers' queue pairs with them, until nobody has it open."""
        return [] if self._closed else [self._descriptor]


class Nics:
    """The devices of one engine. Thread-safe.

    Attributes:
        names: of those that it may use. If empty: those that are nearest to its GPUs, or all if it
            has none.
        gpus: tells the PCI addresses of the GPUs whose memory the engine has registered.
    """

    def __init__(self, names: Sequence[str] | None = None, root: Path = topology.SYSFS) -> None:
        wanted = os.environ.get(NICS_VARIABLE, "")
        self.names = tuple(names) if names is not None else tuple(filter(None, wanted.split(",")))
        self.gpus: Callable[[], Collection[str]] = tuple
        self._root = root
        self._lock = threading.Lock()
        self._open: list[Device] = []

    def usable(self) -> list[Nic]:
        """Return the active ports that this engine would use for a link now."""
        nics = topology.nics(self._root)
        if self.names:
            return [nic for nic in nics if nic.active and nic.name in self.names]
        return topology.near_any(self.gpus(), nics, self._root)

    def devices(self) -> list[Device]:
        """Return the usable devices, opened.

        Raises:
            TransportUnavailable: there is none, or one does not open.
        """
        nics = self.usable()
        if not nics:
            raise TransportUnavailable("no RDMA device is active", operation="start")
        with self._lock:
            self._open = [device for device in self._open if not device.lost]
            known = {(device.nic.name, device.nic.port): device for device in self._open}
            for nic in nics:
                if (nic.name, nic.port) not in known:
                    device = known[nic.name, nic.port] = Device(nic)
                    self._open.append(device)
            return [known[nic.name, nic.port] for nic in nics]

    def forget(self, region_id: int) -> None:
        """A region of the engine is deregistered."""
        with self._lock:
            devices = list(self._open)
        for device in devices:
            device.forget(region_id)

    def close(self) -> None:
        """Close every device. No link may be up."""
        with self._lock:
            devices, self._open = self._open, []
        for device in devices:
            device.close()


def check_names(names: Sequence[str]) -> None:
    """Check that the devices that a user names are there, up or down.

    Raises:
        TransportUnavailable: one is not.
    """
    found = {nic.name for nic in topology.nics()}
    missing = [names] if isinstance(names, str) else [name for name in names if name not in found]
    if missing:
        there = ", ".join(sorted(found)) or "none"
        raise TransportUnavailable(
            f"nics={names!r} names {missing[0]!r}: give a list of RDMA devices of this machine; there "
            f"are: {there}",
            operation="start",
        )


def absence(names: Iterable[str] = ()) -> str:
    """Return why there is no RDMA device to use, or ""."""
    found = topology.nics()
    if not found:
        return f"no RDMA device in {topology.SYSFS / 'class' / 'infiniband'}"
    if not Nics(tuple(names) or None).usable():
        states = ", ".join(
            f"{nic.name} port {nic.port} {'active' if nic.active else 'down'}" for nic in found
        )
        return f"no RDMA port that may be used is active ({states})"
    return ""


def _verbs_node(name: str) -> Path:
    for node in _VERBS_CLASS.glob("uverbs*"):
        with contextlib.suppress(OSError):
            if (node / "ibdev").read_text().strip() == name:
                return node
    return _VERBS_CLASS / "none"


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _channels() -> set[int]:
    """Return the descriptors of this process that RDMA events come from."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == _CHANNEL_LINK:
                found.add(int(name))
    return found
