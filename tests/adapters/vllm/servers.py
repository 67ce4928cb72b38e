"""Programs of vLLM's environment, and real servers behind routers, which a test may kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

from kvferry.tools.vllm_cpu.environment import environ

if TYPE_CHECKING:
    from pathlib import Path

RUN_S = 900.0  # reached only when something hangs: a pair of engines takes one to two minutes
START_S = 600.0  # reached only when something hangs: one takes a minute on a busy host
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def run_nicely(command: list[str], log: Path) -> None:
    """Runs a program of vLLM's environment to its end, with what it says in `log`."""
    with log.open("wb") as output:
        done = subprocess.run(
            ["nice", "-n", "5", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ() | {"HF_HOME": str(log.parent)},
            cwd=log.parent,
            timeout=RUN_S,
        )
    assert done.returncode == 0, log.read_text()[-4000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def post(url: str, body: dict[str, Any]) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(answer.read().decode())


def metric(url: str, name: str) -> float:
    """The sum of all that a server's metrics have under that name."""
    lines = [line for line in get(url + "/metrics").splitlines() if line.startswith(name)]
    return sum(float(line.split()[-1]) for line in lines if line[len(name)] in "{ ")


class Program:
    """A program that serves HTTP at a port of this machine, started anew as often as it is killed."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self.port = free_port()
        self.kills = 0
        self.log = folder / f"{name}.log"
        self._command = [*command, "--port", str(self.port)]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                ["nice", "-n", "5", *self._command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ() | SETTINGS | {"HF_HOME": str(self._folder)},
                cwd=self._folder,
                start_new_session=True,
            )

    def kill(self) -> None:
        """At once, with all of its processes. Safe to call again."""
        if self._process is not None:
            self.kills += 1
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def healthy(self) -> bool:
        """Whether it serves; fails if it ended by itself."""
        assert self._process is not None
        code = self._process.poll()
        assert code is None, f"{self.name} ended with {code}: {self.log.read_text()[-3000:]}"
        try:
            get(self.url + "/health")
        except OSError:
            return False
        return True

    def wait_healthy(self) -> None:
        deadline_s = time.monotonic() + START_S
        while not self.healthy():
            assert time.monotonic() < deadline_s, f"{self.name} did not start in {START_S} s"
            time.sleep(0.2)

    def complete(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What this server alone makes of a prompt."""
        answer = post(self.url + "/v1/completions", completion(prompt, num_tokens))
        return list(json.loads(answer)["choices"][0]["token_ids"])


def completion(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """The body of a request for so many tokens, as ids."""
    return {
        "model": "model",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def server(python: str, model: str, name: str, folder: Path, connector: Any) -> Program:
    """A vLLM server."""
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--served-model-name", "model", "--host", "127.0.0.1"),
        *("--dtype", "float32", "--block-size", "32", "--num-gpu-blocks-override", "256"),
        *("--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "512"),
        *("--enforce-eager", "--kv-transfer-config", json.dumps(connector)),
    ]
    if connector["kv_role"] == "kv_consumer":
        command.append("--no-enable-prefix-caching")  # every prompt is loaded whole, each time
    return Program(name, command, folder)


def router(name: str, prefills: list[Program], decodes: list[Program], *more: str) -> Program:
    """`kvferry router` before them."""
    command = [sys.executable, "-m", "kvferry.tools.cli", "router", *more]
    for role, programs in (("--prefill", prefills), ("--decode", decodes)):
        for each in programs:
            command += [role, each.url]
    return Program(name, command, prefills[0].log.parent)
