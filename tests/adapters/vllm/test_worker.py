"""The worker side of the vLLM connector: real agents, caches shaped as vLLM's, orders by hand."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING
from urllib.request import urlopen

import pytest
import torch

from kvferry.adapters.vllm.cache import Backend
from kvferry.adapters.vllm.orders import Orders, ReceiveOrder, SendOrder
from kvferry.control.cluster.client import DaemonClient
from kvferry.control.handoff.timeline import decode as decode_trace
from tests.support.daemon_process import DaemonProcess
from tests.support.vllm_steps import (
    BLOCKS,
    CONTENT,
    HEADS,
    LAYERS,
    NAMES,
    ROWS,
    SENTINEL,
    TOKENS,
    WAIT_S,
    ask,
    make_caches,
    start_ranks,
    step,
    two_ports,
    until_reported,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.adapters.vllm.worker import WorkerSide


@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize("decode_first", [False, True])
def test_a_prompt_arrives_whole_and_nothing_else_does(
    new_worker: Callable[..., WorkerSide], mode: str, decode_first: bool
) -> None:
    src, dst = make_caches(1), make_caches(None)
    prefill, decode = new_worker("p", "prefill", src), new_worker("d", "decode", dst, mode=mode)
    send = Orders(sends=[SendOrder("a", "r", [[7, 2, 9]], 11)])
    wanted = ask(prefill, [4, 0, 5], 11)
    if decode_first:
        assert not step(decode, wanted).received, "there is nothing yet"
        step(prefill, send, computes=True)
        results = until_reported(decode)
    else:
        step(prefill, send, computes=True)
        results = until_reported(decode, wanted)
    assert (results.received, results.failed) == ({"d"}, set())
    (nbytes,) = decode.figures.take()["load_nbytes"]
    assert nbytes == LAYERS * 3 * HEADS * TOKENS * CONTENT * 2
    assert not any(decode.figures.take().values())
    for name in NAMES:
        assert torch.equal(dst[name][[4, 0, 5]], src[name][[7, 2, 9]])
        others = [1, 2, 3, *range(6, BLOCKS)]
        assert bool((dst[name][others] == SENTINEL).all())
    assert step(prefill, Orders()).sent == set(), "nobody said yet that the request ended"
    assert until_reported(prefill, Orders(finished_sends=["a"])).sent == {"a"}
    assert prefill.figures.take()["sent_nbytes"] == [nbytes]


def test_a_worker_can_be_traced_from_outside(new_worker: Callable[..., WorkerSide]) -> None:
    worker = new_worker("p", "prefill", make_caches(1), http="127.0.0.1:0")
    with urlopen(f"http://{worker.agent.http_address}/trace", timeout=10) as answer:
        assert decode_trace(answer.read(), "the worker") == []


def test_only_what_decode_has_not_is_moved(new_worker: Callable[..., WorkerSide]) -> None:
    src, dst = make_caches(1), make_caches(None)
    prefill, decode = new_worker("p", "prefill", src), new_worker("d", "decode", dst)
    step(prefill, Orders(sends=[SendOrder("a", "r", [[7, 2, 9]], 11)]), computes=True)
    results = until_reported(decode, ask(prefill, [1, 0, 5], 11, local=TOKENS))
    assert (results.received, results.failed) == ({"d"}, set())
    for name in NAMES:
        assert torch.equal(dst[name][[0, 5]], src[name][[2, 9]])
        assert bool((dst[name][[1, 2, 3, 4]] == SENTINEL).all())


def test_prefill_is_told_when_nothing_is_needed(new_worker: Callable[..., WorkerSide]) -> None:
    prefill = new_worker("p", "prefill", make_caches(1))
    decode = new_worker("d", "decode", dst := make_caches(None))
    step(prefill, Orders(sends=[SendOrder("a", "r", [[7, 2, 9]], 11)]), computes=True)
    orders = ask(prefill, [], 11, local=11)
    orders.receives[0].awaited = False
    step(decode, orders)
    assert until_reported(prefill, Orders(finished_sends=["a"])).sent == {"a"}
    assert all(bool((cache == SENTINEL).all()) for cache in dst.values())


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_other_block_sizes_of_an_opaque_cache_are_refused_by_name(
    new_worker: Callable[..., WorkerSide], mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = new_worker("p", "prefill", make_caches(1))
    decode = new_worker("d", "decode", dst := make_caches(None, 2 * TOKENS), mode=mode)
    step(prefill, Orders(sends=[SendOrder("a", "r", [[7, 2, 9]], 11)]), computes=True)
    with caplog.at_level(logging.WARNING):
        results = until_reported(decode, ask(prefill, [0, 5], 11))
    assert results.failed == {"d"}
    assert "block size cannot change from 4 to 8 tokens" in caplog.text
    assert "'token' is opaque in codec 'vllm/CPU_ATTN/vec/0.32.0'" in caplog.text
    assert all(bool((cache == SENTINEL).all()) for cache in dst.values())


@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize("sizes", [(4, 8), (8, 4)])
@pytest.mark.parametrize(("num_tokens", "local"), [(16, 0), (11, 0), (11, 8)])
def test_other_block_sizes_where_blocks_are_rows_of_tokens(
    new_worker: Callable[..., WorkerSide],
    mode: str,
    sizes: tuple[int, int],
    num_tokens: int,
    local: int,
) -> None:
    src, dst = (make_caches(seed, size) for seed, size in zip((1, None), sizes, strict=True))
    prefill = new_worker("p", "prefill", src, backend=ROWS)
    decode = new_worker("d", "decode", dst, backend=ROWS, mode=mode)
    tables = [
        table[: -(-num_tokens // size)]
        for table, size in zip(([7, 2, 9, 1], [4, 0, 5, 3]), sizes, strict=True)
    ]
    step(prefill, Orders(sends=[SendOrder("a", "r", [tables[0]], num_tokens)]), computes=True)
    results = until_reported(decode, ask(prefill, tables[1], num_tokens, local=local))
    assert (results.received, results.failed) == ({"d"}, set())
    for name in NAMES:
        sent = torch.cat([src[name][block] for block in tables[0]], 1)
        wanted = torch.full_like(dst[name], SENTINEL)
        for token in range(local, num_tokens):
            block = tables[1][token // sizes[1]]
            wanted[block, :, token % sizes[1]] = sent[:, token]
        assert torch.equal(dst[name], wanted)
    assert until_reported(prefill, Orders(finished_sends=["a"])).sent == {"a"}


def test_another_instruction_set_is_refused_by_name(
    new_worker: Callable[..., WorkerSide], caplog: pytest.LogCaptureFixture
) -> None:
    prefill = new_worker("p", "prefill", make_caches(1))
    other = Backend("CPU_ATTN", "amx", "0.32.0")
    decode = new_worker("d", "decode", make_caches(None), backend=other)
    step(prefill, Orders(sends=[SendOrder("a", "r", [[7]], 4)]), computes=True)
    assert until_reported(decode, ask(prefill, [0], 4)).failed == {"d"}
    assert "codec differs" in caplog.text
    assert "amx" in caplog.text


def test_a_block_of_vllm_may_be_several_of_the_cache(new_worker: Callable[..., WorkerSide]) -> None:
    src, dst = make_caches(1), make_caches(None)
    prefill = new_worker("p", "prefill", src, split=2)
    decode = new_worker("d", "decode", dst, split=3)
    step(prefill, Orders(sends=[SendOrder("a", "r", [[4, 1]], 11)]), computes=True)  # 8 9 2
    results = until_reported(decode, ask(prefill, [2], 11))  # 6 7 8
    assert (results.received, results.failed) == ({"d"}, set())
    for name in NAMES:
        assert torch.equal(dst[name][[6, 7, 8]], src[name][[8, 9, 2]])
        assert bool((dst[name][[0, 1, 2, 3, 4, 5, 9, 10, 11]] == SENTINEL).all())


def test_a_prefill_engine_that_is_not_there_fails_the_load(
    new_worker: Callable[..., WorkerSide], caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = (
        new_worker("p", "prefill", make_caches(1)),
        new_worker("d", "decode", make_caches(2)),
    )
    orders = ask(prefill, [0], 4)
    orders.receives[0].peer = "another"
    assert until_reported(decode, orders).failed == {"d"}
    assert "is p/0, not another/0: the prefill engine was restarted" in caplog.text
    assert decode.figures.take()["loads_failed"] == 1


@pytest.mark.parametrize("port", ["the same", "another"])
def test_a_prefill_engine_that_restarts_at_its_address_is_loaded_from_at_once(
    new_worker: Callable[..., WorkerSide], port: str
) -> None:
    """With a new identity, as vLLM gives one with each start."""
    src, dst = make_caches(1), make_caches(None)
    prefill, decode = new_worker("p", "prefill", src), new_worker("d", "decode", dst)
    step(prefill, Orders(sends=[SendOrder("a", "r", [[7]], 4)]), computes=True)
    assert not until_reported(decode, ask(prefill, [0], 4)).failed
    address = prefill.agent.address
    taken = int(address.rpartition(":")[2]) if port == "the same" else 0
    prefill.close()
    again = new_worker("q", "prefill", src, port=taken)
    assert (again.agent.address == address) == (port == "the same")
    step(again, Orders(sends=[SendOrder("a", "r", [[2]], 4)]), computes=True)
    orders = ask(again, [3], 4)
    orders.receives[0].peer = "q"
    assert not until_reported(decode, orders).failed
    for name in NAMES:
        assert torch.equal(dst[name][3], src[name][2])


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_orders_that_cannot_be_carried_out_end_alone(
    new_worker: Callable[..., WorkerSide], role: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever they are: vLLM's worker goes on, and what waits for them hears of it."""
    worker = new_worker("w", role, make_caches(1))
    send = SendOrder("a", "r", [[10**6]] if role == "prefill" else [[1]], 4)
    step(worker, Orders(sends=[send]), computes=True)
    assert until_reported(worker, Orders(finished_sends=["a"])).sent == {"a"}
    receive = ReceiveOrder("d", "r", "p", ["tcp://127.0.0.1:1"], [[1]], 4, 0)
    receive.addresses = ["nonsense"]
    assert until_reported(worker, Orders(receives=[receive])).failed == {"d"}
    step(worker, Orders(refused=["x" * 500]))


