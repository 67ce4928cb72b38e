"""Loads that a step of vLLM's waits for: which ones, and what becomes of them in a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.adapters.vllm import receiving as vllm_receiving
from kvferry.adapters.vllm.cache import CacheGroup
from kvferry.adapters.vllm.orders import Orders, SendOrder
from kvferry.adapters.vllm.scheduler import SchedulerSide
from kvferry.adapters.vllm.settings import Settings
from tests.support.vllm_steps import NAMES, SENTINEL, TOKENS, ask, make_caches, step, until_reported

from .test_scheduler import REMOTE, request
from .test_scheduler import step as scheduled

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.adapters.vllm.worker import WorkerSide

BLOCK = 16
PROMPT = 40
FINISHED = REMOTE | {"remote_num_tokens": PROMPT}
TABLE = ([1, 2, 3, 4],)


def make_side(max_tokens: int = 100, token_nbytes: int = 8) -> SchedulerSide:
    groups = (CacheGroup(0, "full", ("model.layers.0.attn",), BLOCK),)
    settings = Settings(in_step_nbytes=max_tokens * 8)
    return SchedulerSide("me", settings, groups=groups, tp_size=1, token_nbytes=token_nbytes)


def load(side: SchedulerSide, name: str = "d", params: Any = None, local: int = 0) -> Any:
    """What vLLM asks and tells in one pass; the order that comes of it."""
    names = {"remote_request_id": f"of {name}"}
    asked = request(name, PROMPT, (FINISHED if params is None else params) | names)
    count = side.num_remote_tokens(asked, local)
    assert side.num_remote_tokens(asked, local) == count, "asking changes nothing"
    in_step = side.loads_in_step(asked)
    side.blocks_allocated(asked, TABLE, count)
    order = side._orders.receives[-1]
    assert order.in_step == in_step
    assert count == PROMPT - local - in_step, "a step must have something to compute"
    assert (order.num_tokens, order.num_local_tokens) == (PROMPT, local)
    assert order.tables == [[1, 2, 3]]
    return order


def answered(side: SchedulerSide) -> SchedulerSide:
    """A first load from that engine has ended."""
    assert not load(side, "first").in_step, "nobody knows yet whether it answers"
    side.take_orders(scheduled())
    side.transfers_ended([], ["first"])
    return side


def test_a_step_waits_for_an_engine_that_has_answered() -> None:
    side = answered(make_side())
    assert load(side, local=16).in_step
    side.take_orders(scheduled({"d": 1}))
    side.transfers_ended([], [])
    side.request_ended(request("d", PROMPT, {}), ([1, 2, 3],), completed=True)
    assert load(side, "e").in_step


def test_a_step_does_not_wait_while_others_are_computed() -> None:
    side = answered(make_side())
    side.take_orders(scheduled({"x": 1, "y": 1}))
    side.request_ended(request("x", 5, {}), ([9],), completed=True)
    assert not load(side).in_step
    side.request_ended(request("y", 5, {}), ([8],), completed=False)
    assert load(side, "e").in_step


def test_a_step_waits_for_so_many_bytes() -> None:
    side = answered(make_side(max_tokens=2 * PROMPT))
    assert [load(side, name).in_step for name in "abc"] == [True, True, False]
    side.take_orders(scheduled())
    assert load(side, "e").in_step
    assert not load(answered(make_side(max_tokens=PROMPT - 1))).in_step


@pytest.mark.parametrize("size", [{"max_tokens": 0}, {"token_nbytes": 0}])
def test_no_step_waits_where_that_is_turned_off(size: dict[str, int]) -> None:
    assert not load(answered(make_side(**size))).in_step


def test_a_step_does_not_wait_for_what_prefill_may_still_compute() -> None:
    both = {key: value for key, value in REMOTE.items() if key != "remote_request_id"}
    assert not load(answered(make_side()), params=both | {"transfer_id": "t"}).in_step


def test_a_step_does_not_wait_for_an_engine_that_failed_last() -> None:
    side = answered(make_side())
    assert load(side).in_step
    side.take_orders(scheduled({"d": 1}))
    side.transfers_ended([], [], (), {2, 3})
    side.request_ended(request("d", PROMPT, {}), ([1, 2, 3],), completed=False)
    assert not load(side, "e").in_step
    side.take_orders(scheduled())
    side.transfers_ended([], ["e"], {"e"})
    assert not load(side, "f").in_step
    side.transfers_ended([], ["f"])
    assert load(side, "g").in_step


def in_step(prefill: WorkerSide, blocks: list[int], local: int = 0) -> Orders:
    orders = ask(prefill, blocks, 11, local)
    orders.receives[0].in_step = True
    return orders


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_a_load_is_there_when_the_forward_pass_begins(
    new_worker: Callable[..., WorkerSide], mode: str
) -> None:
    src, dst = make_caches(1), make_caches(None)
    prefill, decode = new_worker("p", "prefill", src), new_worker("d", "decode", dst, mode=mode)
    step(prefill, Orders(sends=[SendOrder("a", "r", [[7, 2, 9]], 11)]), computes=True)
    decode.begin_receives(in_step(prefill, [1, 0, 5], TOKENS))
    for name in NAMES:
        assert torch.equal(dst[name][[0, 5]], src[name][[2, 9]])
        assert bool((dst[name][[1, 2, 3, 4]] == SENTINEL).all())
    assert decode.take_failed_blocks() == set()
    assert len(decode.figures.take()["load_nbytes"]) == 1
    results = decode.take_results(idle=False)
    assert (results.received, results.failed) == (set(), set()), "vLLM waits for no report"
    assert until_reported(prefill, Orders(finished_sends=["a"])).sent == {"a"}


def test_a_load_that_fails_is_told_by_its_blocks(
    new_worker: Callable[..., WorkerSide],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_receiving, "CONNECT_TIMEOUT_S", 0.1)
    prefill = new_worker("p", "prefill", make_caches(1))
    decode = new_worker("d", "decode", dst := make_caches(None))
    orders = in_step(prefill, [4, 0, 5], TOKENS)
    prefill.close()
    decode.begin_receives(orders)
    assert decode.take_failed_blocks() == {0, 5}, "the first block was here already"
    assert decode.take_failed_blocks() == set()
    results = decode.take_results(idle=False)
    assert (results.received, results.failed) == (set(), set())
    assert decode.figures.take()["loads_failed"] == 1
    assert "KV of request d was not loaded" in caplog.text
    assert all(bool((cache == SENTINEL).all()) for cache in dst.values())


def test_a_prefill_engine_that_falls_silent_holds_a_step_up_for_a_while_only(
    new_worker: Callable[..., WorkerSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_receiving, "IN_STEP_TIMEOUT_S", 0.1)
    prefill = new_worker("p", "prefill", make_caches(1))
    decode = new_worker("d", "decode", dst := make_caches(None))
    decode.begin_receives(in_step(prefill, [4, 0, 5]))  # it never sends that
    assert decode.take_failed_blocks() == {4, 0, 5}
    step(prefill, Orders(sends=[SendOrder("a", "r", [[7, 2, 9]], 11)]), computes=True)
    assert until_reported(prefill, Orders(cancelled_sends=["a"])).sent == {"a"}
    assert all(bool((cache == SENTINEL).all()) for cache in dst.values())
