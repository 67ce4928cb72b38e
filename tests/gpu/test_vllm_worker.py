"""The vLLM connector's workers with GPU memory: layers follow the stream that computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvferry.adapters.vllm.cache import Backend
from kvferry.adapters.vllm.orders import Orders, SendOrder
from tests.support.vllm_steps import NAMES, SENTINEL, ask, make_caches, make_worker, until_reported

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gpu

GPU = Backend("FLASH_ATTN", "", "0.32.0")
SRC, DST, OTHERS = [7, 2, 9], [4, 0, 5], [1, 2, 3, 6, 7, 8, 9, 10, 11]


@pytest.fixture(params=["cuda_ipc", "cma", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["push", "pull"])
def workers(
    request: pytest.FixtureRequest, transport: str, peer_device: int
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """A prefill and a decode worker, and their caches."""
    src = make_caches(1, device="cuda:0")
    dst = make_caches(None, device=f"cuda:{peer_device}")
    for device in {0, peer_device}:
        torch.cuda.synchronize(device)
    options = {"transport": transport, "backend": GPU, "mode": request.param}
    prefill = make_worker("p", "prefill", src, **options)
    decode = make_worker("d", "decode", dst, **options)
    yield prefill, src, decode, dst
    decode.close()
    prefill.close()


@pytest.mark.parametrize("decode_first", [False, True])
def test_layers_go_out_when_the_stream_has_computed_them(
    workers: tuple[Any, Any, Any, Any], decode_first: bool
) -> None:
    prefill, src, decode, dst = workers
    orders = Orders(sends=[SendOrder("a", "r", [SRC], 11)])
    wanted = {name: torch.rand_like(cache) for name, cache in src.items()}
    torch.cuda.synchronize()
    if decode_first:
        decode.begin_receives(ask(prefill, DST, 11))
    prefill.before_forward(orders)
    compute = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(compute):
        for name in NAMES:
            torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
            src[name].copy_(wanted[name])
            prefill.layer_computed(name)
        prefill.after_forward()
    if not decode_first:
        decode.begin_receives(ask(prefill, DST, 11))
    results = until_reported(decode)
    assert (results.received, results.failed) == ({"d"}, set())
    for name in NAMES:
        assert torch.equal(dst[name][DST].cpu(), wanted[name][SRC].cpu())
        assert bool((dst[name][OTHERS] == SENTINEL).all())
    assert until_reported(prefill, Orders(finished_sends=["a"])).sent == {"a"}
