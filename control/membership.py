"""Who is there: agents with their leases and generations, as the daemon knows them.

Pure: the caller brings the time (monotonic seconds) and carries the answers. Every change gets into
one batch until `flush`, which numbers it: that is what watchers follow.

Two rules carry the rest:

* generations only grow, over all names and over restarts of the daemon: whatever names an older
  one than the member has is denied, and changes nothing;
* a name belongs to the newest life that asked for it. A life that lost its name takes it again
  only when nobody lives under it, so two agents of one name cannot chase each other for ever.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec

from .daemon_messages import (
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
    from .daemon_messages import AnyAnswer, Ask, DenialReason, State

LIVES_REMEMBERED = 10_000  # lives that lost their name; about 200 bytes each
MAX_LEASE_S = 60.0  # longer ones are cut: a dead agent must not be placed on for minutes


class _Seat(msgspec.Struct):
    """A member and what only the daemon knows of it."""

    member: Member
    key: bytes
    lease_s: float
    deadline_s: float
    load: Load


class Membership:
    """All members. Not thread-safe: one owner.

    Args:
        epoch: one life of the daemon, for watchers.
        first_generation: below every generation that is given here; let it grow from one life of
            the daemon to the next.
        publisher: where changes are published, for the answers.
    """

    def __init__(self, *, epoch: int, first_generation: int, publisher: str) -> None:
        self.epoch = epoch
        self.sequence = 0
        self.publisher = publisher
        self._generation = first_generation
        self._seats: dict[str, _Seat] = {}
        self._leases: list[tuple[float, str, int]] = []
        self._forgiven_s = 0.0
        self._dirty: dict[str, None] = {}
        self._gone: list[Gone] = []
        self._loads: dict[str, Load] = {}
        self._outlived: OrderedDict[tuple[str, int], None] = OrderedDict()

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

    def answer(self, ask: Ask, now_s: float, key: bytes = b"") -> AnyAnswer:
        """What a request is answered with; `key` is the asker's public key, if it has one."""
        now_s -= self._forgiven_s
        match ask:
            case Heartbeat():
                return self._renew(ask, now_s, key)
            case Register():
                return self._register(ask, now_s, key)
            case Deregister(name=name, generation=generation):
                seat = self._seats.get(name)
                denial = self._denial(ask, seat, generation, key)
                if denial is None:
                    self._remove(name, "it left")
                return denial or Done(ask.request)
            case Drain(name=name, generation=generation):
                return self._change(ask, name, generation, "draining", "")
            case Restore(name=name, generation=generation):
                return self._change(ask, name, generation, "serving", "")
            case Flip(name=name, generation=generation, role=role):
                seat = self._seats.get(name)
                if seat is not None and seat.member.role == role:
                    return self._change(ask, name, generation, "serving", "")
                return self._change(ask, name, generation, "draining", role)
        return Denied(ask.request, "protocol", f"{type(ask).__name__} is no request of a member")

    def snapshot(self, request: int, *, loads: bool) -> Snapshot:
        """All members as of the last `flush`: call that first."""
        return Snapshot(
            request,
            self.epoch,
            self.sequence,
            self.publisher,
            self.members,
            self.loads if loads else {},
        )

    def expire(self, now_s: float) -> float:
        """Removes members whose lease has run out; returns the seconds until the next may."""
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
                self._remove(name, f"its lease of {seat.lease_s:g} s ran out")
            else:
                return deadline_s - now_s
        return MAX_LEASE_S

    def forgive(self, seconds: float) -> None:
        """The daemon itself was asleep: that time counts against nobody."""
        self._forgiven_s += seconds

    def flush(self) -> Changes | None:
        """The changes since the last call, numbered; None if there are none."""
        if not self._dirty and not self._gone:
            return None
        self.sequence += 1
        seats = (self._seats.get(name) for name in self._dirty)
        members = tuple(seat.member for seat in seats if seat is not None)
        changes = Changes(self.epoch, self.sequence, members, tuple(self._gone))
        self._dirty.clear()
        self._gone.clear()
        return changes

    def flush_loads(self) -> Loads | None:
        """The loads since the last call; None if there are none."""
        if not self._loads:
            return None
        loads = Loads(self.epoch, self._loads)
        self._loads = {}
        return loads

    def tick(self) -> Tick:
        """The last number, for watchers that may have missed it."""
        return Tick(self.epoch, self.sequence)

    # Requests

    def _register(self, ask: Register, now_s: float, key: bytes) -> AnyAnswer:
        registration = ask.registration
        name, life = registration.name, registration.life
        if ask.version != VERSION:
            detail = f"the daemon speaks version {VERSION}, {name} {ask.version}"
            return Denied(ask.request, "version", detail)
        if registration.public_key != key:
            detail = f"{name} names another public key than the one it connected with"
            return Denied(ask.request, "key", detail)
        seat = self._seats.get(name)
        lease_s = min(ask.lease_s, MAX_LEASE_S)
        if seat is not None and seat.member.registration.life == life:
            if seat.member.registration == registration:  # the answer was lost
                seat.deadline_s = now_s + seat.lease_s
                return self._registered(ask, seat)
        elif seat is not None and (ask.previous or (name, life) in self._outlived):
            detail = f"another life of {name} has taken the name; it has to end first"
            return Denied(ask.request, "superseded", detail)
        elif seat is None and len(self._seats) >= MAX_MEMBERS:
            return Denied(ask.request, "full", f"{MAX_MEMBERS} agents are registered already")
        if seat is not None:
            self._remove(name, "it registered anew")
        self._generation = max(self._generation, ask.previous) + 1
        seat = _Seat(
            member=Member(registration, self._generation),
            key=key,
            lease_s=lease_s,
            deadline_s=now_s + lease_s,
            load=Load(free_blocks=registration.num_blocks),
        )
        self._seats[name] = seat
        self._dirty[name] = None
        heapq.heappush(self._leases, (seat.deadline_s, name, seat.member.generation))
        return self._registered(ask, seat)

    def _registered(self, ask: Register, seat: _Seat) -> Registered:
        generation = seat.member.generation
        return Registered(ask.request, generation, seat.lease_s, self.publisher, self.epoch)

    def _renew(self, ask: Heartbeat, now_s: float, key: bytes) -> AnyAnswer:
        seat = self._seats.get(ask.name)
        denial = self._denial(ask, seat, ask.generation, key)
        if denial is not None or seat is None:
            return denial or Denied(ask.request, "unknown")
        seat.deadline_s = now_s + seat.lease_s
        if ask.load != seat.load:
            seat.load = self._loads[ask.name] = ask.load
        return Beat(ask.request, seat.member.state, seat.member.wanted_role)

    def _denial(self, ask: Ask, seat: _Seat | None, generation: int, key: bytes) -> Denied | None:
        """Why an agent may not speak for a member, or None."""
        reason: DenialReason
        if seat is None:
            reason, detail = "unknown", "nobody of that name is registered: register again"
        elif generation != seat.member.generation:
            reason = "generation"
            detail = f"generation {generation} is over, the name has {seat.member.generation}"
        elif seat.key != key:
            reason, detail = "key", "this name was registered with another key"
        else:
            return None
        return Denied(ask.request, reason, detail)

    def _change(
        self, ask: Ask, name: str, generation: int, state: State, wanted_role: str
    ) -> AnyAnswer:
        seat = self._seats.get(name)
        if seat is None:
            return Denied(ask.request, "unknown", f"no agent {name!r} is registered")
        if generation and generation != seat.member.generation:
            detail = f"generation {generation} is over, {name} has {seat.member.generation}"
            return Denied(ask.request, "generation", detail)
        changed = msgspec.structs.replace(seat.member, state=state, wanted_role=wanted_role)
        if changed != seat.member:
            seat.member = changed
            self._dirty[name] = None
        return Done(ask.request)

    def _remove(self, name: str, reason: str) -> None:
        seat = self._seats.pop(name)
        self._dirty.pop(name, None)
        self._loads.pop(name, None)
        self._gone.append(Gone(name, seat.member.generation, reason))
        self._outlived[(name, seat.member.registration.life)] = None
        while len(self._outlived) > LIVES_REMEMBERED:
            self._outlived.popitem(last=False)
