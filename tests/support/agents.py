"""An agent of this process, and one of another; over which transports. Imports no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvferry.adapters.agent.agent import Agent
from kvferry.engine.transports.verbs import topology
from kvferry.engine.transports.verbs.device import NICS_VARIABLE
from tests.support.child import Child

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .agent_process import Cache

# As for the engine's tests: only these, with commas between them. `verbs` needs RDMA devices, which
# `tests/conftest.py` has chosen for this process; other processes have the last one.
TRANSPORTS = os.environ.get("KVFERRY_TEST_TRANSPORTS", "cma,tcp").split(",")
NICS = [nic.name for nic in topology.nics() if nic.active] if "verbs" in TRANSPORTS else []
ANSWER_S = 150.0 if NICS else 60.0  # reached only when something hangs


class Local:
    """An agent of this process, with its cache."""

    def __init__(self, name: str, role: str, transport: str, cache: Cache, **options: Any) -> None:
        self.cache = cache
        self.agent = Agent(
            name=name,
            role=role,  # type: ignore[arg-type]
            layout=cache.layout,
            tensors=cache.layers,
            transports=(transport,),
            **options,
        )


class Remote(Child):
    """An agent of another process, and that process's fate; it can be started long before it is
    needed."""

    farewell = ("open_gate", "close")

    def __init__(self, launcher: Sequence[str] = ()) -> None:
        super().__init__(
            "tests.support.agent_process",
            answer_s=ANSWER_S,
            launcher=launcher,
            environment={NICS_VARIABLE: NICS[-1]} if NICS else {},
        )
        self.address = ""

    def begin(self, **options: Any) -> None:
        """Makes its agent."""
        self.pipe.send(options)
        self.answer("start")
        self.address = self.call("address")
