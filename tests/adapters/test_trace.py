"""Timelines of handoffs: bounded, written, read back, and shown as a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvferry.control.errors import ConfigError, HandoffTimeout
from kvferry.control.recorder import Recorder, read
from tests.daemon_process import ROOT

from .agent_process import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import Local

SRC, DST = [9, 2, 11, 40, 3], [1, 0, 7, 30, 12]


@pytest.fixture
def transport() -> str:
    return "tcp"


def test_a_trace_of_two_agents(new_agent: Callable[..., Local], tmp_path: Path) -> None:
    prefill, decode = new_agent("prefill-0", "prefill"), new_agent("decode-0", "decode")
    decode.agent.connect(prefill.agent.address)
    sending = prefill.agent.send("r", SRC)
    nbytes = decode.agent.receive("r", "prefill-0", DST).wait(WAIT_S)
    sending.wait(WAIT_S)
    with pytest.raises(HandoffTimeout):
        decode.agent.receive("never", "prefill-0", DST, timeout_s=0.05).wait(WAIT_S)
    files = [tmp_path / "decode", tmp_path / "prefill"]
    assert decode.agent.write_trace(files[0]) == 2
    assert prefill.agent.write_trace(files[1]) == 1
    good, bad = read(files[0])
    assert [name for name, _ in good.marks] == ["queued", "asked", "free", "ready"]
    assert (good.peer, good.nbytes, good.error) == ("prefill-0", nbytes, "")
    assert bad.error == "HandoffTimeout"
    (sent, *_) = read(files[1])
    assert [name for name, _ in sent.marks] == [
        *("queued", "offered", "on wire", "written", "free", "ready")
    ]
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
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "nothing")
