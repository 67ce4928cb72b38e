"""`kvferry bench transfer`: its request, its processes, what it does with liars and failures."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from io import StringIO
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvferry.tools.bench import idle_memory, machine
from kvferry.tools.bench.idle_memory import IdleMemory
from kvferry.tools.bench.transfer import measure as transfer_measure
from kvferry.tools.bench.transfer.driver import READ, WRITE
from kvferry.tools.bench.transfer.pairs import Burst, Pair, WorkerFailed
from kvferry.tools.bench.transfer.report import (
    SCHEMA,
    Report,
    Result,
    Settings,
    decode,
    encode,
    judge,
)
from kvferry.tools.bench.transfer.roster import (
    MEMCPY,
    Contender,
    Shapes,
    installed_peers,
    roster,
)
from kvferry.tools.bench.transfer.tables import draw, name_of, show
from kvferry.tools.bench.transfer.workload import (
    CONTIGUOUS,
    LARGE_BLOCKS,
    NUM_REQUESTS,
    SMALL_BLOCKS,
    SMALL_HANDOFF,
    Pool,
    Shape,
    block_ids,
    piece_numbers,
)
from kvferry.tools.cli import app

if TYPE_CHECKING:
    from pathlib import Path

TINY = Shapes(
    Shape("tiny large", 2, 3, 9, 4, 512),
    Shape("tiny small", 2, 3, 20, 7, 64),
    Shape("tiny piece", 1, 1, 2, 1, 100_000),
    Shape("tiny handoff", 2, 3, 20, 1, 64),
)
MISSING = () if "nixl" in installed_peers(sys.executable) else ("nixl",)
SOCKET_DRIVER = "kvferry.tools.bench.transfer.drivers.plain_socket:SocketDriver"


# The request.


def test_three_shapes_have_the_same_bytes_and_fill_the_same_pool() -> None:
    shapes = (LARGE_BLOCKS, SMALL_BLOCKS, CONTIGUOUS)
    assert {shape.nbytes for shape in shapes} == {128 << 20}
    assert {shape.pool_nbytes for shape in shapes} == {256 << 20}
    assert [shape.num_pieces for shape in shapes] == [4096, 32768, 1]
    assert SMALL_HANDOFF.nbytes == 2 << 20
    assert SMALL_HANDOFF.pool_nbytes == SMALL_BLOCKS.pool_nbytes


def test_requests_differ_and_scatter_on_both_sides() -> None:
    seen = set()
    for request in range(NUM_REQUESTS):
        src, dst = block_ids(LARGE_BLOCKS, request)
        assert len(set(src.tolist())) == len(set(dst.tolist())) == LARGE_BLOCKS.num_blocks
        assert src.max() < LARGE_BLOCKS.pool_blocks
        assert src.tolist() != dst.tolist()
        seen.add((*src.tolist(), *dst.tolist()))
    assert len(seen) == NUM_REQUESTS
    again = block_ids(LARGE_BLOCKS, NUM_REQUESTS)
    assert all(map(np.array_equal, again, block_ids(LARGE_BLOCKS, 0)))


def test_pieces_are_the_same_ids_in_every_plane_and_layer() -> None:
    shape = TINY.large_blocks
    numbers = piece_numbers(shape, np.array([8, 0, 3, 1]))
    rows = numbers.reshape(shape.num_rows, shape.num_blocks)
    assert (rows - np.arange(shape.num_rows)[:, None] * shape.pool_blocks == [8, 0, 3, 1]).all()


def copy_request(shape: Shape, request: int, src: Pool, dst: Pool) -> None:
    here, there = (piece_numbers(shape, ids) for ids in block_ids(shape, request))
    dst.blocks(shape)[there] = src.blocks(shape)[here]


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_a_pool_tells_a_request_from_any_other(shape: Shape) -> None:
    src, dst = Pool(shape.pool_nbytes), Pool(shape.pool_nbytes)
    src.fill()
    dst.clear()
    assert not dst.holds(shape, 0)
    copy_request(shape, 0, src, dst)
    assert dst.holds(shape, 0)
    other = next(r for r in range(1, NUM_REQUESTS) if _differs(shape, r))
    assert not dst.holds(shape, other)
    dst.poison(shape, 0)
    assert not dst.holds(shape, 0)


def _differs(shape: Shape, request: int) -> bool:
    return not all(map(np.array_equal, block_ids(shape, request), block_ids(shape, 0)))


@pytest.mark.parametrize("where", ["first", "last"])
def test_one_wrong_byte_at_either_end_of_a_large_piece_is_seen(where: str) -> None:
    shape = TINY.one_piece
    src, dst = Pool(shape.pool_nbytes), Pool(shape.pool_nbytes)
    src.fill()
    copy_request(shape, 3, src, dst)
    piece = dst.blocks(shape)[block_ids(shape, 3)[1][0]]
    piece[0 if where == "first" else -1] ^= 1
    assert not dst.holds(shape, 3)


# Two processes.


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        (SOCKET_DRIVER, {}),
        ("kvferry.tools.bench.transfer.drivers.process_vm:VmDriver", {"threads": 2}),
        (
            "kvferry.tools.bench.transfer.drivers.kvferry:KvferryDriver",
            {"transport": "tcp", "rails": 2},
        ),
    ],
    ids=["socket", "process_vm", "kvferry"],
)
def test_a_pair_moves_every_shape(driver: str, options: dict[str, object]) -> None:
    with Pair(driver, options) as pair:
        pair.start_opening(TINY)
        pair.finish_opening()
        for shape in TINY:
            burst = pair.burst(shape, WRITE, slot_s=60.0, count=NUM_REQUESTS + 1)
            assert burst.verified
            assert len(burst.latencies_ns) == NUM_REQUESTS + 1
            assert min(burst.latencies_ns) > 0
            assert burst.cpu_s > 0


def lying_pair(source: str) -> Pair:
    """A pair whose driver is `Liar` of this source code."""
    pair = Pair("liar:Liar", {})
    (pair.import_root / "liar.py").write_text(
        "from kvferry.tools.bench.transfer.drivers.plain_socket import SocketDriver\n"
        + textwrap.dedent(source)
    )
    pair.start_opening(TINY)
    pair.finish_opening()
    return pair


def test_a_library_that_moves_nothing_is_not_verified() -> None:
    source = """
        class Liar(SocketDriver):
            def transfer(self, shape, request, operation, token): pass
            def arrived(self, shape, request): pass
        """
    with lying_pair(source) as pair:
        burst = pair.burst(TINY.large_blocks, WRITE, slot_s=0.0)
    assert not burst.verified
    assert len(burst.latencies_ns) == 1


def test_a_library_that_moves_only_the_first_request_is_not_verified() -> None:
    source = """
        class Liar(SocketDriver):
            def transfer(self, shape, request, operation, token):
                if request == 0:
                    super().transfer(shape, request, operation, token)
            def arrived(self, shape, request):
                if request == 0:
                    super().arrived(shape, request)
        """
    with lying_pair(source) as pair:
        assert not pair.burst(TINY.large_blocks, WRITE, slot_s=0.0).verified


def test_a_refused_transfer_leaves_the_pair_usable() -> None:
    source = """
        class Liar(SocketDriver):
            notifies = False
            def transfer(self, shape, request, operation, token):
                if shape.name == "tiny small":
                    raise ValueError("too many pieces")
        """
    with lying_pair(source) as pair:
        with pytest.raises(WorkerFailed, match="ValueError: too many pieces") as caught:
            pair.burst(TINY.small_blocks, WRITE, slot_s=0.0)
        assert caught.value.usable
        assert pair.burst(TINY.large_blocks, WRITE, slot_s=0.0, count=1).latencies_ns


def test_a_receiver_that_fails_ends_the_pair() -> None:
    source = """
        class Liar(SocketDriver):
            def arrived(self, shape, request):
                self._socket.close()
                raise OSError("lost my socket")
        """
    with lying_pair(source) as pair:
        with pytest.raises(WorkerFailed, match="lost my socket") as caught:
            pair.burst(TINY.large_blocks, WRITE, slot_s=0.0)
        assert not caught.value.usable


def test_a_process_that_dies_is_reported_and_leaves_nothing_behind() -> None:
    pair = Pair(SOCKET_DRIVER, {})
    pids = pair.pids
    pair.start_opening(TINY)
    pair.finish_opening()
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerFailed, match="ended with status -9") as caught:
        pair.burst(TINY.large_blocks, WRITE, slot_s=0.0)
    assert not caught.value.usable
    pair.close()
    pair.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not pair.import_root.exists()


def test_frozen_processes_go_on_after_a_thaw() -> None:
    with Pair(SOCKET_DRIVER, {}) as pair:
        pair.start_opening(TINY)
        pair.finish_opening()
        pair.freeze()
        pair.thaw()
        assert pair.burst(TINY.large_blocks, WRITE, slot_s=0.0).verified
        pair.freeze()  # and closing a frozen pair ends it


def test_frozen_processes_end_with_a_parent_that_is_killed() -> None:
    code = """
        import os, signal
        from kvferry.tools.bench.transfer.pairs import Pair
        from kvferry.tools.bench.transfer.workload import Shape
        pair = Pair("kvferry.tools.bench.transfer.drivers.plain_socket:SocketDriver", {})
        pair.start_opening([Shape("tiny", 1, 1, 2, 1, 64)])
        pair.finish_opening()
        pair.freeze()
        pair._folder.cleanup()
        print(*pair.pids, flush=True)
        signal.pause()
        """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    fds = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(fds) == 2
    parent.kill()
    parent.communicate()
    for fd in fds:
        assert select.select([fd], [], [], 30.0)[0], "a frozen worker outlived its parent"
        os.close(fd)


# A whole run.


@pytest.fixture(scope="module")
def report() -> Report:
    """A run with tiny shapes; NIXL is asked for where it is not there."""
    memory = (IdleMemory("TransferEngine", 1, 2, 3), IdleMemory("Agent", 0, 0, 0, "not there"))
    settings = Settings(seconds=0.2, rounds=2, rails=(1,), peers=MISSING)
    told: list[float] = []
    options = transfer_measure.Options(settings, sys.executable, TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle_memory, "start", lambda: lambda: memory)
        patch.setattr(transfer_measure, "REST_S", 0.01)
        made = transfer_measure.measure(options, lambda text, done: told.append(done))
    assert told == sorted(told)
    return made


def test_every_row_is_measured_and_verified(report: Report) -> None:
    rows = {(r.engine, r.operation) for r in report.results if r.shape == "tiny large"}
    expected = {
        (contender.key, operation)
        for contender in roster((1,), (), "")
        for operation in contender.operations
    }
    assert rows == expected
    assert {(MEMCPY, "libc"), ("socket", WRITE), ("cma", READ), ("tcp-1", WRITE)} < rows
    assert report.shapes == tuple(shape.name for shape in TINY)
    assert report.wrong == ()
    for result in report.results:
        assert result.samples >= 1
        assert 0 < result.min_ms <= result.p50_ms <= result.p99_ms
        assert result.ratio_to_memcpy > 0


def test_the_fastest_memcpy_is_the_measure(report: Report) -> None:
    for shape in report.shapes:
        ratios = [
            r.ratio_to_memcpy for r in report.results if (r.shape, r.engine) == (shape, MEMCPY)
        ]
        assert len(ratios) == 3
        assert max(ratios) == 1.0


@pytest.mark.skipif(not MISSING, reason="NIXL is installed here")
def test_a_missing_peer_is_left_out_with_its_reason(report: Report) -> None:
    assert {left.engine for left in report.left_out} == {"nixl", "nixl-tcp"}
    assert all("No module named 'nixl'" in left.reason for left in report.left_out)
    assert all(left.shape == "" for left in report.left_out)
    assert next(t for t in report.targets if "NIXL over CMA" in t.name).met is None


def test_json_reads_back_and_is_checked(report: Report) -> None:
    data = encode(report)
    assert decode(data) == report
    plain = json.loads(data)
    assert plain["schema"] == SCHEMA
    assert set(plain) == {
        "schema",
        "machine",
        "settings",
        "results",
        "left_out",
        "idle_cpu",
        "idle_memory",
        "targets",
        "wall_s",
    }
    assert msgspec.json.schema(Report)["$defs"]["Result"]["required"] == list(plain["results"][0])
    plain["results"][0]["surprise"] = 1
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        decode(json.dumps(plain).encode())


@pytest.mark.parametrize("usable", [True, False])
def test_a_failure_leaves_out_one_shape_or_everything(
    monkeypatch: pytest.MonkeyPatch, usable: bool
) -> None:
    real = Pair.burst

    def burst(self: Pair, shape: Shape, operation: str, *, slot_s: float) -> Burst:
        if self.driver == SOCKET_DRIVER and shape is TINY.large_blocks:
            raise WorkerFailed("no such luck", usable=usable)
        return real(self, shape, operation, slot_s=slot_s)

    def two(*arguments: object) -> list[Contender]:
        return [each for each in roster((1,), (), "") if each.key in (MEMCPY, "socket")]

    monkeypatch.setattr(Pair, "burst", burst)
    monkeypatch.setattr(transfer_measure, "roster", two)
    monkeypatch.setattr(transfer_measure, "REST_S", 0.01)
    monkeypatch.setattr(idle_memory, "start", lambda: tuple)
    options = transfer_measure.Options(Settings(0.01, 2, (1,), ()), sys.executable, TINY)
    made = transfer_measure.measure(options, lambda text, done: None)
    assert [(left.engine, left.shape) for left in made.left_out] == [("socket", "tiny large")]
    assert made.find("tiny large", MEMCPY, "libc") is not None
    assert made.find("tiny large", "socket", WRITE) is None
    assert (made.find("tiny small", "socket", WRITE) is not None) is usable


def test_tables_fit_80_columns_and_show_every_row(report: Report) -> None:
    large = [
        msgspec.structs.replace(
            result, p50_ms=1234.56, p99_ms=2345.67, samples=12345, cpu_s_per_gib=18.17
        )
        for result in report.results
    ]
    output = StringIO()
    show(Console(file=output, width=80), msgspec.structs.replace(report, results=tuple(large)))
    text = output.getvalue()
    assert "…" not in text
    assert text.count("1234.56") == text.count("12345 ") == len(large)
    assert all(name_of(result) in text for result in report.results)
    assert all(target.name in text for target in report.targets)
    assert text.count("left out: nixl") == 2 * len(MISSING)
    assert "idle Agent: not measured: not there" in text


def test_a_plot_is_a_png(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    draw(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG\r\n")


# Targets.


def changed(report: Report, **p50_ms: float) -> Report:
    """The report with other latencies of writes (and of memcpy's `libc`) in the large shape."""

    def change(result: Result) -> Result:
        engine = result.engine.replace("-", "_")
        if result.shape == "tiny large" and engine in p50_ms:
            return msgspec.structs.replace(result, p50_ms=p50_ms[engine])
        return result

    return msgspec.structs.replace(report, results=tuple(map(change, report.results)))


@pytest.mark.parametrize(("cma_ms", "met"), [(10.0, True), (12.5, True), (12.6, False)])
def test_targets_compare_medians(report: Report, cma_ms: float, met: bool) -> None:
    judged = judge(changed(report, memcpy=10.0, cma=cma_ms), TINY)
    target = next(t for t in judged.targets if t.name == "cma / scattered memcpy")
    assert target.met is met
    assert target.value == pytest.approx(10.0 / cma_ms, abs=1e-3)


def test_the_agents_memory_is_judged_with_its_imports(report: Report) -> None:
    mib = 1 << 20
    agent = IdleMemory("Agent", 200 * mib, 28 * mib, 3 * mib)
    judged = judge(msgspec.structs.replace(report, idle_memory=(agent,)), TINY)
    assert judged.targets[-1].value == 31.0
    assert judged.targets[-1].met is False


# The roster and the command.


def test_keys_are_unique_and_peers_are_picked() -> None:
    everybody = roster((1, 2, 4), ("nixl", "mooncake"), "python")
    keys = [contender.key for contender in everybody]
    assert len(set(keys)) == len(keys)
    assert {c.key for c in everybody if c.peer} == {"nixl", "nixl-tcp", "mooncake-tcp"}
    assert not any(c.peer for c in roster((1,), (), "python"))


def test_too_little_memory_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_nbytes", lambda field: 1 << 30)
    options = transfer_measure.Options(Settings(1.0, 1, (1,), ()), sys.executable)
    with pytest.raises(transfer_measure.BenchError, match=r"1\.0 GiB are free"):
        transfer_measure.measure(options, lambda text, done: None)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rails", "0"], "1 to 64"),
        (["--rails", "two"], "1 to 64"),
        (["--compare", "pigeon"], "pigeon"),
        (["--peer-python", "/no/such/python"], "No such file"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], complaint: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "transfer", *arguments])
    assert result.exit_code == 2
    assert complaint in result.output


@pytest.mark.parametrize("verified", [True, False])
def test_exits_1_if_bytes_arrived_wrong(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verified: bool
) -> None:
    first = msgspec.structs.replace(report.results[0], verified=verified)
    made = msgspec.structs.replace(report, results=(first, *report.results[1:]))
    monkeypatch.setattr(transfer_measure, "measure", lambda options, progress: made)
    path = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", "transfer", "--quick", "--json", str(path)])
    assert result.exit_code == (0 if verified else 1)
    assert ("bytes arrived wrong" in result.output) is not verified
    assert decode(path.read_bytes()) == made


@pytest.mark.slow
def test_idle_memory_is_measured_beside_torch() -> None:
    by_name = {memory.name: memory for memory in idle_memory.start()()}
    engine = by_name["TransferEngine"]
    assert engine.reason == ""
    assert engine.torch_nbytes > engine.imports_nbytes + engine.object_nbytes >= 0
    assert set(by_name) == {"TransferEngine", "Agent"}
