"""What the two sides of the SGLang backend tell each other, over SGLang's own ZeroMQ sockets.

    decode                                   prefill
    Register(geometry, token)     ──────▶    compares the two caches
                                  ◀──────    Meet(address), or Refused in words
    dials the engine there
    Publish(room, pages, link)    ──────▶    writes as chunks are computed
                                  ◀──────    Ended(room): nobody writes for it any more
    Abort(room)                   ──────▶    stops, drains, answers Ended

A message is two frames: `TAG` and MessagePack. Fields are only ever appended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from ...engine.errors import ProtocolError
from ...engine.memory.descriptors import RegionDescriptor  # noqa: TC001 - msgspec reads it at run time
from ...engine.memory.fields import DECODE_ERRORS

TAG = b"KVFERRY"
VERSION = 2


class Entry(msgspec.Struct, frozen=True):
    """One buffer that SGLang registered: `num_items` items of `item_nbytes`, side by side."""

    region: RegionDescriptor
    item_nbytes: int
    num_items: int


class Component(msgspec.Struct, frozen=True):
    """Buffers that share a list of indices: the KV pages, the metadata, one kind of state.

    Attributes:
        kind: `kv`, `aux`, or SGLang's name of the state type.
        entries: None for a buffer that SGLang left out (no bytes).
        layer_ids: of each entry; empty where SGLang gives none.
    """

    kind: str
    entries: tuple[Entry | None, ...]
    layer_ids: tuple[int, ...] = ()


class Geometry(msgspec.Struct, frozen=True):
    """One rank's caches, and how its model is split over ranks.

    Attributes:
        total_heads: KV heads of the model; 0 where heads do not matter (MLA).
        swa_layout: of the sliding-window pages, such as `nhd`; "" if there are none.
        numbers: SGLang's `kv_cache_dtype`; its bytes alone do not say what they are.
    """

    page_size: int
    tp_size: int
    tp_rank: int
    state_tp_size: int
    pp_size: int
    dcp_size: int
    dcp_rank: int
    total_heads: int
    mla: bool
    hybrid_mla: bool
    swa_layout: str
    numbers: str
    components: tuple[Component, ...]


class Target(NamedTuple):
    """A prefill rank as SGLang's bootstrap server names it."""

    host: str
    port: int

    @property
    def name(self) -> str:
        """How it calls itself."""
        return f"{self.host}:{self.port}"


class Register(msgspec.Struct, frozen=True, tag="register"):
    """A decode rank wants a link: one for each `generation`, which `token` opens."""

    version: int
    engine_id: str
    generation: int
    host: str
    port: int
    token: bytes
    geometry: Geometry


class Publish(msgspec.Struct, frozen=True, tag="publish"):
    """Where one request's KV goes. `generation` names the link that it may come over.

    Attributes:
        attempt: of this request; another attempt at the same room has another.
        pages: int32, packed.
        states: a list of int32 for each state component, packed; None where there is none.
        required: how many decode ranks publish this room to this prefill rank.
        dummy: this prefill rank need not send anything.
    """

    engine_id: str
    generation: int
    host: str
    port: int
    room: int
    attempt: str
    pages: bytes
    aux_index: int
    states: tuple[bytes | None, ...]
    required: int
    prefix_len: int
    dummy: bool


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Decode gives up on an attempt and wants its pages back; `Ended` is the answer."""

    engine_id: str
    host: str
    port: int
    room: int
    attempt: str
    reason: str


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    """The caches go together: dial this engine."""

    prefill: str
    generation: int
    address: bytes


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The caches do not go together, in words."""

    prefill: str
    generation: int
    reason: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """This prefill rank writes nothing more for that attempt.

    Attributes:
        rank: SGLang's number of the prefill rank.
        reason: why it failed; "" if everything is there.
    """

    prefill: str
    rank: int
    room: int
    attempt: str
    reason: str


ToPrefill = Register | Publish | Abort
ToDecode = Meet | Refused | Ended

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Register | Publish | Abort | Meet | Refused | Ended
)


def frames(message: ToPrefill | ToDecode) -> list[bytes]:
    """Return the frames of a message."""
    return [TAG, _encoder.encode(message)]


def parse(received: list[bytes]) -> ToPrefill | ToDecode | None:
    """Return the message in these frames; None if they are not kvferry's.

    Raises:
        ProtocolError: they are, and make no sense.
    """
    if len(received) != 2 or received[0] != TAG:
        return None
    try:
        message: ToPrefill | ToDecode = _decoder.decode(received[1])
    except DECODE_ERRORS as error:
        raise ProtocolError(
            f"not a message of this backend: {error}", operation="sglang"
        ) from error
    return message
