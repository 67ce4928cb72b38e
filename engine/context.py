"""What all links of one engine share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .staging.ring import StagingMeter
from .staging.thresholds import DirectThresholds

if TYPE_CHECKING:
    from .memory.regions import RegionTable
    from .runtime.copy_threads import Copiers
    from .runtime.progress import Progress
    from .transfer.compute_gate import StreamGate
    from .transfer.counters import CounterTable
    from .transfer.device_counters import DeviceCounters
    from .wire.identity import Identity


@dataclass(frozen=True)
class EngineContext:
    """The shared parts of one `TransferEngine`.

    Attributes:
        verify: whether every chunk's checksum is compared before it is counted.
        peer_timeout_s: silence after which a peer is lost.
        device_counters: this engine's counters in GPU memory.
        gate: holds staged transfers back until the compute before them is done.
        max_programs: programs that a kernel may use at a time; no limit if None.
        paths: which pieces go direct, and which are staged.
        staging: how much memory staging takes.
    """

    identity: Identity
    regions: RegionTable
    counters: CounterTable
    progress: Progress
    copiers: Copiers
    verify: bool
    peer_timeout_s: float
    device_counters: DeviceCounters
    gate: StreamGate
    max_programs: int | None = None
    paths: DirectThresholds = field(default_factory=DirectThresholds)
    staging: StagingMeter = field(default_factory=StagingMeter)
