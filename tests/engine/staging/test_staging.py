"""Staging: movers, rings, the gate for streams, shared slots, and the table of paths."""

from __future__ import annotations

import ctypes
import os
import queue
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import DeviceError, EngineError, PlanError, ProtocolError, RegionGone
from kvferry.engine.memory import iovec
from kvferry.engine.runtime.pipeline import Finisher, work_off
from kvferry.engine.staging.mover import GRID_BELOW_NBYTES, HostMover, gather, scatter, suits
from kvferry.engine.staging.ring import Buffer, Ring, StagingMeter
from kvferry.engine.staging.shared_slots import SharedSlots
from kvferry.engine.staging.thresholds import NEVER_DIRECT, DirectThresholds, load
from kvferry.engine.transfer.compute_gate import StreamGate
from tests import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SENTINEL = 0xA5


def pieces_of(memory: npt.NDArray[np.uint8], offsets: list[int], sizes: list[int]) -> iovec.Iovec:
    return iovec.make(memory.ctypes.data + np.array(offsets), np.array(sizes))


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [
        ([5, 100, 40], [63, 2000, 1]),  # odd ones
        (list(range(6400, 0, -128)), [128] * 50),  # on a grid, backwards
        (list(range(3, 6403, 128)), [64] * 50),  # on a grid, with gaps
        (list(range(6400, 0, -71)), [64] * 91),  # equal, on no grid
        (list(range(5, 15365, 768)), [512] * 20),  # on a grid of half their size
        (list(range(0, 8000, 160)), [32, 128, 64, 96, 160] * 10),  # of whole rows of 32 bytes
        (list(range(1, 8001, 161)), [32, 128, 64, 96, 160] * 10),  # and on no grid
        (list(range(0, 8192, 256)), [256] * 32),  # one after the other
        ([7], [4096]),
        ([], []),
    ],
)
def test_a_host_mover_gathers_and_scatters(offsets: list[int], sizes: list[int]) -> None:
    memory = np.random.default_rng(1).integers(0, 256, 16384, np.uint8)
    total = sum(sizes)
    staged = np.full(total + 2, SENTINEL, np.uint8)
    mover = HostMover()
    mover.gather(pieces_of(memory, offsets, sizes), staged.ctypes.data + 1).wait()
    wanted = [memory[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    assert np.array_equal(staged[1:-1], np.concatenate([*wanted, memory[:0]]))
    assert staged[0] == staged[-1] == SENTINEL
    there = np.full(16384, SENTINEL, np.uint8)
    mover.scatter(staged.ctypes.data + 1, pieces_of(there, offsets, sizes)).wait()
    expected = np.full(16384, SENTINEL, np.uint8)
    for offset, size in zip(offsets, sizes, strict=True):
        expected[offset : offset + size] = memory[offset : offset + size]
    assert np.array_equal(there, expected)


@pytest.mark.parametrize(("size", "step"), [(4096, 4096), (8192, 12288), (5000, 5001)])
def test_large_pieces_by_rows_and_by_the_kernel(size: int, step: int) -> None:
    memory = np.random.default_rng(2).integers(0, 256, 32 * step, np.uint8)
    pieces = pieces_of(memory, list(range(0, 32 * step - size + 1, step)), [size] * 32)
    staged = [np.zeros(32 * size, np.uint8) for _ in range(2)]
    HostMover().gather(pieces, staged[0].ctypes.data).wait()
    gather(pieces, staged[1])
    wanted = memory.reshape(32, step)[:, :size].ravel()
    assert all(np.array_equal(found, wanted) for found in staged)
    for by_mover in (True, False):
        memory[:] = SENTINEL
        if by_mover:
            HostMover().scatter(staged[0].ctypes.data, pieces).wait()
        else:
            scatter(staged[1], pieces)
        rows = memory.reshape(32, step)
        assert np.array_equal(rows[:, :size].ravel(), wanted)
        assert bool((rows[:, size:] == SENTINEL).all())


@pytest.mark.parametrize("below_nbytes", [GRID_BELOW_NBYTES, NEVER_DIRECT], ids=["tcp", "verbs"])
def test_memory_that_is_gone_is_an_error(below_nbytes: int) -> None:
    """As `tcp` and `verbs` gather and scatter: the kernel says what a processor would not survive."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = 1 << 16
    address = libc.mmap(None, ctypes.c_size_t(size), 3, 0x22, -1, ctypes.c_long(0))
    assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0
    pieces = np.array([[address, 4096], [address + 8192, 4096]], np.uint64)
    for copy in (gather, scatter):
        buffer = np.zeros(8192, np.uint8)
        arguments: Any = (pieces, buffer) if copy is gather else (buffer, pieces)
        with pytest.raises(RegionGone, match="not mapped any more"):
            copy(*arguments, below_nbytes=below_nbytes)


def test_what_goes_through_host_staging() -> None:
    memory = np.zeros(1 << 16, np.uint8)
    tiny = pieces_of(memory, list(range(0, 6400, 128)), [64] * 50)
    assert suits(tiny, 256)
    assert not suits(tiny, 64)
    assert not suits(tiny[:10], 256)  # too few
    assert not suits(pieces_of(memory, list(range(0, 50 * 65, 65)), [64] * 50), 256)  # no grid
    assert not suits(pieces_of(memory, list(range(0, 50 * 99, 99)), [64] * 49 + [63]), 256)
    large = pieces_of(memory, [0], [4096])
    assert not suits(large, 256)
    assert suits(large, NEVER_DIRECT)
    assert not suits(large[:0], NEVER_DIRECT)


def test_a_ring_lends_each_buffer_to_one_user_and_grows() -> None:
    meter = StagingMeter()
    ring = Ring(HostMover(), 2, 100, meter)
    one, other = ring.take(10), ring.take(100)
    assert one is not other
    assert meter.nbytes == one.nbytes + other.nbytes
    returned: list[Buffer] = []
    waiting = threading.Thread(target=lambda: returned.append(ring.take(1 << 20)))
    waiting.start()
    ring.give(one)
    waiting.join()
    assert returned[0].nbytes >= 1 << 20
    ring.give(other)
    ring.give(returned[0])
    assert meter.nbytes == other.nbytes + returned[0].nbytes
    ring.close()
    assert not meter.nbytes


def test_works_are_finished_in_order_and_one_ahead() -> None:
    items: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for item in (1, 2, 3, 4, None):
        items.put(item)
    told: list[str] = []

    def begin(item: int) -> int | None:
        told.append(f"begin {item}")
        return item if item != 3 else None  # nothing to finish

    def finish(work: int) -> None:
        told.append(f"finish {work}")

    work_off(items, begin, finish, lambda _, begun: begun < 2, finish)
    assert told == [
        "begin 1", "begin 2", "finish 1", "begin 3", "begin 4", "finish 2", "finish 4",
    ]  # fmt: skip


def test_a_work_that_is_done_is_finished_before_another_begins() -> None:
    """Else a burst of items is begun before the first of them is announced."""
    items: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for item in (1, 2, 3, 4, None):
        items.put(item)
    told: list[str] = []

    def begin(item: int) -> int:
        told.append(f"begin {item}")
        return item

    work_off(
        items,
        begin,
        lambda work: told.append(f"finish {work}"),
        lambda _, __: True,
        lambda work: None,
        lambda work: work != 2,
    )
    assert told == [
        "begin 1", "finish 1", "begin 2", "begin 3", "begin 4", "finish 2", "finish 3", "finish 4",
    ]  # fmt: skip


def test_a_work_that_was_begun_is_dropped_when_the_loop_fails() -> None:
    items: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for item in (1, 2, 3):
        items.put(item)
    dropped: list[int] = []

    def finish(work: int) -> None:
        raise OSError(work)

    with pytest.raises(OSError, match="1"):
        work_off(items, lambda item: item, finish, lambda _, begun: begun < 2, dropped.append)
    assert dropped == [2]


def test_a_finisher_closes_after_what_was_put() -> None:
    told: list[int] = []
    closed = threading.Event()
    finisher = Finisher("test")
    for number in range(5):
        finisher.put(lambda number=number: told.append(number))  # type: ignore[misc]
    finisher.close(closed.set)
    assert closed.wait(10)
    assert told == [0, 1, 2, 3, 4]
    unused = threading.Event()
    Finisher("unused").close(unused.set)
    assert unused.is_set()


class Flag:
    """What the gate knows of a CUDA event."""

    def __init__(self) -> None:
        self.passed = False
        self.broken = False

    def query(self) -> bool:
        if self.broken:
            raise DeviceError("an illegal access", code=700)
        return self.passed


def test_the_gate_lets_pass_what_is_computed_and_nothing_else() -> None:
    gate = StreamGate("test")
    slow, quick, broken = Flag(), Flag(), Flag()
    told: queue.SimpleQueue[str | EngineError] = queue.SimpleQueue()
    gate.when(slow, lambda: told.put("slow"), told.put)
    gate.when(broken, lambda: told.put("broken"), told.put)
    gate.when(quick, lambda: told.put("quick"), told.put)
    quick.passed = True  # another stream's: it does not wait for the slow one
    assert told.get(timeout=10) == "quick"
    broken.broken = True
    assert isinstance(told.get(timeout=10), DeviceError)
    assert told.empty()
    slow.passed = True
    assert told.get(timeout=10) == "slow"
    never = Flag()
    gate.when(never, lambda: told.put("never"), told.put)
    gate.close()
    assert told.empty()


def test_shared_slots_are_the_same_memory_for_whoever_opens_them() -> None:
    mine = SharedSlots.make(3, 4096)
    theirs = SharedSlots.open(os.getpid(), mine.descriptor, 3, 4096)
    word = np.arange(4, dtype=np.int64)
    HostMover().gather(pieces_of(word.view(np.uint8), [0], [32]), mine.slot(2)).wait()
    copy = np.zeros(4, np.int64)
    HostMover().scatter(theirs.slot(2), pieces_of(copy.view(np.uint8), [0], [32])).wait()
    assert np.array_equal(copy, word)
    with pytest.raises(OSError, match="not permitted"):
        os.truncate(mine.descriptor, 4096)  # sealed: nobody cuts memory away under the other
    theirs.close()
    mine.close()


def test_staging_that_is_none_is_refused(tmp_path: Path) -> None:
    mine = SharedSlots.make(3, 4096)
    pid = os.getpid()
    for slots, nbytes in ((3, 8192), (0, 4096), (3, 1 << 62)):
        with pytest.raises(ProtocolError):
            SharedSlots.open(pid, mine.descriptor, slots, nbytes)
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(3 * 4096)
        with pytest.raises(ProtocolError, match="no memory file"):
            SharedSlots.open(pid, file.fileno(), 3, 4096)
    mine.close()
    with pytest.raises(FileNotFoundError):
        SharedSlots.open(pid, mine.descriptor, 3, 4096)


def test_a_table_of_paths_is_saved_and_found(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "paths.json"
    table = DirectThresholds(
        direct_from_nbytes={"tcp": 512, "verbs": NEVER_DIRECT}, measured_on="here"
    )
    assert table.save(file) == file
    assert load(file) == table
    assert not table.direct("tcp", 511.5)
    assert table.direct("tcp", 512)
    assert not table.direct("verbs", 1 << 40)
    assert table.direct("cuda_ipc", 1)  # missing: its default
    assert load(tmp_path / "absent.json") == DirectThresholds()
    (tmp_path / "broken.json").write_text('{"direct_from_nbytes": {"tcp": -1}}')
    with pytest.raises(PlanError, match=r"broken\.json is no table of paths"):
        load(tmp_path / "broken.json")


@pytest.mark.slow
def test_every_transport_conforms_when_everything_is_staged(tmp_path: Path) -> None:
    """The conformance suite and the faults again, in processes whose table stages every piece."""
    table = tmp_path / "paths.json"
    DirectThresholds(direct_from_nbytes={"cma": NEVER_DIRECT, "tcp": NEVER_DIRECT}).save(table)
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k"),
            # Errors of the calls that staging does not make, and of those it makes otherwise.
            "not errors_of_system_calls",
            *("tests/engine/conformance", "tests/faults/test_lost_peer.py"),
        ],
        cwd=ROOT,
        env=os.environ | {"KVFERRY_PATHS": str(table), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
