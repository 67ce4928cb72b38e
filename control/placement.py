"""Which prefill and which decode agent take a request.

Pure: a policy is a function from a `Fleet` (what is known of the agents) and a request to a
`Decision`. No sockets, no clock: a daemon calls it, and a simulator may.

`least_time`, the default, takes the pair with the least estimated time until decode has all blocks:

    queue of prefill + its compute + transfer by the pair's bandwidth + queue of decode

Other policies are plug-ins: an entry point of the group `kvferry.placement` that names a `Policy`.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import nsmallest
from importlib.metadata import entry_points
from math import inf
from typing import TYPE_CHECKING

import msgspec

from .daemon_messages import Load, Place, Topology
from .errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .daemon_messages import Member

POLICY_GROUP = "kvferry.placement"
DEFAULT_POLICY = "least-time"
SHORTLIST = 6  # of each side; with their neighbours, 48 pairs are weighed, which takes 30 µs

# What a pair is taken to move until it has measured itself, bytes a second.
SAME_HOST_RATE = 5e9  # `cma` between processes moves 5.4 GB/s (docs/benchmarks.md)
SAME_ZONE_RATE = 2e9  # `tcp` 2.3 GB/s over loopback
FAR_RATE = 1e9
DEFAULT_TOKENS_PER_S = 10_000.0  # for an agent that does not know
DEFAULT_TOKEN_NBYTES = 131_072  # an 8B model with 8 KV heads: 32 layers, K and V, 128 x 2 bytes


class Decision(msgspec.Struct, frozen=True):
    """These two agents, the estimated seconds until decode has all of it, and why."""

    prefill: str
    decode: str
    estimate_s: float
    reason: str


Policy = Callable[["Fleet", Place], Decision]


class _Candidate:
    """What placement needs of one agent, worked out once a change and not once a request."""

    __slots__ = (
        "free_tokens",
        "member",
        "name",
        "rates",
        "seconds_per_token",
        "token_nbytes",
        "wait_s",
    )

    def __init__(self, member: Member) -> None:
        registration = member.registration
        self.member = member
        self.name = member.name
        self.seconds_per_token = 1 / (registration.tokens_per_s or DEFAULT_TOKENS_PER_S)
        self.token_nbytes = registration.token_nbytes or DEFAULT_TOKEN_NBYTES
        self.take(Load(free_blocks=registration.num_blocks))

    def take(self, load: Load) -> None:
        """A load that the agent told."""
        block = self.member.registration.tokens_per_block
        self.wait_s = load.queued_tokens * self.seconds_per_token
        self.free_tokens = load.free_blocks * block if block else inf
        self.rates = load.rates


class Fleet:
    """What is known of all agents. Not thread-safe: one owner changes it, policies only read it."""

    def __init__(
        self, members: Iterable[Member] = (), loads: dict[str, Load] | None = None
    ) -> None:
        self._all: dict[str, _Candidate] = {}
        self._prefills: dict[str, dict[str, _Candidate]] = {}
        self._decodes: dict[str, dict[str, _Candidate]] = {}
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
        candidate = _Candidate(member)
        if old is not None and old.member.generation == member.generation:
            candidate.wait_s, candidate.free_tokens = old.wait_s, old.free_tokens
            candidate.rates = old.rates
        self._all[member.name] = candidate
        if member.state == "serving":
            model = member.registration.model
            if member.role != "decode":
                self._prefills.setdefault(model, {})[member.name] = candidate
            if member.role != "prefill":
                self._decodes.setdefault(model, {})[member.name] = candidate

    def remove(self, name: str) -> None:
        """A member went."""
        candidate = self._all.pop(name, None)
        if candidate is not None:
            model = candidate.member.registration.model
            for side in (self._prefills, self._decodes):
                side.get(model, {}).pop(name, None)

    def load(self, name: str, load: Load) -> None:
        """A member told its load."""
        candidate = self._all.get(name)
        if candidate is not None:
            candidate.take(load)

    def reserve(self, decision: Decision, tokens: int) -> None:
        """A decision stands: until their next loads, both agents have that much more to do."""
        prefill, decode = self._all.get(decision.prefill), self._all.get(decision.decode)
        if prefill is not None:
            prefill.wait_s += tokens * prefill.seconds_per_token
        if decode is not None:
            decode.free_tokens -= tokens

    def prefills(self, model: str) -> dict[str, _Candidate]:
        """The agents that compute prompts of a model now."""
        return self._prefills.get(model, {})

    def decodes(self, model: str) -> dict[str, _Candidate]:
        """The agents that take them."""
        return self._decodes.get(model, {})

    def generation(self, name: str) -> int:
        """Of a member that is known."""
        return self._all[name].member.generation


def place(fleet: Fleet, request: Place) -> Decision:
    """The decision of the policy that the request names, or of `least_time`.

    Raises:
        PlacementError: no agent, or no policy, fits; says which and what to do.
    """
    name = request.policy or DEFAULT_POLICY
    if name == DEFAULT_POLICY:
        return least_time(fleet, request)
    return _policy(name)(fleet, request)


def least_time(fleet: Fleet, request: Place) -> Decision:
    """The pair with the least estimated time, out of the best of each side and their neighbours.

    Raises:
        PlacementError: no prefill, or no decode with enough free blocks, serves the model.
    """
    prefills, decodes = fleet.prefills(request.model), fleet.decodes(request.model)
    if request.exclude:
        prefills = {n: c for n, c in prefills.items() if n not in request.exclude}
        decodes = {n: c for n, c in decodes.items() if n not in request.exclude}
    tokens, cached = request.tokens, request.cached
    costs = [(c.wait_s + tokens * c.seconds_per_token, n) for n, c in prefills.items()]
    if cached:
        costs = [
            (cost - min(tokens, cached.get(n, 0)) * prefills[n].seconds_per_token, n)
            for cost, n in costs
        ]
    waits = [(c.wait_s, n) for n, c in decodes.items() if c.free_tokens >= tokens]
    if not costs or not waits:
        raise _nobody(request, prefills, decodes)
    best: tuple[float, str, str] | None = None
    short_p, short_d = nsmallest(SHORTLIST, costs), nsmallest(SHORTLIST, waits)
    neighbours = _neighbours(short_p, prefills, waits, decodes)
    for cost, source_name in short_p:
        source = prefills[source_name]
        for wait, target_name in {*short_d, *neighbours.get(source_name, ())}:
            if source_name == target_name:
                continue
            target = decodes[target_name]
            missing = max(0, tokens - cached.get(target_name, 0))
            total = cost + wait + missing * source.token_nbytes / bandwidth(source, target)
            if best is None or (total, source_name, target_name) < best:
                best = (total, source_name, target_name)
    if best is None:
        raise _nobody(request, prefills, decodes)
    total, source_name, target_name = best
    return Decision(
        source_name,
        target_name,
        total,
        _reason(request, prefills[source_name], decodes[target_name]),
    )


def bandwidth(source: _Candidate, target: _Candidate) -> float:
    """Bytes a second between two agents: as either measured it, or as their places suggest."""
    measured = source.rates.get(target.name) or target.rates.get(source.name)
    if measured:
        return measured
    return _assumed(source.member.registration.topology, target.member.registration.topology)


def _assumed(source: Topology, target: Topology) -> float:
    if source.host and source.host == target.host:
        return SAME_HOST_RATE
    if source.zone and source.zone == target.zone:
        return SAME_ZONE_RATE
    return FAR_RATE


def _neighbours(
    short: list[tuple[float, str]],
    prefills: dict[str, _Candidate],
    waits: list[tuple[float, str]],
    decodes: dict[str, _Candidate],
) -> dict[str, list[tuple[float, str]]]:
    """For each prefill of the shortlist, the best decode of its host and the best of its zone."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    places = {n: prefills[n].member.registration.topology for _, n in short}
    hosts = {place.host for place in places.values()} - {""}
    zones = {place.zone for place in places.values()} - {""}
    if not hosts and not zones:
        return {}
    for entry in waits:
        topology = decodes[entry[1]].member.registration.topology
        if topology.host in hosts:
            key = ("host", topology.host)
            if key not in best or entry < best[key]:
                best[key] = entry
        if topology.zone in zones:
            key = ("zone", topology.zone)
            if key not in best or entry < best[key]:
                best[key] = entry
    return {
        name: [best[k] for k in (("host", at.host), ("zone", at.zone)) if k in best]
        for name, at in places.items()
    }


