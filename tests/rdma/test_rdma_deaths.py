"""A peer that is killed at any moment of a stream, many times: named, bounded, and no byte astray.

Its process is forked from one that has everything imported, so that a life takes seconds.
"""

from __future__ import annotations

import multiprocessing
import random
import threading

import numpy as np
import pytest

from kvferry.engine.errors import EngineError, PeerLost
from kvferry.engine.transfer_engine import TransferEngine
from tests.rdma.victim import victim
from tests.support.leaks import LeakCheck

MIB = 1 << 20
SENTINEL = 0xA5
PATIENCE_S = 120.0


@pytest.mark.parametrize("rounds", [4, pytest.param(30, marks=pytest.mark.soak)])
def test_a_peer_may_be_killed_at_any_moment(rounds: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rdma.victim"])
    chance = random.Random(rounds)
    nbytes = 2 * MIB
    whole = np.full(nbytes + 8192, SENTINEL, np.uint8)
    window = whole[4096:-4096]
    with TransferEngine(name="survivor", nics=("rxe0",), transports=("verbs",)) as engine:
        mine = engine.register(np.ones(nbytes, np.uint8))
        leaks = LeakCheck()
        for _ in range(rounds):
            into = engine.register(window)
            ours, theirs = context.Pipe()
            process = context.Process(
                target=victim, args=(theirs, engine.address.encode(), into.descriptor, nbytes)
            )
            process.start()
            theirs.close()
            engine_id, inbox = ours.recv()
            link = engine.accept_link(engine_id, PATIENCE_S)
            waiting = engine.expect(engine.new_imm(), nbytes=1, links=[link], timeout_s=PATIENCE_S)
            tickets = [waiting]
            fate = threading.Timer(chance.uniform(0, 0.3), process.kill)
            fate.start()
            try:
                while True:
                    tickets.append(link.write(mine, 0, inbox, 0, nbytes, imm=1))
                    if len(tickets) > 3:
                        tickets[-2].wait(PATIENCE_S)
            except PeerLost:
                pass
            fate.join()
            process.join()
            for ticket in tickets:
                try:
                    ticket.wait(PATIENCE_S)
                except EngineError as error:
                    assert isinstance(error, PeerLost), error  # noqa: PT017
            assert isinstance(waiting.exception(), PeerLost)
            assert link.quiesced.wait(PATIENCE_S) == 0
            into.deregister()
            assert (whole[:4096] == SENTINEL).all()
            assert (whole[-4096:] == SENTINEL).all()
            assert mine._uses == 0
            ours.close()
            process.close()
            leaks.take()
