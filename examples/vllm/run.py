"""Prefill in one vLLM server, decode in another, daemon and router before them: on this machine.

    python examples/vllm/run.py [MODEL] [--serve]

Run it with the Python that has vLLM and kvferry. It starts two OpenAI-compatible servers, sends one
request through the router, prints what each server said it did, and ends; with `--serve` it stays.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from typing import Any

START_S = 900.0
PREFILL, DECODE, ROUTER = 8100, 8200, 8000
DAEMON = "tcp://127.0.0.1:7717"


def start_server(model: str, port: int, role: str, mode: str) -> subprocess.Popen[bytes]:
    """One vLLM server; all that kvferry needs is `--kv-transfer-config`."""
    config = {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.adapters.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {
            "mode": mode,
            "daemon": DAEMON,
            "service": f"http://127.0.0.1:{port}",
        },
    }
    return subprocess.Popen(
        [
            sys.executable,
            *("-m", "vllm.entrypoints.openai.api_server"),
            *("--model", model, "--served-model-name", "model"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"),
            *("--kv-transfer-config", json.dumps(config)),
        ],
        # For vLLM on CPUs: room for the cache in GiB, and cores left for the transfer.
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | os.environ,
        start_new_session=True,
    )


def post(port: int, path: str, body: dict[str, Any]) -> Any:
    """Sends JSON; returns the open response."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=300)


def start_tool(*arguments: str) -> subprocess.Popen[bytes]:
    """A sub-command of kvferry."""
    command = [sys.executable, "-m", "kvferry.tools.cli", *arguments]
    return subprocess.Popen(command, start_new_session=True)


def wait_healthy(port: int, server: subprocess.Popen[bytes]) -> None:
    """Until a server is ready; fails if it ends before."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            sys.exit(f"the server at port {port} ended with code {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1.0)
    sys.exit(f"the server at port {port} did not start in {START_S} s")


def loaded_tokens(port: int) -> str:
    """What a server counts of tokens that it did not compute itself, and of loads."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    names = ("vllm:prompt_tokens_by_source_total", "vllm:kvferry_load_bytes_sum")
    counts = [line for line in lines if line.startswith(names)]
    return "\n".join(counts)


def main() -> None:
    """Starts everything, sends a request, ends everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--mode", choices=["push", "pull"], default="push")
    parser.add_argument("--serve", action="store_true", help="stay, for more requests")
    options = parser.parse_args()
    processes = [start_tool("daemon", "--bind", DAEMON)]
    try:
        servers = {
            port: start_server(options.model, port, role, options.mode)
            for port, role in ((PREFILL, "kv_producer"), (DECODE, "kv_consumer"))
        }
        processes += servers.values()
        for port, server in servers.items():
            wait_healthy(port, server)
        processes.append(start_tool("router", "--port", str(ROUTER), "--daemon", DAEMON))
        wait_healthy(ROUTER, processes[-1])
        prompt = "A ferry carries what two shores have in common, and nothing else. " * 8
        body = {"model": "model", "prompt": prompt, "max_tokens": 16, "temperature": 0}
        with post(ROUTER, "/v1/completions", body) as answer:
            through_both = json.load(answer)["choices"][0]["text"]
        with post(PREFILL, "/v1/completions", body) as answer:
            alone = json.load(answer)["choices"][0]["text"]
        print("through both: ", repr(through_both))
        print("prefill alone:", repr(alone))
        print(loaded_tokens(DECODE), flush=True)
        if options.serve:
            print(f"serving at http://127.0.0.1:{ROUTER}/v1; end with Ctrl-C", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            process.terminate()  # it ends its own processes
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