def test_aborts_on_either_side_end_both(new_worker: Callable[..., WorkerSide]) -> None:
    prefill, decode = (
        new_worker("p", "prefill", make_caches(1)),
        new_worker("d", "decode", make_caches(2)),
    )
    step(decode, ask(prefill, [0, 1, 2], 11))
    assert until_reported(decode, Orders(cancelled_receives=["d"])).received == {"d"}
    step(prefill, Orders(sends=[SendOrder("a", "s", [[7, 2, 9]], 11)]), computes=True)
    assert until_reported(prefill, Orders(cancelled_sends=["a"])).sent == {"a"}


@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize(
    ("ranks", "decode_first"), [((1, 2), False), ((1, 2), True), ((2, 1), False), ((2, 2), False)]
)
def test_tensor_parallelism_may_differ(
    new_worker: Callable[..., WorkerSide], mode: str, ranks: tuple[int, int], decode_first: bool
) -> None:
    model = make_caches(1)
    src, dst = model, {name: torch.full_like(cache, SENTINEL) for name, cache in model.items()}
    prefills = start_ranks(new_worker, "p", "prefill", src, ranks[0], mode)
    decodes = start_ranks(new_worker, "d", "decode", dst, ranks[1], mode)
    addresses = [worker.agent.address for worker, _ in prefills]
    order = ReceiveOrder("d", "r", "p", addresses, [[4, 0, 5]], 11, 0)
    send = Orders(sends=[SendOrder("a", "r", [[7, 2, 9]], 11)])
    if decode_first:
        for worker, _ in decodes:
            assert not step(worker, Orders(receives=[order])).received
    for worker, _ in prefills:
        step(worker, send, computes=True)
    for worker, _ in decodes:
        wanted = None if decode_first else Orders(receives=[order])
        results = until_reported(worker, wanted)
        assert (results.received, results.failed) == ({"d"}, set())
    for worker, _ in prefills:
        assert until_reported(worker, Orders(finished_sends=["a"])).sent == {"a"}
    # Decode has it all by now: prefill learns that nothing is needed.
    again = ReceiveOrder("e", "s", "p", addresses, [[]], 11, 11, awaited=False)
    for worker, _ in prefills:
        step(worker, Orders(sends=[SendOrder("b", "s", [[7, 2, 9]], 11)]), computes=True)
    for worker, _ in decodes:
        step(worker, Orders(receives=[again]))
    for worker, _ in prefills:
        assert until_reported(worker, Orders(finished_sends=["b"])).sent == {"b"}
        assert len(worker.figures.take()["sent_nbytes"]) == 2
    for _, caches in decodes:
        for name in NAMES:
            assert bool((caches[name][[1, 2, 3, *range(6, BLOCKS)]] == SENTINEL).all())
    for name in NAMES:
        arrived = torch.cat([caches[name] for _, caches in decodes], 1)
        assert torch.equal(arrived[[4, 0, 5]], src[name][[7, 2, 9]])


