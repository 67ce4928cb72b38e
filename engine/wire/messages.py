"""Messages on a link's control channel: small, typed, length-prefixed MessagePack.

Bulk data never passes here. One message a transfer, not one a block.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ..errors import ProtocolError
from ..memory.fields import DECODE_ERRORS, Key, Uint32, Uint63

# 2: one-time tokens; 3: Arrived.write_nbytes, and where bytes begin in a verbs frame; 4: verbs slots of
# 2 MiB; 5: nobody says who it is before the other has proven itself, and checks wait for their turn.
LINK_VERSION = 5
LENGTH_NBYTES = 4
MAX_MESSAGE_NBYTES = 1 << 20


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    pass


class Heartbeat(_Message, frozen=True, tag="hb"):
    """I am alive."""


class Arrived(_Message, frozen=True, tag="arrived"):
    """Bytes that I wrote into your memory are visible there: count them under `imm`.

    `device_nbytes` of them have been added to your device counter of that imm already.
    `write_nbytes` more, of the same writes, are counted where they arrive, before or after this.
    """

    imm: Uint32
    nbytes: Uint63
    writes: Uint32
    device_nbytes: Uint63 = 0
    write_nbytes: Uint63 = 0


class Acknowledge(_Message, frozen=True, tag="ack"):
    """These bytes of your transfer are placed and counted; on verbs, they came in that slot."""

    transfer: Uint63
    nbytes: Uint63
    slot: Uint32 | None = None


class Refuse(_Message, frozen=True, tag="refuse"):
    """A part of your transfer is refused or failed here.

    `error` names the class of `engine.errors`; `first` is the refused `ReadRequest`'s, or the chunk
    of the refused `Check`.
    """

    transfer: Uint63
    error: str
    reason: str
    first: Uint32 = 0


class ReadRequest(_Message, frozen=True, tag="read"):
    """Send me these pieces of your memory, as the pieces from `first` on of my transfer."""

    transfer: Uint63
    first: Uint32
    regions: bytes
    pieces: bytes
    verify: bool = False


class Check(_Message, frozen=True, tag="check"):
    """Compute the checksum of these pieces of your memory.

    With `count`, compare it with `crc` and count the bytes under `imm` if they agree.
    """

    transfer: Uint63
    chunk: Uint32
    regions: bytes
    pieces: bytes
    count: bool
    crc: Uint32
    imm: Uint32 | None


class Checked(_Message, frozen=True, tag="checked"):
    """The checksum that was asked for."""

    transfer: Uint63
    chunk: Uint32
    crc: Uint32


class OpenStaging(_Message, frozen=True, tag="stage-open"):
    """My staging for you is this descriptor of my process: slots of so many bytes each."""

    descriptor: Uint32
    num_slots: Uint32
    slot_nbytes: Uint63


class Staged(_Message, frozen=True, tag="staged"):
    """A slot of my staging holds these pieces, one after the other: put them in their places.

    A write names regions and pieces of yours; a reply to your `ReadRequest` names neither, for it is
    your own transfer's pieces from `first` on.
    """

    transfer: Uint63
    first: Uint32
    slot: Uint32
    nbytes: Uint63
    reply: bool
    regions: bytes
    pieces: bytes
    imm: Uint32 | None
    crc: Uint32 | None


class Unstaged(_Message, frozen=True, tag="unstaged"):
    """I am done with that slot of your staging."""

    slot: Uint32


class Abort(_Message, frozen=True, tag="abort"):
    """I gave up on this imm: its counter will never reach the total."""

    imm: Uint32
    reason: str


class Claim(_Message, frozen=True, tag="claim"):
    """May I reach this region of yours, which I believe to be here and this large?"""

    claim: Uint63
    region: Uint32
    key: Key
    address: Uint63
    nbytes: Uint63


class Granted(_Message, frozen=True, tag="granted"):
    """You may; or, with the name of a class of `engine.errors`, you may not.

    `keys` are the region's keys on each of my RDMA devices, where the transport has such.
    """

    claim: Uint63
    error: str = ""
    reason: str = ""
    keys: Annotated[tuple[Uint32, ...], Meta(max_length=64)] = ()


class Revoke(_Message, frozen=True, tag="revoke"):
    """Stop using this region of mine."""

    region: Uint32


class Revoked(_Message, frozen=True, tag="revoked"):
    """I have stopped using that region of yours."""

    region: Uint32


class SlotFree(_Message, frozen=True, tag="slot"):
    """I have taken apart what you wrote into that staging slot of mine."""

    slot: Uint32


class Credits(_Message, frozen=True, tag="credits"):
    """I have posted so many receives more on that queue pair (its number here) of mine."""

    queue: Uint32
    count: Uint32


class RailDown(_Message, frozen=True, tag="raildown"):
    """My end of that rail is stopped: stop yours. Nothing new goes over it."""

    rail: Uint32
    epoch: Uint32
    reason: str


class RailClosed(_Message, frozen=True, tag="railclosed"):
    """I have dealt with everything that came over that rail, and given back its queue pairs."""

    rail: Uint32
    epoch: Uint32


class RailOpen(_Message, frozen=True, tag="railopen"):
    """Open that rail again: this is my end (`verbs_cards.Offer` of one rail)."""

    rail: Uint32
    offer: bytes


class RailOpened(_Message, frozen=True, tag="railopened"):
    """It is: this is mine; or, with a reason, it cannot be opened yet."""

    rail: Uint32
    epoch: Uint32
    offer: bytes = b""
    refused: str = ""


class RailReady(_Message, frozen=True, tag="railready"):
    """My end of that rail is connected: send."""

    rail: Uint32
    epoch: Uint32


class Bye(_Message, frozen=True, tag="bye"):
    """I am closing this link; an error's text if something went wrong."""

    reason: str


class ByeToo(_Message, frozen=True, tag="byetoo"):
    """I have stopped all access to your memory over this link."""


LinkMessage = (
    Heartbeat
    | Arrived
    | Acknowledge
    | Refuse
    | ReadRequest
    | Check
    | Checked
    | OpenStaging
    | Staged
    | Unstaged
    | Abort
    | Claim
    | Granted
    | Revoke
    | Revoked
    | SlotFree
    | Credits
    | RailDown
    | RailClosed
    | RailOpen
    | RailOpened
    | RailReady
    | Bye
    | ByeToo
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[LinkMessage] = msgspec.msgpack.Decoder(LinkMessage)


def encode(message: LinkMessage) -> bytes:
    """Return one message with its length in front."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_NBYTES, "little") + body


def decode_all(buffer: bytearray) -> list[LinkMessage]:
    """Take every complete message out of `buffer`.

    Raises:
        ProtocolError: a length or a message is not of this protocol.
    """
    messages: list[LinkMessage] = []
    start = 0
    while len(buffer) - start >= LENGTH_NBYTES:
        size = int.from_bytes(buffer[start : start + LENGTH_NBYTES], "little")
        if not 0 < size <= MAX_MESSAGE_NBYTES:
            raise ProtocolError(
                f"a control message of {size} bytes is not between 1 and {MAX_MESSAGE_NBYTES}"
            )
        if len(buffer) - start - LENGTH_NBYTES < size:
            break
        body = bytes(buffer[start + LENGTH_NBYTES : start + LENGTH_NBYTES + size])
        try:
            messages.append(_decoder.decode(body))
        except DECODE_ERRORS as error:
            raise ProtocolError(f"a control message does not decode: {error}") from error
        start += LENGTH_NBYTES + size
    del buffer[:start]
    return messages
