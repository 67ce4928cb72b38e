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

from typing import Any, NamedTuple

from ...control.keys import split_address

Params = dict[str, Any]


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


def wants_remote_decode(params: Params | None) -> bool:
    """Return whether this engine computes the prompt and another decodes."""
    return bool(params and params.get("do_remote_decode"))


def wants_remote_prefill(params: Params | None) -> bool:
    """Return whether another engine computes the prompt, and nothing was loaded yet."""
    return bool(params and params.get("do_remote_prefill"))


def handoff_id(params: Params, req_id: str) -> str:
    """Return what prefill calls the handoff of a request: what the router named, or the request
    itself."""
    return str(params.get("transfer_id") or req_id)


def find_remote(params: Params, num_tokens: int = 0) -> Remote | str:
    """Return where the KV of a prompt of so many tokens is; or, as text, why the parameters do not
    say."""
    name = params.get("remote_request_id") or params.get("transfer_id")
    if not name:
        return "neither 'remote_request_id' nor 'transfer_id'"
    for key in ("remote_engine_id", "remote_host", "remote_port"):
        if not params.get(key):
            return f"no {key!r}"
    there = params.get("remote_num_tokens")
    if there is not None and there < num_tokens:
        return f"remote_num_tokens {there}, but the prompt has {num_tokens} tokens here"
    first = f"tcp://{params['remote_host']}:{int(params['remote_port'])}"
    addresses = [str(each) for each in params.get("remote_agents") or [first]]
    return Remote(str(name), str(params["remote_engine_id"]), addresses)


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
