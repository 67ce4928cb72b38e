"""Agents with GPU memory: layers go out as a stream computes them, pushed and pulled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from kvferry.adapters.agent.agent import Agent
from kvferry.engine.layout.kv_layout import KVLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gpu

DIMS = "plane block token head dim"
SHAPE = (2, 19, 16, 2, 64)
NUM_LAYERS = 3


@pytest.fixture(params=["cuda_ipc", "cma", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def pair(transport: str, peer_device: int) -> Iterator[tuple[Any, Any, Any, Any]]:
    """A prefill and a decode agent, connected, and their pools."""
    made: list[Any] = []
    for role, device, value in (("prefill", 0, 1.0), ("decode", peer_device, 0.0)):
        with torch.cuda.device(device):
            tensors = [torch.full(SHAPE, value, device="cuda") for _ in range(NUM_LAYERS)]
            torch.cuda.synchronize()
        agent = Agent(
            name=role,
            role=role,  # type: ignore[arg-type]
            layout=KVLayout.from_tensors(tensors, DIMS),
            tensors=tensors,
            transports=(transport,),
        )
        made += [agent, tensors]
    prefill, sent, decode, got = made
    decode.connect(prefill.address, 20.0)
    yield prefill, sent, decode, got
    decode.close()
    prefill.close()


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_layers_go_out_as_they_are_computed(
    pair: tuple[Any, Any, Any, Any], mode: Literal["push", "pull"]
) -> None:
    prefill, sent, decode, got = pair
    src, dst = [3, 0, 17, 9], [1, 18, 4, 6]
    warm = decode.receive("warm-up", "prefill", dst, mode=mode)
    prefill.send("warm-up", src).wait(60)
    warm.wait(60)
    wanted = [torch.rand_like(tensor) for tensor in sent]
    torch.cuda.synchronize()
    handoff = decode.receive("request", "prefill", dst, mode=mode)
    sending = prefill.open_send("request", src)
    compute = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(compute):
        for layer, tensor in enumerate(sent):
            torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
            tensor.copy_(wanted[layer])
            sending.write_layers(range(layer, layer + 1), stream=compute)
    sending.finish(stream=compute)
    assert not sending.done()  # the host waited for nothing
    assert handoff.wait(60) == 4 * NUM_LAYERS * sent[0][:, 0].nbytes
    sending.wait(60)
    for there, right in zip(got, wanted, strict=True):
        assert torch.equal(there[:, dst].cpu(), right[:, src].cpu())
        rest = [block for block in range(SHAPE[1]) if block not in dst]
        assert int(there[:, rest].count_nonzero()) == 0
