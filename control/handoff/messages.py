"""Every message that two agents exchange about a handoff. Version 4.

Each message is one MessagePack map with a `type` key, so any language's MessagePack can talk to
us. Fields are named, and only ever appended, with a default: an older reader ignores what it does
not know. Layouts, descriptors and addresses are opaque bytes here.

    Meeting        Hello ⇄ Hello, then Describe ⇄ Describe, then Welcome; or Refused
    Push           Request → Accepted → (bytes) → Sent            decode asks, prefill writes
    Pull           Request → Accepted → Ready → (bytes) → Done    decode asks, decode reads
    Giving up      Failed; Cancel → Cancelled
    Parting        Bye

Any of them may be lost, delayed or duplicated. Who repeats what, and why that is harmless:

* `Request` is repeated until `Accepted`, `Ready` until `Done`, `Cancel` until its answer. All
  three carry a serial, and a serial moves bytes at most once.
* `Sent`, `Failed`, `Done` and `Cancelled` are final answers: *no byte of this serial moves any
  more*. The side that gave one repeats it whenever it is asked about that serial again.

Several messages for one peer may travel as the parts of one ZeroMQ message, in their order.

Version history:
    1   the first
    2   `Describe.token`; several messages in one ZeroMQ message
    3   `Part` and `Verdict`: a request that several decode ranks take ends alike on all of them
    4   without these two, and without `rank_set` in a cache's descriptor: see decision 0033
"""

from __future__ import annotations

from array import array
from sys import byteorder
from typing import Annotated, Literal, Union

import msgspec
from msgspec import Meta

from ..wire import Codec

VERSION = 4

MAX_BLOCK_IDS = 1 << 20  # a table: 16 Mi tokens at 16 a block
MAX_TABLES = 64  # groups of layers with a block table each
BLOCK_ID_NBYTES = 4
MAX_FRAME_NBYTES = 8 << 20  # a Request with 2^20 block ids takes 4 MiB
MAX_ITEMS = 1024  # a frame; ours use under 200, with 64 tables

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=1024)]
Opaque = Annotated[bytes, Meta(max_length=1 << 20)]
LARGEST_NATURAL = (1 << 63) - 1
Natural = Annotated[int, Meta(ge=0, le=LARGEST_NATURAL)]
Imm = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Seconds = Annotated[float, Meta(gt=0, le=7 * 86_400)]
Table = Annotated[bytes, Meta(max_length=BLOCK_ID_NBYTES * MAX_BLOCK_IDS)]
Tables = Annotated[tuple[Table, ...], Meta(max_length=MAX_TABLES)]
Role = Literal["prefill", "decode", "both"]
Mode = Literal["push", "pull"]
Side = Literal["prefill", "decode"]
Attempt = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Reason = Literal["version", "role", "layout", "link", "session", "protocol", "closed"]


class HandoffId(msgspec.Struct, frozen=True, gc=False):
    """Which handoff: `attempt` of `request_id`, and its place in decode's order of handoffs.

    `serial` grows with every handoff that a decode agent starts. Prefill needs the order to be
    able to forget old handoffs without ever taking a late `Request` for a new one.
    """

    request_id: Name
    attempt: Attempt
    serial: Natural

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"


class Message(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower, gc=False):
    """What all messages have in common: a lower-case class name under `type`.

    Messages hold nothing that could refer back to them, so Python's collector need not look at the
    thousands that ledgers remember (`gc=False`): decision 0042.

    `session` is the number that the side that connects gives to this session. A message of
    another session belongs to the dead: it is answered with `Refused("session")`.
    """

    session: Natural


class HandoffMessage(Message, frozen=True, tag_field="type", tag=str.lower):
    """A message about one handoff.

    Where both sides may send a message it says on which `side` of the handoff its sender is.
    """

    handoff: HandoffId


class Hello(Message, frozen=True, tag_field="type", tag=str.lower):
    """First contact, and its answer. These fields stay as they are in every version."""

    version: Natural
    name: Name
    role: Role
    generation: Natural  # tells one life of an agent from the next


class Describe(Message, frozen=True, tag_field="type", tag=str.lower):
    """The sender's cache and how its engine is reached; and the answer to it.

    `cache` is its layout with the descriptors of its regions, `engine` the engine's address: both
    hold keys, so this message goes over CURVE or stays on one machine. With `token` the reader may
    open one link to the sender's engine, once.
    """

    layout_digest: Name
    cache: Opaque
    engine: Opaque
    token: Annotated[bytes, Meta(max_length=32)] = b""


class Welcome(Message, frozen=True, tag_field="type", tag=str.lower):
    """The side that was connected to has its end of the link: handoffs may begin."""


