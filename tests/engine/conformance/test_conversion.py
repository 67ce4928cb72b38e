"""Conformance: numbers that change their type travel in chunks, and a transfer's staging is bounded."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.engine.convert import chunk as converting
from kvferry.engine.convert import conversion
from kvferry.engine.convert.conversion import chunks_of
from kvferry.engine.errors import Cancelled, DeadlineExceeded, EngineError
from kvferry.engine.transfer.moves import TokenMove
from tests.support.caches import PagedPool
from tests.support.scaled_caches import NUM_BLOCKS, Scaled, expect

if TYPE_CHECKING:
    from kvferry.engine.link.link import Link
    from kvferry.engine.transfer_engine import TransferEngine
    from tests.conftest import Peer

NHD = ("plane", "block", "token", "head", "dim")
HND = ("plane", "block", "head", "token", "dim")
FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
TABLES = [np.random.default_rng(i).permutation(NUM_BLOCKS).tolist() for i in (1, 2)]


def plan_of(engine: TransferEngine, peer: Peer, src: Scaled, dst: Scaled, write: bool) -> Any:
    mine, theirs = (src, dst) if write else (dst, src)
    local = engine.register_cache(mine.layout, mine.arrays())
    remote = peer.call("cache_of", theirs.arrays(), theirs.layout)
    return engine.plan(local, remote) if write else engine.plan(remote, local)


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("types", [(BF16, FP8), (INT8, BF16), (INT8, FP8)])
def test_it_does_not_matter_where_a_transfer_is_cut(
    engine: TransferEngine,
    link: Link,
    peer: Peer,
    types: Any,
    write: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversion, "CHUNK_NBYTES", 150)  # a block of numbers has more
    src, dst = Scaled(NHD, 4, types[0], seed=3), Scaled(HND, 6, types[1])
    truth = expect(src, dst, TABLES, 12, 37)
    plan = plan_of(engine, peer, src, dst, write)
    move = TokenMove(plan, (TABLES[0],), (TABLES[1],), 12, 37)
    assert len(list(chunks_of(move, 150))) >= 8
    nbytes = plan.tokens.nbytes(12, 37)
    if write:
        imm = peer.call("new_imm")
        ticket = peer.call("expect", imm, nbytes=nbytes)
        assert link.write_tokens(plan, *TABLES, start=12, stop=37, imm=imm).wait() == nbytes
        assert peer.call("wait", ticket) == nbytes
        got = peer.call("peek_cache")
    else:
        link.read_tokens(plan, *TABLES, start=12, stop=37).wait()
        got = dst.arrays()
    for mine, theirs in zip(got, truth, strict=True):
        assert np.array_equal(mine, theirs)
    plan.local.deregister()  # nothing holds it any more


def test_nothing_at_all_is_counted_too(engine: TransferEngine, link: Link, peer: Peer) -> None:
    plan = plan_of(engine, peer, Scaled(NHD, 4, BF16, seed=3), Scaled(HND, 6, FP8), True)
    imm = peer.call("new_imm")
    ticket = peer.call("expect", imm, nbytes=0, writes=1)
    assert link.write_tokens(plan, *TABLES, start=6, stop=6, imm=imm).wait() == 0
    assert peer.call("wait", ticket) == 0
    plan.local.deregister()


def test_a_transfer_that_is_cancelled_begins_no_further_chunk(
    engine: TransferEngine, link: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "CHUNK_NBYTES", 150)
    src, dst = Scaled(NHD, 4, BF16, seed=3), Scaled(HND, 6, FP8)
    plan = plan_of(engine, peer, src, dst, True)
    made: list[Any] = []
    chunk = converting.ConvertChunk

    def first_then_cancel(*arguments: Any) -> Any:
        made.append(chunk(*arguments))
        ticket.cancel()
        return made[-1]

    monkeypatch.setattr(conversion, "ConvertChunk", first_then_cancel)
    # Both are held up until the ticket is there to be cancelled.
    run = link.core.copiers.run
    tasks: list[Any] = []
    monkeypatch.setattr(link.core.copiers, "run", tasks.append)
    ticket = link.write_tokens(plan, *TABLES, start=12, stop=37)
    monkeypatch.setattr(link.core.copiers, "run", run)
    for task in tasks:
        task()
    with pytest.raises(Cancelled):
        ticket.wait(30)
    assert len(made) == 1
    plan.local.deregister()


def test_between_two_chunks_a_transfer_hears_of_the_links_end(
    engine: TransferEngine, link: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(engine, peer, Scaled(NHD, 4, BF16, seed=3), Scaled(HND, 6, FP8), True)
    monkeypatch.setattr(link.core.copiers, "run", lambda task: None)  # nothing ever begins
    ticket = link.write_tokens(plan, *TABLES, start=12, stop=37)
    link.close()
    with pytest.raises(EngineError):
        ticket.wait(30)
    with pytest.raises(EngineError):
        link.write_tokens(plan, *TABLES, start=12, stop=37)
    plan.local.deregister()


def test_a_transfer_that_never_begins_ends_at_its_deadline(
    engine: TransferEngine, link: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(engine, peer, Scaled(NHD, 4, BF16, seed=3), Scaled(HND, 6, FP8), True)
    monkeypatch.setattr(link.core.copiers, "run", lambda task: None)  # as if a stream never ended
    ticket = link.write_tokens(plan, *TABLES, start=12, stop=37, timeout_s=0.01)
    with pytest.raises(DeadlineExceeded):
        ticket.wait(30)
    assert link.error is None
    plan.local.deregister()


def test_the_memory_of_a_transfer_does_not_grow_with_it(
    engine: TransferEngine, link: Link, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What NumPy holds: all staging and tables. 16 MiB travel in chunks of 256 KiB."""
    monkeypatch.setattr(conversion, "CHUNK_NBYTES", 256 << 10)
    shape: dict[str, Any] = {"layers": tuple(range(32)), "heads": (0, 4), "num_blocks": 64}
    ones = {plane: np.ones((32, 1), np.float32) for plane in "kv"}
    src = PagedPool.make(NHD, tokens=16, dim=64, stacked=False, dtype=BF16, seed=3, **shape)
    dst = PagedPool.make(HND, tokens=16, dim=64, stacked=False, dtype=FP8, scales=ones, **shape)
    local = engine.register_cache(src.layout, src.arrays())
    plan = engine.plan(local, peer.call("cache_of", dst.arrays(), dst.layout))
    tables = [list(range(64)), list(range(64))]
    nbytes = plan.tokens.nbytes(0, 1024)
    assert nbytes == 16 << 20
    link.write_tokens(plan, *tables, stop=16).wait(30)  # what is made once
    tracemalloc.start()
    try:
        assert link.write_tokens(plan, *tables, stop=1024).wait(30) == nbytes
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < nbytes // 2  # 4.4 MiB were seen; two chunks and what they are made of
    local.deregister()
