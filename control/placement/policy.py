"""Which prefill and which decode agent take a request.

Pure: a policy is a function from a `Fleet` (what is known of the agents) and a request to a
`Decision`. No sockets, no clock: a daemon calls it, and a simulator may.

`least_time`, the default, takes the pair with the least estimated time until decode has all blocks:

    queue of prefill + its compute + transfer by the pair's bandwidth + queue of decode

Other policies are plug-ins: an entry point of the group `kvferry.placement` that names a `Policy`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from ..cluster.messages import LARGEST_AMOUNT, Place, Topology
from ..errors import PlacementError
from .fleet import MIN_RATE, Decision, Fleet

if TYPE_CHECKING:
    from .fleet import Candidate

POLICY_GROUP = "kvferry.placement"
DEFAULT_POLICY = "least-time"

# What a pair is taken to move until it has measured itself, bytes a second.
SAME_HOST_RATE = 5e9  # `cma` between processes moves 5.4 GB/s (docs/benchmarks.md)
SAME_ZONE_RATE = 2e9  # `tcp` 2.3 GB/s over loopback
FAR_RATE = 1e9


Policy = Callable[[Fleet, Place], Decision]


def place(fleet: Fleet, request: Place) -> Decision:
    """Return the decision of the policy that the request names, or of `least_time`.

    Raises:
        PlacementError: no agent, or no policy, fits; says which and what to do.
    """
    name = request.policy or DEFAULT_POLICY
    if name == DEFAULT_POLICY:
        return least_time(fleet, request)
    return _policy(name)(fleet, request)


def least_time(fleet: Fleet, request: Place) -> Decision:
    """Return the pair with the least estimated time, out of the best of each side and their
    neighbours.

    Raises:
        PlacementError: no prefill, or no decode with enough free blocks, serves the model.
    """
    prefills, decodes = fleet.prefills(request.model), fleet.decodes(request.model)
    tokens, cached = request.tokens, request.cached

    def with_missing(found: list[tuple[float, str]]) -> list[tuple[float, str, Candidate, int]]:
        return [(w, n, decodes[n], max(0, tokens - cached.get(n, 0))) for w, n in found]

    shortest = fleet.shortest_decodes(request)
    all_over = with_missing(shortest)
    neighbours: dict[tuple[str, str], list[tuple[float, str, Candidate, int]]] = {}
    total, source_name, target_name = inf, "", ""
    # Some 40 pairs are weighed: what is the same for several is worked out once.
    for cost, name in fleet.shortest_prefills(request) if shortest else ():
        if cost + shortest[0][0] >= total:
            break  # before a byte is moved it is as late as the best pair
        source = prefills[name]
        at = source.topology
        host, zone, rates, token_nbytes = at.host, at.zone, source.rates, source.token_nbytes
        near = neighbours.get((host, zone))
        if near is None:
            found = fleet.shortest_decodes(request, at) if host or zone else []
            near = with_missing([one for one in found if one not in shortest])
            near = neighbours[host, zone] = [*all_over, *near]
        for wait, other, target, missing in near:
            pair = cost + wait
            if pair > total or other == name:
                continue
            if missing:
                rate = (rates and rates.get(other)) or (target.rates and target.rates.get(name))
                if not rate:
                    there = target.topology
                    near_by = (host and host == there.host) or (zone and zone == there.zone)
                    rate = _assumed(at, there) if near_by else FAR_RATE
                pair += missing * token_nbytes / max(MIN_RATE, rate)
            if pair < total or (pair == total and (name, other) < (source_name, target_name)):
                total, source_name, target_name = pair, name, other
    if not source_name:
        raise _nobody(request, prefills, decodes)
    reason = _reason(request, prefills[source_name], decodes[target_name])
    return Decision(source_name, target_name, min(total, LARGEST_AMOUNT), reason)


def bandwidth(source: Candidate, target: Candidate) -> float:
    """Bytes a second between two agents: as either measured it, or as their places suggest."""
    measured = source.rates.get(target.name) or target.rates.get(source.name)
    if measured:
        return max(MIN_RATE, measured)
    return _assumed(source.member.registration.topology, target.member.registration.topology)


def _assumed(source: Topology, target: Topology) -> float:
    if source.host and source.host == target.host:
        return SAME_HOST_RATE
    if source.zone and source.zone == target.zone:
        return SAME_ZONE_RATE
    return FAR_RATE


def _reason(request: Place, source: Candidate, target: Candidate) -> str:
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
    request: Place, prefills: dict[str, Candidate], decodes: dict[str, Candidate]
) -> PlacementError:
    prefills = {name: c for name, c in prefills.items() if name not in request.exclude}
    decodes = {name: c for name, c in decodes.items() if name not in request.exclude}
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
    from importlib.metadata import entry_points  # with `email` and more it takes 20 ms to load

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
