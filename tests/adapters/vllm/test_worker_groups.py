"""Several block tables through the vLLM connector's workers: windows beside full attention, latents."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.adapters.vllm.cache import CacheGroup
from kvferry.adapters.vllm.orders import Orders, ReceiveOrder, SendOrder
from tests.support.vllm_steps import (
    CONTENT,
    HEADS,
    SENTINEL,
    TOKENS,
    start_ranks,
    step,
    until_reported,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.adapters.vllm.worker import WorkerSide

BLOCKS = 20
NAMES = [f"model.layers.{number}.self_attn.attn" for number in range(6)]
# As vLLM has it of a model whose every third layer attends to all: blocks of all groups lie in the
# same two tensors.
HYBRID = (
    CacheGroup(0, "swa", (NAMES[0], NAMES[3]), TOKENS, 6),
    CacheGroup(1, "swa", (NAMES[1], NAMES[4]), TOKENS, 6),
    CacheGroup(2, "full", (NAMES[2], NAMES[5]), TOKENS),
)
NUM_TOKENS = 22  # the window of the next one begins with block 4
SRC = [[0, 0, 0, 0, 3, 5], [0, 0, 0, 0, 9, 8], [1, 2, 4, 6, 7, 10]]
DST = [[0, 0, 0, 0, 11, 2], [0, 0, 0, 0, 1, 19], [18, 3, 12, 13, 5, 4]]
SEND = Orders(sends=[SendOrder("a", "r", SRC, NUM_TOKENS + 1)])


def hybrid_caches(seed: int | None) -> dict[str, Any]:
    """Two tensors of three layers each; all of one value if there is no seed."""
    shape = (BLOCKS, HEADS, TOKENS, CONTENT)
    if seed is not None:
        torch.manual_seed(seed)
    made = [
        torch.full(shape, SENTINEL, dtype=torch.bfloat16)
        if seed is None
        else torch.randn(shape, dtype=torch.bfloat16)
        for _ in range(2)
    ]
    return {name: made[number // 3] for number, name in enumerate(NAMES)}


def asked(addresses: list[str], local: int = 0) -> Orders:
    return Orders(receives=[ReceiveOrder("d", "r", "p", addresses, DST, NUM_TOKENS, local)])


def check_arrived(src: dict[str, Any], dst: dict[str, Any], local: int = 0) -> None:
    """The blocks that are needed are there, and no other byte was touched."""
    moved = [
        (there, here)
        for group, source, destination in zip(HYBRID, SRC, DST, strict=True)
        for number, (here, there) in enumerate(zip(source, destination, strict=True))
        if number * TOKENS >= local and here
    ]
    for name in (NAMES[0], NAMES[3]):
        wanted = torch.full_like(dst[name], SENTINEL)
        for there, here in moved:
            wanted[there] = src[name][here]
        assert torch.equal(dst[name], wanted)


@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize("decode_first", [False, True])
def test_windows_alone_of_the_layers_that_have_them(
    new_worker: Callable[..., WorkerSide], mode: str, decode_first: bool
) -> None:
    src, dst = hybrid_caches(1), hybrid_caches(None)
    prefill = new_worker("p", "prefill", src, groups=HYBRID)
    decode = new_worker("d", "decode", dst, groups=HYBRID, mode=mode)
    wanted = asked([prefill.agent.address])
    if decode_first:
        assert not step(decode, wanted).received, "there is nothing yet"
    step(prefill, SEND, computes=True, names=NAMES)
    results = until_reported(decode, None if decode_first else wanted)
    assert (results.received, results.failed) == ({"d"}, set())
    check_arrived(src, dst)
    (nbytes,) = decode.figures.take()["load_nbytes"]
    assert nbytes == 2 * (2 + 2 + 6) * HEADS * TOKENS * CONTENT * 2
    assert until_reported(prefill, Orders(finished_sends=["a"])).sent == {"a"}
    assert prefill.figures.take()["sent_nbytes"] == [nbytes]


@pytest.mark.parametrize("local", [8, 20])
def test_only_what_decode_has_not(new_worker: Callable[..., WorkerSide], local: int) -> None:
    """A prefix may end before a window begins, or in it."""
    src, dst = hybrid_caches(1), hybrid_caches(None)
    prefill = new_worker("p", "prefill", src, groups=HYBRID)
    decode = new_worker("d", "decode", dst, groups=HYBRID)
    step(prefill, SEND, computes=True, names=NAMES)
    results = until_reported(decode, asked([prefill.agent.address], local))
    assert (results.received, results.failed) == ({"d"}, set())
    check_arrived(src, dst, local)


def test_prefill_is_told_when_nothing_is_needed(new_worker: Callable[..., WorkerSide]) -> None:
    prefill = new_worker("p", "prefill", hybrid_caches(1), groups=HYBRID)
    decode = new_worker("d", "decode", dst := hybrid_caches(None), groups=HYBRID)
    step(prefill, SEND, computes=True, names=NAMES)
    addresses = [prefill.agent.address]
    nothing: list[list[int]] = [[], [], []]
    order = ReceiveOrder("d", "r", "p", addresses, nothing, 23, 23, awaited=False)
    step(decode, Orders(receives=[order]))
    assert until_reported(prefill, Orders(finished_sends=["a"])).sent == {"a"}
    assert all(bool((cache == SENTINEL).all()) for cache in dst.values())


def test_a_refused_handoff_fails_at_once(new_worker: Callable[..., WorkerSide]) -> None:
    prefill = new_worker("p", "prefill", hybrid_caches(1), groups=HYBRID)
    decode = new_worker("d", "decode", hybrid_caches(2), groups=HYBRID)
    step(prefill, Orders(refused=["r"]))
    assert until_reported(decode, asked([prefill.agent.address])).failed == {"d"}


def test_another_window_is_refused_by_name(
    new_worker: Callable[..., WorkerSide], caplog: pytest.LogCaptureFixture
) -> None:
    prefill = new_worker("p", "prefill", hybrid_caches(1), groups=HYBRID)
    wider = tuple(group._replace(window=group.window and 7) for group in HYBRID)
    decode = new_worker("d", "decode", hybrid_caches(2), groups=wider)
    step(prefill, SEND, computes=True, names=NAMES)
    with caplog.at_level(logging.WARNING):
        assert until_reported(decode, asked([prefill.agent.address])).failed == {"d"}
    assert "window differs: source has 6, destination has 7" in caplog.text


def test_a_model_of_windows_alone(new_worker: Callable[..., WorkerSide]) -> None:
    groups = (CacheGroup(0, "swa", (NAMES[0], NAMES[3]), TOKENS, 6),)
    src, dst = [
        {name: caches[name] for name in (NAMES[0], NAMES[3])}
        for caches in (hybrid_caches(1), hybrid_caches(None))
    ]
    prefill = new_worker("p", "prefill", src, groups=groups)
    decode = new_worker("d", "decode", dst, groups=groups)
    send = Orders(sends=[SendOrder("a", "r", SRC[:1], NUM_TOKENS + 1)])
    step(prefill, send, computes=True, names=NAMES)
    order = ReceiveOrder("d", "r", "p", [prefill.agent.address], DST[:1], NUM_TOKENS, 0)
    results = until_reported(decode, Orders(receives=[order]))
    assert (results.received, results.failed) == ({"d"}, set())
    for name in src:
        assert torch.equal(dst[name][[11, 2]], src[name][[3, 5]])
        dst[name][[11, 2]] = SENTINEL
        assert bool((dst[name] == SENTINEL).all())


@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 2)])
def test_windows_between_ranks(
    new_worker: Callable[..., WorkerSide], mode: str, ranks: tuple[int, int]
) -> None:
    src, dst = hybrid_caches(1), hybrid_caches(None)
    prefills = start_ranks(new_worker, "p", "prefill", src, ranks[0], mode, HYBRID)
    decodes = start_ranks(new_worker, "d", "decode", dst, ranks[1], mode, HYBRID)
    addresses = [worker.agent.address for worker, _ in prefills]
    for worker, _ in prefills:
        step(worker, SEND, computes=True, names=NAMES)
    for worker, _ in decodes:
        results = until_reported(worker, asked(addresses))
        assert (results.received, results.failed) == ({"d"}, set())
    for worker, _ in prefills:
        assert until_reported(worker, Orders(finished_sends=["a"])).sent == {"a"}
    check_arrived(
        src, {name: torch.cat([caches[name] for _, caches in decodes], 1) for name in NAMES}
    )


@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize("ranks", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_latent_goes_whole_to_every_rank(
    new_worker: Callable[..., WorkerSide], mode: str, ranks: tuple[int, int]
) -> None:
    names = NAMES[:3]
    groups = (CacheGroup(0, "mla", tuple(names), TOKENS),)
    torch.manual_seed(1)
    src = {name: torch.randn(BLOCKS, TOKENS, CONTENT) for name in names}
    dst = {name: torch.full_like(cache, SENTINEL) for name, cache in src.items()}
    prefills = start_ranks(new_worker, "p", "prefill", src, ranks[0], mode, groups)
    decodes = start_ranks(new_worker, "d", "decode", dst, ranks[1], mode, groups)
    addresses = [worker.agent.address for worker, _ in prefills]
    for worker, _ in prefills:
        step(
            worker,
            Orders(sends=[SendOrder("a", "r", [[7, 2, 9]], 11)]),
            computes=True,
            names=names,
        )
    order = ReceiveOrder("d", "r", "p", addresses, [[4, 0, 5]], 11, 0)
    for worker, caches in decodes:
        results = until_reported(worker, Orders(receives=[order]))
        assert (results.received, results.failed) == ({"d"}, set())
        for name in names:
            wanted = torch.full_like(src[name], SENTINEL)
            wanted[[4, 0, 5]] = src[name][[7, 2, 9]]
            assert torch.equal(caches[name], wanted)
    for worker, _ in prefills:
        assert until_reported(worker, Orders(finished_sends=["a"])).sent == {"a"}


@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("decode_first", [False, True])
def test_a_draft_models_caches_go_with_the_models(
    new_worker: Callable[..., WorkerSide], mode: str, together: bool, decode_first: bool
) -> None:
    """Smaller ones, which a step fills when the model's are full, and then again and again."""
    names, drafts = NAMES[:2], [f"draft_model.{name}" for name in NAMES[:2]]

    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        shapes = [(BLOCKS, HEADS, TOKENS, CONTENT)] * 2 + [(BLOCKS, 1, TOKENS, CONTENT)] * 2
        return {
            name: torch.randn(shape, dtype=torch.bfloat16)
            for name, shape in zip([*names, *drafts], shapes, strict=True)
        }

    if together:
        groups: tuple[CacheGroup, ...] = (CacheGroup(0, "full", (*drafts, *names), TOKENS),)
    else:
        groups = (
            CacheGroup(0, "full", tuple(names), TOKENS),
            CacheGroup(1, "full", tuple(drafts), TOKENS),
        )
    here, there = [[7, 2, 9], [1, 3, 5]][: len(groups)], [[4, 0, 6], [8, 10, 2]][: len(groups)]
    src, dst = make(1), make(2)
    was = {name: cache.clone() for name, cache in dst.items()}
    prefill = new_worker("p", "prefill", src, groups=groups)
    decode = new_worker("d", "decode", dst, groups=groups, mode=mode)
    send = Orders(sends=[SendOrder("a", "r", here, 11)])
    order = ReceiveOrder("d", "r", "p", [prefill.agent.address], there, 11, 0)
    wanted: Orders | None = Orders(receives=[order])
    if decode_first:
        assert not step(decode, Orders(receives=[order])).received, "there is nothing yet"
        wanted = None
    step(prefill, send, computes=True, names=[*names, *drafts, *drafts])
    results = until_reported(decode, wanted)
    assert (results.received, results.failed) == ({"d"}, set())
    for number, members in enumerate([group.layers for group in groups]):
        for name in members:
            was[name][there[number]] = src[name][here[number]]
    for name, cache in dst.items():
        assert torch.equal(cache, was[name]), name
    assert until_reported(prefill, Orders(finished_sends=["a"])).sent == {"a"}
