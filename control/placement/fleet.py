"""What placement knows of the agents, kept in order as it changes, so that a request is placed fast.

Pure, like `policy.py`: no sockets, no clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import islice
from math import inf, log
from typing import TYPE_CHECKING

import msgspec

from ..cluster.messages import Load

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..cluster.messages import Member, Place, Topology

SHORTLIST = 6  # of each side and speed; with their neighbours, some 48 pairs are weighed
SPEED_CLASS = 0.05  # agents whose speeds differ by less are ranked by their queues alone
DEFAULT_TOKENS_PER_S = 10_000.0  # for an agent that does not know
# What is slower is taken for this slow: estimates stay numbers.
MIN_TOKENS_PER_S = 1e-3
MIN_RATE = 1.0  # bytes a second
DEFAULT_TOKEN_NBYTES = 131_072  # an 8B model with 8 KV heads: 32 layers, K and V, 128 x 2 bytes


class Decision(msgspec.Struct, frozen=True):
    """These two agents, the estimated seconds until decode has all of it, and why."""

    prefill: str
    decode: str
    estimate_s: float
    reason: str


class Candidate:
    """What placement needs of one agent, worked out once a change and not once a request."""

    __slots__ = (
        "free_tokens",
        "member",
        "name",
        "rates",
        "seconds_per_token",
        "speed_class",
        "token_nbytes",
        "topology",
        "wait_s",
    )

    def __init__(self, member: Member) -> None:
        registration = member.registration
        self.member = member
        self.name = member.name
        self.topology = registration.topology
        speed = registration.tokens_per_s or DEFAULT_TOKENS_PER_S
        self.seconds_per_token = 1 / max(MIN_TOKENS_PER_S, speed)
        self.speed_class = round(log(self.seconds_per_token) / SPEED_CLASS)
        self.token_nbytes = registration.token_nbytes or DEFAULT_TOKEN_NBYTES
        self.take(Load(free_blocks=registration.num_blocks))

    def take(self, load: Load) -> None:
        """A load that the agent told."""
        block = self.member.registration.tokens_per_block
        self.wait_s = load.queued_tokens * self.seconds_per_token
        self.free_tokens = load.free_blocks * block if block else inf
        self.rates = load.rates


class _Side:
    """The agents of one model that serve in one role, ranked by their queues.

    Kept in order as loads come, so that a request looks at the few best instead of at all.
    """

    def __init__(self, *, by_speed: bool) -> None:
        self.candidates: dict[str, Candidate] = {}
        self.rankings: dict[object, list[tuple[float, str]]] = {}
        self._by_speed = by_speed

    def add(self, candidate: Candidate) -> None:
        self.candidates[candidate.name] = candidate
        for key in self._keys(candidate):
            insort(self.rankings.setdefault(key, []), (candidate.wait_s, candidate.name))

    def remove(self, candidate: Candidate) -> None:
        if self.candidates.pop(candidate.name, None) is None:
            return
        for key in self._keys(candidate):
            ranking = self.rankings[key]
            del ranking[bisect_left(ranking, (candidate.wait_s, candidate.name))]
            if not ranking:
                del self.rankings[key]

    def _keys(self, candidate: Candidate) -> tuple[object, ...]:
        if self._by_speed:
            return (candidate.speed_class,)
        at = candidate.member.registration.topology
        return ("all", ("host", at.host), ("zone", at.zone))


_NOBODY = _Side(by_speed=False)


class Fleet:
    """What is known of all agents. Not thread-safe: one owner changes it, policies only read it."""

    def __init__(
        self, members: Iterable[Member] = (), loads: dict[str, Load] | None = None
    ) -> None:
        self._all: dict[str, Candidate] = {}
        self._prefills: dict[str, _Side] = {}
        self._decodes: dict[str, _Side] = {}
        for member in members:
            self.put(member)
        for name, load in (loads or {}).items():
            self.load(name, load)

    def __len__(self) -> int:
        return len(self._all)

    def put(self, member: Member) -> None:
        """A member came, or changed."""
        old = self._all.get(member.name)
        self.remove(member.name)
        candidate = Candidate(member)
        if old is not None and old.member.generation == member.generation:
            candidate.wait_s, candidate.free_tokens = old.wait_s, old.free_tokens
            candidate.rates = old.rates
        self._all[member.name] = candidate
        for side in self._sides(candidate):
            side.add(candidate)

    def remove(self, name: str) -> None:
        """A member went."""
        candidate = self._all.pop(name, None)
        if candidate is not None:
            for side in self._sides(candidate):
                side.remove(candidate)
            model = candidate.member.registration.model
            for sides in (self._prefills, self._decodes):
                if model in sides and not sides[model].candidates:
                    del sides[model]  # agents name models: there may be any number of names

    def load(self, name: str, load: Load) -> None:
        """A member told its load."""
        candidate = self._all.get(name)
        if candidate is not None:
            sides = self._sides(candidate)
            for side in sides:
                side.remove(candidate)
            candidate.take(load)
            for side in sides:
                side.add(candidate)

    def reserve(self, decision: Decision, tokens: int) -> None:
        """A decision stands: until their next loads, both agents have that much more to do."""
        prefill, decode = self._all.get(decision.prefill), self._all.get(decision.decode)
        if prefill is not None:
            sides = self._sides(prefill)
            for side in sides:
                side.remove(prefill)
            prefill.wait_s += tokens * prefill.seconds_per_token
            for side in sides:
                side.add(prefill)
        if decode is not None:
            decode.free_tokens -= tokens

    def prefills(self, model: str) -> dict[str, Candidate]:
        """Return the agents that compute prompts of a model now."""
        return self._prefills.get(model, _NOBODY).candidates

    def decodes(self, model: str) -> dict[str, Candidate]:
        """Return the agents that take them."""
        return self._decodes.get(model, _NOBODY).candidates

    def generation(self, name: str) -> int:
        """Of a member that is known."""
        return self._all[name].member.generation

    def _sides(self, candidate: Candidate) -> list[_Side]:
        member, model = candidate.member, candidate.member.registration.model
        sides = []
        if member.state == "serving" and member.role != "decode":
            sides.append(self._prefills.setdefault(model, _Side(by_speed=True)))
        if member.state == "serving" and member.role != "prefill":
            sides.append(self._decodes.setdefault(model, _Side(by_speed=False)))
        return sides

    def shortest_prefills(self, request: Place) -> list[tuple[float, str]]:
        """Seconds until the prompt is computed, for the best of each speed and all with a cache."""
        side = self._prefills.get(request.model, _NOBODY)
        names = {name for name in request.cached if name in side.candidates}
        for ranking in side.rankings.values():
            free = (name for _, name in ranking if name not in request.exclude)
            names.update(islice(free, SHORTLIST))
        costs = []
        for name in names - set(request.exclude):
            candidate = side.candidates[name]
            tokens = max(0, request.tokens - request.cached.get(name, 0))
            costs.append((candidate.wait_s + tokens * candidate.seconds_per_token, name))
        return sorted(costs)

    def shortest_decodes(
        self, request: Place, near: Topology | None = None
    ) -> list[tuple[float, str]]:
        """Return the decode agents with room and the shortest queues: of all, or the one
        nearest."""
        side = self._decodes.get(request.model, _NOBODY)
        keys: tuple[object, ...] = ("all",)
        if near is not None:
            keys = (("host", near.host),) * bool(near.host) + (("zone", near.zone),) * bool(
                near.zone
            )
        found: list[tuple[float, str]] = []
        for key in keys:
            fitting = (
                entry
                for entry in side.rankings.get(key, ())
                if side.candidates[entry[1]].free_tokens >= request.tokens
                and entry[1] not in request.exclude
            )
            found.extend(islice(fitting, SHORTLIST if near is None else 2))
        return found
