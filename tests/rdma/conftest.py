"""Two engines on the two ends of a wire of RDMA devices, and what can be done to the wire.

Runs inside `kvferry rdma-vm`, or wherever rxe0 and rxe1 reach each other through v0 and v1.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import EngineError
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.transports.verbs import topology

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer.ticket import Ticket

SENTINEL = 0xA5
MARGIN_NBYTES = 4096
MIB = 1 << 20
PATIENCE_S = 120.0  # for what must come, in an emulated machine on a busy host
SYSFS = Path("/sys/class/infiniband")
ADDRESSES = {"v0": "10.77.0.1", "v1": "10.77.0.2"}


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (SYSFS / "rxe0").exists() and (SYSFS / "rxe1").exists():
        return
    reason = "needs the RDMA devices rxe0 and rxe1: kvferry rdma-vm run -- pytest tests/rdma"
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


class Wire:
    """The veth pair between the devices."""

    def up(self, name: str) -> None:
        """Brings an interface up again, with the neighbour that it has forgotten."""
        run("ip", "link", "set", name, "up")
        self.introduce()

    def down(self, name: str) -> None:
        run("ip", "link", "set", name, "down")

    def introduce(self) -> None:
        for name, other in (("v0", "v1"), ("v1", "v0")):
            hardware = Path(f"/sys/class/net/{other}/address").read_text().strip()
            address = ADDRESSES[other]
            run("ip", "neigh", "replace", address, "lladdr", hardware, "dev", name)

    def forget_ipv4(self) -> None:
        """Leaves the devices their link-local IPv6 addresses."""
        local = {}
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            local[name] = ":".join(digits[i : i + 4] for i in range(0, 32, 4))
        for name, other in (("v0", "v1"), ("v1", "v0")):
            run("ip", "addr", "del", f"{ADDRESSES[name]}/24", "dev", name)
            hardware = Path(f"/sys/class/net/{other}/address").read_text().strip()
            run("ip", "neigh", "replace", local[other], "lladdr", hardware, "dev", name)
        self.agree(ipv4=False)

    def agree(self, *, ipv4: bool) -> None:
        """Waits until the devices have heard of their interfaces' addresses."""
        deadline_s = time.monotonic() + PATIENCE_S
        while any(
            ipv4 != ("ipv4" in {gid.family for gid in topology.gids(nic)})
            for nic in topology.nics()
            if nic.name in ("rxe0", "rxe1")
        ):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)

    def spoil(self, *netem: str) -> None:
        for name in ADDRESSES:
            run("tc", "qdisc", "replace", "dev", name, "root", "netem", *netem)

    def slow(self) -> None:
        """4 MB/s: what was posted is still under way when something is done to it."""
        self.spoil("rate", "32mbit")

    def mend(self) -> None:
        for name in ADDRESSES:
            subprocess.run(("tc", "qdisc", "del", "dev", name, "root"), capture_output=True)

    def mtu(self, nbytes: int, *names: str) -> None:
        for name in names or ADDRESSES:
            run("ip", "link", "set", name, "mtu", str(nbytes))


@pytest.fixture
def wire() -> Iterator[Wire]:
    mended = Wire()
    yield mended
    mended.mend()
    mended.mtu(9000)
    for name, address in ADDRESSES.items():
        run("ip", "addr", "replace", f"{address}/24", "dev", name)
        run("ip", "link", "set", name, "up")
    mended.introduce()
    mended.agree(ipv4=True)


class Pair:
    """Two engines of this process, a link between them, and memory with sentinels around it."""

    def __init__(
        self, here: tuple[str, ...] = ("rxe0",), there: tuple[str, ...] = ("rxe1",), queues: int = 1
    ) -> None:
        options: dict[str, Any] = {"transports": ("verbs",), "peer_timeout_s": 20.0}
        self.here = TransferEngine(name="here", nics=here, queues=queues, **options)
        self.there = TransferEngine(name="there", nics=there, **options)
        self.link = self.connect()
        self.back: Link = self.there.accept_link(self.here.engine_id, PATIENCE_S)

    def connect(self) -> Link:
        return self.here.connect(self.there.address, transport="verbs", timeout_s=PATIENCE_S)

    def memory(self, nbytes: int) -> Memory:
        return Memory(self, nbytes)

    def failure(self, ticket: Ticket) -> EngineError:
        """The error that a ticket ends with."""
        with pytest.raises(EngineError) as caught:
            ticket.wait(PATIENCE_S)
        return caught.value

    def rails_up(self) -> None:
        """Waits until every rail is up again at both ends."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not all(rail.up for rail in (*self.link.rails, *self.back.rails)):
            assert time.monotonic() < deadline_s, (self.link.rails, self.back.rails)
            time.sleep(0.05)

    def reopened(self, epoch: int) -> None:
        """Waits until every rail is up at both ends, opened after that epoch."""
        deadline_s = time.monotonic() + PATIENCE_S
        rails = [rail for link in (self.link, self.back) for rail in link._path.rails]  # type: ignore[attr-defined]
        while not all(rail.up and rail.epoch > epoch for rail in rails):
            assert time.monotonic() < deadline_s, (self.link.rails, self.back.rails)
            time.sleep(0.05)

    def close(self) -> None:
        self.here.close()
        self.there.close()


class Memory:
    """A source here, a destination there, both registered, the destination between sentinels."""

    def __init__(self, pair: Pair, nbytes: int) -> None:
        self.pair = pair
        self.nbytes = nbytes
        self.src: npt.NDArray[np.uint8] = np.random.default_rng(nbytes).integers(
            0, 256, nbytes, np.uint8
        )
        self.whole = np.full(nbytes + 2 * MARGIN_NBYTES, SENTINEL, np.uint8)
        self.dst = self.whole[MARGIN_NBYTES:-MARGIN_NBYTES]
        self.here = pair.here.register(self.src)
        self.there = pair.there.register(self.dst)

    def write(
        self, link: Link | None = None, *, piece: int = 0, timeout_s: float = PATIENCE_S
    ) -> Ticket:
        """Writes everything: in one piece, or in scattered pieces of this size."""
        link = link or self.pair.link
        self.imm = self.pair.there.new_imm()
        if not piece:
            return link.write(
                self.here,
                0,
                self.there.descriptor,
                0,
                self.nbytes,
                imm=self.imm,
                timeout_s=timeout_s,
            )
        # Every piece keeps its offset, but their order is scattered.
        order = np.random.default_rng(piece).permutation(self.nbytes // piece) * piece
        return link.write(
            self.here, order, self.there.descriptor, order, piece, imm=self.imm, timeout_s=timeout_s
        )

    def arrived(self) -> None:
        """Waits until everything has been counted, and looks at every byte."""
        ticket = self.pair.there.expect(
            self.imm, nbytes=self.nbytes, writes=1, timeout_s=PATIENCE_S
        )
        assert ticket.wait() == self.nbytes
        assert np.array_equal(self.dst, self.src)
        self.unharmed()

    def unharmed(self) -> None:
        """No byte outside the destination was written."""
        assert (self.whole[:MARGIN_NBYTES] == SENTINEL).all()
        assert (self.whole[-MARGIN_NBYTES:] == SENTINEL).all()

    def clear(self) -> None:
        self.dst[:] = SENTINEL


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(**options: Any) -> Pair:
        pairs.append(Pair(**options))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()
