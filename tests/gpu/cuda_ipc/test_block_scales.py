"""Scales that differ from block to block between GPU caches in two processes, made by kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.support.scaled_caches import NUM_BLOCKS, Scaled, expect

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
CASES = [
    (NHD, 4, BF16, HND, 6, FP8, True),
    (NHD, 4, BF16, NHD, 8, INT8, False),
    (HND, 6, FP8, NHD, 4, BF16, True),
    (NHD, 4, INT8, HND, 4, BF16, False),
    (NHD, 4, INT8, HND, 6, FP8, True),
]


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]} to {case[5]}")
def test_scales_are_made_and_used_as_on_the_cpu(
    engine: TransferEngine,
    link: Link,
    peer: GpuPeer,
    case: Any,
    write: bool,
) -> None:
    src_order, src_tokens, src_type, dst_order, dst_tokens, dst_type, by_head = case
    src = Scaled(src_order, src_tokens, src_type, by_head=by_head, seed=3)
    dst = Scaled(dst_order, dst_tokens, dst_type, by_head=by_head)
    tables = [np.random.default_rng(i).permutation(NUM_BLOCKS).tolist() for i in (1, 2)]
    start, stop = 2 * dst_tokens, 2 * dst_tokens + 25
    truth = expect(src, dst, tables, start, stop)
    mine, theirs = (src, dst) if write else (dst, src)
    tensors = [torch.from_numpy(array).cuda() for array in mine.arrays()]
    local = engine.register_cache(mine.layout, tensors)
    remote = peer.call("cache_of", theirs.arrays(), theirs.layout)
    plan = engine.plan(local, remote) if write else engine.plan(remote, local)
    nbytes = plan.tokens.nbytes(start, stop)
    if write:
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=nbytes)
        link.write_tokens(plan, *tables, start=start, stop=stop, imm=imm).wait(60)
        assert peer.call("wait", ticket) == nbytes
        got = peer.call("peek_cache")
    else:
        link.read_tokens(plan, *tables, start=start, stop=stop).wait(60)
        got = [tensor.cpu().numpy() for tensor in tensors]
    for mine_now, then in zip(got, truth, strict=True):
        assert np.array_equal(mine_now, then)
