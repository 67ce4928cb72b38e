"""What a link does about GPU memory of its peer that no kernel reaches, with a driver that says so."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from kvferry.engine.errors import DeviceError, OutOfRange, RegionGone, TransportUnavailable
from kvferry.engine.memory import cuda_driver as cuda
from kvferry.engine.memory.descriptors import CudaMemory, RegionDescriptor
from kvferry.engine.transfer.device_counters import COUNTERS_NBYTES
from kvferry.engine.transports.cuda_ipc import path as cuda_ipc
from kvferry.engine.transports.cuda_ipc import peer_memory
from kvferry.engine.transports.cuda_ipc.peer_memory import PeerMappings, PeerReach
from kvferry.engine.wire.messages import Arrived

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ALLOCATION_NBYTES = 1 << 20
HIDDEN = "cc"
UUIDS = ["aa", "bb"]


class Driver:
    """Two GPUs that are visible, one that is not, and whatever else a test says."""

    def __init__(self) -> None:
        self.opened: list[bytes] = []
        self.mapped = 0
        self.maps = True
        self.reaches = True
        self.adds = True  # by native atomics, between its GPUs
        self.allocated: dict[int, int] = {}

    def adds_at(self, device: int, peer: int) -> bool:
        return device == peer or self.adds

    def allocate(self, device: int, nbytes: int) -> int:
        address = (1 + len(self.allocated)) << 40
        self.allocated[address] = nbytes
        return address + device

    def free(self, device: int, address: int) -> None:
        del self.allocated[address - device]

    def device_count(self) -> int:
        return len(UUIDS)

    def find_device(self, uuid: str) -> int:
        return UUIDS.index(uuid) if uuid in UUIDS else -1

    def can_access(self, device: int, peer: int) -> bool:
        return device == peer or self.reaches

    def open(self, _device: int, handle: bytes) -> int:
        self.opened.append(handle)
        if not self.maps:
            raise DeviceError("CUDA_ERROR_INVALID_DEVICE", operation="cuda")
        self.mapped += 1
        return 4096

    def allocation(self, _device: int, base: int) -> tuple[int, int]:
        return base, ALLOCATION_NBYTES

    def unmap(self, _device: int, _address: int) -> None:
        self.mapped -= 1


class Chunks:
    """Chunks that are mapped where an allocation would be."""

    def __init__(self, _device: int, _pid: int, chunks: Sequence[tuple[int, int]]) -> None:
        self.base = 4096
        self.nbytes = sum(size for _, size in chunks)

    def close(self) -> None:
        pass


def in_chunks(whole: RegionDescriptor) -> RegionDescriptor:
    """The same region, in memory that is mapped chunk by chunk."""
    chunks = ((3, ALLOCATION_NBYTES // 2), (4, ALLOCATION_NBYTES // 2))
    assert whole.cuda is not None
    memory = msgspec.structs.replace(whole.cuda, handle=b"", chunks=chunks)
    return msgspec.structs.replace(whole, cuda=memory)


class Link:
    """A link, as far as reach depends on it."""

    closed = False
    leave = True

    def has_access(self, _regions: Any) -> bool:
        return self.leave


class Local:
    device = 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    for module in (cuda, peer_memory):
        monkeypatch.setattr(module, "driver", lambda: fake)
    return fake


def region(number: int, uuid: str, offset: int = 0, nbytes: int = 64) -> RegionDescriptor:
    handle = bytes([number]) * 64
    memory = CudaMemory(handle, offset, uuid, b"c" * 64, 0)
    return RegionDescriptor("engine", number, b"k" * 16, 1 << 20, nbytes, "cuda", memory)


@pytest.fixture
def reach(driver: Driver) -> tuple[Link, Callable[..., str]]:
    link = Link()
    found = PeerReach(link, PeerMappings("peer", os.getpid() + 1))  # type: ignore[arg-type]
    return link, lambda *remote: found.obstacle((Local(),), remote)  # type: ignore[arg-type]


def test_a_gpu_without_peer_access_is_an_obstacle_that_nobody_maps(
    driver: Driver, reach: tuple[Link, Callable[..., str]]
) -> None:
    driver.reaches = False
    assert reach[1](region(1, "bb")) == "GPU 0 has no peer access to GPU 1"
    assert reach[1](region(1, "aa")) == ""  # the same GPU
    assert bytes([1]) * 64 in driver.opened


def test_a_hidden_gpu_is_mapped_once_the_peer_has_granted_it(
    driver: Driver, reach: tuple[Link, Callable[..., str]]
) -> None:
    link, obstacle = reach
    link.leave = False
    theirs = region(1, HIDDEN)
    assert obstacle(theirs) == ""
    assert driver.opened == []
    link.leave = True
    assert obstacle(theirs) == ""
    assert driver.opened == [bytes([1]) * 64, b"c" * 64]
    assert obstacle(theirs) == ""
    assert len(driver.opened) == 2


def test_what_the_driver_does_not_map_stays_an_obstacle_and_is_told_once(
    driver: Driver, reach: tuple[Link, Callable[..., str]], caplog: pytest.LogCaptureFixture
) -> None:
    driver.maps = False
    one, other = region(1, HIDDEN), region(2, HIDDEN)
    for _ in range(3):
        for theirs in (one, other):
            assert "CUDA_ERROR_INVALID_DEVICE" in reach[1](theirs)
            assert "CUDA_VISIBLE_DEVICES" in reach[1](theirs)
    assert driver.opened == [bytes([1]) * 64, bytes([2]) * 64]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pinned host memory" in caplog.text


def test_a_link_that_is_down_blames_no_gpu(
    driver: Driver, reach: tuple[Link, Callable[..., str]], caplog: pytest.LogCaptureFixture
) -> None:
    reach[0].closed, driver.maps = True, False
    reach[1](region(1, HIDDEN))
    assert not caplog.records


def test_without_native_atomics_kernels_add_to_words_that_nobody_reads(driver: Driver) -> None:
    driver.adds = False
    mappings = PeerMappings("peer", os.getpid() + 1)
    far, near, hidden = (region(1, uuid) for uuid in ("bb", "aa", HIDDEN))
    assert [mappings.counted(0, each) for each in (far, near, hidden)] == [False, True, True]
    sink = mappings.counters(0, far)
    assert mappings.counters(0, region(2, "bb")) == sink
    assert driver.allocated == {sink: COUNTERS_NBYTES}
    assert driver.opened == []
    mappings.counters(0, near)
    assert driver.opened == [b"c" * 64]
    mappings.close()
    assert driver.allocated == {}
    with pytest.raises(TransportUnavailable, match="the link is down"):
        mappings.counters(0, far)


@pytest.mark.parametrize("counted", [True, False])
def test_a_peer_is_told_what_its_gpu_has_counted(counted: bool) -> None:
    sent: list[object] = []
    path: Any = SimpleNamespace(_link=SimpleNamespace(send=sent.append))
    transfer: Any = SimpleNamespace(imm=9, total_nbytes=100)
    cuda_ipc.CudaIpcPath._tell_placed(path, transfer, counted)
    assert sent == [Arrived(9, 100, 1, device_nbytes=100 if counted else 0)]


def test_what_the_peer_has_taken_back_is_not_mapped_again(driver: Driver) -> None:
    """Whoever made up its mind before the peer took it back finds it gone, not what came after it."""
    mappings = PeerMappings("peer", os.getpid() + 1)
    theirs = region(1, HIDDEN)
    mappings.address(0, theirs)
    mappings.counters(0, theirs)
    assert driver.mapped == 2
    mappings.forget(1)
    with pytest.raises(RegionGone, match="region 1"):
        mappings.address(0, theirs)
    assert PeerReach(Link(), mappings).obstacle((Local(),), (theirs,)) == ""  # type: ignore[arg-type]
    mappings.close()
    assert driver.mapped == 0


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (-(1 << 32), 64),
        (-1, 64),
        (ALLOCATION_NBYTES - 63, 64),
        (1 << 40, 64),
        (2**63 - 1, 64),
        (0, ALLOCATION_NBYTES + 1),
        (64, 2**63 - 1),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_region_that_leaves_its_allocation_aims_no_kernel(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, offset: int, nbytes: int, chunked: bool
) -> None:
    """What a peer says of its memory is added to where that is mapped here."""
    monkeypatch.setattr(peer_memory, "MappedChunks", Chunks)
    mappings = PeerMappings("peer", os.getpid() + 1)
    for whole in (region(1, "aa", ALLOCATION_NBYTES - 64), region(1, "aa", 0, ALLOCATION_NBYTES)):
        assert whole.cuda is not None
        assert mappings.address(0, in_chunks(whole) if chunked else whole) >= 4096
    lie = region(2, "aa", offset, nbytes)
    with pytest.raises(OutOfRange, match=r"region 2 .* leaves"):
        mappings.address(0, in_chunks(lie) if chunked else lie)
    mappings.close()
    assert driver.mapped == 0


def test_counters_that_their_allocation_does_not_hold_are_not_mapped(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    mappings = PeerMappings("peer", os.getpid() + 1)
    monkeypatch.setattr(driver, "allocation", lambda _device, base: (base, COUNTERS_NBYTES - 1))
    with pytest.raises(OutOfRange, match="counters"):
        mappings.counters(0, region(1, "aa"))
    mappings.close()
    assert driver.mapped == 0


@pytest.mark.parametrize("field", ["handle", "counters"])
def test_a_descriptor_has_ranges(field: str) -> None:
    """What does not decode needs no check where it is used."""
    true = region(1, "aa").cuda
    assert true is not None
    for lie in ({field: b"x" * 65}, {"offset": -1}, {"counters_address": -1}):
        memory = msgspec.structs.replace(true, **lie)
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(memory), type=CudaMemory)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_probe_names_pairs_that_are_cut_off(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    monkeypatch.setattr(cuda, "absence", lambda: "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert "each reaches the memory of the others" in cuda_ipc.probe().reason
    driver.reaches = False
    ok, reason = cuda_ipc.probe()
    assert ok
    assert "no peer access between 0-1, 1-0" in reason
    assert ("CUDA_VISIBLE_DEVICES hides" in reason) == hidden