class Refused(Message, frozen=True, tag_field="type", tag=str.lower):
    """No, and why. Never answered."""

    reason: Reason
    detail: Text = ""


class Bye(Message, frozen=True, tag_field="type", tag=str.lower):
    """The sender is leaving and will not touch the peer's memory again."""

    reason: Text = ""


class Request(HandoffMessage, frozen=True, tag_field="type", tag=str.lower):
    """Decode wants `num_blocks` blocks of a request: all but the first `skip_blocks` of each table.

    In push mode `tables` name the destination blocks, a table for each group of layers, and the
    writes carry `imm`. In pull mode there are none, and `imm` is 0.

    Where the two caches' blocks are not alike, tokens `[start_token, stop_token)` are wanted instead:
    the tables then hold all blocks of the request, from its first token on, and none is skipped.
    """

    mode: Mode
    num_blocks: Annotated[int, Meta(ge=0, le=MAX_BLOCK_IDS)]
    nbytes: Natural
    timeout_s: Seconds
    imm: Imm = 0
    skip_blocks: Annotated[int, Meta(ge=0, le=MAX_BLOCK_IDS)] = 0
    tables: Tables = ()
    start_token: Natural = 0
    stop_token: Natural = 0

    def __post_init__(self) -> None:
        check_tables(self.tables, self.num_blocks if self.mode == "push" else None)


class Accepted(HandoffMessage, frozen=True, tag_field="type", tag=str.lower):
    """Prefill knows the request: it need not be repeated."""


class Ready(HandoffMessage, frozen=True, tag_field="type", tag=str.lower):
    """Pull: everything is computed; `tables` name the source blocks, skipped ones left out."""

    num_blocks: Annotated[int, Meta(ge=0, le=MAX_BLOCK_IDS)]
    tables: Tables

    def __post_init__(self) -> None:
        check_tables(self.tables, self.num_blocks)


class Done(HandoffMessage, frozen=True, tag_field="type", tag=str.lower):
    """Pull: decode has read everything, and reads no more."""

    nbytes: Natural


class Sent(HandoffMessage, frozen=True, tag_field="type", tag=str.lower):
    """Push: prefill has written everything, and writes no more."""

    nbytes: Natural


class Failed(HandoffMessage, frozen=True, tag_field="type", tag=str.lower):
    """The side that moves bytes, or was about to, gave up; it moves no more."""

    side: Side
    error: Name  # the name of the error's class
    reason: Text
    retryable: bool


class Cancel(HandoffMessage, frozen=True, tag_field="type", tag=str.lower):
    """The side whose memory is touched asks the other to stop."""

    side: Side
    reason: Text = ""


class Cancelled(HandoffMessage, frozen=True, tag_field="type", tag=str.lower):
    """Stopped and drained: not a byte of this handoff moves any more."""

    side: Side


AnyMessage = Union[  # noqa: UP007 - `get_args` of it works alike on every Python
    Hello,
    Describe,
    Welcome,
    Refused,
    Bye,
    Request,
    Accepted,
    Ready,
    Done,
    Sent,
    Failed,
    Cancel,
    Cancelled,
]
FINAL_ANSWERS = (Done, Sent, Failed, Cancelled)

_codec: Codec[AnyMessage] = Codec(AnyMessage, max_nbytes=MAX_FRAME_NBYTES, max_items=MAX_ITEMS)
encode = _codec.encode
decode = _codec.decode


def check_tables(tables: tuple[bytes, ...], num_blocks: int | None) -> None:
    """Check that every table holds whole block ids, and together `num_blocks` of them.

    Raises:
        ValueError: naming the table, or both numbers.
    """
    for index, table in enumerate(tables):
        if len(table) % BLOCK_ID_NBYTES:
            raise ValueError(
                f"tables[{index}] has {len(table)} bytes, "
                f"not a multiple of {BLOCK_ID_NBYTES} (little-endian int32 block ids)"
            )
    total = count_blocks(tables)
    if num_blocks is not None and total != num_blocks:
        raise ValueError(f"tables hold {total} block ids, num_blocks is {num_blocks}")


def unpack_block_ids(table: bytes) -> list[int]:
    """Return the block ids of one table."""
    ids = array("i")
    ids.frombytes(table)
    if byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def skip_in_tables(tables: tuple[bytes, ...], skip_blocks: int) -> tuple[bytes, ...]:
    """Return the tables without the first `skip_blocks` block ids of each."""
    skip_nbytes = skip_blocks * BLOCK_ID_NBYTES
    return tuple(table[skip_nbytes:] for table in tables) if skip_blocks else tables


def count_blocks(tables: tuple[bytes, ...]) -> int:
    """Return how many block ids the tables hold."""
    return sum(map(len, tables)) // BLOCK_ID_NBYTES