def _reason(request: Place, source: _Candidate, target: _Candidate) -> str:
    rate = bandwidth(source, target)
    compute = max(0, request.tokens - request.cached.get(source.name, 0))
    missing = max(0, request.tokens - request.cached.get(target.name, 0))
    return (
        f"{source.name}: queue {source.wait_s * 1e3:.1f} ms, "
        f"compute {compute * source.seconds_per_token * 1e3:.1f} ms; "
        f"transfer {missing * source.token_nbytes / rate * 1e3:.1f} ms at {rate / 1e9:.2f} GB/s; "
        f"{target.name}: queue {target.wait_s * 1e3:.1f} ms"
    )


def _nobody(
    request: Place, prefills: dict[str, _Candidate], decodes: dict[str, _Candidate]
) -> PlacementError:
    model = f" of model {request.model!r}" if request.model else ""
    if not prefills:
        what = f"no prefill agent{model} is serving: start or restore one"
    elif not decodes:
        what = f"no decode agent{model} is serving: start or restore one"
    else:
        what = (
            f"none of {len(decodes)} decode agents{model} has room for {request.tokens} tokens "
            "beside its prefill: wait, or start another"
        )
    return PlacementError(what, operation="place", retryable=True)


def _policy(name: str) -> Policy:
    found = [point for point in entry_points(group=POLICY_GROUP) if point.name == name]
    if not found:
        known = sorted(
            {point.name for point in entry_points(group=POLICY_GROUP)} | {DEFAULT_POLICY}
        )
        raise PlacementError(
            f"no placement policy {name!r} is installed: use {' or '.join(known)}",
            operation="place",
        )
    policy: Policy = found[0].load()
    return policy
