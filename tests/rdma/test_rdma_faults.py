"""What goes wrong on a wire, at a peer, or in a device: named, bounded, and over when it is over.

In each: every ticket ends, no byte is written outside the destination, and the survivors serve.
"""

from __future__ import annotations

import subprocess
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.engine.errors import (
    DeadlineExceeded,
    LinkFlushed,
    PeerAborted,
    RailError,
    RailStalled,
    ReceiverNotReady,
    RegionGone,
    RemoteAccessError,
    RetryExceeded,
)
from kvferry.engine.transports.verbs import queue_pair as verbs_qp

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
PATIENCE_S = 120.0


def serves(pair: Any, memory: Any) -> None:
    """The same link moves the same memory again, once its rails are back."""
    pair.rails_up()
    for piece in (0, 4096):
        memory.clear()
        memory.write(piece=piece).wait()
        memory.arrived()
    assert pair.link.error is None


@pytest.mark.parametrize(
    "weather",
    [
        pytest.param(("loss", "1%"), id="loss-1%", marks=pytest.mark.soak),
        pytest.param(("loss", "10%"), id="loss-10%"),
        pytest.param(
            ("delay", "2ms", "reorder", "25%", "50%"), id="reorder", marks=pytest.mark.soak
        ),
    ],
)
def test_a_wire_that_loses_and_reorders_only_slows(
    pair: Any, wire: Any, weather: tuple[str, ...]
) -> None:
    memory = pair.memory(MIB // 4)
    wire.spoil(*weather)
    for piece in (0, 4096):
        memory.clear()
        try:
            memory.write(piece=piece).wait()
        except RailError as error:
            print(f"{weather}: {error}")  # seven tries in a row were lost: named, and over
            memory.unharmed()
        else:
            memory.arrived()
    wire.mend()
    serves(pair, memory)


def test_an_interface_that_goes_down_fails_by_name_and_comes_back(pair: Any, wire: Any) -> None:
    memory = pair.memory(8 * MIB)
    memory.write().wait()
    memory.arrived()
    memory.clear()
    wire.slow()
    tickets = [memory.write() for _ in range(4)]
    waiting = pair.there.expect(
        memory.imm, nbytes=memory.nbytes, links=[pair.back], timeout_s=PATIENCE_S
    )
    wire.down("v0")
    errors = [pair.failure(ticket) for ticket in tickets[-2:]]  # an earlier one may be through
    assert isinstance(pair.failure(waiting), PeerAborted)
    assert all(isinstance(error, (RetryExceeded, RailStalled, LinkFlushed)) for error in errors), (
        errors
    )
    assert all("is down" in str(error) or "RETRY_EXC" in str(error) for error in errors), errors
    assert all(error.retryable and error.peer == "there" for error in errors)
    (rail,) = pair.link.rails
    assert not rail.up
    assert isinstance(rail.error, RailError)
    memory.unharmed()
    patient = memory.write()  # waits for the rail
    hopeless = memory.write(timeout_s=0.2)
    assert isinstance(pair.failure(hopeless), DeadlineExceeded)
    wire.mend()
    wire.up("v0")
    assert patient.wait(PATIENCE_S) == memory.nbytes
    serves(pair, memory)


def test_one_rail_of_two_breaks_and_the_link_lives_on_with_the_other(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(here=("rxe0", "rxe1"), there=("rxe1", "rxe0"))
    memory = pair.memory(MIB)
    memory.write().wait()
    memory.arrived()
    first = pair.link._path.rails[0]
    monkeypatch.setattr(type(first.device), "active", property(lambda _: False))  # stays out
    path = pair.link._path
    path.loop.soon(lambda: path.take_out(first, RailError("struck by lightning", rail=first.name)))
    for _ in range(3):
        memory.clear()
        error = None
        try:
            memory.write().wait()
        except RailError as caught:
            error = caught
        if error is None:
            memory.arrived()
    assert [rail.up for rail in pair.link.rails] == [False, True]
    assert "struck by lightning" in str(pair.link.rails[0].error)
    monkeypatch.undo()
    serves(pair, memory)
    assert [rail.up for rail in pair.link.rails] == [True, True]


def test_a_wrong_remote_key_is_refused_by_the_device(pair: Any) -> None:
    memory = pair.memory(MIB)
    memory.write().wait()
    memory.arrived()
    memory.clear()
    keys = pair.link._path._direct._keys
    region = memory.there.region_id
    right = keys[region]
    keys[region] = tuple(key ^ 0x5A00 for key in right)
    error = pair.failure(memory.write())
    assert isinstance(error, RemoteAccessError)
    assert "REM_ACCESS_ERR" in str(error)
    assert "vendor code" in str(error)
    assert not error.retryable
    assert (memory.whole == 0xA5).all()
    keys[region] = right
    serves(pair, memory)


def test_a_region_that_is_taken_back_under_a_transfer(pair: Any) -> None:
    memory = pair.memory(8 * MIB)
    memory.write().wait()
    memory.arrived()
    tickets = [memory.write() for _ in range(8)]
    memory.there.deregister(PATIENCE_S)
    before = memory.whole.copy()
    errors = []
    for ticket in tickets:
        try:
            ticket.wait(PATIENCE_S)
        except RegionGone as error:
            errors.append(error)
    assert errors  # some had not begun
    with pytest.raises(RegionGone):
        memory.write()
    assert np.array_equal(memory.whole, before)
    other = pair.memory(MIB)
    serves(pair, other)


def test_a_registration_that_vanishes_under_a_transfer(pair: Any) -> None:
    """Not by its owner's `deregister`: as if the owner's driver had dropped it."""
    memory = pair.memory(8 * MIB)
    memory.write().wait()
    memory.arrived()
    tickets = [memory.write() for _ in range(8)]
    pair.there._selection.nics.forget(memory.there.region_id)
    errors = []
    for ticket in tickets:
        try:
            ticket.wait(PATIENCE_S)
        except RailError as error:
            errors.append(error)
    assert any(isinstance(error, RemoteAccessError) for error in errors), errors
    memory.unharmed()
    pair.rails_up()
    other = pair.memory(MIB)
    serves(pair, other)


@pytest.mark.parametrize("end", ["v0", "v1"])
def test_packets_larger_than_the_wire_takes_are_named(pair: Any, wire: Any, end: str) -> None:
    """This end's interface takes none of them; or the other's drops what comes."""
    memory = pair.memory(MIB)
    memory.write().wait()
    memory.arrived()
    memory.clear()
    wire.mtu(1500, end)  # the rails agreed on 4,096 bytes when they were opened
    error = pair.failure(memory.write())
    # Either the device gives up first, or who watches it does.
    assert isinstance(error, (RailStalled, RetryExceeded)), error
    assert "MTU" in str(error)
    assert ("packets of 1024 bytes, and 4096 were agreed on" in str(error)) == (end == "v0")
    assert error.retryable
    memory.unharmed()
    serves(pair, memory)  # the rail opens again, with packets that pass


def test_a_receiver_without_receives_is_named(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its credits are forged here, and it posts no more."""
    memory = pair.memory(MIB)
    with monkeypatch.context() as patch:
        patch.setattr(verbs_qp.QueuePair, "received", lambda _: False)
        path = pair.link._path
        for pair_of_queues in path.rails[0].direct:
            pair_of_queues.credits = 1 << 20
        tickets = [
            pair.link.write(
                memory.here, 0, memory.there.descriptor, 0, 1, imm=7, timeout_s=PATIENCE_S
            )
            for _ in range(verbs_qp.RECEIVE_DEPTH + 8)
        ]
        errors = []
        for ticket in tickets:
            try:
                ticket.wait(PATIENCE_S)
            except RailError as error:
                errors.append(error)
    assert any(isinstance(error, ReceiverNotReady) for error in errors), errors[:3]
    memory.unharmed()
    serves(pair, memory)


def test_a_device_that_is_removed_ends_its_links_and_a_new_one_serves(
    pair: Any, make_pair: Callable[..., Any], wire: Any
) -> None:
    memory = pair.memory(4 * MIB)
    memory.write().wait()
    memory.arrived()
    waiting = pair.there.expect(pair.there.new_imm(), nbytes=1, links=[pair.back])
    wire.slow()
    tickets = [memory.write() for _ in range(8)]
    # It returns once every user has let go: that they do is what is tested.
    removal = subprocess.Popen(["rdma", "link", "delete", "rxe0"])
    assert removal.wait(PATIENCE_S) == 0
    try:
        for ticket in (*tickets[-2:], waiting):  # an earlier one may be through
            print(type(pair.failure(ticket)).__name__)
        assert all(ticket.done() for ticket in tickets)
        error = pair.failure(pair.link.down)
        assert "device" in str(error)
        memory.unharmed()
    finally:
        wire.mend()
        subprocess.run(["rdma", "link", "add", "rxe0", "type", "rxe", "netdev", "v0"], check=True)
    pair.close()
    fresh = make_pair()
    serves(fresh, fresh.memory(MIB))


def test_a_queue_pair_may_be_stopped_while_it_is_closed_and_after(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer's word stops a rail on one thread while its loss closes it on another. The library
    crashes on a queue pair that is closed."""
    rail = pair.link._path.rails[0]
    queue = verbs_qp.QueuePair(rail.device, rail._completions, pad=(0, 0))
    closing = threading.Thread(target=queue.close)

    def attributes(**fields: Any) -> Any:
        closing.start()
        closing.join(0.2)  # it ends only if nothing keeps it from closing under `stop`
        return queue._device.library.qp.QPAttr(**fields)

    library = queue._library._replace(qp=SimpleNamespace(QPAttr=attributes))
    monkeypatch.setattr(queue, "_library", library)
    queue.stop()
    closing.join()
    queue.stop()

    gone = verbs_qp.QueuePair(rail.device, rail._completions, pad=(0, 0))
    gone.close()
    gone.stop()