@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize("decode_first", [False, True])
def test_a_refusal_is_for_all_ranks(
    new_worker: Callable[..., WorkerSide],
    mode: str,
    decode_first: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Prefill's request ended before it had anything."""
    prefill = new_worker("p", "prefill", make_caches(1))
    decodes = start_ranks(new_worker, "d", "decode", make_caches(None), 2, mode)
    order = ReceiveOrder("d", "r", "p", [prefill.agent.address], [[4, 0, 5]], 11, 0)
    if not decode_first:
        step(prefill, Orders(refused=["r"]))
    for worker, _ in decodes:
        assert not step(worker, Orders(receives=[order])).received
    if decode_first:
        step(prefill, Orders(refused=["r"]))
    for worker, caches in decodes:
        with caplog.at_level(logging.WARNING):
            assert until_reported(worker).failed == {"d"}
        assert all(bool((cache == SENTINEL).all()) for cache in caches.values())
    told = [each for each in caplog.messages if "was not loaded" in each]
    assert len(told) == 2
    assert all("0 source blocks" in each for each in told), told  # and not that time ran out


def test_a_router_need_only_know_the_first_rank(new_worker: Callable[..., WorkerSide]) -> None:
    """The ports of the others follow on its."""
    src, dst = make_caches(1), make_caches(None)
    port = two_ports()
    prefills = start_ranks(new_worker, "p", "prefill", src, 2, "push", port=port)
    decode = new_worker("d", "decode", dst)
    order = ReceiveOrder("d", "r", "p", [f"tcp://127.0.0.1:{port}"], [[4, 0, 5]], 11, 0)
    assert not step(decode, Orders(receives=[order])).received
    for worker, _ in prefills:
        step(worker, Orders(sends=[SendOrder("a", "r", [[7, 2, 9]], 11)]), computes=True)
    results = until_reported(decode)
    assert (results.received, results.failed) == ({"d"}, set())
    for worker, _ in prefills:
        assert until_reported(worker, Orders(finished_sends=["a"])).sent == {"a"}
    for name in NAMES:
        assert torch.equal(dst[name][[4, 0, 5]], src[name][[7, 2, 9]])


def test_the_daemon_learns_where_the_engine_serves_and_what_it_has_to_do(
    new_worker: Callable[..., WorkerSide],
) -> None:
    daemon = DaemonProcess()
    try:
        options = {"daemon": daemon.address, "service": "http://here:8100"}
        prefill = new_worker("p", "prefill", make_caches(1), model="tiny", split=2, **options)
        step(prefill, Orders(queued_tokens=77, free_blocks=3))
        prefill.agent.wait_for_member("p/0", WAIT_S)
        with DaemonClient(daemon.address) as client:
            deadline_s = time.monotonic() + WAIT_S
            while not (seen := client.look()).loads["p/0"].queued_tokens:
                assert time.monotonic() < deadline_s, "the load was never told"
        (member,) = seen.members
        assert (member.registration.model, member.registration.service) == (
            "tiny",
            "http://here:8100",
        )
        load = seen.loads["p/0"]
        assert (load.queued_tokens, load.free_blocks) == (77, 6)
    finally:
        daemon.end()


def test_a_refused_handoff_fails_at_once(new_worker: Callable[..., WorkerSide]) -> None:
    prefill, decode = (
        new_worker("p", "prefill", make_caches(1)),
        new_worker("d", "decode", make_caches(2)),
    )
    step(prefill, Orders(refused=["r"]))
    assert until_reported(decode, ask(prefill, [0, 1, 2], 11)).failed == {"d"}
