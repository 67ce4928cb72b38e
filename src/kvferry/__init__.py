"""kvferry moves paged KV cache between inference engines, at the speed of the wire.

This is the whole public API. Every name is imported when it is first used: `import kvferry` loads
neither torch nor NumPy nor ZeroMQ. `docs/structure.md` walks one handoff through the files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.agent import Agent
    from .adapters.handoffs import Handoff, SendHandoff
    from .adapters.ranks import (
        HandoffSet,
        connect_ranks,
        num_readers,
        receive_from_ranks,
        send_to_ranks,
    )
    from .engine.block_ids import UploadedIds
    from .engine.errors import EngineError
    from .engine.handshake import EngineAddress
    from .engine.join import join_groups, join_planes
    from .engine.layout import Axis, GroupLayout, KVLayout, RegionLayout
    from .engine.link import Link
    from .engine.memory import CacheDescriptor, MemoryRegion, RegionDescriptor, RegisteredCache
    from .engine.ranks import RankPlan
    from .engine.tickets import Ticket
    from .engine.transfer import TransferEngine
    from .engine.transfer_plan import TransferPlan
    from .engine.transports.cuda_graph import GraphWrite

_HOMES = {
    "Agent": "adapters.agent",
    "Axis": "engine.layout",
    "CacheDescriptor": "engine.memory",
    "EngineAddress": "engine.handshake",
    "EngineError": "engine.errors",
    "GraphWrite": "engine.transports.cuda_graph",
    "GroupLayout": "engine.layout",
    "Handoff": "adapters.handoffs",
    "HandoffSet": "adapters.ranks",
    "KVLayout": "engine.layout",
    "Link": "engine.link",
    "MemoryRegion": "engine.memory",
    "RankPlan": "engine.ranks",
    "RegionDescriptor": "engine.memory",
    "RegionLayout": "engine.layout",
    "RegisteredCache": "engine.memory",
    "SendHandoff": "adapters.handoffs",
    "Ticket": "engine.tickets",
    "TransferEngine": "engine.transfer",
    "TransferPlan": "engine.transfer_plan",
    "UploadedIds": "engine.block_ids",
    "connect_ranks": "adapters.ranks",
    "join_groups": "engine.join",
    "join_planes": "engine.join",
    "num_readers": "adapters.ranks",
    "receive_from_ranks": "adapters.ranks",
    "send_to_ranks": "adapters.ranks",
}

__all__ = [
    "Agent",
    "Axis",
    "CacheDescriptor",
    "EngineAddress",
    "EngineError",
    "GraphWrite",
    "GroupLayout",
    "Handoff",
    "HandoffSet",
    "KVLayout",
    "Link",
    "MemoryRegion",
    "RankPlan",
    "RegionDescriptor",
    "RegionLayout",
    "RegisteredCache",
    "SendHandoff",
    "Ticket",
    "TransferEngine",
    "TransferPlan",
    "UploadedIds",
    "connect_ranks",
    "join_groups",
    "join_planes",
    "num_readers",
    "receive_from_ranks",
    "send_to_ranks",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvferry' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kvferry.{home}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return __all__
