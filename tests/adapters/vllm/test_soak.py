"""Ten minutes of real vLLM servers behind routers, one of which is killed every minute.

Requests of mixed lengths, some of which their clients give up at random, go to two prefill and two
decode servers. Each ends with the tokens of one server alone or with an error, none is left without
an answer, and when all is over no server holds a block.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from .servers import Program, completion, get, metric, router, server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

REQUESTS, DURATION_S, KILL_EVERY_S = 500, 600.0, 60.0
LENGTHS = (5, 33, 64, 100, 129, 300, 500, 700, 1000, 1500)
PROMPTS_A_LENGTH = 3
NUM_TOKENS = 16
ABORTED = 0.15  # of all requests
PATIENCE_S = 20  # of the connectors, twice: for a request, and for blocks that nobody asks for
ANSWER_S = 120.0  # then a request has been forgotten
FIRST, LAST = 3, 258  # ids of the model's ordinary tokens

pytestmark = [pytest.mark.slow, pytest.mark.soak]


class Soak:
    """The servers, and what became of the requests."""

    def __init__(self, python: str, model: str, folder: Path) -> None:
        self.random = random.Random(7)
        self.outcomes: Counter[str] = Counter()
        self.details: list[str] = []
        self.prefills = [self._server(python, model, f"prefill{n}", folder) for n in (1, 2)]
        self.decodes = [self._server(python, model, f"decode{n}", folder) for n in (1, 2)]
        self.servers = [
            each for pair in zip(self.prefills, self.decodes, strict=True) for each in pair
        ]
        both = (self.prefills, self.decodes)
        self.routers = [
            router("together", *both, "--together"),
            router("prefill-first", *both, "--no-together"),
        ]
        self.prompts: list[list[int]] = []
        self.wants: list[list[int]] = []

    def _server(self, python: str, model: str, name: str, folder: Path) -> Program:
        connector = {
            "kv_connector": "KVFerryConnector",
            "kv_connector_module_path": "kvferry.adapters.vllm",
            "kv_role": "kv_producer" if name.startswith("prefill") else "kv_consumer",
            "kv_connector_extra_config": {
                "mode": "push" if name.endswith("1") else "pull",  # decode's counts
                "timeout_s": PATIENCE_S,
                "lease_s": PATIENCE_S,
            },
        }
        return server(python, model, name, folder, connector)

    def start(self) -> None:
        """Starts all, and asks one server alone for what is right."""
        for each in self.servers:
            each.start()
        for each in self.servers:
            each.wait_healthy()
        for each in self.routers:
            each.start()
            each.wait_healthy()
        self.prompts = [
            [self.random.randint(FIRST, LAST) for _ in range(length)]
            for length in LENGTHS
            for _ in range(PROMPTS_A_LENGTH)
        ]
        self.wants = [self.decodes[0].complete(each, NUM_TOKENS) for each in self.prompts]
        assert len({tuple(each) for each in self.wants}) == len(self.wants), "prompts look alike"

    def close(self) -> None:
        for each in (*self.routers, *self.servers):
            each.kill()

    async def run(self) -> None:
        """All requests, and the kills beside them."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            killer = asyncio.create_task(self._kill_in_turn())
            began_s, asked = time.monotonic(), []
            for number in range(REQUESTS):
                wait_s = began_s + number * DURATION_S / REQUESTS - time.monotonic()
                await asyncio.sleep(max(0.0, wait_s))
                asked.append(asyncio.create_task(self._ask(session, number)))
                assert not killer.done(), killer.result()
            await asyncio.gather(*asked)
            killer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await killer

    async def _kill_in_turn(self) -> None:
        for each in itertools.cycle(self.servers):
            await asyncio.sleep(KILL_EVERY_S)
            for other in self.servers:  # on a busy host a start takes longer than that
                await asyncio.to_thread(other.wait_healthy)
            await asyncio.to_thread(each.kill)
            each.start()

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> None:
        which = self.random.randrange(len(self.prompts))
        stream = self.random.random() < 0.5
        abort_s = self.random.uniform(0.0, 0.6) if self.random.random() < ABORTED else None
        url = self.routers[number % len(self.routers)].url + "/v1/completions"
        body = completion(self.prompts[which], NUM_TOKENS) | {"stream": stream}
        try:
            outcome = await asyncio.wait_for(self._answer(session, url, body, which), abort_s)
        except asyncio.TimeoutError:
            outcome = "silent" if abort_s is None else "given up"
        except aiohttp.ClientError as error:
            outcome = f"router failed: {error!r}"
        self.outcomes[outcome.partition(":")[0]] += 1
        if outcome.partition(":")[0] not in ("right", "given up"):
            self.details.append(f"request {number}, {len(self.prompts[which])} tokens: {outcome}")

    async def _answer(
        self, session: aiohttp.ClientSession, url: str, body: dict[str, Any], which: int
    ) -> str:
        async with session.post(url, json=body) as answer:
            raw = await answer.read()
            if answer.status != 200:
                return f"error: {answer.status} {raw[:200]!r}"
        if not body["stream"]:
            tokens = json.loads(raw)["choices"][0]["token_ids"]
        else:
            tokens = []
            for line in raw.splitlines():
                event = line.removeprefix(b"data: ")
                if event == line or event == b"[DONE]":
                    continue
                found = json.loads(event)
                if "error" in found:
                    # What came before must be right all the same.
                    whole = tokens == self.wants[which][: len(tokens)]
                    return f"error: {found['error']}" if whole else f"wrong: {tokens}"
                for choice in found["choices"]:
                    tokens += choice.get("token_ids") or []
        return "right" if tokens == self.wants[which] else f"wrong: {tokens}"

    def wait_for_free_blocks(self, each: Program) -> float:
        """The share of a server's blocks that are not free, when leases have run out."""
        deadline_s = time.monotonic() + 4 * PATIENCE_S
        while True:
            each.complete(self.prompts[0], 1)  # what it tells is from the end of its last step
            used = metric(each.url, "vllm:kv_cache_usage_perc")
            if used == 0 or time.monotonic() > deadline_s:
                return used
            time.sleep(1.0)


@pytest.fixture
def soak(vllm_python: str, model: Callable[[str], str], tmp_path: Path) -> Iterator[Soak]:
    made = Soak(vllm_python, model("llama"), tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_kills_and_aborts_leave_no_wrong_token_and_no_block(soak: Soak) -> None:
    asyncio.run(soak.run())
    for each in soak.servers:
        each.wait_healthy()
    used = {each.name: soak.wait_for_free_blocks(each) for each in soak.servers}
    loads = sum(metric(each.url, "vllm:kvferry_load_bytes_count") for each in soak.decodes)
    ways = {each.name: get(each.url + "/metrics") for each in soak.routers}
    kills = sum(each.kills for each in soak.servers)
    print(dict(soak.outcomes), f"{kills} kills, {loads:.0f} loads since the last, used {used}")
    print(*soak.details, sep="\n")
    assert set(used.values()) == {0.0}, used
    assert sum(soak.outcomes.values()) == REQUESTS
    assert set(soak.outcomes) <= {"right", "given up", "error"}, soak.details
    assert soak.outcomes["right"] >= REQUESTS // 2, soak.details
    for role in (soak.prefills, soak.decodes):
        assert any(each.kills for each in role), f"only {kills} kills: this host is too busy"
    assert 'way="both at once"' in ways["together"]
    assert loads > 0
