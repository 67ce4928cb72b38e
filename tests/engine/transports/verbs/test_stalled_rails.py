"""When a rail is said to get nowhere, and when it is left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.engine.transports.verbs.queue_pair import Batch
from kvferry.engine.transports.verbs.reopen import (
    DOWN_S,
    LONGEST_LOOK_S,
    SLOWEST_NBYTES_PER_S,
    STALLED_S,
    Watch,
    packet_nbytes,
)

LARGEST = 5  # the verbs' code of 4,096 bytes


def rail_with(*batches: Batch) -> Any:
    pair = SimpleNamespace(flying=list(batches), oldest=-1, waited_s=0.0)
    device = SimpleNamespace(name="rxe0", mtu=LARGEST, active=True)
    return SimpleNamespace(queues=[pair], device=device, name="0 (rxe0)", mtu=LARGEST)


def batch(number: int, nbytes: int = 1) -> Batch:
    return Batch(number, 3, nbytes, None, -1)


def looks_until_stalled(watch: Watch, rail: Any, *, step_s: float, most: int) -> int:
    """How many looks went by before the rail was found; `most` if it never was."""
    for look in range(most):
        if watch.look([rail], 100.0 + step_s * look):
            return look
    return most


def test_a_rail_that_completes_nothing_is_found_after_its_time() -> None:
    rail = rail_with(batch(7), batch(8))
    looks = looks_until_stalled(Watch(), rail, step_s=0.5, most=100)
    assert STALLED_S <= 0.5 * looks < STALLED_S + 1.0
    (stall,) = Watch().look([rail], 1.0)
    assert stall.rail is rail
    assert stall.batch.number == 7
    assert "6 posted work requests" in str(stall.error)
    assert "packets of 4096 bytes" in str(stall.error)


def test_a_large_batch_has_longer() -> None:
    nbytes = 20 * SLOWEST_NBYTES_PER_S
    looks = looks_until_stalled(Watch(), rail_with(batch(7, nbytes)), step_s=0.5, most=100)
    assert STALLED_S + 20.0 <= 0.5 * looks < STALLED_S + 21.0


def test_a_rail_that_gets_on_or_rests_is_left_alone() -> None:
    watch, rail = Watch(), rail_with()
    for look in range(100):
        # Each is the oldest for nearly as long as is allowed.
        rail.queues[0].flying = [batch(look // 15)] if look % 50 else []
        assert watch.look([rail], 0.5 * look) == []


def test_a_process_that_stood_still_does_not_blame_the_rail() -> None:
    looks = looks_until_stalled(Watch(), rail_with(batch(7)), step_s=3600.0, most=100)
    assert looks >= STALLED_S / LONGEST_LOOK_S


@pytest.mark.parametrize("number", [0, 7])
def test_packets_that_have_shrunk_are_named_at_once(number: int) -> None:
    rail = rail_with(batch(number, 1 << 30))
    rail.device.mtu = 3
    watch = Watch()
    looks = looks_until_stalled(watch, rail, step_s=0.5, most=100)
    assert looks <= 4
    (stall,) = watch.look([rail], 1000.0)
    assert "packets of 1024 bytes, and 4096 were agreed on" in str(stall.error)


def test_a_port_that_stays_down_is_named_sooner() -> None:
    rail = rail_with(batch(7, 1 << 30))
    rail.device.active = False
    watch = Watch()
    looks = looks_until_stalled(watch, rail, step_s=0.5, most=100)
    assert DOWN_S <= 0.5 * looks < DOWN_S + 1.0
    (stall,) = watch.look([rail], 1000.0)
    assert "the port of rxe0 is down" in str(stall.error)


def test_the_verbs_codes_of_packet_sizes() -> None:
    assert [packet_nbytes(code) for code in range(1, 6)] == [256, 512, 1024, 2048, 4096]
