"""Measures the transport `verbs` between two processes, and its baselines in the same run."""

from __future__ import annotations

import gc
import re
import statistics
import subprocess
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvferry.engine.errors import EngineError
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.transports.verbs import library as verbs_library
from kvferry.engine.transports.verbs import path as verbs
from kvferry.engine.transports.verbs import queue_pair as verbs_qp
from kvferry.engine.transports.verbs import topology
from kvferry.engine.transports.verbs.device import Nics
from kvferry.engine.transports.verbs.rail import Meeting
from kvferry.tools.bench.peers import Peer, PeerEnded
from kvferry.tools.rdma_vm.missing import which

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
TOTAL_NBYTES = 32 * MIB
PERFTEST = "ib_write_bw"
PATIENCE_S = 120.0
LOOP_STEPS = 200_000
WIRE_GBPS = 400


class BenchError(Exception):
    """The benchmark cannot run, or bytes arrived wrong."""


class Report(NamedTuple):
    """Medians of one run, in MB/s (10^6) unless the name says otherwise.

    Attributes:
        perftest_1m, perftest_64k: `ib_write_bw` with messages of that size.
        staged_4k: 32 MiB of scattered 4 KiB blocks, through frames.
        direct_64k: 32 MiB of scattered 64 KiB pieces, one work request each.
        single_4k: the same 4 KiB blocks, each posted by a call of its own.
        crossover: by piece size, direct and staged.
        post_us: Python's work for one work request in a batch, without the doorbell.
        chain_us: the same with an object for each work request.
        loop_ns: one step of an empty Python loop here: what compares this processor with another.
    """

    perftest_1m: float
    perftest_64k: float
    staged_4k: float
    direct_64k: float
    single_4k: float
    crossover: dict[int, tuple[float, float]]
    post_us: float
    chain_us: float
    loop_ns: float


def measure(near: str, far: str, rounds: int) -> Report:
    """Run everything.

    Raises:
        BenchError: a device or perftest is missing, or bytes arrived wrong.
    """
    active = {nic.name for nic in topology.nics() if nic.active}
    for name in (near, far):
        if name not in active:
            raise BenchError(
                f"there is no active RDMA device {name}: kvferry rdma-vm run -- kvferry bench verbs"
            )
    if which(PERFTEST) is None:
        raise BenchError(f"there is no {PERFTEST}: apt install perftest")
    single, post_us, chain_us = _posting(near, far)
    peer = Peer(_Receiver, far)
    try:
        with TransferEngine(name="sender", nics=(near,), transports=("verbs",)) as engine:
            sender = _Sender(engine, peer)
            # In turns, so that a disturbance hits all of them.
            figures: dict[str, list[float]] = {}
            for _ in range(rounds):
                for name, value in (
                    ("perftest_1m", _perftest(near, far, MIB, 64)),
                    ("staged_4k", sender.run(4096)),
                    ("perftest_64k", _perftest(near, far, 65536, 512)),
                    ("direct_64k", sender.run(65536)),
                ):
                    figures.setdefault(name, []).append(value)
            crossover = {
                size: (sender.run(size, staged_below=0), sender.run(size, staged_below=MIB))
                for size in (4096, 8192, 16384, 32768, 65536)
            }
            sender.link.close()
    except (EngineError, PeerEnded) as error:
        raise BenchError(str(error)) from error
    finally:
        peer.kill()
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return Report(
        **medians,
        single_4k=single,
        crossover=crossover,
        post_us=post_us,
        chain_us=chain_us,
        loop_ns=_loop_ns(),
    )


def lines(report: Report) -> list[str]:
    """Return the report for people."""
    r = report
    return [
        f"ib_write_bw, 1 MiB messages                  {r.perftest_1m:8.1f} MB/s",
        f"staged, 4 KiB blocks scattered, 32 MiB       {r.staged_4k:8.1f} MB/s  "
        f"{r.staged_4k / r.perftest_1m:5.2f} of ib_write_bw, {r.staged_4k / r.single_4k:.1f} x single",
        f"one posted write a block, 4 KiB              {r.single_4k:8.1f} MB/s",
        f"ib_write_bw, 64 KiB messages                 {r.perftest_64k:8.1f} MB/s",
        f"direct, 64 KiB pieces scattered, 32 MiB      {r.direct_64k:8.1f} MB/s  "
        f"{r.direct_64k / r.perftest_64k:5.2f} of ib_write_bw",
        *(
            f"pieces of {size >> 10:3d} KiB: direct {direct:8.1f}, staged {staged:8.1f} MB/s"
            for size, (direct, staged) in r.crossover.items()
        ),
        f"Python's work a work request: {r.post_us:.2f} us in a batch, {r.chain_us:.2f} us as an "
        f"object; an empty loop step {r.loop_ns:.0f} ns",
        f"from {piece_nbytes(r.post_us) / 1024:.1f} KiB a piece one such core would fill "
        f"{WIRE_GBPS} Gb/s",
    ]


