"""Which NIC is near which GPU, from sysfs trees in the shape of real machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvferry.engine.transports.verbs import topology
from kvferry.engine.transports.verbs.device import NICS_VARIABLE, Nics
from kvferry.engine.transports.verbs.topology import Gid, gids, gpus, nearest, nics, rank

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Machine:
    """A sysfs tree that grows device by device."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "class/infiniband").mkdir(parents=True)

    def pci(self, path: Sequence[str], numa_node: int) -> Path:
        """A PCI device at the end of a path of bridges, below the root complex of the first one."""
        folder = self.root / "devices" / f"pci{path[0][:7]}" / "/".join(path)
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{numa_node}\n")
        link = self.root / "bus/pci/devices" / path[-1]
        link.symlink_to(folder)
        return folder

    def gpu(self, path: Sequence[str], numa_node: int) -> None:
        folder = self.pci(path, numa_node)
        (folder / "vendor").write_text("0x10de\n")
        (folder / "class").write_text("0x030200\n")

    def nic(
        self,
        name: str,
        folder: Path | None,
        *,
        rate: str = "400 Gb/sec (4X NDR)",
        state: str = "4: ACTIVE",
        link_layer: str = "InfiniBand",
        lid: str = "0x12",
    ) -> Path:
        device = self.root / "class/infiniband" / name
        port = device / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text(f"{rate}\n")
        (port / "lid").write_text(f"{lid}\n")
        (port / "link_layer").write_text(f"{link_layer}\n")
        if folder is not None:
            (device / "device").symlink_to(folder)
        return port


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def dgx_h100(machine: Machine) -> None:
    """Two sockets, four PCI switches a socket, a GPU and a ConnectX-7 at each; two storage NICs that
    share a bridge with nobody."""
    buses = ["1a", "40", "53", "66", "9c", "c0", "d2", "e4"]
    for number, bus in enumerate(buses):
        node = number // 4
        switch = [f"0000:{bus}:01.0", f"0000:{bus}:02.0"]
        machine.gpu([*switch, f"0000:{bus}:08.0", f"0000:{bus}:09.0"], node)
        folder = machine.pci([*switch, f"0000:{bus}:10.0", f"0000:{bus}:11.0"], node)
        machine.nic(f"mlx5_{number}", folder)
    for number, node in ((8, 0), (9, 1)):
        folder = machine.pci([f"0000:a{node}:00.0", f"0000:a{node}:01.0"], node)
        machine.nic(f"mlx5_{number}", folder, rate="200 Gb/sec (4X HDR)")


def test_each_gpu_of_a_dgx_h100_has_a_nic_of_its_own(machine: Machine) -> None:
    dgx_h100(machine)
    found = nics(machine.root)
    assert [nic.name for nic in found] == [f"mlx5_{i}" for i in range(10)]
    for number, gpu in enumerate(gpus(machine.root)):
        assert [nic.name for nic in nearest(gpu, found)] == [f"mlx5_{number}"]
        ranked = rank(gpu, found)
        assert topology.distance(gpu, ranked[0]).name == "PXB"
        # Then the others of its socket, faster ones first, then those of the other socket.
        node = number // 4
        assert {nic.numa_node for nic in ranked[:5]} == {node}
        assert ranked[4].rate_gbps == 200
        assert {nic.numa_node for nic in ranked[5:]} == {1 - node}
        assert topology.distance(gpu, ranked[1]).name == "NODE"
        assert topology.distance(gpu, ranked[-1]).name == "SYS"


@pytest.mark.parametrize(
    ("mine", "used"),
    [([2], [2]), ([5, 2], [2, 5]), (range(8), range(8)), ([], range(10))],
)
def test_an_engine_uses_the_nics_of_its_gpus(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, mine: Sequence[int], used: Sequence[int]
) -> None:
    monkeypatch.delenv(NICS_VARIABLE, raising=False)
    dgx_h100(machine)
    addresses = [gpu.address for gpu in gpus(machine.root)]
    here = Nics(root=machine.root)
    here.gpus = lambda: [addresses[number] for number in mine]
    assert [nic.name for nic in here.usable()] == [f"mlx5_{number}" for number in used]
    here.gpus = lambda: ["0000:77:00.0"]  # of another machine's: nothing is known of it
    assert len(here.usable()) == 10


