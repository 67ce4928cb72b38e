"""RDMA devices and GPUs as sysfs shows them: which NIC is near which GPU, and how a NIC is reached.

Reads files only; loads no library and opens no device.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

SYSFS = Path("/sys")
_PCI_ADDRESS = re.compile(r"^[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")
_NVIDIA_VENDOR, _DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")


class Gid(NamedTuple):
    """One entry of a port's GID table.

    Attributes:
        number: its place in the table.
        value: 16 bytes as sysfs writes them: eight groups of four hex digits.
        kind: `RoCE v2`, `IB/RoCE v1`, …
    """

    number: int
    value: str
    kind: str

    @property
    def family(self) -> str:
        """`ipv4`, `ipv6` (routable) or `link-local`: what peers must have in common."""
        if self.value.startswith("0000:0000:0000:0000:0000:ffff:"):
            return "ipv4"
        return "link-local" if self.value.startswith("fe80:") else "ipv6"


class Nic(NamedTuple):
    """A port of an RDMA device.

    Attributes:
        name: of the device: `mlx5_0`, `rxe0`.
        pci: addresses of the PCI bridges above it and of itself, outermost first; empty for a
            device that is on no PCI bus.
        numa_node: -1 if unknown.
        rate_gbps: of the port.
    """

    name: str
    port: int
    active: bool
    link_layer: str
    lid: int
    rate_gbps: float
    numa_node: int
    pci: tuple[str, ...]


class Gpu(NamedTuple):
    """A GPU as a PCI device; `pci` and `numa_node` as for `Nic`."""

    pci: tuple[str, ...]
    numa_node: int

    @property
    def address(self) -> str:
        """Its own PCI address."""
        return self.pci[-1]


def nics(root: Path = SYSFS) -> list[Nic]:
    """Return every port of every RDMA device, by name."""
    found = []
    folder = root / "class" / "infiniband"
    for device in sorted(folder.iterdir(), key=_natural) if folder.is_dir() else []:
        for port in sorted((device / "ports").glob("*"), key=_natural):
            found.append(
                Nic(
                    name=device.name,
                    port=int(port.name),
                    active=_read(port / "state").split(":")[0] == "4",
                    link_layer=_read(port / "link_layer"),
                    lid=int(_read(port / "lid") or "0", 0),
                    rate_gbps=float((_read(port / "rate") or "0").split()[0]),
                    numa_node=int(_read(device / "device" / "numa_node") or -1),
                    pci=_pci_path(device / "device"),
                )
            )
    return found


def gids(nic: Nic, root: Path = SYSFS) -> list[Gid]:
    """Return the port's GIDs that are in use."""
    port = root / "class" / "infiniband" / nic.name / "ports" / str(nic.port)
    found = []
    for path in sorted((port / "gids").glob("*"), key=_natural):
        value = _read(path)
        if value and set(value) - set("0:"):
            kind = _read(port / "gid_attrs" / "types" / path.name)
            found.append(Gid(int(path.name), value, kind))
    return found


def gpus(root: Path = SYSFS) -> list[Gpu]:
    """NVIDIA GPUs, by PCI address."""
    found = []
    folder = root / "bus" / "pci" / "devices"
    for device in sorted(folder.iterdir()) if folder.is_dir() else []:
        if _read(device / "vendor") != _NVIDIA_VENDOR:
            continue
        if not _read(device / "class").startswith(_DISPLAY_CLASSES):
            continue
        found.append(Gpu(_pci_path(device), int(_read(device / "numa_node") or -1)))
    return found


class Distance(NamedTuple):
    """How far a NIC is from a GPU; smaller is nearer.

    Attributes:
        hops: PCI bridges between the two; many if they meet only at the processor.
        same_numa: 0 if both are on one NUMA node, 1 if not, or unknown.
    """

    same_numa: int
    hops: int

    @property
    def name(self) -> str:
        """As `nvidia-smi topo` would call it."""
        if self.hops < _NO_COMMON_BRIDGE:
            return "PIX" if self.hops <= 2 else "PXB"
        return "SYS" if self.same_numa else "NODE"


_NO_COMMON_BRIDGE = 1000


def distance(gpu: Gpu, nic: Nic) -> Distance:
    """Return how far a NIC is from a GPU, by the PCI bridges that they share and by NUMA node."""
    shared = 0
    for one, other in zip(gpu.pci[:-1], nic.pci[:-1], strict=False):
        if one != other:
            break
        shared += 1
    near = gpu.numa_node == nic.numa_node and nic.numa_node >= 0
    if not shared:
        return Distance(0 if near else 1, _NO_COMMON_BRIDGE)
    return Distance(0, len(gpu.pci) + len(nic.pci) - 2 * shared - 1)


def rank(gpu: Gpu, candidates: list[Nic]) -> list[Nic]:
    """Return the active NICs, nearest to the GPU first; equals by rate, then by name."""
    usable = [nic for nic in candidates if nic.active]
    return sorted(
        usable, key=lambda nic: (distance(gpu, nic), -nic.rate_gbps, _natural(Path(nic.name)))
    )


def nearest(gpu: Gpu, candidates: list[Nic]) -> list[Nic]:
    """Return the active NICs that no other one is nearer than."""
    ranked = rank(gpu, candidates)
    return [nic for nic in ranked if distance(gpu, nic) == distance(gpu, ranked[0])]


def near_any(addresses: Collection[str], candidates: list[Nic], root: Path = SYSFS) -> list[Nic]:
    """Return the active NICs that are nearest to one of the GPUs at these PCI addresses, in the
    order given.

    All active ones if there is no such GPU here.
    """
    near = {
        nic for gpu in gpus(root) if gpu.address in addresses for nic in nearest(gpu, candidates)
    }
    return [nic for nic in candidates if nic.active and (not near or nic in near)]


def _pci_path(link: Path) -> tuple[str, ...]:
    """Return the PCI addresses on the way to a device, outermost bridge first, out of its real
    path."""
    if not link.exists():
        return ()
    return tuple(part for part in link.resolve().parts if _PCI_ADDRESS.match(part))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Order mlx5_2 before mlx5_10."""
    return [(int(d or 0), t) for d, t in re.findall(r"(\d*)(\D*)", path.name)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
