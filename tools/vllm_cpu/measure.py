"""Time to first token through pairs of real engines: kvferry's connector beside NIXL's, in turns.

Runs in vLLM's environment (see `environment.py`):

    python -m kvferry.tools.vllm_cpu.measure MODEL [kvferry:push:cma nixl:pull:cma ...]

All pairs are there at once and requests go to them in turns, one at a time, each round in another
order: what the machine's host takes meanwhile, it takes from all alike. Pairs whose turn it is not are
stopped, because a worker of vLLM's looks for its next step for a second without sleeping.

*Decode's time* is from the request's arrival at decode until its first token, when prefill is done
already: loading and one forward pass of one token. *Alone* is decode's time for a prompt that it has
in its own cache but for the last block: the part that no connector can save. It is asked for in the
same turn, so what is told is the median of the differences. *Both at once* is from the moment that
both have the request, less what prefill took for the one before.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from .engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT = ("kvferry:push:cma", "nixl:pull:cma")
PROMPT_TOKENS = 500
ROUNDS = 40
WARM_UP = 5
AWAKE_S = 0.02  # after a pair goes on: sockets that were full meanwhile are read
BLOCKS = 256  # of 32 tokens: a few prompts
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
# What UCX, below NIXL, may use; `sm` reads the other process's memory, as cma does.
UCX_TLS = {"cma": "tcp,sm,self", "tcp": "tcp,self"}


def connector(kind: str, role: str) -> dict[str, Any]:
    """Return a `KVTransferConfig`: `kvferry:MODE:TRANSPORT` or `nixl:MODE:TRANSPORT`."""
    name, mode, transport = kind.split(":")
    if name == "nixl":
        return {"kv_connector": f"Nixl{mode.title()}Connector", "kv_role": role}
    return {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.adapters.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"mode": mode, "transports": [transport]},
    }


class Pair:
    """Two engines, and prompts that no cache has seen."""

    def __init__(self, model: str, kind: str, number: int) -> None:
        self.kind = kind
        self.found: dict[str, list[float]] = {}
        self._random = random.Random(1)  # the same prompts for all
        self._count = 0
        os.environ["UCX_TLS"] = UCX_TLS[kind.rpartition(":")[2]]
        self.prefill = self._engine(model, "kv_producer", 5600 + 100 * number)
        self.decode = self._engine(model, "kv_consumer", 5650 + 100 * number)

    def _engine(self, model: str, role: str, port: int) -> Engine:
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
        options = {"model": model, "dtype": "float32", "block_size": 32}
        options |= {"num_gpu_blocks_override": BLOCKS, "connector": connector(self.kind, role)}
        return Engine(role, options)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let the engines' processes run."""
        pids = self.prefill.processes() + self.decode.processes()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(AWAKE_S)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)

    def measure(self) -> None:
        """One request through both engines, one to decode alone, and one to both at once."""
        prompt, name = self._prompt(), self._name()
        started_s = time.monotonic()
        params = self.prefill.generate(prompt, 1, dict(TO_PREFILL), name).kv_transfer_params
        prefill_s = time.monotonic() - started_s
        # NIXL's push finds what belongs together by the request's name.
        decode_s = self._first_token_s(prompt, dict(params), name)
        prompt = self._prompt()
        self.decode.generate(prompt, 1)
        alone_s = self._first_token_s(prompt, None, self._name())
        self._note(prefill=prefill_s, decode=decode_s, alone=alone_s, load=decode_s - alone_s)
        if self.kind.startswith("kvferry:push"):
            self._note(at_once=self._at_once(params) - prefill_s - alone_s)

    def _at_once(self, first: dict[str, Any]) -> float:
        """From the arrival at both until decode's first token."""
        prompt, name = self._prompt(), self._name()
        address = {key: first[key] for key in ("remote_engine_id", "remote_host", "remote_port")}
        to_decode = {"do_remote_prefill": True, "transfer_id": name} | address
        _, output = self.decode.submit(prompt, 1, to_decode, name)
        self.prefill.generate(prompt, 1, TO_PREFILL | {"transfer_id": name})
        output.result(60)
        return self.decode.first_token_s[name]

    def _first_token_s(self, prompt: list[int], params: Any, name: str) -> float:
        """From arrival at decode until the first token."""
        self.decode.generate(prompt, 1, params, name)
        return self.decode.first_token_s[name]

    def _name(self) -> str:
        return f"{self.kind}-{self._count}"

    def _prompt(self) -> list[int]:
        self._count += 1
        return [self._random.randint(3, 258) for _ in range(PROMPT_TOKENS)]

    def _note(self, **found_s: float) -> None:
        for name, seconds in found_s.items():
            self.found.setdefault(name, []).append(1e3 * seconds)

    def close(self) -> None:
        """End the engines."""
        with self.turn():
            self.prefill.close()
            self.decode.close()


def measure(pairs: list[Pair]) -> None:
    """Print a JSON line for each pair: medians in milliseconds, and quartiles of the load."""
    for number in range(WARM_UP + ROUNDS):
        if number == WARM_UP:
            print("== measuring", flush=True)
            for pair in pairs:
                pair.found.clear()
        start = number % len(pairs)
        for pair in pairs[start:] + pairs[:start]:
            with pair.turn():
                pair.measure()
    first = pairs[0].found
    for pair in pairs:
        medians = {name: round(statistics.median(each), 2) for name, each in pair.found.items()}
        quartiles = [round(each, 2) for each in statistics.quantiles(pair.found["load"], n=4)]
        found = {"kind": pair.kind, "rounds": ROUNDS, "prompt_tokens": PROMPT_TOKENS} | medians
        found |= {"load_quartiles": quartiles, "first_by_this": ratio(first, pair.found)}
        print("==", json.dumps(found), flush=True)


def ratio(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float:
    """Of the two pairs' median loads, round by round: how ours compares to theirs."""
    return round(statistics.median(ours["load"]) / statistics.median(theirs["load"]), 3)


def main(model: str, *kinds: str) -> None:
    """Measure all of them together, and end their processes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or stopped processes would stay
    pairs: list[Pair] = []
    try:
        for number, kind in enumerate(kinds or DEFAULT):
            pairs.append(Pair(model, kind, number))
            with pairs[-1].turn():
                pairs[-1].measure()
        measure(pairs)
    finally:
        for pair in pairs:
            pair.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