def piece_nbytes(post_us: float) -> float:
    """Return the piece from which one core that needs so long a work request fills `WIRE_GBPS`."""
    return WIRE_GBPS * 1e9 / 8 * post_us * 1e-6


class _Sender:
    """Writes the pool here over the pool there, in pieces whose order is scattered on both sides."""

    def __init__(self, engine: TransferEngine, peer: Peer) -> None:
        self._peer = peer
        address, self._there = peer.call("where")
        self.link = engine.connect(address, transport="verbs", timeout_s=PATIENCE_S)
        content = np.random.default_rng(1).integers(0, 256, TOTAL_NBYTES, np.uint8)
        self._content = content
        self._here = engine.register(content)
        self._round = 0
        self.run(4096)  # warm: registration, and what Python does at first
        self.run(65536)

    def run(self, piece: int, *, staged_below: int = verbs.STAGED_BELOW_NBYTES) -> float:
        """MB/s of one write of everything, until every byte is counted there."""
        self._round += 1
        random = np.random.default_rng(self._round)
        count = TOTAL_NBYTES // piece
        here, there = (random.permutation(count) * piece for _ in range(2))
        self._peer.call("expect", self._round)
        before, verbs.STAGED_BELOW_NBYTES = verbs.STAGED_BELOW_NBYTES, staged_below
        gc.collect()
        started_s = time.perf_counter()
        ticket = self.link.write(
            self._here, here, self._there, there, piece, imm=self._round, timeout_s=PATIENCE_S
        )
        ticket.wait()
        took_s = time.perf_counter() - started_s
        verbs.STAGED_BELOW_NBYTES = before
        if self._peer.call("check", there, here, piece) is not True:
            raise BenchError(f"bytes arrived wrong in pieces of {piece}")
        return TOTAL_NBYTES / took_s / 1e6


