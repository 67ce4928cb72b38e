"""What the two sides of the vLLM connector tell each other in a step: orders one way, results back.

Orders are plain data: vLLM pickles them to every worker. Block ids are those of vLLM's block manager;
tables are one for each group that is moved, from a prompt's first token on. What a sliding window has
left behind is block 0 there, vLLM's null block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SendOrder:
    """This step computes the last of a prompt: hand its blocks over, layer by layer.

    Attributes:
        req_id: vLLM's name for the request, in this engine.
        handoff_id: what decode will ask for.
        tables: the prompt's blocks.
        num_tokens: of the prompt.
    """

    req_id: str
    handoff_id: str
    tables: list[list[int]]
    num_tokens: int


@dataclass
class ReceiveOrder:
    """Load what prefill has of a prompt into blocks of this engine.

    Attributes:
        req_id, handoff_id: as in `SendOrder`.
        peer: the engine that has it.
        addresses: of that engine's agents, one for each rank.
        tables: where the prompt goes.
        num_tokens: of the prompt that are to be here in the end, with those that are already.
        num_local_tokens: of it that are here already; whole blocks.
        in_step: whether this step waits for it: its forward pass needs it.
        awaited: whether the request waits for it; if not, prefill is only told to free its blocks.
    """

    req_id: str
    handoff_id: str
    peer: str
    addresses: list[str]
    tables: list[list[int]]
    num_tokens: int
    num_local_tokens: int
    awaited: bool = True
    in_step: bool = False


@dataclass
class Orders:
    """One step's orders.

    Attributes:
        sends, receives: what begins.
        finished_sends: requests that ended: their blocks are freed when they are handed over.
        cancelled_sends: requests that were aborted: the same, but nothing more is written.
        refused: handoffs that decode may ask for and that will never have blocks.
        cancelled_receives: requests that were aborted while they were being loaded.
        idle: whether this step computes nothing.
        queued_tokens, free_blocks: what the daemon is told of this engine's load.
    """

    sends: list[SendOrder] = field(default_factory=list)
    receives: list[ReceiveOrder] = field(default_factory=list)
    finished_sends: list[str] = field(default_factory=list)
    cancelled_sends: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    cancelled_receives: list[str] = field(default_factory=list)
    idle: bool = True
    queued_tokens: int = 0
    free_blocks: int = 0


class Results:
    """What a step reports: requests by how they ended."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[str] = set()


@dataclass
class Figures:
    """Handoffs since the last `take`, as `stats.KVFerryStats` has them. Not thread-safe.

    Attributes:
        load_seconds, load_nbytes: of the loads that are here.
        sent_nbytes: of the sends that were handed over.
        loads_failed, sends_failed: how many are not, and were not.
    """

    load_seconds: list[float] = field(default_factory=list)
    load_nbytes: list[int] = field(default_factory=list)
    sent_nbytes: list[int] = field(default_factory=list)
    loads_failed: int = 0
    sends_failed: int = 0

    def take(self) -> dict[str, Any]:
        """Return all of them, once: plain data, which vLLM carries on."""
        found = {**vars(self)}
        vars(self).update(vars(Figures()))
        return found
