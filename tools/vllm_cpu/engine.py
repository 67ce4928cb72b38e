"""A real vLLM engine for tests and measurements; runs in vLLM's own environment.

Every engine is two more processes (scheduler and worker), as in production; only HTTP is left out.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from concurrent.futures import Future
from multiprocessing import active_children
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else transfers starve
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions sent to workers
os.environ.setdefault("UCX_TLS", "tcp,sm,self")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

WAIT_S = 120.0


class Engine:
    """One engine, driven from a thread of its own; requests go in and futures come out.

    Args:
        options: of `vllm.LLM`, and `connector`: a `KVTransferConfig` as a dict, or None;
            `log_stats`: whether vLLM counts what it does.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        options = dict(options)
        connector = options.pop("connector", None)
        others = active_children()
        self.name = name
        log_stats = options.pop("log_stats", False)
        self.llm = LLM(
            **{"enforce_eager": True, "max_num_seqs": 8, "max_model_len": 2048} | options,
            kv_transfer_config=KVTransferConfig(**connector) if connector else None,
            disable_log_stats=not log_stats,
        )
        self._engine = self.llm.llm_engine
        self._started = [each for each in active_children() if each not in others]
        self._commands: queue.Queue[Any] = queue.Queue()
        self._futures: dict[str, Future[Any]] = {}
        self._count = 0
        self.started: dict[str, float] = {}
        self.first_token_s: dict[str, float] = {}  # since it was started
        self.ended_s: dict[str, float] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            while self._futures or not self._commands.empty():
                while not self._commands.empty():
                    self._commands.get()()
                if self._engine.has_unfinished_requests():
                    for output in self._engine.step():
                        self._take(output)
                else:
                    time.sleep(0.0005)
            self._commands.get()()

    def _take(self, output: Any) -> None:
        if output.outputs and output.outputs[0].token_ids:
            self.first_token_s.setdefault(
                output.request_id, time.monotonic() - self.started[output.request_id]
            )
        if output.finished:
            self.ended_s[output.request_id] = time.monotonic()
            future = self._futures.pop(output.request_id, None)
            if future is not None:
                future.set_result(output)

    def submit(
        self, prompt: list[int], max_tokens: int, params: Any = None, name: str = ""
    ) -> tuple[str, Any]:
        """Add a request; return its name, a new one if "", and the future of its output."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._count += 1
        name = name or f"{self.name}-{self._count}"
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.CUMULATIVE,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        future: Future[Any] = Future()

        def add() -> None:
            self._futures[name] = future
            self.started[name] = time.monotonic()
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

        self._commands.put(add)
        return name, future

    def abort(self, name: str) -> None:
        """Abort a request; its future ends with None."""

        def stop() -> None:
            self._engine.abort_request([name])
            future = self._futures.pop(name, None)
            if future is not None:
                future.set_result(None)

        self._commands.put(stop)

    def call(self, function: Any) -> Any:
        """Run `function(llm)` between two steps."""
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(function(self.llm))
            except BaseException as error:
                done.set_exception(error)

        self._commands.put(run)
        return done.result(WAIT_S)

    def generate(
        self, prompt: list[int], max_tokens: int, params: Any = None, name: str = ""
    ) -> Any:
        """Return one request, to its end."""
        _, future = self.submit(prompt, max_tokens, params, name)
        return future.result(WAIT_S)

    def processes(self) -> list[int]:
        """Return the engine's processes, its scheduler's first."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended just now
                continue
            children.setdefault(parent, []).append(int(stat.parent.name))
        found = [each.pid for each in self._started if each.pid is not None]
        for pid in found:
            found += children.get(pid, [])
        return found

    def close(self) -> None:
        """End its processes."""
        self._engine.engine_core.shutdown()

    def forget_prefixes(self, wait_s: float = 30.0) -> bool:
        """Empty the prefix cache; False if blocks are still held by requests after `wait_s`."""
        deadline_s = time.monotonic() + wait_s
        while not self.call(lambda llm: llm.reset_prefix_cache()):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.05)
        return True

    def zero_caches(self) -> None:
        """Overwrite the whole cache of the engine's workers with zeros."""
        self.call(lambda llm: llm.collective_rpc(_zero_caches))


def _zero_caches(worker: Any) -> None:
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def tokens(output: Any) -> list[int]:
    """Return what was generated."""
    return list(output.outputs[0].token_ids)
