"""Every message between an agent (or a tool) and the daemon. Version 1.

Each is one MessagePack map with a `type` key, as in `handoff/messages.py`, and fields are only appended.

    Requests       to the daemon's ROUTER; each is answered once, with the same `request` number
        Register → Registered        Heartbeat → Beat         Deregister → Done
        Look → Snapshot              Place → Placed           Drain, Restore, Flip → Done
        Show → Shown
        anything → Denied, with a reason
    Publications   from the daemon's XPUB, two frames: the topic, then the message
        topic `c`   Changes, numbered without gaps; Tick, the last number, when all is quiet
        topic `l`   Loads, unnumbered: each replaces what was known

The parts of one ZeroMQ message are a request each. A request can be lost or come twice. `Register` of one life is answered alike each time; the others
name a generation, and one of an old generation is denied and changes nothing.

Version history:
    1   the first
        `Heartbeat.activity` was appended: older daemons pass it over, older agents have none
        `Show` was added: older daemons deny it as `protocol`, and its asker shows less
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import Meta

from ..handoff.messages import Name, Natural, Role, Side, Text  # noqa: TC001 - msgspec reads them
from ..wire import Codec

VERSION = 1

CHANGES_TOPIC = b"c"
LOADS_TOPIC = b"l"

MAX_REQUEST_NBYTES = 128 << 10  # a Register is 600 bytes; a Heartbeat with 256 rates, all of its
MAX_REQUEST_ITEMS = 2048  # activity and names of 30 characters is 16 KiB and 1,000 items
MAX_MEMBERS = 10_000
# Each daemon of a cluster may accept one more before it hears of the others' last.
MAX_LISTED = 2 * MAX_MEMBERS
MAX_REPLY_NBYTES = 64 << 20  # a member is 500 bytes, its load 100: a full snapshot is 6 MB
MAX_REPLY_ITEMS = 1 << 20
MAX_RATES = 256
MAX_LINKS = 16  # an agent shows: its busiest
MAX_LIVE = 8  # handoffs that an agent shows: its oldest
MAX_FAILURES = 4
MAX_ERRORS = 32
MAX_SHOWN_LINKS = 600  # the busiest of all; more lines than that nobody can tell apart
MAX_SHOWN_ROWS = 50  # of handoffs and failures
MAX_ERROR_KINDS = 256
# Handoffs are counted by how long they took: up to the first bound, the second, ..., and longer.
SECONDS_BOUNDS = tuple(1e-4 * 1.5**number for number in range(31))  # 0.1 ms to 19 s

Short = Annotated[str, Meta(max_length=256)]
Lease = Annotated[float, Meta(ge=0.05, le=3600)]
LARGEST_AMOUNT = 1e18
Amount = Annotated[float, Meta(ge=0, le=LARGEST_AMOUNT)]
State = Literal["serving", "draining"]
DenialReason = Literal[
    "version", "unknown", "generation", "superseded", "key", "full", "nobody", "protocol", "store"
]


class Topology(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where an agent runs; placement prefers what is near."""

    host: Short = ""
    numa: Annotated[int, Meta(ge=-1, le=4095)] = -1
    rails: Annotated[tuple[Short, ...], Meta(max_length=64)] = ()
    zone: Short = ""


