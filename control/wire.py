"""Messages as bytes: one encoder and one decoder for each family of messages, in MessagePack.

The decoder takes bytes from anybody. Before msgspec sees them, `check_frame` walks the frame once
without building anything: size, depth and number of items are bounded there, whatever a frame
claims about itself. msgspec then checks every type and every limit of the messages. A frame of no
more bytes than the limit of items goes to msgspec at once, and is walked only if that refuses it, to
say what is wrong: the walk took 25 of the 30 microseconds that a frame of a small handoff costs.
"""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

import msgspec

from .errors import ProtocolError

MAX_DEPTH = 8  # ours use 3: map, handoff, its fields; the rest is room to append

_M = TypeVar("_M")
_encoder = msgspec.msgpack.Encoder()

# Bytes after the first byte, for the items of fixed size from 0xC0 on; -1 is not MessagePack.
_FIXED = {0xC0: 0, 0xC1: -1, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
_FIXED.update({0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8})
_FIXED.update({0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17})
# Items that carry their length: how it is packed, and how many bytes besides it they have.
_SIZED = {0xC4: (">B", 0), 0xC5: (">H", 0), 0xC6: (">I", 0), 0xD9: (">B", 0), 0xDA: (">H", 0)}
_SIZED.update({0xDB: (">I", 0), 0xC7: (">B", 1), 0xC8: (">H", 1), 0xC9: (">I", 1)})
# Containers that carry their length, and how many items an entry of theirs is.
_NESTED = {0xDC: (">H", 1), 0xDD: (">I", 1), 0xDE: (">H", 2), 0xDF: (">I", 2)}


class Codec(Generic[_M]):
    """One encoder and one decoder for one family of messages.

    Args:
        messages: the union of the family's types.
        max_nbytes, max_items: bounds of a frame, checked before anything is built.
    """

    def __init__(self, messages: Any, *, max_nbytes: int, max_items: int) -> None:
        self._decoder: msgspec.msgpack.Decoder[_M] = msgspec.msgpack.Decoder(messages)
        self._max_nbytes = max_nbytes
        self._max_items = max_items

    def encode(self, message: msgspec.Struct) -> bytes:
        """Return the frame for one message.

        Raises:
            ProtocolError: a field breaks its limit, or the frame would be larger than any reader
                takes.
        """
        kind = type(message).__name__
        try:
            frame = _encoder.encode(message)
            self._decoder.decode(frame)  # 2.5 µs: what a reader would refuse is never sent
        except (msgspec.MsgspecError, UnicodeError, OverflowError, TypeError) as error:
            raise ProtocolError(
                f"a {kind} that no reader takes: {error}", fault="wrong type"
            ) from error
        if len(frame) > self._max_nbytes:
            raise ProtocolError(
                f"a {kind} of {len(frame)} bytes, the limit is {self._max_nbytes}: "
                "split the request",
                fault="oversized",
            )
        return frame

    def decode(self, frame: bytes | memoryview, *, peer: str = "") -> _M:
        """Return the message in one frame, all of it checked.

        Raises:
            ProtocolError: anything else than exactly one well-formed message; `fault` says what.
        """
        if len(frame) <= self._max_items:  # so it cannot hold more, nor be deep enough to matter
            try:
                return self._decoder.decode(frame)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                pass  # again, by name
        try:
            check_frame(frame, max_nbytes=self._max_nbytes, max_items=self._max_items)
            return self._decoder.decode(frame)
        except ProtocolError as error:
            error.peer = peer
            raise
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            fault = "malformed"
            if isinstance(error, msgspec.ValidationError):
                unknown = "`$.type`" in str(error) or "required field `type`" in str(error)
                fault = "unknown message" if unknown else "wrong type"
            raise ProtocolError(
                f"not a kvferry message: {error}", fault=fault, peer=peer
            ) from error


def check_frame(frame: bytes | memoryview, *, max_nbytes: int, max_items: int) -> None:
    """Check that a frame is exactly one MessagePack map within the limits. Builds nothing.

    Raises:
        ProtocolError: truncated, oversized, deep or malformed.
    """
    end = len(frame)
    if end > max_nbytes:
        raise ProtocolError(f"a frame of {end} bytes, the limit is {max_nbytes}", fault="oversized")
    at = 0
    items = 0
    open_items = [1]  # how many items each level still lacks
    while open_items:
        if not open_items[-1]:
            open_items.pop()
            continue
        open_items[-1] -= 1
        items += 1
        if items > max_items:
            raise ProtocolError(f"more than {max_items} items in one message", fault="oversized")
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
