"""Timelines of handoffs: bounded, written, read back, and shown as a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvferry.control.errors import ConfigError, HandoffTimeout
from kvferry.control.handoff.timeline import Recorder, read
from tests import ROOT
from tests.support.agent_process import WAIT_S
from tests.support.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.engine.transfer_engine import TransferEngine
    from tests.support.agents import Local

SRC, DST = [9, 2, 11, 40, 3], [1, 0, 7, 30, 12]


@pytest.fixture
def transport() -> str:
    return "tcp"


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    process = DaemonProcess()
    yield process
    process.end()


@pytest.fixture
def daemon_with_http() -> Iterator[DaemonProcess]:
    process = DaemonProcess("--http", "127.0.0.1:0")
    yield process
    process.end()


def test_a_trace_of_two_agents(new_agent: Callable[..., Local], tmp_path: Path) -> None:
    prefill, decode = new_agent("prefill-0", "prefill"), new_agent("decode-0", "decode")
    decode.agent.connect(prefill.agent.address)
    sending = prefill.agent.send("r", SRC)
    offered = threading.Event()
    prefill.agent._core.messaging.call_soon(offered.set)
    assert offered.wait(WAIT_S)  # else the request may come first
    nbytes = decode.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    sending.wait(WAIT_S)
    with pytest.raises(HandoffTimeout):
        decode.agent.receive("never", "prefill-0", DST, timeout_s=0.05).wait(WAIT_S)
    files = [tmp_path / "decode", tmp_path / "prefill"]
    assert decode.agent.write_trace(files[0]) == 2
    assert prefill.agent.write_trace(str(files[1])) == 1
    good, bad = read(files[0])
    assert [name for name, _ in good.marks] == [
        "queued",
        "placed",
        "asked",
        "first byte",
        "free",
        "ready",
    ]
    assert (good.peer, good.nbytes, good.error) == ("prefill-0", nbytes, "")
    assert bad.error == "HandoffTimeout"
    (sent, *_) = read(files[1])
    assert [name for name, _ in sent.marks] == [
        *("queued", "offered", "placed", "submitted", "on wire", "written", "free", "ready")
    ]
    assert sent.peer == "decode-0"
    times = [at for _, at in sent.marks]
    assert times == sorted(times)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvferry.tools.cli", "trace", *map(str, files)),
            *("--out", str(tmp_path / "t.json")),
        ],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert "handoffs in" in done.stdout
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"decode-0", "prefill-0"}
    assert "on wire" in {event["name"] for event in events}


@pytest.mark.parametrize("transport", ["tcp", "cma"])
@pytest.mark.parametrize("mode", ["push", "pull"])
def test_marks_of_a_staged_handoff(
    new_agent: Callable[..., Local],
    staging_engine: Callable[[str], TransferEngine],
    tmp_path: Path,
    mode: str,
) -> None:
    """Gathered here, sent, scattered there."""
    prefill, decode = (
        new_agent(f"{role}-0", role, options={"engine": staging_engine(role)})
        for role in ("prefill", "decode")
    )
    decode.agent.connect(prefill.agent.address)
    receiving = decode.agent.receive("r", "prefill-0", DST, mode=mode)  # type: ignore[arg-type]
    sending = prefill.agent.send("r", SRC)
    receiving.wait(WAIT_S)
    sending.wait(WAIT_S)
    sides = {}
    for local in (prefill, decode):
        local.agent.write_trace(tmp_path / local.agent.name)
        (timeline,) = read(tmp_path / local.agent.name)
        times = [at for _, at in timeline.marks]
        assert times == sorted(times)
        sides[timeline.side] = dict(timeline.marks)
    there, here = sides["prefill"], sides["decode"]
    assert there["placed"] > here["asked"]
    if mode == "push":
        assert there["submitted"] < there["gathered"] < there["written"]
        assert there["submitted"] < there["on wire"] < there["written"]
        assert there["on wire"] < here["first byte"] <= here["scattered"] < here["ready"]
    else:
        assert here["submitted"] < here["first byte"] <= here["scattered"] < here["read"]
        assert not {"on wire", "gathered", "scattered"} & set(there)


def trace(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvferry.tools.cli", "trace", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "http_proxy": "http://127.0.0.1:1"},
    )


def test_agents_that_run_are_asked(new_agent: Callable[..., Local], tmp_path: Path) -> None:
    options = {"http": "127.0.0.1:0"}
    prefill = new_agent("prefill-0", "prefill", options=options)
    decode = new_agent("decode-0", "decode", options=options)
    decode.agent.connect(prefill.agent.address)
    sending = prefill.agent.send("r", SRC)
    decode.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    sending.wait(WAIT_S)
    prefill.agent.write_trace(tmp_path / "prefill")
    out = tmp_path / "t.json"
    agents = [f"--from=http://{decode.agent.http_address}/", f"--from={prefill.agent.http_address}"]
    done = trace(*agents, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 handoffs in ")
    events = json.loads(out.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"decode-0", "prefill-0"}
    mixed = trace(agents[0], str(tmp_path / "prefill"), "--out", str(out))
    assert mixed.stdout.startswith("2 handoffs in ")


def test_whoever_cannot_be_traced_is_named(daemon_with_http: DaemonProcess) -> None:
    nobody = trace("--from=http://127.0.0.1:1")
    assert nobody.returncode == 1
    assert "http://127.0.0.1:1/trace does not answer" in nobody.stderr
    other = trace(f"--from={daemon_with_http.http}")
    assert other.returncode == 1
    assert "is no agent that can be traced: there is: " in other.stderr
    assert trace().returncode == 1


def test_a_timeline_that_grows_while_it_is_written(tmp_path: Path) -> None:
    """Its owner marks on, on another thread: nothing of it is lost, and nobody stumbles."""
    recorder = Recorder(1)
    timeline = recorder.begin("r", "decode", "a", "b", 0.0)
    for mark in range(40):
        timeline.take({f"late {mark}": 40 - mark})
    before = list(timeline.marks)
    recorder.write(tmp_path / "t")
    assert timeline.marks == before, "it is the owner's"
    assert [at for _, at in read(tmp_path / "t")[0].marks] == list(range(41))


def test_a_handoff_is_placed_when_its_peer_is_connected(
    new_agent: Callable[..., Local], daemon: DaemonProcess, tmp_path: Path
) -> None:
    options = {"daemon": daemon.address}
    prefill = new_agent("prefill-0", "prefill", options=options)
    decode = new_agent("decode-0", "decode", options=options)
    decode.agent.wait_for_member("prefill-0", WAIT_S)
    prefill.agent.send("r", SRC)
    decode.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    decode.agent.write_trace(tmp_path / "t")
    (timeline,) = read(tmp_path / "t")
    assert [name for name, _ in timeline.marks][:3] == ["queued", "placed", "asked"]


def test_memory_is_bounded(tmp_path: Path) -> None:
    recorder = Recorder(3)
    for number in range(10):
        timeline = recorder.begin(f"r{number}", "decode", "a", "b", 0.0)
        for _ in range(1000):
            timeline.mark("again")
    assert recorder.write(tmp_path / "t") == 3
    assert [t.handoff for t in read(tmp_path / "t")] == ["r7", "r8", "r9"]
    assert max(len(t.marks) for t in read(tmp_path / "t")) == 64


def test_a_full_disk_and_what_is_no_trace_are_named(tmp_path: Path) -> None:
    recorder = Recorder(3)
    recorder.begin("r", "decode", "a", "b", 0.0)
    with pytest.raises(ConfigError, match="No space left"):
        recorder.write(Path("/dev/full"))
    (tmp_path / "junk").write_bytes(b"no trace")
    with pytest.raises(ConfigError, match="is no trace"):
        read(tmp_path / "junk")
    (tmp_path / "cut").write_bytes(2 * recorder.encode()[0][:-1])
    with pytest.raises(ConfigError, match="is no trace"):
        read(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(recorder.encode()[0][:-1])
    with pytest.raises(ConfigError, match="ends inside a record"):
        read(tmp_path / "cut")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "nothing")