def test_nics_that_are_named_are_used_wherever_the_gpus_are(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dgx_h100(machine)
    (first, *_) = gpus(machine.root)
    monkeypatch.setenv(NICS_VARIABLE, "mlx5_8,mlx5_9")
    for here, used in (
        (Nics(("mlx5_3",), machine.root), ["mlx5_3"]),
        (Nics(root=machine.root), ["mlx5_8", "mlx5_9"]),
    ):
        here.gpus = lambda: [first.address]
        assert [nic.name for nic in here.usable()] == used


def test_each_gpu_of_a_p5_has_four_efa_devices(machine: Machine) -> None:
    """Eight GPUs, 32 EFA devices; a switch has one GPU and four EFA."""
    for number in range(8):
        bridge = f"0000:{0x40 + 16 * number:02x}:00.0"
        machine.gpu([bridge, f"0000:{0x41 + 16 * number:02x}:00.0"], number // 4)
        for lane in range(4):
            place = f"0000:{0x42 + 16 * number + lane:02x}:00.0"
            name = f"rdmap{16 * number + lane}s0"
            machine.nic(name, machine.pci([bridge, place], number // 4), lid="0x0")
    found = nics(machine.root)
    assert len(found) == 32
    for number, gpu in enumerate(gpus(machine.root)):
        near = nearest(gpu, found)
        assert [nic.name for nic in near] == [f"rdmap{16 * number + i}s0" for i in range(4)]
        assert topology.distance(gpu, near[0]).name == "PIX"


def test_a_workstation_has_one_nic_for_everybody(machine: Machine) -> None:
    machine.gpu(["0000:00:01.0", "0000:01:00.0"], -1)
    machine.gpu(["0000:00:02.0", "0000:02:00.0"], -1)
    folder = machine.pci(["0000:00:1c.0", "0000:03:00.0"], -1)
    machine.nic("mlx5_0", folder, link_layer="Ethernet", lid="0x0", rate="25 Gb/sec (1X EDR)")
    machine.nic("mlx5_1", folder, state="1: DOWN", link_layer="Ethernet", lid="0x0")
    for gpu in gpus(machine.root):
        assert [nic.name for nic in nearest(gpu, nics(machine.root))] == ["mlx5_0"]
        assert topology.distance(gpu, nics(machine.root)[0]).name == "SYS"  # no node is known


def test_a_soft_device_is_on_no_bus(machine: Machine) -> None:
    port = machine.nic("rxe0", None, link_layer="Ethernet", lid="0x0", rate="10 Gb/sec (4X SDR)")
    for number, (value, kind) in enumerate(
        [
            ("fe80:0000:0000:0000:005b:37ff:fe5a:63cd", "RoCE v2"),
            ("0000:0000:0000:0000:0000:ffff:0a4d:0001", "RoCE v2"),
            ("0000:0000:0000:0000:0000:0000:0000:0000", ""),
            ("2001:0db8:0000:0000:0000:0000:0000:0001", "IB/RoCE v1"),
        ]
    ):
        for folder, text in (("gids", value), ("gid_attrs/types", kind)):
            (port / folder).mkdir(parents=True, exist_ok=True)
            (port / folder / str(number)).write_text(f"{text}\n")
    (nic,) = nics(machine.root)
    assert (nic.pci, nic.numa_node, nic.active, nic.rate_gbps) == ((), -1, True, 10)
    found = gids(nic, machine.root)
    assert [(gid.number, gid.family) for gid in found] == [
        (0, "link-local"),
        (1, "ipv4"),
        (3, "ipv6"),
    ]
    assert found[2] == Gid(3, "2001:0db8:0000:0000:0000:0000:0000:0001", "IB/RoCE v1")


def test_a_machine_without_rdma_has_no_nics(tmp_path: Path) -> None:
    assert nics(tmp_path) == []
    assert gpus(tmp_path) == []
