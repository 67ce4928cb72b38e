"""`kv_transfer_params`: what a router carries from vLLM's prefill to its decode engine.

The form is the one of vLLM's NIXL connector, so that routers written for it need no change:

    router → prefill   do_remote_decode: true
    prefill → router   do_remote_prefill: true, remote_engine_id, remote_request_id, remote_host, …
    router → decode    the same, verbatim

A router that sends a request to both engines at once, so that decode's blocks are there before
prefill writes, names the handoff itself, with the same `transfer_id` in both requests, and tells
decode `remote_engine_id`, `remote_host` and `remote_port`.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from ...control.errors import ControlError
from ...control.keys import split_address

if TYPE_CHECKING:
    from collections.abc import Sequence

Params = dict[str, Any]
MAX_AGENTS = 256  # ranks of an engine
# Where decode goes for KV unless the operator says otherwise: this machine and private networks. Not
# link-local ones, where clouds answer with credentials.
PRIVATE_NETWORKS = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class Remote(NamedTuple):
    """Where decode finds a request's KV.

    Attributes:
        handoff_id: what the prefill engine calls it.
        engine_id: the prefill engine.
        addresses: of its agents, one for each rank.
    """

    handoff_id: str
    engine_id: str
    addresses: list[str]


class Asked(msgspec.Struct):
    """What a request's `kv_transfer_params` ask for, checked: they come from whoever can send one."""

    do_remote_decode: bool | None = False
    do_remote_prefill: bool | None = False
    transfer_id: Text | None = None
    remote_request_id: Text | None = None
    remote_engine_id: Text | None = None
    remote_host: Text | None = None
    remote_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    remote_agents: Annotated[list[Text], msgspec.Meta(max_length=MAX_AGENTS)] | None = None
    remote_num_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] | None = None

    def handoff_id(self, req_id: str) -> str:
        """Return what prefill calls the handoff of a request: what the router named, or the request
        itself."""
        return self.transfer_id or req_id

    def remote(self, peers: Sequence[str]) -> Remote | str:
        """Return where the KV is; or, as text, why that is not said or not allowed.

        Args:
            peers: networks, addresses and names that may be dialled.
        """
        name = self.remote_request_id or self.transfer_id
        if not name:
            return "neither 'remote_request_id' nor 'transfer_id'"
        for key in ("remote_engine_id", "remote_host", "remote_port"):
            if not getattr(self, key):
                return f"no {key!r}"
        addresses = self.remote_agents or [f"tcp://{self.remote_host}:{self.remote_port}"]
        for address in addresses:
            why = _not_allowed(address, peers)
            if why:
                return why
        return Remote(name, str(self.remote_engine_id), addresses)


def read(params: object) -> Asked | str:
    """Read a request's `kv_transfer_params`; or, as text, why they ask for nothing. Whatever they are,
    this returns."""
    try:
        return msgspec.convert(params, Asked, strict=False) if params else Asked()
    except msgspec.ValidationError as error:
        return str(error)
    except (TypeError, ValueError, RecursionError) as error:
        return f"they cannot be read: {type(error).__name__}"


def _not_allowed(address: str, peers: Sequence[str]) -> str:
    """Return why an agent's address may not be dialled, or ""."""
    try:
        endpoint, _ = split_address(address)
    except (ControlError, ValueError):
        return f"an agent at {address[:100]!r}, which is no address"
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not host or not port.isdecimal():
        return f"an agent at {address[:100]!r}, which is not tcp://host:port"
    if any(_matches(host, each) for each in peers):
        return ""
    return (
        f"an agent at {host}, which this engine does not dial: allow it with `peers` in "
        "kv_connector_extra_config"
    )


def _matches(host: str, allowed: str) -> bool:
    """Return whether a host is in a network, or is this name, or one below `*.name`."""
    if allowed == "*" or host == allowed:
        return True
    if allowed.startswith("*."):
        return host.endswith(allowed[1:])
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(allowed, strict=False)
    except ValueError:
        return False  # a name, here or there


def describe(addresses: list[str], **known: Any) -> Params:
    """Return what prefill tells decode, by way of the router: where its agents are, and what else
    is known."""
    endpoint, _ = split_address(addresses[0])
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_host": host,
        "remote_port": int(port),
        "remote_agents": addresses,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_blocks_expiry_time": None,
        **known,
    }
