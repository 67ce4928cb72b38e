"""`examples/vllm/run.py` on this machine: real servers, and bodies as other routers send them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvferry.tools.vllm_cpu.environment import environ
from tests import ROOT

from .servers import SETTINGS, metric, post

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPT = "What is moved is what was computed. " * 9
END_S = 120.0  # reached only when something hangs

pytestmark = [pytest.mark.slow, pytest.mark.soak]


def free_ports() -> int:
    """A port that is free with those 100, 200 and 300 above it."""
    for first in range(21000, 29000, 401):
        sockets = [socket.socket() for _ in range(4)]
        try:
            for above, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + 100 * above))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
        return first
    raise AssertionError("no four ports are free")


class Example:
    """The example, serving."""

    def __init__(self, python: str, model: str, folder: Path) -> None:
        self.router = free_ports()
        self.prefill, self.decode = self.router + 100, self.router + 200
        script = str(ROOT / "examples" / "vllm" / "run.py")
        self.log = folder / "log"
        with self.log.open("wb") as errors:
            self.process = subprocess.Popen(
                [python, script, model, "--port", str(self.router), "--serve"],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environ() | SETTINGS | {"HF_HOME": str(folder)},
                cwd=folder,
                text=True,
            )
        self.said: dict[str, str] = {}
        for line in self.process.stdout or ():
            what, _, rest = line.rstrip().partition(": ")
            self.said[what] = rest.strip()
            if what.startswith("serving at"):
                return
        raise AssertionError(self.log.read_text()[-4000:])

    def ask(self, port: int, **fields: Any) -> str:
        body = {"model": "model", "prompt": PROMPT, "max_tokens": 16, "temperature": 0} | fields
        return post(f"http://127.0.0.1:{port}/v1/completions", body)

    def count(self, port: int, name: str) -> float:
        return metric(f"http://127.0.0.1:{port}", name)


@pytest.fixture
def example(vllm_python: str, model: Callable[[str], str], tmp_path: Path) -> Iterator[Example]:
    running = Example(vllm_python, model("llama"), tmp_path)
    yield running
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGTERM)
    running.process.wait(END_S)
    if running.process.stdout is not None:
        running.process.stdout.close()


def test_the_example_and_requests_of_other_routers(example: Example) -> None:
    assert example.said["through both"] == example.said["prefill alone"] != ""
    loaded, sent = (
        (example.decode, "vllm:kvferry_load_bytes_sum"),
        (example.prefill, "vllm:kvferry_sent_bytes_sum"),
    )
    before = example.count(*loaded)
    assert before > 0

    # As vLLM's example proxy for NIXL: prefill first, with these fields as null; its answer verbatim.
    nothing_yet = dict.fromkeys(
        ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
    )
    params: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False, **nothing_yet}
    fresh = {"prompt": "A prompt that nobody has sent before. " * 8}
    first = json.loads(
        example.ask(example.prefill, kv_transfer_params=params, max_tokens=1, stream=False, **fresh)
    )
    answered = first["kv_transfer_params"]
    assert answered["do_remote_prefill"] is True
    streamed = example.ask(example.decode, kv_transfer_params=answered, stream=True, **fresh)
    events = [line[6:] for line in streamed.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    alone = json.loads(example.ask(example.prefill, **fresh))["choices"][0]["text"]
    assert text == alone
    assert example.count(*loaded) > before
    assert example.count(*sent) == example.count(*loaded)
    assert example.count(example.decode, "vllm:kvferry_loads_failed_total") == 0

    group = descendants(example.process.pid)
    assert group
    example.process.send_signal(signal.SIGTERM)
    assert example.process.wait(END_S) == 0
    assert not [pid for pid in group if Path(f"/proc/{pid}/exe").exists() and alive(pid)]


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
