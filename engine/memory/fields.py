"""Ranges of what comes from a peer: msgspec checks them while it decodes.

A number that decodes therefore fits the arrays, headers and system calls that it goes into.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, MsgspecError

# What decoding a peer's bytes may raise: text that is no UTF-8 and nesting without end have errors of
# Python's own.
DECODE_ERRORS = (MsgspecError, UnicodeDecodeError, RecursionError)

Uint32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Uint63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Pid = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Key = Annotated[bytes, Meta(min_length=16, max_length=16)]
IpcHandle = Annotated[bytes, Meta(max_length=64)]  # empty: there is none
Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
