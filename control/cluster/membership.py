"""Who is there: agents with their leases and generations, as the daemon knows them.

Pure: the caller brings the time (monotonic seconds) and carries the answers. Every change gets into
one batch until `flush`, which numbers it: that is what watchers follow.

A request is judged first, which changes nothing: the judgement is an answer and, maybe, a proposal.
A daemon that is alone learns its own proposal at once (`answer`); daemons that share a store
(`replication.py`) propose it there, and all of them learn what the store then has. The rules are these
either way.

Two rules carry the rest:

* generations only grow, over all names and over restarts of the daemon: whatever names an older
  one than the member has is denied, and changes nothing;
* a name belongs to the newest life that asked for it. A life that lost its name takes it again
  only when nobody lives under it, so two agents of one name cannot chase each other for ever.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from math import inf
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec

from ..handoff.messages import Natural  # noqa: TC001 - msgspec reads it
from .messages import (
    MAX_MEMBERS,
    VERSION,
    Beat,
    Changes,
    Denied,
    Deregister,
    Done,
    Drain,
    Flip,
    Gone,
    Heartbeat,
    Lease,
    Load,
    Loads,
    Member,
    Register,
    Registered,
    Restore,
    Snapshot,
    Tick,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .messages import AnyAnswer, Ask, DenialReason, State

    Judgement = tuple[AnyAnswer, "Proposal | None"]

LIVES_REMEMBERED = 10_000  # lives that lost their name; about 200 bytes each
# With it a snapshot of `MAX_MEMBERS` has room in a frame; an honest one is 600 bytes.
MAX_REGISTRATION_NBYTES = 6 << 10
# Generations are microseconds of the clock: nobody can have had a higher one, and above it there
# is room for as many as will ever be given.
MAX_PREVIOUS = 1 << 62
# Of one publication, about: a load is 100 bytes, a rate 40. Readers walk a frame of 1 MiB.
LOADS_NBYTES = 256 << 10
MAX_LEASE_S = 60.0  # longer ones are cut: a dead agent must not be placed on for minutes


_encoder = msgspec.msgpack.Encoder()


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """A member as a store keeps it.

    Attributes:
        key: the public key that registered it.
        daemon: who hears it and ends its lease; the others leave that to this one.
        floor: while `member.generation` is 0, the generation is this and the record's revision.
    """

    member: Member
    key: Annotated[bytes, msgspec.Meta(max_length=32)]
    lease_s: Lease
    daemon: Natural = 0
    floor: Annotated[int, msgspec.Meta(ge=0, le=MAX_PREVIOUS)] = 0


class Proposal(msgspec.Struct, frozen=True):
    """`name` shall have this record (none: be gone), if nothing has changed it since `revision`."""

    name: str
    revision: int
    record: Record | None
    reason: str = ""


class _Seat(msgspec.Struct):
    """A member and what only the daemon knows of it."""

    member: Member
    key: bytes
    lease_s: float
    deadline_s: float
    load: Load
    daemon: int
    revision: int


class Membership:
    """All members. Not thread-safe: one owner.

    Args:
        epoch: one life of the daemon, for watchers.
        first_generation: below every generation that is given here; let it grow from one life of
            the daemon to the next.
        publisher: where changes are published, for the answers.
        daemon: who this is, if it shares its members with others through a store; else 0.
    """

    def __init__(
        self, *, epoch: int, first_generation: int, publisher: str, daemon: int = 0
    ) -> None:
        self.epoch = epoch
        self.sequence = 0
        self.publisher = publisher
        self.daemon = daemon
        self.floor = first_generation  # of generations that are a store's revisions
        self._generation = first_generation
        self._revision = 0
        self._seats: dict[str, _Seat] = {}
        self._leases: list[tuple[float, str, int]] = []
        self._forgiven_s = 0.0
        self._dirty: dict[str, None] = {}
        self._gone: list[Gone] = []
        self._loads: dict[str, Load] = {}
        self._outlived: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._wishes: dict[str, Proposal] = {}

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def members(self) -> tuple[Member, ...]:
        """All members."""
        return tuple(seat.member for seat in self._seats.values())

    @property
    def changed(self) -> bool:
        """Whether `flush` has something."""
        return bool(self._dirty or self._gone)

    @property
    def loads(self) -> dict[str, Load]:
        """The last load of each."""
        return {name: seat.load for name, seat in self._seats.items()}

    def hears(self, name: str) -> bool:
        """Return whether it is this daemon that `name` tells that it lives."""
        seat = self._seats.get(name)
        return seat is not None and seat.daemon == self.daemon

    def answer(self, ask: Ask, now_s: float, key: bytes = b"") -> AnyAnswer:
        """Return what a request is answered with by a daemon that is alone."""
        answer, proposal = self.judge(ask, now_s, key)
        if proposal is not None:
            self.learn(proposal.name, proposal.record, 0, now_s, proposal.reason)
        return answer

    def judge(self, ask: Ask, now_s: float, key: bytes = b"") -> Judgement:
        """Return what a request is answered with if what it needs comes about; `key` is the asker's
        public key, if it has one."""
        judge = self._judges.get(type(ask))
        if judge is None:
            detail = f"{type(ask).__name__} is no request of a member"
            return Denied(ask.request, "protocol", detail), None
        return judge(self, ask, now_s - self._forgiven_s, key)

    def learn(
        self, name: str, record: Record | None, revision: int, now_s: float, reason: str = ""
    ) -> None:
        """What `name` has now, in the order in which it came about; None: nobody has it."""
        now_s -= self._forgiven_s
        self._revision = max(self._revision, revision)
        seat = self._seats.get(name)
        if record is None:
            if seat is not None:
                self._remove(name, reason)
            return
        member = record.member
        if not member.generation:
            member = msgspec.structs.replace(member, generation=record.floor + revision)
        self._generation = max(self._generation, member.generation)
        ours = record.daemon == self.daemon
        deadline_s = now_s + record.lease_s if ours else inf
        if seat is not None and seat.member.generation != member.generation:
            self._remove(name, "it registered anew")
            seat = None
        if seat is None:
            load = Load(free_blocks=member.registration.num_blocks)
            lease_s, daemon = record.lease_s, record.daemon
            seat = _Seat(member, record.key, lease_s, deadline_s, load, daemon, revision)
            self._seats[name] = seat
            self._dirty[name] = None
        else:
            if member != seat.member:
                seat.member = member
                self._dirty[name] = None
            seat.revision, seat.daemon = revision, record.daemon
            if ours and seat.deadline_s != inf:
                return
            seat.deadline_s = deadline_s
        if ours:
            heapq.heappush(self._leases, (seat.deadline_s, name, member.generation))

    def learn_all(
        self, records: Mapping[str, tuple[Record, int]], revision: int, now_s: float
    ) -> None:
        """All that the store has."""
        self._revision = max(self._revision, revision)
        for name in [name for name in self._seats if name not in records]:
            self._remove(name, "it is not in the store any more")
        for name, (record, at) in records.items():
            self.learn(name, record, at, now_s)

    def hear_loads(self, daemon: int, loads: Mapping[str, Load]) -> None:
        """Load that another daemon publishes: of its own agents they are news."""
        for name, load in loads.items():
            seat = self._seats.get(name)
            if seat is not None and seat.daemon == daemon != self.daemon:
                seat.load = self._loads[name] = load

    def wishes(self) -> list[Proposal]:
        """Return what the store has to be told of leases that ended here, and of agents that came
        here."""
        if not self._wishes:
            return []
        wishes, self._wishes = list(self._wishes.values()), {}
        return wishes

    def snapshot(self, request: int, *, loads: bool) -> Snapshot:
        """Return all members as of the last `flush`: call that first."""
        return Snapshot(
            request,
            self.epoch,
            self.sequence,
            self.publisher,
            self.members,
            self.loads if loads else {},
        )

    def expire(self, now_s: float) -> float:
        """Remove members whose lease has run out; return the seconds until the next may."""
        now_s -= self._forgiven_s
        while self._leases:
            deadline_s, name, generation = self._leases[0]
            seat = self._seats.get(name)
            if seat is None or seat.member.generation != generation:
                heapq.heappop(self._leases)
            elif seat.deadline_s > deadline_s:  # renewed since
                heapq.heapreplace(self._leases, (seat.deadline_s, name, generation))
            elif deadline_s <= now_s:
                heapq.heappop(self._leases)
                reason = f"its lease of {seat.lease_s:g} s ran out"
                if self.daemon:
                    self._wishes[name] = Proposal(name, seat.revision, None, reason)
                self._remove(name, reason)
            else:
                return deadline_s - now_s
        return MAX_LEASE_S

    def forgive(self, seconds: float) -> None:
        """The daemon itself was asleep: that time counts against nobody."""
        self._forgiven_s += seconds

    def flush(self) -> Changes | None:
        """Return the changes since the last call, numbered; None if there are none."""
        if not self._dirty and not self._gone:
            return None
        self.sequence += 1
        seats = (self._seats.get(name) for name in self._dirty)
        members = tuple(seat.member for seat in seats if seat is not None)
        changes = Changes(self.epoch, self.sequence, members, tuple(self._gone))
        self._dirty.clear()
        self._gone.clear()
        return changes

    def flush_loads(self) -> list[Loads]:
        """Return the loads since the last call, in as many parts as frames are needed."""
        parts: list[dict[str, Load]] = []
        room = 0
        for name, load in self._loads.items():
            nbytes = 100 + len(name) + sum(12 + len(peer) for peer in load.rates)
            if nbytes > room:
                parts.append({})
                room = LOADS_NBYTES
            parts[-1][name] = load
            room -= nbytes
        self._loads = {}
        return [Loads(self.epoch, part) for part in parts]

    def tick(self) -> Tick:
        """Return the last number, for watchers that may have missed it."""
        return Tick(self.epoch, self.sequence)

    # Requests

    def _register(self, ask: Register, now_s: float, key: bytes) -> Judgement:
        registration = ask.registration
        name, life = registration.name, registration.life
        if ask.version != VERSION:
            detail = f"the daemon speaks version {VERSION}, {name} {ask.version}"
            return Denied(ask.request, "version", detail), None
        if registration.public_key != key:
            detail = f"{name} names another public key than the one it connected with"
            return Denied(ask.request, "key", detail), None
        nbytes = len(_encoder.encode(registration))
        if nbytes > MAX_REGISTRATION_NBYTES:
            detail = f"a registration of {nbytes} bytes, the limit is {MAX_REGISTRATION_NBYTES}"
            return Denied(ask.request, "protocol", detail), None
        seat = self._seats.get(name)
        previous = min(ask.previous, MAX_PREVIOUS)
        lease_s = min(ask.lease_s, MAX_LEASE_S)
        if seat is not None and seat.member.registration.life == life:
            if seat.member.registration == registration:  # the answer was lost
                self._heard(seat, now_s)
                return self._registered(ask, seat.member.generation, seat.lease_s), None
        elif seat is not None and (ask.previous or (name, life) in self._outlived):
            detail = f"another life of {name} has taken the name; it has to end first"
            return Denied(ask.request, "superseded", detail), None
        elif seat is not None and seat.key != key:
            detail = f"{name} lives under another key: it has to end first"
            return Denied(ask.request, "key", detail), None
        elif seat is None and len(self._seats) >= MAX_MEMBERS:
            return Denied(ask.request, "full", f"{MAX_MEMBERS} agents are registered already"), None
        generation, floor = 0, 0
        if not self.daemon:
            generation = max(self._generation, previous) + 1
        else:  # the store's next revision is above all that were seen
            floor = self.floor if previous < self.floor + self._revision else previous
        record = Record(Member(registration, generation), key, lease_s, self.daemon, floor)
        revision = seat.revision if seat is not None else 0
        return self._registered(ask, generation, lease_s), Proposal(name, revision, record)

    def _registered(self, ask: Register, generation: int, lease_s: float) -> Registered:
        return Registered(ask.request, generation, lease_s, self.publisher, self.epoch)

    def _renew(self, ask: Heartbeat, now_s: float, key: bytes) -> Judgement:
        seat = self._seat_of(ask, key)
        if isinstance(seat, Denied):
            return seat, None
        self._heard(seat, now_s)
        if ask.load != seat.load:
            seat.load = self._loads[ask.name] = ask.load
        return Beat(ask.request, seat.member.state, seat.member.wanted_role), None

    def _deregister(self, ask: Deregister, _: float, key: bytes) -> Judgement:
        seat = self._seat_of(ask, key)
        if isinstance(seat, Denied):
            return seat, None
        return Done(ask.request), Proposal(ask.name, seat.revision, None, "it left")

    def _drain(self, ask: Drain, *_: object) -> Judgement:
        return self._change(ask, "draining", "")

    def _restore(self, ask: Restore, *_: object) -> Judgement:
        return self._change(ask, "serving", "")

    def _flip(self, ask: Flip, *_: object) -> Judgement:
        seat = self._seats.get(ask.name)
        if seat is not None and seat.member.role == ask.role:
            return self._change(ask, "serving", "")
        if seat is not None and seat.member.registration.fixed_role:
            detail = f"{ask.name} keeps the role that its engine was started with: restart it"
            return Denied(ask.request, "protocol", detail), None
        return self._change(ask, "draining", ask.role)

    def _heard(self, seat: _Seat, now_s: float) -> None:
        """A member spoke: its lease begins anew, and it is ours if it was another daemon's."""
        if seat.deadline_s != inf:
            seat.deadline_s = now_s + seat.lease_s
            return
        name = seat.member.name
        record = Record(seat.member, seat.key, seat.lease_s, self.daemon)
        self._wishes[name] = Proposal(name, seat.revision, record)

    def _seat_of(self, ask: Heartbeat | Deregister, key: bytes) -> _Seat | Denied:
        """Return the member that an agent speaks for, or why it may not."""
        seat = self._seats.get(ask.name)
        reason: DenialReason
        if seat is None:
            reason, detail = "unknown", "nobody of that name is registered: register again"
        elif ask.generation != seat.member.generation:
            reason = "generation"
            detail = f"generation {ask.generation} is over, the name has {seat.member.generation}"
        elif seat.key != key:
            reason, detail = "key", "this name was registered with another key"
        else:
            return seat
        return Denied(ask.request, reason, detail)

    def _change(self, ask: Drain | Restore | Flip, state: State, wanted_role: str) -> Judgement:
        name, generation = ask.name, ask.generation
        seat = self._seats.get(name)
        if seat is None:
            return Denied(ask.request, "unknown", f"no agent {name!r} is registered"), None
        if generation and generation != seat.member.generation:
            detail = f"generation {generation} is over, {name} has {seat.member.generation}"
            return Denied(ask.request, "generation", detail), None
        member = msgspec.structs.replace(seat.member, state=state, wanted_role=wanted_role)
        if member == seat.member:
            return Done(ask.request), None
        record = Record(member, seat.key, seat.lease_s, seat.daemon)
        return Done(ask.request), Proposal(name, seat.revision, record)

    def _remove(self, name: str, reason: str) -> None:
        seat = self._seats.pop(name)
        self._dirty.pop(name, None)
        self._loads.pop(name, None)
        self._gone.append(Gone(name, seat.member.generation, reason))
        self._outlived[(name, seat.member.registration.life)] = None
        while len(self._outlived) > LIVES_REMEMBERED:
            self._outlived.popitem(last=False)

    _judges: ClassVar[Mapping[type[Ask], Callable[..., Judgement]]] = {
        Heartbeat: _renew,
        Register: _register,
        Deregister: _deregister,
        Drain: _drain,
        Restore: _restore,
        Flip: _flip,
    }
