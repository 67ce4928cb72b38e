"""Prefill in one vLLM server, decode in another, daemon and router before them: on this machine.

    python examples/vllm/run.py [MODEL] [--serve]

Run it with the Python that has vLLM and kvferry. It starts two OpenAI-compatible servers, sends one
request through the router and the same to prefill alone, prints both answers and what decode says
that it loaded, and ends: with status 1 if the answers differ or nothing was loaded. With `--serve` it
stays until Ctrl-C or SIGTERM.
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


def start_server(
    model: str, port: int, role: str, mode: str, daemon: str
) -> subprocess.Popen[bytes]:
    """One vLLM server; all that kvferry needs is `--kv-transfer-config`."""
    config = {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.adapters.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {
            "mode": mode,
            "daemon": daemon,
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


def loads(port: int) -> tuple[list[str], float]:
    """What a server counts of tokens that it did not compute itself and of loads, and their bytes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    nbytes = "vllm:kvferry_load_bytes_sum"
    counts = [line for line in lines if line.startswith(("vllm:prompt_tokens_by_source", nbytes))]
    return counts, sum(float(line.split()[-1]) for line in counts if line.startswith(nbytes))


def main() -> None:
    """Starts everything, sends a request, ends everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--mode", choices=["push", "pull"], default="push")
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        help="the router's; 100, 200 and 300 above it are used, too",
    )
    parser.add_argument("--serve", action="store_true", help="stay, for more requests")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    router, prefill, decode, daemon = (options.port + above for above in (0, 100, 200, 300))
    at = f"tcp://127.0.0.1:{daemon}"
    processes = [start_tool("daemon", "--bind", at)]
    try:
        servers = {
            port: start_server(options.model, port, role, options.mode, at)
            for port, role in ((prefill, "kv_producer"), (decode, "kv_consumer"))
        }
        processes += servers.values()
        for port, server in servers.items():
            wait_healthy(port, server)
        processes.append(start_tool("router", "--port", str(router), "--daemon", at))
        wait_healthy(router, processes[-1])
        prompt = "A ferry carries what two shores have in common, and nothing else. " * 8
        body = {"model": "model", "prompt": prompt, "max_tokens": 16, "temperature": 0}
        with post(router, "/v1/completions", body) as answer:
            through_both = json.load(answer)["choices"][0]["text"]
        with post(prefill, "/v1/completions", body) as answer:
            alone = json.load(answer)["choices"][0]["text"]
        print("through both: ", repr(through_both))
        print("prefill alone:", repr(alone))
        counts, loaded_nbytes = loads(decode)
        print(*counts, sep="\n", flush=True)
        if through_both != alone or not loaded_nbytes:
            sys.exit("these should be equal, and decode should have loaded the prompt's KV")
        if options.serve:
            print(f"serving at http://127.0.0.1:{router}/v1; end with Ctrl-C", flush=True)
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
