"""What the engine's tests share: transports, a peer in a process of its own, sentinels and gates.

A new transport joins every conformance test by one line in `TRANSPORTS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.memory import iovec
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.transports.verbs import path as verbs
from kvferry.engine.transports.verbs import queue_pair as verbs_qp
from kvferry.engine.transports.verbs import topology
from kvferry.engine.transports.verbs.device import NICS_VARIABLE
from kvferry.engine.wire.identity import EngineAddress
from tests.support import shuffle
from tests.support.child import Child
from tests.support.skips import pytest_terminal_summary  # noqa: F401 - a hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from kvferry.engine.link.link import Link
    from kvferry.engine.memory.descriptors import RegionDescriptor
    from kvferry.engine.memory.regions import MemoryRegion

# Each transport, and the functions that move its writes' and its reads' bytes in the process that
# asked for them: `Gate` holds transfers in flight there.
TRANSPORTS: dict[str, tuple[Any, str, str]] = {
    "cma": (iovec, "process_vm", "process_vm"),
    "tcp": (iovec, "send", "receive"),
}
NICS = [nic.name for nic in topology.nics() if nic.active]
if verbs.available().ok:
    TRANSPORTS["verbs"] = (verbs_qp, "post", "post")
    os.environ.setdefault(NICS_VARIABLE, NICS[0])  # this process's; peers have the last one
if "KVFERRY_TEST_TRANSPORTS" in os.environ:  # only these, with commas between them
    _wanted = os.environ["KVFERRY_TEST_TRANSPORTS"].split(",")
    TRANSPORTS = {name: entry for name, entry in TRANSPORTS.items() if name in _wanted}


shuffle.install()

SENTINEL = 0xA5
# How long a peer may take for a command: reached only when something hangs. Soft RDMA devices are in
# emulated machines, where starting Python takes a minute on a busy host.
ANSWER_S = 150.0 if "verbs" in TRANSPORTS else 30.0


class Peer(Child):
    """A transfer engine in another process, and that process's fate."""

    def __init__(self, *, launcher: Sequence[str] = (), **options: Any) -> None:
        """Starts the peer, by way of the command `launcher`, with these options of its engine; with
        `interpreted_gpu`, which imports torch and Triton, it has a GPU (`support/interpreted_gpu.py`).
        """
        super().__init__(
            "tests.support.peer_process",
            json.dumps(options),
            answer_s=4 * ANSWER_S if "interpreted_gpu" in options else ANSWER_S,
            launcher=launcher,
            environment={NICS_VARIABLE: NICS[-1]} if NICS else {},
        )
        self.address = EngineAddress.decode(self.call("address"))

    @property
    def engine_id(self) -> str:
        return self.address.engine_id

    def contents(self, region: RegionDescriptor) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.call("peek", region.region_id), np.uint8)


class Gate:
    """Holds bytes back just before they move, so that a transfer stays in flight as long as needed.

    `reached` is set once a thread waits at the gate.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def guard(self, function: Callable[..., None]) -> Callable[..., None]:
        def guarded(*arguments: Any, **options: Any) -> None:
            self.reached.set()
            assert self._open.wait(ANSWER_S), "nobody opened the gate"
            function(*arguments, **options)

        return guarded


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Every transport in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def peer() -> Iterator[Peer]:
    """One peer for all tests that leave it alive."""
    process = Peer(name="peer")
    yield process
    process.end()


@contextlib.contextmanager
def _peers() -> Iterator[Callable[..., Peer]]:
    started: list[Peer] = []

    def start(**options: Any) -> Peer:
        started.append(Peer(**options))
        return started[-1]

    yield start
    for process in started:
        process.thaw()
        process.end()


@pytest.fixture
def start_peer() -> Iterator[Callable[..., Peer]]:
    """Starts peers that a test may kill."""
    with _peers() as start:
        yield start


@pytest.fixture(scope="module")
def start_module_peer() -> Iterator[Callable[..., Peer]]:
    """Starts peers for all tests of a module."""
    with _peers() as start:
        yield start


@pytest.fixture(scope="session")
def engine() -> Iterator[TransferEngine]:
    """This process's engine, for all tests that do not close it."""
    with TransferEngine(name="here") as shared:
        yield shared


@pytest.fixture
def link(engine: TransferEngine, peer: Peer, transport: str) -> Iterator[Link]:
    """A fresh link to the peer over the transport under test."""
    fresh = engine.connect(peer.address, transport=transport)
    assert peer.call("accept", engine.engine_id) == transport
    yield fresh
    fresh.close()


@pytest.fixture
def new_pool(engine: TransferEngine) -> Iterator[Callable[..., Pool]]:
    """Makes pools of this process's engine: random bytes, or a sentinel throughout."""
    pools: list[Pool] = []

    def make(nbytes: int, *, fill: int | None = None) -> Pool:
        pools.append(Pool(engine, nbytes, fill))
        return pools[-1]

    yield make
    for pool in pools:
        pool.region.deregister()


class Pool:
    """Registered memory of this process."""

    def __init__(self, engine: TransferEngine, nbytes: int, fill: int | None) -> None:
        random = np.random.default_rng(nbytes)
        self.bytes: npt.NDArray[np.uint8] = (
            random.integers(0, 256, nbytes, np.uint8)
            if fill is None
            else np.full(nbytes, fill, np.uint8)
        )
        self.region: MemoryRegion = engine.register(self.bytes)
        self.descriptor = self.region.descriptor


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch, transport: str) -> Iterator[Callable[[str], Gate]]:
    """`hold("write")` or `hold("read")` closes a gate before this process's bytes."""
    gates: list[Gate] = []

    def close(operation: str) -> Gate:
        module, *names = TRANSPORTS[transport]
        name = names[operation == "read"]
        gate = Gate()
        gates.append(gate)
        monkeypatch.setattr(module, name, gate.guard(getattr(module, name)))
        return gate

    yield close
    for gate in gates:
        gate.open()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Soak tests run only when they are asked for; what is marked `first` comes first."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    if "soak" in (config.getoption("-m") or ""):
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with -m soak"))
