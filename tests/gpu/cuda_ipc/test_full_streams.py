"""Streams without room, whose head waits for a thread of their own process: nothing stands still."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.cuda_ipc.test_ipc import NHD, new_tensors, register

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.engine.transfer_engine import TransferEngine
    from tests.gpu.conftest import GpuPeer

pytestmark = pytest.mark.gpu

MORE_THAN_A_STREAM_HOLDS = 1500  # it takes 1,024 launches
SHORT_S = 2.0  # a deadline that passes: what the streams wait for never comes


@pytest.fixture
def own_peer(
    engine: TransferEngine, start_peer: Callable[..., GpuPeer], peer_device: int
) -> GpuPeer:
    """A peer that may stand still, connected to this process's engine."""
    peer = start_peer(peer_device, name="crowded")
    engine.connect(peer.address, transport="cuda_ipc")
    assert peer.call("accept", engine.engine_id) == "cuda_ipc"
    return peer


def test_a_full_stream_does_not_keep_the_interpreter_from_what_its_head_waits_for(
    engine: TransferEngine, own_peer: GpuPeer
) -> None:
    tensors = [tensor.cuda() for tensor in new_tensors(NHD, seed=None)]
    local = register(engine, tensors, NHD)
    own_peer.call("cache", [tensor.numpy() for tensor in new_tensors(NHD, seed=3)], NHD)
    wrong = own_peer.call("crowd", local.descriptor, MORE_THAN_A_STREAM_HOLDS, SHORT_S)
    assert wrong == []
    assert own_peer.call("late_writes") == 0


def test_more_words_are_had_while_streams_wait_for_others(own_peer: GpuPeer) -> None:
    assert own_peer.call("wait_often", 200, 64, SHORT_S) == 200
