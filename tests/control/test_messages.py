"""The wire format: golden bytes, readable with plain MessagePack, and every limit of a field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest

from kvferry.control.errors import ProtocolError
from kvferry.control.handoff import messages
from kvferry.control.handoff.messages import (
    MAX_FRAME_NBYTES,
    AnyMessage,
    HandoffId,
    Hello,
    Request,
    decode,
    encode,
    skip_in_tables,
    unpack_block_ids,
)

from .examples import EXAMPLES, GOLDEN, HANDOFF, SESSION, TABLES, pack_block_ids

if TYPE_CHECKING:
    from kvferry.control.handoff.messages import Message

KINDS = sorted(EXAMPLES)


def _plain(message: Message) -> dict[str, Any]:
    """A message as the maps, lists, strings, bytes and numbers that any language sees."""
    plain: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,))
    return {key: list(value) if key == "tables" else value for key, value in plain.items()}


def test_every_message_has_an_example_and_golden_bytes() -> None:
    kinds = {kind.__struct_config__.tag for kind in get_args(AnyMessage)}
    assert kinds == set(EXAMPLES) == set(GOLDEN)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_bytes(kind: str) -> None:
    assert encode(EXAMPLES[kind]).hex() == GOLDEN[kind]
    assert decode(bytes.fromhex(GOLDEN[kind])) == EXAMPLES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_msgpack_reads_and_writes_every_message(kind: str) -> None:
    message = EXAMPLES[kind]
    plain = msgpack.unpackb(encode(message), raw=False, strict_map_key=True)
    assert list(plain) == list(_plain(message))  # `type` comes first
    assert plain == _plain(message)
    assert plain["type"] == kind
    assert decode(msgpack.packb(plain)) == message
    # Another language may well order the keys in another way.
    assert decode(msgpack.packb(dict(reversed(plain.items())))) == message


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_a_later_version_appends_are_ignored(kind: str) -> None:
    plain = msgpack.unpackb(encode(EXAMPLES[kind]))
    plain["colour"] = {"of": ["the", {"sea": 1}]}
    assert decode(msgpack.packb(plain)) == EXAMPLES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_frozen(kind: str) -> None:
    with pytest.raises(AttributeError):
        EXAMPLES[kind].session = 1  # type: ignore[misc]


def test_block_ids_travel_as_little_endian_int32() -> None:
    assert pack_block_ids([1, 258, 70_000, -1]) == bytes.fromhex("010000000201000070110100ffffffff")
    assert unpack_block_ids(pack_block_ids([1, 258, 70_000, -1])) == [1, 258, 70_000, -1]
    assert pack_block_ids([]) == b""
    with pytest.raises(OverflowError):
        pack_block_ids([1 << 31])


def test_skipping_blocks_shortens_every_table() -> None:
    tables = (pack_block_ids([1, 2, 3]), pack_block_ids([4]))
    assert skip_in_tables(tables, 2) == (pack_block_ids([3]), b"")
    assert skip_in_tables(tables, 0) is tables


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"imm": 1 << 32}, "imm"),
        ({"imm": -1}, "imm"),
        ({"imm": True}, "imm"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": "30"}, "timeout_s"),
        ({"mode": "shove"}, "mode"),
        ({"tables": [b"abc"]}, "multiple of 4"),
        ({"tables": ["abcd"]}, "tables"),
        ({"tables": [b"abcd"] * 65}, "tables"),
        ({"tables": [b"abcd"]}, "1 block ids, num_blocks is 2"),
        ({"num_blocks": (1 << 20) + 1}, "num_blocks"),
        ({"nbytes": -1}, "nbytes"),
        ({"nbytes": 1 << 63}, "nbytes"),
        ({"session": None}, "session"),
        ({"handoff": {"request_id": "", "attempt": 1, "serial": 1}}, "request_id"),
        ({"handoff": {"request_id": "x" * 257, "attempt": 1, "serial": 1}}, "request_id"),
        ({"handoff": {"request_id": "x", "attempt": 0, "serial": 1}}, "attempt"),
        ({"handoff": ["x", 1, 1]}, "handoff"),
    ],
    ids=str,
)
def test_a_field_outside_its_limits_is_refused_by_name(
    change: dict[str, Any], complaint: str
) -> None:
    plain = msgpack.unpackb(encode(EXAMPLES["request"])) | change
    with pytest.raises(ProtocolError, match=complaint) as caught:
        decode(msgpack.packb(plain), peer="decode-0")
    assert caught.value.fault == "wrong type"
    assert caught.value.peer == "decode-0"


@pytest.mark.parametrize("field", ["session", "handoff", "mode", "num_blocks", "timeout_s"])
def test_a_missing_field_is_refused_by_name(field: str) -> None:
    plain = msgpack.unpackb(encode(EXAMPLES["request"]))
    del plain[field]
    with pytest.raises(ProtocolError, match=field):
        decode(msgpack.packb(plain))


def test_what_no_reader_takes_is_not_sent() -> None:
    nameless = Hello(SESSION, 1, "", "decode", 1)
    with pytest.raises(ProtocolError, match="a Hello that no reader takes"):
        encode(nameless)
    with pytest.raises(ProtocolError):
        encode(Hello(SESSION, 1, "\ud800", "decode", 1))
    with pytest.raises(ProtocolError):
        encode(Hello(1 << 70, 1, "x", "decode", 1))


def test_the_largest_request_fits_one_frame() -> None:
    table = bytes(4 * messages.MAX_BLOCK_IDS)
    request = Request(SESSION, HANDOFF, "push", messages.MAX_BLOCK_IDS, 1, 1.0, 1, tables=(table,))
    frame = encode(request)
    assert len(frame) < MAX_FRAME_NBYTES
    assert decode(frame) == request


def test_requests_name_themselves() -> None:
    assert str(HandoffId("req-1", 2, 300)) == "req-1#2"
    assert unpack_block_ids(TABLES[0]) == [5, 70_000]
