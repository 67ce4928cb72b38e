"""The decoder against bytes from anybody: every fault has a name, and nothing else comes out."""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import get_args

import msgpack  # type: ignore[import-untyped]
import pytest

from kvferry.control.errors import ProtocolError
from kvferry.control.handoff.messages import (
    MAX_FRAME_NBYTES,
    MAX_ITEMS,
    AnyMessage,
    decode,
    encode,
)
from kvferry.control.wire import MAX_DEPTH
from kvferry.control.wire import check_frame as check_frame_within

from .examples import EXAMPLES

check_frame = partial(check_frame_within, max_nbytes=MAX_FRAME_NBYTES, max_items=MAX_ITEMS)
FAULTS = {"truncated", "oversized", "deep", "malformed", "wrong type", "unknown message"}
FRAMES = [encode(message) for message in EXAMPLES.values()]


def fault_of(frame: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(frame)
    assert caught.value.fault in FAULTS
    assert caught.value.message
    return caught.value.fault


@pytest.mark.parametrize("frame", FRAMES, ids=list(EXAMPLES))
def test_every_truncation_is_named(frame: bytes) -> None:
    for length in range(len(frame)):
        assert fault_of(frame[:length]) == "truncated"


@pytest.mark.parametrize("frame", FRAMES, ids=list(EXAMPLES))
def test_bytes_after_a_message_are_named(frame: bytes) -> None:
    assert fault_of(frame + b"\0") == "malformed"
    assert fault_of(frame + frame) == "malformed"


def test_oversized_frames_and_item_counts() -> None:
    assert fault_of(bytes(MAX_FRAME_NBYTES + 1)) == "oversized"
    assert fault_of(msgpack.packb({"type": "welcome", "session": 1, "x": [0] * MAX_ITEMS})) == (
        "oversized"
    )
    # A frame of a few bytes that claims four billion items costs nothing.
    assert fault_of(b"\x82\xa4type\xa7welcome\xa1x\xdd\xff\xff\xff\xff") in {
        "truncated",
        "oversized",
    }
    assert fault_of(b"\x82\xa4type\xa7welcome\xa1x\xc6\xff\xff\xff\xff") == "truncated"


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\x00", b"\xdd\x00\x00\x00\x01"])
def test_deep_frames_do_not_reach_the_stack(opener: bytes) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)  # as a careless host process might
    try:
        bomb = b"\x82\xa4type\xa7welcome\xa1x" + opener * 1_000_000 + b"\0"
        assert fault_of(bomb) == "deep"
    finally:
        sys.setrecursionlimit(limit)
    fine: object = 1
    for _ in range(MAX_DEPTH - 1):
        fine = [fine]
    check_frame(msgpack.packb({"x": fine}))


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        (b"", "truncated"),
        (b"\xc1", "malformed"),
        (b"\x81\xa4type\xc1", "malformed"),
        (b"\xc0", "wrong type"),
        (b"\x90", "wrong type"),
        (b"\x80", "unknown message"),
        (msgpack.packb({"type": "farewell", "session": 1}), "unknown message"),
        (msgpack.packb({"type": 3, "session": 1}), "unknown message"),
        (msgpack.packb({"session": 1}), "unknown message"),
        (msgpack.packb({"type": "welcome", "session": "1"}), "wrong type"),
        (msgpack.packb({"type": "welcome"}), "wrong type"),
        (msgpack.packb({"type": "bye", "session": 1, "reason": "x" * 1025}), "wrong type"),
        (b"\x83\xa4type\xa3bye\xa7session\x01\xa6reason\xa1\xff", "malformed"),
        (msgpack.packb({"type": "welcome", "session": msgpack.ExtType(1, b"x")}), "wrong type"),
    ],
)
def test_faults_are_named(frame: bytes, fault: str) -> None:
    assert fault_of(frame) == fault


def test_check_frame_agrees_with_msgpack_on_every_form() -> None:
    values = [0, 127, 128, 1 << 15, 1 << 31, 1 << 63, -1, -33, -(1 << 15), -(1 << 31), -(1 << 63)]
    values_of_all_kinds = [
        *values,
        1.5,
        None,
        True,
        "x" * 31,
        "x" * 32,
        "x" * 256,
        "x" * 70_000,
        b"x",
        b"x" * 256,
        b"x" * 70_000,
        [1] * 15,
        [1] * 16,
        {i: i for i in range(16)},
        *(msgpack.ExtType(5, bytes(n)) for n in (1, 2, 4, 8, 16, 3, 300, 70_000)),
    ]
    for value in values_of_all_kinds:
        frame = msgpack.packb(value)
        check_frame(frame)
        for length in {0, 1, len(frame) // 2, len(frame) - 1} - {len(frame)}:
            with pytest.raises(ProtocolError) as caught:
                check_frame(frame[:length])
            assert caught.value.fault == "truncated"


def test_fuzz_hundred_thousand_frames() -> None:
    """Damaged and random frames: a message or a `ProtocolError`, never anything else."""
    rng = random.Random(1)
    kinds = set(get_args(AnyMessage))
    decoded = 0
    faults: set[str] = set()
    for _ in range(100_000):
        choice = rng.randrange(5)
        frame = bytearray(rng.choice(FRAMES))
        if choice == 0:
            frame = bytearray(rng.randbytes(rng.randrange(200)))
        elif choice == 1:
            del frame[rng.randrange(len(frame)) :]
        elif choice == 2:
            for _ in range(rng.randrange(1, 4)):
                frame[rng.randrange(len(frame))] = rng.randrange(256)
        elif choice == 3:
            at = rng.randrange(len(frame))
            frame[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            other = rng.choice(FRAMES)
            frame = frame[: rng.randrange(len(frame))] + other[rng.randrange(len(other)) :]
        try:
            message = decode(bytes(frame))
        except ProtocolError as error:
            faults.add(error.fault)
        else:
            assert type(message) in kinds
            assert decode(encode(message)) == message
            decoded += 1
    assert decoded  # some damage hits a value and leaves a message
    assert faults == FAULTS - {"oversized"}
