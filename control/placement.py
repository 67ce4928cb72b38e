"""Which prefill and which decode agent take a request.

Pure: a policy is a function from a `Fleet` (what is known of the agents) and a request to a
`Decision`. No sockets, no clock: a daemon calls it, and a simulator may.

`least_time`, the default, takes the pair with the least estimated time until decode has all blocks:

    queue of prefill + its compute + transfer by the pair's bandwidth + queue of decode

Other policies are plug-ins: an entry point of the group `kvferry.placement` that names a `Policy`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import msgspec

from .daemon_messages import Place, Topology
from .errors import PlacementError
from .fleet import Fleet

if TYPE_CHECKING:
    from .fleet import Candidate

POLICY_GROUP = "kvferry.placement"
DEFAULT_POLICY = "least-time"

# What a pair is taken to move until it has measured itself, bytes a second.
SAME_HOST_RATE = 5e9  # `cma` between processes moves 5.4 GB/s (docs/benchmarks.md)
SAME_ZONE_RATE = 2e9  # `tcp` 2.3 GB/s over loopback
FAR_RATE = 1e9


class Decision(msgspec.Struct, frozen=True):
    """These two agents, the estimated seconds until decode has all of it, and why."""

    prefill: str
    decode: str
    estimate_s: float
    reason: str


Policy = Callable[[Fleet, Place], Decision]


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
    tokens, cached = request.tokens, request.cached
    shortest = fleet.shortest_decodes(request)
    best: tuple[float, str, str] | None = None
    for cost, source_name in fleet.shortest_prefills(request) if shortest else ():
        if best is not None and cost + shortest[0][0] >= best[0]:
            break  # before a byte is moved it is as late as the best pair
        source = prefills[source_name]
        near = fleet.shortest_decodes(request, source.member.registration.topology)
        for wait, target_name in {*shortest, *near}:
            if source_name == target_name:
                continue
            missing = max(0, tokens - cached.get(target_name, 0))
            rate = bandwidth(source, decodes[target_name])
            total = cost + wait + missing * source.token_nbytes / rate
            if best is None or (total, source_name, target_name) < best:
                best = (total, source_name, target_name)
    if best is None:
        raise _nobody(request, prefills, decodes)
    total, source_name, target_name = best
    reason = _reason(request, prefills[source_name], decodes[target_name])
    return Decision(source_name, target_name, total, reason)


def bandwidth(source: Candidate, target: Candidate) -> float:
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
