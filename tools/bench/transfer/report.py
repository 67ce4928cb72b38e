"""What `kvferry bench transfer` found, as types: `--json` writes a `Report`, and reads back as one."""

from __future__ import annotations

import msgspec

SCHEMA = "kvferry.bench.transfer/1"


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Machine(_Part, frozen=True):
    """Where it ran. `load` is the load average of the last minute before it began."""

    cpu: str
    cores: int
    memory_nbytes: int
    system: str
    huge_pages: str
    load: float
    versions: dict[str, str]


class Settings(_Part, frozen=True):
    """What was asked for."""

    seconds: float
    rounds: int
    rails: tuple[int, ...]
    peers: tuple[str, ...]


class Result(_Part, frozen=True):
    """One library, in one configuration, moving one shape in one way.

    `gb_per_s` and `ratio_to_memcpy` are those of the median latency; `cpu_s_per_gib` is both
    processes'; `burst_p50_ms` has the median of each burst, in order of time.
    """

    shape: str
    engine: str
    operation: str
    label: str
    num_pieces: int
    piece_nbytes: int
    nbytes: int
    samples: int
    gb_per_s: float
    p50_ms: float
    p99_ms: float
    min_ms: float
    cpu_s_per_gib: float
    ratio_to_memcpy: float
    verified: bool
    burst_p50_ms: tuple[float, ...]


class LeftOut(_Part, frozen=True):
    """A library that could not be measured; `shape` is empty if in none at all."""

    engine: str
    shape: str
    reason: str


class IdleCpu(_Part, frozen=True):
    """CPU that a connected, idle library takes: percent of a core, both processes."""

    engine: str
    label: str
    percent: float


class IdleMemory(_Part, frozen=True):
    """Resident memory of an idle object, in a process that had imported torch before.

    `imports_nbytes` is what importing its module added, `object_nbytes` what making it added.
    `reason` says why there are no figures; empty if there are.
    """

    name: str
    torch_nbytes: int
    imports_nbytes: int
    object_nbytes: int
    reason: str = ""


class Target(_Part, frozen=True):
    """A figure that the project has set itself. `value` is None if it was not measured."""

    name: str
    wanted: str
    value: float | None
    met: bool | None


class Report(_Part, frozen=True):
    """One run."""

    machine: Machine
    settings: Settings
    results: tuple[Result, ...]
    left_out: tuple[LeftOut, ...]
    idle_cpu: tuple[IdleCpu, ...]
    idle_memory: tuple[IdleMemory, ...]
    targets: tuple[Target, ...]
    wall_s: float
    schema: str = SCHEMA

    def find(self, shape: str, engine: str, operation: str) -> Result | None:
        """The result of this shape, engine and operation."""
        for result in self.results:
            if (result.shape, result.engine, result.operation) == (shape, engine, operation):
                return result
        return None

    @property
    def shapes(self) -> tuple[str, ...]:
        """The shapes that were measured, in order."""
        return tuple(dict.fromkeys(result.shape for result in self.results))

    @property
    def wrong(self) -> tuple[Result, ...]:
        """Results whose bytes did not arrive as they were sent."""
        return tuple(result for result in self.results if not result.verified)


def encode(report: Report) -> bytes:
    """Indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2)


def decode(data: bytes) -> Report:
    """Reads what `encode` wrote, checking every field.

    Raises:
        msgspec.ValidationError: it is not a report.
    """
    return msgspec.json.decode(data, type=Report)
