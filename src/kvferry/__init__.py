"""kvferry moves paged KV cache between inference engines, at the speed of the wire.

This is the whole public API. Every name is imported when it is first used: `import kvferry` loads
neither torch nor NumPy nor ZeroMQ. `docs/structure.md` walks one handoff through the files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.agent.agent import Agent
    from .adapters.agent.handoff import Handoff, HandoffSet, SendHandoff
    from .adapters.agent.ranks import connect_ranks, num_readers
    from .engine.errors import EngineError
    from .engine.layout.join import join_groups, join_planes
    from .engine.layout.kv_layout import GroupLayout, KVLayout
    from .engine.layout.region import Axis, RegionLayout
    from .engine.link.link import Link
    from .engine.memory.descriptors import CacheDescriptor, RegionDescriptor
    from .engine.memory.regions import MemoryRegion, RegisteredCache
    from .engine.plan.rank_plan import RankPlan
    from .engine.transfer.block_ids import UploadedIds
    from .engine.transfer.plan import TransferPlan
    from .engine.transfer.ticket import Ticket
    from .engine.transfer_engine import TransferEngine
    from .engine.transports.cuda_ipc.graph_write import GraphWrite
    from .engine.wire.identity import EngineAddress

_HOMES = {
    "Agent": "adapters.agent.agent",
    "Axis": "engine.layout.region",
    "CacheDescriptor": "engine.memory.descriptors",
    "EngineAddress": "engine.wire.identity",
    "EngineError": "engine.errors",
    "GraphWrite": "engine.transports.cuda_ipc.graph_write",
    "GroupLayout": "engine.layout.kv_layout",
    "Handoff": "adapters.agent.handoff",
    "HandoffSet": "adapters.agent.handoff",
    "KVLayout": "engine.layout.kv_layout",
    "Link": "engine.link.link",
    "MemoryRegion": "engine.memory.regions",
    "RankPlan": "engine.plan.rank_plan",
    "RegionDescriptor": "engine.memory.descriptors",
    "RegionLayout": "engine.layout.region",
    "RegisteredCache": "engine.memory.regions",
    "SendHandoff": "adapters.agent.handoff",
    "Ticket": "engine.transfer.ticket",
    "TransferEngine": "engine.transfer_engine",
    "TransferPlan": "engine.transfer.plan",
    "UploadedIds": "engine.transfer.block_ids",
    "connect_ranks": "adapters.agent.ranks",
    "join_groups": "engine.layout.join",
    "join_planes": "engine.layout.join",
    "num_readers": "adapters.agent.ranks",
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
