"""Registered memory: what can be registered, how long it lives, and who may name it."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
import threading
import weakref
from typing import Any

import msgspec
import numpy as np
import pytest

from kvferry.engine.errors import (
    DeadlineExceeded,
    LayoutError,
    NotRegistered,
    OutOfRange,
    RegionGone,
)
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.memory.regions import RegionTable, check_ranges
from kvferry.engine.transfer_engine import TransferEngine


@pytest.fixture
def table() -> RegionTable:
    return RegionTable("engine")


@pytest.mark.parametrize(
    ("memory", "nbytes"),
    [
        (np.zeros(1, np.uint8), 1),
        (np.zeros((3, 4), np.float32), 48),
        (np.zeros((4, 6), np.uint8)[:, :3], 21),  # from the first to the last byte that it names
        (np.zeros(10, np.uint16)[::3], 20),
        (np.zeros((), np.float64), 8),
        (np.asfortranarray(np.zeros((5, 7), np.uint8)), 35),
        (bytearray(9), 9),
        (memoryview(bytearray(12)), 12),
    ],
)
def test_arrays_and_buffers(table: RegionTable, memory: Any, nbytes: int) -> None:
    region = table.register(memory)
    assert region.nbytes == region.descriptor.nbytes == nbytes
    array = memory if isinstance(memory, np.ndarray) else np.frombuffer(memory, np.uint8)
    assert region.address == region.descriptor.address == array.ctypes.data
    assert region.descriptor.engine_id == "engine"
    assert table.get(region.region_id) is region
    assert table.all() == [region]
    region.deregister()
    assert table.get(region.region_id) is None


def test_a_memory_map_can_be_registered(table: RegionTable) -> None:
    with mmap.mmap(-1, 4096) as memory:
        region = table.register(memory)
        assert region.nbytes == 4096
        region.deregister()
        del region
        gc.collect()


def test_torch_tensors(table: RegionTable) -> None:
    torch = pytest.importorskip("torch")
    whole = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert table.register(whole).nbytes == 64
    part = whole[1:3, 2:5]
    region = table.register(part)
    assert (region.address, region.nbytes) == (part.data_ptr(), (8 + 3) * 2)
    for bad, words in (
        (torch.zeros(0), "empty"),
        (torch.zeros(2, device="meta"), "on meta"),
        (torch.eye(3).to_sparse(), "sparse"),
    ):
        with pytest.raises(NotRegistered, match=words):
            table.register(bad)


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (b"constant", "read-only"),
        (memoryview(b"constant"), "read-only"),
        (np.broadcast_to(np.zeros(1, np.uint8), (4,)), "read-only"),
        (np.zeros(0, np.uint8), "empty"),
        (bytearray(), r"empty|bytearray"),
        (np.zeros(8, np.uint8)[::-1], "negative strides"),
        (np.array([object()]), "Python objects"),
        ([1, 2, 3], "a list cannot be registered"),
        (None, "a NoneType cannot be registered"),
        (17, "a int cannot be registered"),
        (memoryview(bytearray(8))[::2], "cannot be registered"),
    ],
)
def test_what_cannot_be_registered_is_refused_by_name(
    table: RegionTable, memory: Any, words: str
) -> None:
    with pytest.raises(NotRegistered, match=words):
        table.register(memory)
    assert table.all() == []


def test_a_region_keeps_its_memory_until_it_is_deregistered(table: RegionTable) -> None:
    class Array(np.ndarray[Any, Any]):
        """Can be referenced weakly."""

    array = np.zeros(10, np.uint8).view(Array)
    alive = weakref.ref(array)
    region = table.register(array)
    del array
    gc.collect()
    assert alive() is not None
    region.deregister()
    gc.collect()
    assert alive() is None
    region.deregister()
    with pytest.raises(RegionGone, match="register its memory again"):
        region.acquire()


def test_a_buffer_cannot_be_resized_under_its_region(table: RegionTable) -> None:
    memory = bytearray(10)
    region = table.register(memory)
    with pytest.raises(BufferError):
        memory.extend(b"x")
    region.deregister()
    memory.extend(b"x")


def test_a_tensor_that_is_freed_or_moved_is_noticed(table: RegionTable) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(100)
    region = table.register(tensor)
    region.acquire()
    region.release()
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RegionGone, match="freed or resized"):
        region.acquire()
    region.deregister()


def test_deregister_waits_for_uses_and_lets_none_begin(table: RegionTable) -> None:
    region = table.register(np.zeros(10, np.uint8))
    region.acquire()
    with pytest.raises(DeadlineExceeded, match="used by 1 transfers"):
        region.deregister(timeout_s=0.01)
    with pytest.raises(RegionGone):
        region.acquire()
    assert table.get(region.region_id) is region  # still held
    waiter = threading.Thread(target=region.deregister)
    waiter.start()
    region.release()
    waiter.join(15.0)
    assert not waiter.is_alive()
    assert table.get(region.region_id) is None


def test_revokers_are_asked_before_the_memory_goes(table: RegionTable) -> None:
    asked: list[int] = []
    table.on_revoke(lambda region_id, _: asked.append(region_id))
    with table.register(np.zeros(10, np.uint8)) as region:
        assert asked == []
    assert asked == [region.region_id]

    def refuse(region_id: int, _: float) -> None:
        raise DeadlineExceeded(f"the peer holds {region_id}")

    table.on_revoke(refuse)
    held = table.register(np.zeros(10, np.uint8))
    with pytest.raises(DeadlineExceeded, match="the peer holds"):
        held.deregister()
    assert held._memory is not None


def test_only_the_right_key_admits(table: RegionTable) -> None:
    region = table.register(np.zeros(10, np.uint8))
    other = table.register(np.zeros(10, np.uint8))
    assert table.admit(region.region_id, region.descriptor.key) is region
    for number, key in (
        (region.region_id, other.descriptor.key),
        (region.region_id, b""),
        (region.region_id, region.descriptor.key[:-1]),
        (10**6, region.descriptor.key),
        (-1, region.descriptor.key),
    ):
        with pytest.raises(NotRegistered, match="not registered here under that key"):
            table.admit(number, key)


def test_regions_have_numbers_and_keys_of_their_own(table: RegionTable) -> None:
    regions = [table.register(bytearray(1)) for _ in range(50)]
    assert len({r.region_id for r in regions}) == len({r.descriptor.key for r in regions}) == 50
    wire = msgspec.msgpack.encode(regions[0].descriptor)
    assert msgspec.msgpack.decode(wire, type=type(regions[0].descriptor)) == regions[0].descriptor


def test_a_cache_needs_the_tensors_of_its_layout(table: RegionTable) -> None:
    arrays = [np.zeros((2, 4, 3, 2, 8), np.uint8) for _ in range(2)]
    layout = KVLayout.from_tensors(arrays, "plane block token head dim")
    with pytest.raises(LayoutError, match="has 2 regions but 1 tensors"):
        table.register_cache(layout, arrays[:1])
    with pytest.raises(LayoutError, match="tensor 1 spans 383 bytes but"):
        table.register_cache(layout, [arrays[0], np.zeros(383, np.uint8)])
    swapped: Any = (arrays, layout)
    with pytest.raises(
        LayoutError, match="takes a KVLayout, then its tensors: the first is a list"
    ):
        table.register_cache(*swapped)
    assert table.all() == []  # nothing half registered
    cache = table.register_cache(layout, arrays)
    assert [r.nbytes for r in cache.regions] == [384, 384]
    cache.descriptor.check()
    cache.deregister()
    assert table.all() == []


@pytest.mark.parametrize("array_limit", [True, False])
def test_ranges(array_limit: bool) -> None:
    limit: Any = np.array([100]) if array_limit else 100
    top = 2**63 - 1
    for offset, nbytes in ((0, 0), (0, 100), (100, 0), (99, 1), (37, 20)):
        check_ranges(np.array([offset]), np.array([nbytes]), limit, "local")
    for offset, nbytes in ((-1, 1), (0, -1), (0, 101), (100, 1), (top, 1), (1, top), (top, top)):
        with pytest.raises(OutOfRange, match=r"local range .* leaves a region of 100 bytes"):
            check_ranges(np.array([offset]), np.array([nbytes]), limit, "local")


def test_threads_may_decode_their_first_descriptors_at_once() -> None:
    """In a fresh interpreter: msgspec works out a type once, and not on two threads at a time."""
    script = """
import sys, threading
sys.setswitchinterval(1e-6)
from kvferry.engine.errors import EngineError
from kvferry.engine.wire.identity import EngineAddress
from kvferry.engine.memory.descriptors import CacheDescriptor
start = threading.Barrier(8)
def decode(kind):
    start.wait()
    try:
        kind.decode(b"\\x80")
    except EngineError:
        pass
threads = [threading.Thread(target=decode, args=(k,)) for k in [CacheDescriptor, EngineAddress] * 4]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 8), ("float16", 16), ("float16", 4)])
def test_a_tensor_that_its_layout_does_not_describe_is_refused(dtype: str, dim: int) -> None:
    """It would be long enough, and other bytes would move."""
    made = np.zeros((2, 8, 4, 8), np.float16)
    layout = KVLayout.from_tensors([made], "plane block token dim")
    with TransferEngine(transports=("tcp",)) as engine:
        engine.register_cache(layout, [made])
        engine.register_cache(layout, [np.zeros(1 << 16, np.uint8)])  # a pool of bytes
        with pytest.raises(LayoutError, match=r"tensor 0 spans \d+ bytes.* layout"):
            engine.register_cache(layout, [np.zeros((2, 8, 4, dim), dtype)])