class Load(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an agent has to do now.

    `rates` are bytes a second that it measured to or from peers, by their names.
    """

    queued_tokens: Natural = 0
    free_blocks: Natural = 0
    inflight_nbytes: Natural = 0
    handoffs: Natural = 0
    rates: Annotated[dict[Name, Amount], Meta(max_length=MAX_RATES)] = {}


class LinkActivity(msgspec.Struct, frozen=True, omit_defaults=True):
    """A link to a peer that sends, and the bytes a second that came over it since the last beat."""

    peer: Name
    transport: Short = ""
    nbytes_per_s: Amount = 0.0


class LiveHandoff(msgspec.Struct, frozen=True, omit_defaults=True):
    """A handoff that is under way, and for how long."""

    handoff: Name
    side: Side
    peer: Short = ""
    nbytes: Natural = 0
    age_s: Amount = 0.0


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """A handoff that failed, and how long ago."""

    handoff: Name
    error: Name
    peer: Short = ""
    age_s: Amount = 0.0


class Activity(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an agent has done, for people to see: nothing is decided by it.

    Counts grow from the agent's first moment, `age_s` ago, so a beat that is lost loses nothing.
    Bytes and seconds are decode's, so that no handoff counts twice; of errors each side has its own.

    Attributes:
        seconds: handoffs that ended well, by how long they took: see `SECONDS_BOUNDS`.
        errors: handoffs that failed, by the name of the error.
        links, live, failures: the busiest, the oldest and the last of them.
    """

    age_s: Amount = 0.0
    nbytes: Natural = 0
    seconds: Annotated[tuple[Natural, ...], Meta(max_length=len(SECONDS_BOUNDS) + 1)] = ()
    errors: Annotated[dict[Name, Natural], Meta(max_length=MAX_ERRORS)] = {}
    links: Annotated[tuple[LinkActivity, ...], Meta(max_length=MAX_LINKS)] = ()
    live: Annotated[tuple[LiveHandoff, ...], Meta(max_length=MAX_LIVE)] = ()
    failures: Annotated[tuple[Failure, ...], Meta(max_length=MAX_FAILURES)] = ()


class Registration(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an agent says of itself.

    Attributes:
        life: random for each process; peers see it as the generation in `Hello`.
        address: where its peers connect to.
        public_key: of its CURVE key pair, 32 bytes, or none.
        num_blocks: capacity of its cache.
        tokens_per_block: tokens of one block.
        token_nbytes: bytes of one token in its cache, all layers.
        tokens_per_s: tokens that it computes in a second, if it knows.
        service: where its engine serves clients, as `http://host:port`; "" if only routers of
            another kind know.
        fixed_role: whether it keeps the role that it was started with, whoever asks it to flip.
    """

    name: Name
    role: Role
    life: Natural
    address: Name
    model: Short = ""
    layout_digest: Short = ""
    transports: Annotated[tuple[Short, ...], Meta(max_length=16)] = ()
    public_key: Annotated[bytes, Meta(max_length=32)] = b""
    num_blocks: Natural = 0
    tokens_per_block: Natural = 0
    token_nbytes: Natural = 0
    tokens_per_s: Amount = 0.0
    topology: Topology = Topology()
    service: Short = ""
    fixed_role: bool = False


class Member(msgspec.Struct, frozen=True, omit_defaults=True):
    """A registered agent.

    `generation` grows with every registration, over all names. `wanted_role` is what it has been
    asked to flip to.
    """

    registration: Registration
    generation: Natural
    state: State = "serving"
    wanted_role: Literal["", "prefill", "decode", "both"] = ""

    @property
    def name(self) -> str:
        """The agent's name."""
        return self.registration.name

    @property
    def role(self) -> str:
        """The agent's role."""
        return self.registration.role


class Gone(msgspec.Struct, frozen=True):
    """A member that is no more; a later generation of the name is another member."""

    name: Name
    generation: Natural
    reason: Text = ""


class LinkRow(msgspec.Struct, frozen=True):
    """Bytes go from `source` to `target`: so many a second now, and when they were measured."""

    source: Name
    target: Name
    transport: Short
    nbytes_per_s: Amount
    measured_nbytes_per_s: Amount


class HandoffRow(msgspec.Struct, frozen=True):
    """A handoff that is under way."""

    handoff: Name
    prefill: Short
    decode: Short
    nbytes: Natural
    age_s: Amount


class FailureRow(msgspec.Struct, frozen=True):
    """A handoff that failed, as `agent` tells."""

    handoff: Name
    agent: Name
    peer: Short
    error: Name
    age_s: Amount


# Requests ----------------------------------------------------------------------------------------


class Ask(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower):
    """What all requests have in common: the asker's number for it, which comes back."""

    request: Natural


class Register(Ask, frozen=True, tag_field="type", tag=str.lower):
    """An agent is there, or is there again.

    `previous` is its last generation, 0 if none. A first registration of a life takes its name from
    whoever has it; one with a `previous` only if nobody lives under the name.
    """

    version: Natural
    registration: Registration
    lease_s: Lease = 3.0
    previous: Natural = 0


class Heartbeat(Ask, frozen=True, tag_field="type", tag=str.lower):
    """The agent lives: its lease begins anew."""

    name: Name
    generation: Natural
    load: Load = Load()
    activity: Activity = Activity()


class Deregister(Ask, frozen=True, tag_field="type", tag=str.lower):
    """The agent leaves."""

    name: Name
    generation: Natural


class Look(Ask, frozen=True, tag_field="type", tag=str.lower):
    """Who is there?"""

    loads: bool = False


class Place(Ask, frozen=True, tag_field="type", tag=str.lower):
    """Which prefill and which decode agent should take a request?

    `cached` are tokens of its beginning that agents have already, by their names. `exclude` are
    agents that may not be chosen.
    """

    tokens: Natural
    model: Short = ""
    cached: Annotated[dict[Name, Natural], Meta(max_length=256)] = {}
    exclude: Annotated[tuple[Name, ...], Meta(max_length=256)] = ()
    policy: Short = ""


class Drain(Ask, frozen=True, tag_field="type", tag=str.lower):
    """Place nothing more on this agent; what is under way goes on. Generation 0: whichever."""

    name: Name
    generation: Natural = 0


class Restore(Ask, frozen=True, tag_field="type", tag=str.lower):
    """Undo `Drain`, or a `Flip` that has not happened yet."""

    name: Name
    generation: Natural = 0


class Flip(Ask, frozen=True, tag_field="type", tag=str.lower):
    """Drain this agent; once it is idle it registers again with another role."""

    name: Name
    role: Role
    generation: Natural = 0


class Show(Ask, frozen=True, tag_field="type", tag=str.lower):
    """What do the agents do? Of those that this daemon hears."""


# Answers -----------------------------------------------------------------------------------------


class Registered(Ask, frozen=True, tag_field="type", tag=str.lower):
    """You are a member. `publisher` is where the changes come from."""

    generation: Natural
    lease_s: Lease
    publisher: Name
    epoch: Natural


class Beat(Ask, frozen=True, tag_field="type", tag=str.lower):
    """Your lease is renewed; this is what is wanted of you."""

    state: State
    wanted_role: Literal["", "prefill", "decode", "both"] = ""


class Snapshot(Ask, frozen=True, tag_field="type", tag=str.lower):
    """All members after change number `sequence` of this `epoch` (one life of a daemon)."""

    epoch: Natural
    sequence: Natural
    publisher: Name
    members: Annotated[tuple[Member, ...], Meta(max_length=MAX_LISTED)]
    loads: Annotated[dict[Name, Load], Meta(max_length=MAX_LISTED)] = {}


class Placed(Ask, frozen=True, tag_field="type", tag=str.lower):
    """These two, and why. `estimate_s` is the time until decode has all of it."""

    prefill: Name
    decode: Name
    prefill_generation: Natural
    decode_generation: Natural
    estimate_s: Amount
    reason: Text = ""


class Shown(Ask, frozen=True, tag_field="type", tag=str.lower):
    """The busiest links, the oldest handoffs under way, the last failures; at most a second old.

    `num_links` is how many there are; `errors` counts failures since the daemon began, by name.
    """

    links: Annotated[tuple[LinkRow, ...], Meta(max_length=MAX_SHOWN_LINKS)]
    num_links: Natural
    live: Annotated[tuple[HandoffRow, ...], Meta(max_length=MAX_SHOWN_ROWS)]
    failures: Annotated[tuple[FailureRow, ...], Meta(max_length=MAX_SHOWN_ROWS)]
    errors: Annotated[dict[Name, Natural], Meta(max_length=MAX_ERROR_KINDS)]


class Done(Ask, frozen=True, tag_field="type", tag=str.lower):
    """It is done."""


class Denied(Ask, frozen=True, tag_field="type", tag=str.lower):
    """No, and why. Number 0 answers a frame that could not be read."""

    reason: DenialReason
    detail: Text = ""


# Publications ------------------------------------------------------------------------------------


class Changes(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower):
    """Change number `sequence`: these members came or changed, those went."""

    epoch: Natural
    sequence: Natural
    members: Annotated[tuple[Member, ...], Meta(max_length=MAX_LISTED)] = ()
    gone: Annotated[tuple[Gone, ...], Meta(max_length=MAX_LISTED)] = ()


class Tick(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower):
    """Nothing new: the last change was number `sequence`."""

    epoch: Natural
    sequence: Natural


class Loads(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower):
    """Loads that agents told since the last of these."""

    epoch: Natural
    loads: Annotated[dict[Name, Load], Meta(max_length=MAX_LISTED)]


AnyRequest = Union[  # noqa: UP007 - `get_args` of it works alike on every Python
    Register, Heartbeat, Deregister, Look, Place, Drain, Restore, Flip, Show
]
AnyAnswer = Union[  # noqa: UP007
    Registered, Beat, Snapshot, Placed, Shown, Done, Denied, Changes, Tick, Loads
]

requests: Codec[Any] = Codec(AnyRequest, max_nbytes=MAX_REQUEST_NBYTES, max_items=MAX_REQUEST_ITEMS)
answers: Codec[Any] = Codec(AnyAnswer, max_nbytes=MAX_REPLY_NBYTES, max_items=MAX_REPLY_ITEMS)
