"""Handoffs by tokens, between caches that are not alike and between sets of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvferry.adapters.agent.agent import Agent
from kvferry.adapters.agent.handoff import Handoff, HandoffSet
from kvferry.adapters.agent.ranks import (
    connect_ranks,
    num_readers,
)
from kvferry.adapters.agent.tables import pack_tables, unpack_table
from kvferry.control.errors import AgentClosed, HandoffError, LayoutMismatch, NotConnected
from kvferry.engine.errors import BlockOutOfRange, OverlappingBlocks, PlanError
from tests.support.caches import PagedPool, expect_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvferry.adapters.agent.handoff import Pending
    from kvferry.adapters.agent.ranks import RankPeers

WAIT_S = 30.0
NHD = ("layer", "plane", "block", "token", "head", "dim")
HND = ("layer", "plane", "block", "head", "token", "dim")
SRC_TABLE, DST_TABLE = [5, 2, 0, 7, 1, 3, 6], [6, 1, 4]
NUM_TOKENS, NUM_HEADS = 26, 4


def make_ranks(degree: int, order: tuple[str, ...], tokens: int, seed: int | None) -> Any:
    share = NUM_HEADS // degree
    return [
        PagedPool.make(
            order,
            layers=(0, 1),
            heads=(rank * share, (rank + 1) * share),
            num_blocks=8,
            tokens=tokens,
            dim=8,
            model_heads=NUM_HEADS,
            seed=None if seed is None else seed + rank,
        )
        for rank in range(degree)
    ]


def receive_all(agent: Agent, peers: RankPeers) -> HandoffSet[Handoff]:
    """What one decode rank takes of the request, from every prefill rank that has some of it."""
    return HandoffSet(
        [
            agent.receive_tokens("r", name, DST_TABLE, num_tokens=NUM_TOKENS)
            for name in peers.names.values()
        ]
    )


@pytest.fixture
def start() -> Iterator[Callable[..., list[Agent]]]:
    """Starts the agents of all ranks of one engine."""
    agents: list[Agent] = []

    def make(role: Any, pools: list[PagedPool], transport: str, *, alone: bool = False) -> Any:
        made = [
            Agent(
                name=f"{role}-{rank}",
                role=role,
                layout=pool.layout,
                tensors=pool.arrays(),
                transports=(transport,),
                ranks=() if alone else [pool.layout for pool in pools],
                rank=0 if alone else rank,
            )
            for rank, pool in enumerate(pools)
        ]
        agents.extend(made)
        return made

    yield make
    for agent in agents:
        agent.close()


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_blocks_of_other_sizes_are_handed_over_by_tokens(
    start: Callable[..., list[Agent]], transport: str, mode: Any
) -> None:
    (src,), (dst,) = make_ranks(1, NHD, 4, 1), make_ranks(1, HND, 9, None)
    (prefill,) = start("prefill", [src], transport, alone=True)
    (decode,) = start("decode", [dst], transport, alone=True)
    assert decode.connect(prefill.address) == "prefill-0"
    with pytest.raises(PlanError, match="do not pair one to one"):
        decode.receive("r", "prefill-0", DST_TABLE)
    truth = expect_tokens(src, dst, SRC_TABLE, DST_TABLE, 5, NUM_TOKENS)
    handoff = decode.receive_tokens(
        "r", "prefill-0", DST_TABLE, num_tokens=NUM_TOKENS, start_token=5, mode=mode
    )
    sent = prefill.send("r", SRC_TABLE)
    nbytes = 21 * 2 * 2 * NUM_HEADS * 8
    assert handoff.wait(WAIT_S) == sent.wait(WAIT_S) == nbytes
    assert dst.equals(truth)


@pytest.mark.parametrize("degrees", [(2, 4), (4, 2), (2, 2)])
def test_each_rank_hands_its_part_to_the_ranks_that_need_it(
    start: Callable[..., list[Agent]], transport: str, degrees: tuple[int, int]
) -> None:
    src, dst = make_ranks(degrees[0], NHD, 4, 1), make_ranks(degrees[1], HND, 9, None)
    prefill, decode = start("prefill", src, transport), start("decode", dst, transport)
    addresses = [agent.address for agent in prefill]
    peers = [connect_ranks(agent, addresses) for agent in decode]
    truth = [pool.clone() for pool in dst]
    for rank, pool in enumerate(truth):
        for other in src:
            if max(other.heads[0], pool.heads[0]) < min(other.heads[1], pool.heads[1]):
                truth[rank] = expect_tokens(other, truth[rank], SRC_TABLE, DST_TABLE, 0, NUM_TOKENS)
    needed = {
        rank: [
            number
            for number, other in enumerate(src)
            if max(other.heads[0], pool.heads[0]) < min(other.heads[1], pool.heads[1])
        ]
        for rank, pool in enumerate(dst)
    }
    assert {rank: sorted(p.names) for rank, p in enumerate(peers)} == needed
    asked = HandoffSet([receive_all(agent, p) for agent, p in zip(decode, peers, strict=True)])
    readers = max(1, degrees[1] // degrees[0])
    assert num_readers(prefill[0], "decode-0") == readers
    sent = HandoffSet([agent.send("r", SRC_TABLE) for agent in prefill for _ in range(readers)])
    total = NUM_TOKENS * 2 * 2 * NUM_HEADS * 8
    assert asked.wait(WAIT_S) == sent.wait(WAIT_S) == total
    asked.blocks_free.wait(WAIT_S)
    assert all(map(PagedPool.equals, dst, truth))


def test_one_rank_failing_fails_the_request_on_all(
    start: Callable[..., list[Agent]], transport: str
) -> None:
    src, dst = make_ranks(2, NHD, 4, 1), make_ranks(4, HND, 9, None)
    prefill, decode = start("prefill", src, transport), start("decode", dst, transport)
    addresses = [agent.address for agent in prefill]
    asked = HandoffSet([receive_all(agent, connect_ranks(agent, addresses)) for agent in decode])
    computing = [agent.open_send("r", SRC_TABLE) for agent in prefill for _ in range(2)]
    sent = HandoffSet(computing)
    computing[0].write_layers(range(1))  # rank 0 is in the middle of it
    prefill[1].close()
    with pytest.raises(HandoffError):
        asked.wait(WAIT_S)
    with pytest.raises(AgentClosed):
        sent.wait(WAIT_S)
    for part in asked.parts:
        assert part.blocks_free.wait(WAIT_S) == 0
        assert part.done()
        assert part.error is not None
    for handoff in computing[:2]:
        handoff.blocks_free.wait(WAIT_S)
        assert handoff.error is not None


def test_ranks_that_make_no_model_are_refused_at_hello(
    start: Callable[..., list[Agent]], transport: str
) -> None:
    src, dst = make_ranks(2, NHD, 4, 1), make_ranks(4, HND, 9, None)
    prefill = start("prefill", src[:1], transport)  # says that it is alone
    decode = start("decode", dst, transport)
    with pytest.raises(LayoutMismatch, match=r"source ranks hold \[0, 2\).*ranks \[0, 4\)"):
        connect_ranks(decode[0], [prefill[0].address])
    with pytest.raises(NotConnected):
        num_readers(prefill[0], "decode-0")


def test_a_set_of_none_is_done() -> None:
    none: HandoffSet[Handoff] = HandoffSet([])
    assert none.wait(0.1) == none.blocks_free.wait(0.1) == 0


def test_a_set_is_at_rest_when_all_of_it_ended_and_is_free() -> None:
    cancelled: list[Pending] = []
    parts = [Handoff(f"r{n}", "", "send", lambda part, _: cancelled.append(part)) for n in range(3)]
    together = HandoffSet(parts[:2])
    parts[0].blocks_free._finish(0)
    parts[0]._outcome._finish(7)
    together.add(parts[2])
    parts[2]._outcome._finish(5)
    assert not together.done()
    parts[1].blocks_free._finish(0)
    parts[1]._outcome._finish(3)
    assert together.wait(0.1) == 15
    assert together.finished_s >= parts[1].finished_s > 0.0
    assert not together.blocks_free.done()
    parts[2].blocks_free._finish(0)
    assert together.blocks_free.wait(0.1) == 0
    assert cancelled == []


def test_a_handoff_that_joins_a_failed_set_is_cancelled_and_waited_for() -> None:
    cancelled: list[Pending] = []
    parts = [Handoff(f"r{n}", "", "send", lambda part, _: cancelled.append(part)) for n in range(3)]
    together = HandoffSet(parts[:2])
    error = HandoffError("the first one's")
    parts[0]._refuse(error)
    assert (together.error, cancelled) == (error, [parts[1]])
    together.add(parts[2])
    assert cancelled == parts[1:]
    parts[1]._refuse(HandoffError("cancelled"))
    assert not together.blocks_free.done()
    closed = AgentClosed("a peer could still reach the blocks")
    parts[2]._outcome._fail(closed)
    parts[2].blocks_free._fail(closed)
    with pytest.raises(AgentClosed):
        together.blocks_free.wait(0.1)
    assert together.error is error


def test_tables_are_packed_once_they_are_checked() -> None:
    many = list(range(40))
    for ids in ([3, 1, 2], many, np.array(many), []):
        (packed,) = pack_tables("destination", [ids], 64)
        assert list(unpack_table(packed)) == list(ids)
    (packed,) = pack_tables("source", [[5, 5]], 64)  # a source may be named twice
    assert unpack_table(packed) == [5, 5]
    assert pack_tables("destination", [[7, 7], [-1]])[1] == b"\xff" * 4  # of tokens: null slots
    refused: list[tuple[Any, type[Exception]]] = [
        ([1, 64], BlockOutOfRange),
        ([*many, -1], BlockOutOfRange),
        ([1, 2, 1], OverlappingBlocks),
        ([*many, 5], OverlappingBlocks),
        ([[1]], PlanError),
        ([1.5], PlanError),
    ]
    for ids, error in refused:
        with pytest.raises(error):
            pack_tables("destination", [ids], 64)
    for value in (1 << 31, -(1 << 31) - 1):
        with pytest.raises(PlanError, match="destination block table 1 has an id beyond 32 bits"):
            pack_tables("destination", [[1], [value]])
    with pytest.raises(
        BlockOutOfRange, match=r"destination block table 1: [0-9]+ is a block of no cache"
    ):
        pack_tables("destination", [[1], [(1 << 64) - 1]])
    rows: list[Any] = [[3, -1], np.array([3, -1], np.int16), torch.tensor([3, -1])]
    assert len({pack_tables("source", [row]) for row in rows}) == 1
