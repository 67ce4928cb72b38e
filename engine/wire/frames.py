"""Frames on a tcp rail: a fixed header, two tables, then the pieces' bytes back to back.

    0  magic "KVF1"     4  kind     5  flags     6  zero (2)      8  imm (4)
   12  num_regions (4) or first     16  transfer (8)     24  nbytes (8)
   32  num_pieces (4)  36  crc of the pieces (4)   40  crc of the header before it (4)

All little-endian. A write frame says where its pieces go; a data frame answers a `ReadRequest`, and
its pieces are the reader's own from `first` on, so it carries no tables.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from ..errors import ProtocolError
from . import tables

MAGIC = b"KVF1"
WRITE, DATA = 1, 2
HAS_IMM, HAS_CRC = 1, 2
MAX_FRAME_NBYTES = 64 << 20
_BODY = struct.Struct("<4sBBxxIIQQII")
_CRC = struct.Struct("<I")
HEADER_NBYTES = _BODY.size + _CRC.size


class Header(NamedTuple):
    """A frame's header. `table` is `num_regions` of a write frame and `first` of a data frame."""

    kind: int
    flags: int
    imm: int
    table: int
    transfer: int
    nbytes: int
    num_pieces: int
    crc: int


def encode(header: Header) -> bytes:
    """Return the header's bytes."""
    body = _BODY.pack(MAGIC, *header)
    return body + _CRC.pack(zlib.crc32(body))


def decode(data: bytes) -> Header:
    """Read a header and check everything that can be checked without a region.

    Raises:
        ProtocolError: naming the first thing that is wrong.
    """
    body = data[: _BODY.size]
    if len(data) != HEADER_NBYTES:
        raise ProtocolError(f"a frame header of {len(data)} bytes is not {HEADER_NBYTES}")
    magic, *fields = _BODY.unpack(body)
    if magic != MAGIC:
        raise ProtocolError(f"a frame starts with {magic!r}, not {MAGIC!r}")
    if _CRC.unpack(data[_BODY.size :])[0] != zlib.crc32(body):
        raise ProtocolError("a frame header's checksum is wrong")
    header = Header(*fields)
    if header.kind not in (WRITE, DATA):
        raise ProtocolError(f"frame kind {header.kind} is unknown")
    if header.flags & ~(HAS_IMM | HAS_CRC):
        raise ProtocolError(f"frame flags {header.flags:#x} are unknown")
    if header.nbytes > MAX_FRAME_NBYTES or header.num_pieces > tables.MAX_PIECES:
        raise ProtocolError(
            f"a frame of {header.nbytes} bytes in {header.num_pieces} pieces is larger than "
            f"{MAX_FRAME_NBYTES} in {tables.MAX_PIECES}"
        )
    if header.kind == WRITE and header.table > tables.MAX_REGIONS:
        raise ProtocolError(f"a frame names {header.table} regions")
    return header
