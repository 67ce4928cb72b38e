"""Messages as bytes: one encoder and one decoder, for MessagePack frames.

The decoder takes bytes from anybody. Before msgspec sees them, `check_frame` walks the frame once
without building anything: size, depth and number of items are bounded there, whatever a frame
claims about itself. msgspec then checks every type and every limit of `messages.py`.
"""

from __future__ import annotations

import struct

import msgspec

from .errors import ProtocolError
from .messages import AnyMessage, Message

MAX_FRAME_NBYTES = 8 << 20  # a Request with 2^20 block ids takes 4 MiB
MAX_DEPTH = 8  # ours use 3: map, handoff, its fields; the rest is room to append
MAX_ITEMS = 1024  # ours use under 200, with 64 tables

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)

# Bytes after the first byte, for the items of fixed size from 0xC0 on; -1 is not MessagePack.
_FIXED = {0xC0: 0, 0xC1: -1, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
_FIXED.update({0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8})
_FIXED.update({0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17})
# Items that carry their length: how it is packed, and how many bytes besides it they have.
_SIZED = {0xC4: (">B", 0), 0xC5: (">H", 0), 0xC6: (">I", 0), 0xD9: (">B", 0), 0xDA: (">H", 0)}
_SIZED.update({0xDB: (">I", 0), 0xC7: (">B", 1), 0xC8: (">H", 1), 0xC9: (">I", 1)})
# Containers that carry their length, and how many items an entry of theirs is.
_NESTED = {0xDC: (">H", 1), 0xDD: (">I", 1), 0xDE: (">H", 2), 0xDF: (">I", 2)}


def encode(message: Message) -> bytes:
    """The frame for one message.

    Raises:
        ProtocolError: a field breaks its limit, or the frame would be larger than any reader takes.
    """
    try:
        frame = _encoder.encode(message)
        _decoder.decode(frame)  # 2.5 µs: what a reader would refuse is never sent
    except (msgspec.MsgspecError, UnicodeError, OverflowError, TypeError) as error:
        raise ProtocolError(
            f"a {type(message).__name__} that no reader takes: {error}", fault="wrong type"
        ) from error
    if len(frame) > MAX_FRAME_NBYTES:
        raise ProtocolError(
            f"a {type(message).__name__} of {len(frame)} bytes, the limit is {MAX_FRAME_NBYTES}: "
            "split the request",
            fault="oversized",
        )
    return frame


def decode(frame: bytes | memoryview, *, peer: str = "") -> AnyMessage:
    """The message in one frame, all of it checked.

    Raises:
        ProtocolError: anything else than exactly one well-formed message; `fault` says what.
    """
    try:
        check_frame(frame)
        return _decoder.decode(frame)
    except ProtocolError as error:
        error.peer = peer
        raise
    except msgspec.ValidationError as error:
        unknown = "`$.type`" in str(error) or "required field `type`" in str(error)
        fault = "unknown message" if unknown else "wrong type"
        raise ProtocolError(f"not a kvferry message: {error}", fault=fault, peer=peer) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(
            f"not a kvferry message: {error}", fault="malformed", peer=peer
        ) from error


def check_frame(frame: bytes | memoryview) -> None:
    """Checks that a frame is exactly one MessagePack map within the limits. Builds nothing.

    Raises:
        ProtocolError: truncated, oversized, deep or malformed.
    """
    end = len(frame)
    if end > MAX_FRAME_NBYTES:
        raise ProtocolError(
            f"a frame of {end} bytes, the limit is {MAX_FRAME_NBYTES}", fault="oversized"
        )
    at = 0
    items = 0
    open_items = [1]  # how many items each level still lacks
    while open_items:
        if not open_items[-1]:
            open_items.pop()
            continue
        open_items[-1] -= 1
        items += 1
        if items > MAX_ITEMS:
            raise ProtocolError(f"more than {MAX_ITEMS} items in one message", fault="oversized")
        if at >= end:
            raise ProtocolError(f"the frame ends after {end} bytes, inside", fault="truncated")
        first = frame[at]
        at += 1
        entries = 0
        if first < 0x80 or first >= 0xE0:  # small integers
            continue
        if first < 0x90:
            entries = 2 * (first & 0x0F)
        elif first < 0xA0:
            entries = first & 0x0F
        elif first < 0xC0:
            at += first & 0x1F
        elif first in _FIXED:
            size = _FIXED[first]
            if size < 0:
                raise ProtocolError(f"byte {at - 1} starts no item", fault="malformed")
            at += size
        else:
            form, extra = _SIZED.get(first) or _NESTED[first]
            width = struct.calcsize(form)
            if at + width > end:
                raise ProtocolError(f"the frame ends after {end} bytes, inside", fault="truncated")
            (length,) = struct.unpack_from(form, frame, at)
            at += width
            if first in _NESTED:
                entries = length * extra
            else:
                at += length + extra
        if entries:
            if len(open_items) > MAX_DEPTH:
                raise ProtocolError(f"nested more than {MAX_DEPTH} deep", fault="deep")
            open_items.append(entries)
        if at > end:
            raise ProtocolError(f"the frame ends after {end} bytes, inside", fault="truncated")
    if at != end:
        raise ProtocolError(f"{end - at} bytes after the message", fault="malformed")
