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
    from .engine.errors import EngineError
    from .engine.handshake import EngineAddress
    from .engine.layout import Axis, GroupLayout, KVLayout, RegionLayout
    from .engine.link import Link
    from .engine.memory import CacheDescriptor, MemoryRegion, RegionDescriptor, RegisteredCache
    from .engine.tickets import Ticket
    from .engine.transfer import TransferEngine
    from .engine.transfer_plan import TransferPlan

_HOMES = {
    "Agent": "adapters.agent",
    "Axis": "engine.layout",
    "CacheDescriptor": "engine.memory",
    "EngineAddress": "engine.handshake",
    "EngineError": "engine.errors",
    "GroupLayout": "engine.layout",
    "Handoff": "adapters.handoffs",
    "KVLayout": "engine.layout",
    "Link": "engine.link",
    "MemoryRegion": "engine.memory",
    "RegionDescriptor": "engine.memory",
    "RegionLayout": "engine.layout",
    "RegisteredCache": "engine.memory",
    "SendHandoff": "adapters.handoffs",
    "Ticket": "engine.tickets",
    "TransferEngine": "engine.transfer",
    "TransferPlan": "engine.transfer_plan",
}

__all__ = [
    "Agent",
    "Axis",
    "CacheDescriptor",
    "EngineAddress",
    "EngineError",
    "GroupLayout",
    "Handoff",
    "KVLayout",
    "Link",
    "MemoryRegion",
    "RegionDescriptor",
    "RegionLayout",
    "RegisteredCache",
    "SendHandoff",
    "Ticket",
    "TransferEngine",
    "TransferPlan",
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