class _Receiver:
    """The receiving process."""

    def __init__(self, nic: str) -> None:
        self._pool = np.zeros(TOTAL_NBYTES, np.uint8)
        self._content = np.random.default_rng(1).integers(0, 256, TOTAL_NBYTES, np.uint8)
        self._engine = TransferEngine(name="receiver", nics=(nic,), transports=("verbs",))
        self._region = self._engine.register(self._pool)

    def where(self) -> Any:
        return self._engine.address, self._region.descriptor

    def expect(self, imm: int) -> None:
        self._ticket = self._engine.expect(imm, nbytes=TOTAL_NBYTES, timeout_s=PATIENCE_S)

    def check(self, there: Any, here: Any, piece: int) -> bool:
        """Wait for the write; whether its pieces are what was sent. Then clear the pool."""
        self._ticket.wait()
        rows, source = self._pool.reshape(-1, piece), self._content.reshape(-1, piece)
        right = bool((rows[there // piece] == source[here // piece]).all())
        self._pool[:] = 0
        return right

    def close(self) -> None:
        self._engine.close()


def _perftest(near: str, far: str, size: int, count: int) -> float:
    """MB/s of perftest's one-sided writes between the two devices."""
    program = which(PERFTEST) or PERFTEST
    options = ["-x", str(_gid_index(near)), "-s", str(size), "-n", str(count), "-F"]
    server: subprocess.Popen[bytes] | None = None
    deadline_s = time.monotonic() + PATIENCE_S
    said = ""
    try:
        while time.monotonic() < deadline_s:
            if server is None or server.poll() is not None:
                server = subprocess.Popen(
                    [program, "-d", far, *options],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            client = subprocess.run(
                [program, "-d", near, *options, "127.0.0.1"],
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
            said = client.stdout + client.stderr
            found = re.search(rf"^\s*{size}\s+\d+\s+[\d.]+\s+([\d.]+)", client.stdout, re.M)
            # It says 0 where it could not measure the processor's clock, which it counts time by.
            if found and float(found[1]):
                return float(found[1]) * MIB / 1e6  # perftest's MB is 2^20 bytes
            time.sleep(0.1)  # the server does not listen yet
    except subprocess.TimeoutExpired:
        said = f"no end after {PATIENCE_S:.0f} s"
    finally:
        if server is not None:
            server.kill()
            server.wait()
    raise BenchError(f"{PERFTEST} gave no figure: {said}")


def _gid_index(name: str) -> int:
    nic = next(nic for nic in topology.nics() if nic.name == name)
    return next(gid.number for gid in topology.gids(nic) if gid.family == "ipv4")


def _posting(near: str, far: str) -> tuple[float, float, float]:
    """Return one posted write a block in MB/s, and the work for a request in a batch and as an
    object, us."""
    ends = Meeting(Nics((near,)), dialed=True), Meeting(Nics((far,)), dialed=False)
    ends[0].take(ends[1].answer(ends[0].offer(1)))
    rail, other = ends[0].rails[0], ends[1].rails[0]
    pair = rail.direct[0]
    pools = [np.zeros(8 * MIB, np.uint8) for _ in range(2)]
    pins = [
        end.device.pin(pool.ctypes.data, len(pool))
        for end, pool in zip((rail, other), pools, strict=True)
    ]
    blocks = np.random.default_rng(3).permutation(len(pools[0]) // 4096) * 4096
    rows = [
        [pools[1].ctypes.data + at, pins[1].rkey, pools[0].ctypes.data + at, 4096, pins[0].lkey]
        for at in blocks.tolist()
    ]

    def flush(room: int) -> None:
        while pair.room < room:
            for completion in rail.poll():
                if completion.status:
                    raise BenchError(f"a write ended with status {completion.status}")
                pair.landed(completion.wr_id)

    def one_by_one(rows: list[list[int]]) -> None:
        for row in rows:
            flush(1)
            batch = pair.launch(1, 4096, None)
            verbs_qp.post(pair, verbs_qp.WRITE, [row], None, batch.number)
        flush(verbs_qp.SEND_DEPTH)

    one_by_one(rows[:64])
    started_s = time.perf_counter()
    one_by_one(rows)
    single = len(pools[0]) / (time.perf_counter() - started_s) / 1e6
    post_us = _best_us(lambda: _fill(pair, rows[:128]), 128)
    chain_us = _best_us(lambda: _chain(rows[:128]), 128)
    for pin in pins:
        pin.close()
    for end in ends:
        end.close()
        for device in end.devices:
            device.close()
    return single, post_us, chain_us


def _fill(pair: verbs_qp.QueuePair, rows: list[Any]) -> None:
    """Fill the queue as `verbs_qp.post` does, then forget it instead of ringing the doorbell."""
    queue, entry, enums = pair.pair, pair.entries[0], verbs_library.load().enums
    queue.wr_start()
    queue.wr_id = 1
    queue.wr_flags = enums.IBV_SEND_SIGNALED
    for address, key, local, nbytes, local_key in rows:
        queue.wr_rdma_write_imm(key, address, 7)
        entry.addr, entry.length, entry.lkey = local, nbytes, local_key
        queue.wr_set_sge(entry)
    queue.wr_abort()


def _chain(rows: list[list[int]]) -> None:
    """The same as a chain of objects, not posted."""
    library = verbs_library.load()
    following = None
    chain = []
    for address, key, local, nbytes, local_key in rows:
        entry = library.wr.SGE(local, nbytes, local_key)
        following = library.wr.SendWR(
            opcode=library.enums.IBV_WR_RDMA_WRITE_WITH_IMM,
            num_sge=1,
            sg=[entry],
            imm_data=7,
            send_flags=0,
            next_wr=following,
        )
        following.set_wr_rdma(key, address)
        chain += [entry, following]
    for thing in chain:
        thing.close()


def _best_us(work: Callable[[], None], count: int, rounds: int = 30) -> float:
    """Microseconds of one of the `count` steps of `work`, at best."""
    best_s = float("inf")
    for _ in range(rounds):
        started_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - started_s)
    return best_s / count * 1e6


def _loop_ns() -> float:
    def loop() -> None:
        for _ in range(LOOP_STEPS):
            pass

    return _best_us(loop, LOOP_STEPS, 5) * 1e3
