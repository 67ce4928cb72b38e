"""The demo: its fragmented pool, what it concludes, and whole runs with two processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from rich.console import Console

from kvferry.control.errors import HelloRefused, LayoutMismatch
from kvferry.engine.errors import DeviceError, TransportUnavailable
from kvferry.engine.memory import cuda_driver as cuda
from kvferry.tools.demo import command as demo_command
from kvferry.tools.demo import report as demo_report
from kvferry.tools.demo import run as demo_run
from kvferry.tools.demo import workers as demo_workers
from kvferry.tools.demo.events import (
    Addresses,
    Finished,
    Generated,
    Options,
    Prefilled,
    Ready,
    Received,
    Skipped,
    Started,
    Step,
)
from kvferry.tools.demo.pool import TOKENS_PER_BLOCK, FragmentedPool, PoolExhausted
from kvferry.tools.demo.report import DemoProgress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvferry.tools.demo.events import Event

TRANSPORTS = ("cma", "tcp")
COMMAND = (sys.executable, "-m", "kvferry.tools.cli", "demo")


class SmallConfig:
    """What the pool reads of a model's config."""

    num_hidden_layers = 2
    num_key_value_heads = 2
    head_dim = 4


def make_pool(num_blocks: int = 60) -> FragmentedPool:
    return FragmentedPool(SmallConfig(), num_blocks, seed=3)


