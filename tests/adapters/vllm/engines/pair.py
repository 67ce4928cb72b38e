"""Runs checks on a prefill and a decode engine and writes down what came out.

Usage: pair.py SPEC.json RESULT.json

The spec has `model`, the `options` of both engines, those of each in `prefill` and `decode`, and the
names of `checks`. The result has an entry for each check, or, under `error`, why there is none.
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.tools.vllm_cpu.engine import Engine, tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_TOKENS = 16
KEPT = 129  # tokens of which vLLM keeps four blocks; of 128 it keeps three where there are windows
PREEMPTED_TOKENS = 100  # from 7 blocks to 10, for each of six requests
FIRST, LAST = 3, 258  # ids of the model's ordinary tokens
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class Pair:
    """Two engines, prompts, and what one engine alone makes of them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        common = {"model": spec["model"]} | spec.get("options", {})
        self.prefill = Engine("prefill", common | spec["prefill"])
        self.decode = Engine("decode", common | spec["decode"])
        self._random = random.Random(1)
        self._count = 0

    def prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randint(FIRST, LAST) for _ in range(num_tokens)]

    def alone(self, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
        """The reference: decode's engine computes everything; its cache is emptied after it."""
        output = tokens(self.decode.generate(prompt, num_tokens))
        assert self.decode.forget_prefixes()
        return output

    def prefilled(self, prompt: list[int]) -> dict[str, Any]:
        """The parameters that prefill answers with."""
        params = self.prefill.generate(prompt, 1, dict(TO_PREFILL)).kv_transfer_params
        assert params, "prefill gave no kv_transfer_params"
        return dict(params)

    def one_after_the_other(self, prompt: list[int]) -> Any:
        return self.decode.generate(prompt, NUM_TOKENS, self.prefilled(prompt))

    def router_params(self, first: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a router that calls both at once tells prefill and decode."""
        self._count += 1
        name = f"transfer-{self._count}"
        keys = ["remote_engine_id", "remote_host", "remote_port"]
        if first["tp_size"] > 1:  # on ports that do not follow on each other
            keys.append("remote_agents")
        address = {key: first[key] for key in keys}
        return (
            TO_PREFILL | {"transfer_id": name},
            {"do_remote_prefill": True, "transfer_id": name} | address,
        )


def check_tokens(pair: Pair) -> Any:
    """Prompts of less than a block, of whole blocks, of several chunks."""
    return _compare(pair, (17, 64, 129, 300, 700))


def check_windows(pair: Pair) -> Any:
    """Prompts whose last token's window begins at a block's last token: vLLM lets go of it early."""
    return _compare(pair, (111, 303, 687))


def _compare(pair: Pair, lengths: Sequence[int]) -> Any:
    result = []
    for length in lengths:
        prompt = pair.prompt(length)
        want = pair.alone(prompt)
        got = pair.one_after_the_other(prompt)
        result.append([length, want, tokens(got)])
        assert pair.decode.forget_prefixes(), "blocks leaked on decode"
    assert pair.prefill.forget_prefixes(), "blocks leaked on prefill"
    return result


def check_both_at_once(pair: Pair) -> Any:
    """Decode has the request before prefill, and at the same time."""
    first = pair.prefilled(warm := pair.prompt(40))
    pair.decode.generate(warm, 1, first)
    result = []
    for length, wait_s in ((129, 0.2), (300, 0.0), (700, 0.0)):
        prompt = pair.prompt(length)
        want = pair.alone(prompt)
        to_prefill, to_decode = pair.router_params(first)
        _, got = pair.decode.submit(prompt, NUM_TOKENS, to_decode)
        time.sleep(wait_s)  # which of the two comes first must not matter
        pair.prefill.generate(prompt, 1, to_prefill)
        result.append([length, want, tokens(got.result(60))])
        assert pair.decode.forget_prefixes(), "blocks leaked on decode"
    assert pair.prefill.forget_prefixes(), "blocks leaked on prefill"
    return result


def check_many(pair: Pair) -> Any:
    """Eight requests at a time."""
    prompts = [pair.prompt(50 + 30 * number) for number in range(8)]
    together = [pair.decode.submit(prompt, NUM_TOKENS)[1] for prompt in prompts]
    wants = [tokens(each.result(60)) for each in together]
    assert pair.decode.forget_prefixes()
    one_by_one = [pair.alone(prompt) for prompt in prompts]
    assert wants == one_by_one, "this model's tokens depend on what else is computed"
    made = [pair.prefill.submit(prompt, 1, dict(TO_PREFILL))[1] for prompt in prompts]
    got = [
        pair.decode.submit(prompt, NUM_TOKENS, output.result(60).kv_transfer_params)[1]
        for prompt, output in zip(prompts, made, strict=True)
    ]
    outputs = [tokens(each.result(60)) for each in got]
    assert pair.decode.forget_prefixes(), "blocks leaked on decode"
    assert pair.prefill.forget_prefixes(), "blocks leaked on prefill"
    return [[len(p), want, out] for p, want, out in zip(prompts, wants, outputs, strict=True)]


def check_recycled(pair: Pair) -> Any:
    """What prefill computes after a prompt must not take the prompt's blocks before decode has read."""
    result = []
    for length, answer in ((303, 1), (300, 1), (300, 60)):
        prompt = pair.prompt(length)
        want = pair.alone(prompt)
        # It goes on after its prompt, which a router never asks for: its windows move on, too.
        made = pair.prefill.generate(prompt, answer, dict(TO_PREFILL))
        for _ in range(4):
            pair.prefill.generate(pair.prompt(700), 1)
        got = pair.decode.generate(prompt, NUM_TOKENS, made.kv_transfer_params)
        result.append([length, want, tokens(got)])
        assert pair.decode.forget_prefixes(), "blocks leaked on decode"
        assert pair.prefill.forget_prefixes(), "blocks leaked on prefill"
    return result


def check_corrupted(pair: Pair) -> Any:
    """The control: zeros in prefill's cache must change the tokens, or nothing was loaded."""
    prompt = pair.prompt(300)
    want = pair.alone(prompt)
    params = pair.prefilled(prompt)
    pair.prefill.zero_caches()
    got = pair.decode.generate(prompt, NUM_TOKENS, params)
    assert pair.prefill.forget_prefixes()
    assert pair.decode.forget_prefixes()
    return [300, want, tokens(got)]


def check_prefix(pair: Pair) -> Any:
    """Decode has the first 128 tokens; zeros in prefill's blocks of those must change nothing."""
    prompt = pair.prompt(300)
    want = pair.alone(prompt)
    pair.decode.generate(prompt[:KEPT], 1)
    got = pair.one_after_the_other(prompt)
    assert pair.decode.forget_prefixes()
    pair.decode.generate(prompt[:KEPT], 1)
    assert pair.prefill.forget_prefixes()
    params = pair.prefilled(prompt)
    there = {
        block
        for table in params["remote_block_ids"]
        for block in table[: KEPT * len(table) // len(prompt)]
        if block
    }
    assert there
    pair.prefill.call(lambda llm: llm.collective_rpc(_zero_blocks, args=(sorted(there),)))
    zeroed = pair.decode.generate(prompt, NUM_TOKENS, params)
    assert pair.decode.forget_prefixes()
    assert pair.prefill.forget_prefixes()
    return [[300, want, tokens(got)], [300, want, tokens(zeroed)]]


def _zero_blocks(worker: Any, block_ids: list[int]) -> None:
    for cache in worker.model_runner.kv_caches:
        cache[block_ids] = 0


def check_unreachable(pair: Pair) -> Any:
    """Nobody is where decode was told to look: recomputed, or an error, as configured."""
    prompt = pair.prompt(129)
    want = pair.alone(prompt)
    params = pair.prefilled(prompt)
    wrong = params | {"remote_engine_id": "another", "remote_host": "127.0.0.1"}
    got = pair.decode.generate(prompt, NUM_TOKENS, wrong)
    reason = got.outputs[0].finish_reason
    pair.decode.generate(prompt, 1, params)  # so that prefill frees its blocks
    assert pair.decode.forget_prefixes()
    assert pair.prefill.forget_prefixes()
    return {"want": want, "got": tokens(got), "finish_reason": reason}


def check_silent(pair: Pair) -> Any:
    """Prefill has answered, and then does not send: the step that waits for it gives up."""
    prompt = pair.prompt(129)
    want = pair.alone(prompt)
    # Between engines that have met, so that the step itself waits.
    assert tokens(pair.one_after_the_other(prompt)) == want
    assert pair.decode.forget_prefixes()
    params = pair.prefilled(prompt)
    got = pair.decode.generate(prompt, NUM_TOKENS, params | {"remote_request_id": "another"})
    reason = got.outputs[0].finish_reason
    assert pair.decode.forget_prefixes(), "blocks leaked on decode"
    after = tokens(pair.decode.generate(prompt, NUM_TOKENS, params))
    assert pair.decode.forget_prefixes()
    assert pair.prefill.forget_prefixes()
    return {"want": want, "got": tokens(got), "finish_reason": reason, "after": after}


def check_aborts(pair: Pair) -> Any:
    """Requests are aborted at every moment of their lives; the next one is right, nothing leaks."""
    first = pair.prefilled(warm := pair.prompt(40))
    pair.decode.generate(warm, 1, first)
    aborted = 0
    for delay_s in (0.0, 0.002, 0.01, 0.03, 0.1, 0.3):
        for both in (False, True):
            prompt = pair.prompt(700)
            if both:  # prefill is aborted while it computes, decode waits for it
                to_prefill, to_decode = pair.router_params(first)
                name, computed = pair.prefill.submit(prompt, 1, to_prefill)
                loading, output = pair.decode.submit(prompt, NUM_TOKENS, to_decode)
                time.sleep(delay_s)  # the moment of the abort is what is varied
                pair.prefill.abort(name)
                computed.result(60)
            else:
                params = pair.prefilled(prompt)
                loading, output = pair.decode.submit(prompt, NUM_TOKENS, params)
                time.sleep(delay_s)
            pair.decode.abort(loading)
            aborted += output.result(60) is None
    assert pair.decode.forget_prefixes(), "blocks leaked on decode"
    assert pair.prefill.forget_prefixes(), "blocks leaked on prefill"
    prompt = pair.prompt(129)
    return {
        "aborted": aborted,
        "after": [129, pair.alone(prompt), tokens(pair.one_after_the_other(prompt))],
    }


def check_preempted(pair: Pair) -> Any:
    """Six requests on a decode engine with room for fewer: some lose their blocks after a load."""
    prompts = [pair.prompt(200) for _ in range(6)]
    wants = [pair.alone(prompt, PREEMPTED_TOKENS) for prompt in prompts]
    made = [pair.prefilled(prompt) for prompt in prompts]
    got = [
        pair.decode.submit(prompt, PREEMPTED_TOKENS, params)[1]
        for prompt, params in zip(prompts, made, strict=True)
    ]
    outputs = [tokens(each.result(120)) for each in got]
    count = pair.decode.call(_count_preemptions)
    assert pair.decode.forget_prefixes(), "blocks leaked on decode"
    assert pair.prefill.forget_prefixes(), "blocks leaked on prefill"
    rows = [[200, want, out] for want, out in zip(wants, outputs, strict=True)]
    return {"preemptions": count, "rows": rows}


def _count_preemptions(llm: Any) -> int:
    return int(sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"))


def check_speculated(pair: Pair) -> Any:
    """Tokens, and how many guesses decode made and took after a load and without one."""
    rows, alone, loaded = [], [0, 0], [0, 0]
    for length in (64, 129, 300):
        prompt = pair.prompt(length)
        seen = [pair.decode.call(_count_guesses)]
        want = pair.alone(prompt)
        seen.append(pair.decode.call(_count_guesses))
        rows.append([length, want, tokens(pair.one_after_the_other(prompt))])
        seen.append(pair.decode.call(_count_guesses))
        for counts, before, after in ((alone, *seen[:2]), (loaded, *seen[1:])):
            for which in range(2):
                counts[which] += after[which] - before[which]
        assert pair.decode.forget_prefixes(), "blocks leaked on decode"
    assert pair.prefill.forget_prefixes(), "blocks leaked on prefill"
    return {"rows": rows, "alone": alone, "loaded": loaded}


def _count_guesses(llm: Any) -> tuple[int, int]:
    found = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    made, taken = (f"vllm:spec_decode_num_{what}_tokens" for what in ("draft", "accepted"))
    return int(found[made]), int(found[taken])


def check_figures(pair: Pair) -> Any:
    """What decode's Prometheus metrics have of the connector, before and after one load.

    Prefill's go nowhere: both engines' front ends are in this process, which has one registry.
    """
    before = pair.decode.call(_kvferry_metrics)
    pair.one_after_the_other(pair.prompt(129))
    assert pair.decode.forget_prefixes()
    return {"before": before, "after": pair.decode.call(_kvferry_metrics)}


def _kvferry_metrics(llm: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:kvferry_"):
            name = metric.name.removeprefix("vllm:kvferry_")
            value = metric.value if hasattr(metric, "value") else metric.sum
            found[name] = found.get(name, 0) + value
    return found


def main(spec_file: str, result_file: str) -> None:
    """Runs the checks in order; one that fails does not stop the others."""
    spec = json.loads(Path(spec_file).read_text())
    results: dict[str, Any] = {}
    try:
        pair = Pair(spec)
        for name in spec["checks"]:
            started_s = time.monotonic()
            try:
                results[name] = globals()[f"check_{name}"](pair)
            except BaseException:
                results[name] = {"error": traceback.format_exc()}
            print(f"== {name} {time.monotonic() - started_s:.1f} s", flush=True)
    except BaseException:
        results["error"] = traceback.format_exc()
    Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