class TestFragmentedPool:
    def test_no_two_blocks_of_a_request_are_neighbours(self) -> None:
        pool = make_pool()
        for num_tokens in (1, 16, 17, 100, 150):
            ids = pool.allocate(num_tokens)
            assert len(ids) == -(-num_tokens // TOKENS_PER_BLOCK)
            assert (np.diff(np.sort(ids)) > 1).all()

    def test_blocks_are_out_of_order(self) -> None:
        ids = make_pool().allocate(300).tolist()
        assert ids != sorted(ids)

    def test_every_block_comes_back(self) -> None:
        pool = make_pool()
        held = [pool.allocate(100) for _ in range(3)]
        assert pool.num_free == 60 - 3 * 7
        assert len({int(block) for ids in held for block in ids}) == 3 * 7
        for ids in held:
            pool.free(ids)
        assert pool.num_free == 60

    def test_a_block_is_freed_once(self) -> None:
        pool = make_pool()
        ids = pool.allocate(20)
        pool.free(ids)
        with pytest.raises(ValueError, match="free already"):
            pool.free(ids)

    def test_blocks_that_are_not_there(self) -> None:
        pool = make_pool()
        with pytest.raises(PoolExhausted, match="60 of 60 blocks are free"):
            pool.allocate(31 * TOKENS_PER_BLOCK)
        assert pool.num_free == 60

    def test_free_blocks_are_poison(self) -> None:
        pool = make_pool()
        assert all(layer.isnan().all() for layer in pool.tensors)
        ids = pool.allocate(20)
        for layer in pool.tensors:
            layer[:, torch.from_numpy(ids)] = 1.0
        assert pool.stray_blocks() == 0
        pool.free(ids)
        assert all(layer.isnan().all() for layer in pool.tensors)

    def test_a_stray_write_is_seen(self) -> None:
        pool = make_pool()
        ids = pool.allocate(20)
        stranger = next(block for block in range(60) if block not in ids)
        pool.tensors[1][1, stranger, 15, 1, 3] = 0.0
        assert pool.stray_blocks() == 1

    def test_damage_stays_in_one_block_of_one_layer(self) -> None:
        pool = make_pool()
        before = [layer.view(torch.int16).clone() for layer in pool.tensors]
        pool.flip_bits(7, layer=1)
        assert torch.equal(pool.tensors[0].view(torch.int16), before[0])
        changed = pool.tensors[1].view(torch.int16) != before[1]
        assert changed[:, 7].all()
        assert not changed[:, :7].any()
        assert not changed[:, 8:].any()

    def test_its_layout_is_its_tensors(self) -> None:
        pool = make_pool()
        assert pool.layout.num_layers == 2
        assert pool.layout.regions[0].num_slots == 60
        assert pool.layout.regions[0].tokens_per_slot == TOKENS_PER_BLOCK


def events_of_a_good_run(options: Options) -> Iterator[Event]:
    for role, pid in (("prefill", 1), ("decode", 2)):
        yield Started(role, pid)
        yield Ready(role)
    answers = {prompt: [prompt, 7, 8] for prompt in range(options.num_prompts)}
    for prompt in answers:
        yield Prefilled(prompt, 100, 0.5)
    for number, name in enumerate(options.transports, 1):
        for prompt in answers:
            yield Received(name, prompt, 1_000_000, (prompt + 1) * number / 1000)
    for path in ("reference", *options.transports):
        for _ in range(options.num_tokens):
            yield Step(path, options.num_prompts)
        yield Generated(path, {prompt: list(tokens) for prompt, tokens in answers.items()})
    yield Finished("prefill", 100, 100, 0)
    yield Finished("decode", 50, 50, 0)


def collect(options: Options, *, skip: type | None = None) -> demo_report.Collector:
    collector = demo_report.Collector(options)
    for event in events_of_a_good_run(options):
        if skip is None or not isinstance(event, skip):
            collector.add(event)
    return collector


class TestReport:
    options = Options(transports=TRANSPORTS, num_prompts=4, num_tokens=3)

    def test_a_good_run(self) -> None:
        collector = collect(self.options)
        cma, tcp = collector.results()
        assert (cma.transport, tcp.transport) == TRANSPORTS
        assert (cma.requests, cma.tokens_compared, cma.mismatches) == (4, 12, 0)
        assert cma.nbytes == 4_000_000
        assert cma.gb_per_s == pytest.approx(0.4)  # 4 MB in 1 + 2 + 3 + 4 ms
        assert (cma.p50_ms, cma.p99_ms) == (2.0, 4.0)
        assert tcp.share_of_prefill == pytest.approx(0.01)  # 20 ms of 2 s
        assert collector.problems() == []
        assert json.loads(json.dumps(collector.to_json(1.0)))["problems"] == []

    def test_the_table_fits_a_narrow_terminal(self) -> None:
        console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.closing(console.file):
            console.print(collect(Options(transports=TRANSPORTS)).table())
        text = console.export_text()
        assert "…" not in text
        for word in (
            *TRANSPORTS,
            "transport",
            "compared",
            "GB/s",
            "p99",
            "prefill",
            "128.00",
            "6.5%",
        ):
            assert word in text

    def test_a_wrong_token_is_a_problem(self) -> None:
        collector = collect(self.options)
        collector.tokens["tcp"][2][1] += 1
        assert [result.mismatches for result in collector.results()] == [0, 1]
        assert collector.problems() == ["1 of 12 tokens over tcp differ from the reference"]

    def test_a_missing_answer_is_a_problem(self) -> None:
        collector = collect(self.options)
        del collector.tokens["cma"][3]
        assert "3 of 12 tokens over cma" in collector.problems()[0]

    def test_a_missing_handoff_is_a_problem(self) -> None:
        collector = collect(self.options)
        collector.received["tcp"].pop()
        assert collector.problems() == ["3 of 4 requests arrived over tcp"]

    def test_no_transport_is_a_problem(self) -> None:
        assert collect(self.options, skip=Received).problems() == ["no transport ran"]

    def test_a_leak_and_a_stray_write_are_problems(self) -> None:
        collector = collect(self.options)
        collector.add(Finished("decode", 50, 48, 3))
        assert collector.problems() == [
            "decode leaked 2 of 50 blocks",
            "3 free blocks of decode were written to",
        ]

    def test_damage_that_goes_unnoticed_is_a_problem(self) -> None:
        collector = collect(Options(transports=("cma",), num_prompts=4, num_tokens=3, corrupt=True))
        assert collector.problems() == ["the damage done on purpose went unnoticed over cma"]

    def test_a_transport_left_out_is_reported(self) -> None:
        collector = collect(Options(transports=("tcp",), num_prompts=4, num_tokens=3))
        collector.add(Skipped("cma", "ptrace is refused"))
        assert collector.problems() == []
        assert collector.to_json(1.0)["skipped"] == {"cma": "ptrace is refused"}

    @pytest.mark.parametrize(
        ("percent", "value"), [(50, 50.0), (99, 99.0), (100, 100.0), (0, 1.0), (0.5, 1.0)]
    )
    def test_percentile_is_the_nearest_rank(self, percent: float, value: float) -> None:
        ordered = [float(number) for number in range(1, 101)]
        assert demo_report.percentile(ordered, percent) == value


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_every_kind_of_event(terminal: bool) -> None:
    options = Options(transports=TRANSPORTS, num_prompts=4, num_tokens=3)
    console = Console(
        width=80,
        record=True,
        force_terminal=terminal,
        file=open(os.devnull, "w"),  # noqa: SIM115
    )
    with contextlib.closing(console.file), DemoProgress(console, options) as progress:
        for event in events_of_a_good_run(options):
            progress.show(event)
        progress.show(Skipped("cma", "no [bracket] is markup"))
    text = console.export_text()
    assert "cma is left out: no [bracket] is markup" in text
    if not terminal:
        assert "tcp handoffs: 4 of 4" in text
        assert "reference tokens: 12 of 12" in text


def test_an_old_or_missing_transformers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.40.1")
    with pytest.raises(demo_run.DemoError, match=r"4\.57 or newer, not 4\.40\.1; install"):
        demo_run.run(Options(transports=TRANSPORTS), lambda event: None)

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(demo_run.DemoError, match=r"needs transformers 4\.57 or newer; install"):
        demo_run.run(Options(transports=TRANSPORTS), lambda event: None)


class FakeAgent:
    """Refuses to connect for one reason, or connects."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def connect(self, address: str, timeout_s: float) -> str:
        if self.error is not None:
            raise self.error
        return f"peer at {address}"


class TestLeavingATransportOut:
    def connect(
        self, agents: dict[str, Any], *, skip: bool = True, **missing: str
    ) -> tuple[dict[str, str], dict[str, str]]:
        unavailable: dict[str, str] = {}
        there = {name: name for name in TRANSPORTS if name not in missing}
        options = Options(transports=TRANSPORTS, skip_unavailable=skip)
        peers = demo_workers._connect(agents, Addresses(there, missing), unavailable, options)
        return peers, unavailable

    def test_both_work(self) -> None:
        peers, unavailable = self.connect({"cma": FakeAgent(), "tcp": FakeAgent()})
        assert peers == {"cma": "peer at cma", "tcp": "peer at tcp"}
        assert unavailable == {}

    @pytest.mark.parametrize("kind", [TransportUnavailable, HelloRefused])
    def test_a_link_is_refused(self, kind: type[Exception]) -> None:
        agents = {"cma": FakeAgent(kind("ptrace is refused")), "tcp": FakeAgent()}
        peers, unavailable = self.connect(agents)
        assert peers == {"tcp": "peer at tcp"}
        assert unavailable == {"cma": "ptrace is refused"}
        with pytest.raises(kind, match="ptrace is refused"):
            self.connect(agents, skip=False)

    def test_the_other_side_has_none(self) -> None:
        agents = {"cma": FakeAgent(), "tcp": FakeAgent()}
        peers, unavailable = self.connect(agents, cma="not on this kernel")
        assert peers == {"tcp": "peer at tcp"}
        assert unavailable == {"cma": "not on this kernel"}

    def test_other_failures_are_not_hidden(self) -> None:
        with pytest.raises(LayoutMismatch):
            self.connect({"tcp": FakeAgent(LayoutMismatch("axis 'head'"))})

    def test_nothing_works(self) -> None:
        with pytest.raises(TransportUnavailable, match="cma: no; tcp: neither"):
            self.connect({}, cma="no", tcp="neither")


class TestWhereItComputes:
    """By itself on GPUs, if there are any that torch can use."""

    @pytest.fixture(autouse=True)
    def _gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: int | Exception = 2

        class Driver:
            def device_count(driver) -> int:
                if isinstance(self.count, Exception):
                    raise self.count
                return self.count

        monkeypatch.setattr(cuda, "absence", lambda: "")
        monkeypatch.setattr(cuda, "driver", Driver)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cu130")

    @pytest.mark.parametrize("wanted", ["auto", "cuda"])
    @pytest.mark.parametrize(
        ("count", "devices"),
        [
            (1, ("cuda:0", "cuda:0")),
            (2, ("cuda:0", "cuda:1")),
            (8, ("cuda:0", "cuda:1")),
        ],
    )
    def test_one_gpu_is_shared_and_of_more_each_has_its_own(
        self, wanted: str, count: int, devices: tuple[str, str]
    ) -> None:
        self.count = count
        assert demo_command.choose_devices(wanted) == devices

    def test_the_cpu_may_be_asked_for(self) -> None:
        assert demo_command.choose_devices("cpu") == ("cpu", "cpu")

    @pytest.mark.parametrize(
        ("why", "says"),
        [
            ("no driver", "no NVIDIA driver: x"),
            ("a CPU build", "torch is built without CUDA"),
            ("none visible", "look at CUDA_VISIBLE_DEVICES"),
            ("a broken driver", "cuInit failed"),
        ],
    )
    def test_without_gpus_it_computes_on_the_cpu_unless_told_not_to(
        self, monkeypatch: pytest.MonkeyPatch, why: str, says: str
    ) -> None:
        if why == "no driver":
            monkeypatch.setattr(cuda, "absence", lambda: "no NVIDIA driver: x")
        elif why == "a CPU build":
            monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
        else:
            self.count = (
                0 if why == "none visible" else DeviceError("cuInit failed", operation="cuda")
            )
        assert demo_command.choose_devices("auto") == ("cpu", "cpu")
        with pytest.raises(demo_command.NoGpu, match=f"--device cuda: .*{says}"):
            demo_command.choose_devices("cuda")


def assert_gone(pids: list[int], timeout_s: float = 20.0) -> None:
    """Waits for processes that need not be children of this one to end."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                assert select.select([handle], [], [], timeout_s)[0], f"{pid} still runs"
            finally:
                os.close(handle)


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
class TestWholeRuns:
    """Two processes, a model, real transports."""

    def test_every_token_is_the_references(self) -> None:
        done = run_command("--prompts", "5", "--tokens", "6", "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        ran = [row["transport"] for row in report["transports"]]
        assert sorted([*ran, *report["skipped"]]) == sorted(TRANSPORTS)
        assert "tcp" in ran
        for row in report["transports"]:
            assert (row["requests"], row["tokens_compared"], row["mismatches"]) == (5, 30, 0)
            assert row["nbytes"] >= report["prompt_tokens"] * 4096
        assert report["distinct_tokens_an_answer"] > 4
        for pool in report["pools"].values():
            assert pool["num_free"] == pool["num_blocks"]
            assert pool["stray_blocks"] == 0

    def test_damaged_blocks_change_tokens(self) -> None:
        done = run_command("--prompts", "3", "--tokens", "8", "--json", "--corrupt")
        assert done.returncode == 1
        assert done.stdout, done.stderr
        report = json.loads(done.stdout)
        assert report["transports"]
        for row in report["transports"]:
            assert row["mismatches"] > 0
            assert f"tokens over {row['transport']} differ from the reference" in done.stderr
        assert "unnoticed" not in done.stderr

    @pytest.mark.parametrize("victim", ["prefill", "decode"])
    def test_a_worker_that_dies_is_named(self, victim: str) -> None:
        pids: dict[str, int] = {}

        def kill_at_first_handoff(event: Event) -> None:
            if isinstance(event, Started):
                pids[event.role] = event.pid
            if isinstance(event, Received):
                os.kill(pids[victim], signal.SIGKILL)

        options = Options(transports=("tcp",), num_prompts=20, num_tokens=8)
        with pytest.raises(
            demo_run.DemoError, match=rf"^the {victim} process \(pid \d+\) was killed by SIGKILL"
        ):
            demo_run.run(options, kill_at_first_handoff)
        assert len(pids) == 2
        assert_gone(list(pids.values()))

    def test_a_worker_that_fails_says_why(self) -> None:
        with pytest.raises(
            demo_run.DemoError, match=r"^the (prefill|decode) process failed: .*pigeon"
        ):
            demo_run.run(
                Options(transports=("pigeon",), skip_unavailable=False, num_prompts=2),
                lambda event: None,
            )

    @pytest.mark.parametrize(
        ("how", "when"),
        [
            (signal.SIGINT, " is process "),
            (signal.SIGTERM, " is process "),
            (signal.SIGKILL, "tcp handoffs"),
        ],
    )
    def test_workers_end_with_their_parent(self, how: signal.Signals, when: str) -> None:
        command = [*COMMAND, "--prompts", "40", "--transport", "tcp"]
        pids = []
        # A shell's jobs in the background ignore SIGINT, and what they start inherits that.
        with subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        ) as parent:
            assert parent.stderr is not None
            for line in parent.stderr:
                if " is process " in line:
                    pids.append(int(line.split()[-1]))
                if len(pids) == 2 and when in line:
                    break
            parent.send_signal(how)
            assert parent.wait(20) != 0
        assert_gone(pids)
