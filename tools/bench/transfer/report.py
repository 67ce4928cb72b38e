"""What `kvferry bench transfer` found, as types, judged by what the project has set itself.

`--json` writes a `Report`, and reads back as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvferry.tools.bench.idle_memory import IdleMemory  # noqa: TC001 - msgspec reads it
from kvferry.tools.bench.machine import Machine  # noqa: TC001
from kvferry.tools.bench.transfer.driver import WRITE
from kvferry.tools.bench.transfer.roster import (
    CMA,
    MEMCPY,
    MOONCAKE,
    NIXL,
    NIXL_TCP,
    SOCKET,
    tcp_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvferry.tools.bench.transfer.roster import Shapes
    from kvferry.tools.bench.transfer.workload import Shape

MIB = 1 << 20

SCHEMA = "kvferry.bench.transfer/1"


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


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
        """Return the result of this shape, engine and operation."""
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
    """Read what `encode` wrote, checking every field.

    Raises:
        msgspec.ValidationError: it is not a report.
    """
    return msgspec.json.decode(data, type=Report)


def judge(report: Report, shapes: Shapes) -> Report:
    """Return the report with its targets."""
    large = shapes.large_blocks

    def written(engine: str, shape: Shape = large) -> Result | None:
        return report.find(shape.name, engine, WRITE)

    def tcp_on(shape: Shape) -> Result | None:
        return _fastest(written(tcp_key(rails), shape) for rails in report.settings.rails)

    memcpy = _fastest(r for r in report.results if (r.shape, r.engine) == (large.name, MEMCPY))
    cma, tcp, small = written(CMA), tcp_on(large), written(CMA, shapes.small_handoff)
    peers = nixl, nixl_tcp, mooncake = [written(key) for key in (NIXL, NIXL_TCP, MOONCAKE)]
    thriftiest = min((each.cpu_s_per_gib for each in peers if each), default=None)
    agent = next((m for m in report.idle_memory if m.name == "Agent" and not m.reason), None)
    targets = [
        _target("cma / scattered memcpy", ">=", 0.8, _speed_up(cma, memcpy)),
        _target("cma / NIXL over CMA", ">=", 1.6, _speed_up(cma, nixl)),
        _target("tcp / plain Python socket", ">=", 1.0, _speed_up(tcp, written(SOCKET))),
        _target("tcp / NIXL over TCP", ">=", 3.0, _speed_up(tcp, nixl_tcp)),
        _target("tcp / Mooncake over TCP", ">=", 3.0, _speed_up(tcp, mooncake)),
    ]
    for name, few, many in (
        ("cma", written(CMA, shapes.small_blocks), cma),
        ("tcp", tcp_on(shapes.small_blocks), tcp),
    ):
        value = _speed_up(few, many)
        targets.append(_target(f"{name}: small blocks / large blocks", ">=", 0.8, value))
    for name, ours in (("cma", cma), ("tcp", tcp)):
        value = ours.cpu_s_per_gib / thriftiest if ours and thriftiest is not None else None
        targets.append(_target(f"{name}: CPU / the thriftiest peer's", "<=", 1.0, value))
    value = small.p50_ms if small else None
    targets.append(_target("cma: small handoff, p50 ms", "<=", 1.0, value))
    value = (agent.imports_nbytes + agent.object_nbytes) / MIB if agent else None
    targets.append(_target("idle agent beside torch, MiB", "<=", 30.0, value))
    return msgspec.structs.replace(report, targets=tuple(targets))


def _fastest(results: Iterable[Result | None]) -> Result | None:
    return min((each for each in results if each), key=lambda each: each.p50_ms, default=None)


def _speed_up(ours: Result | None, theirs: Result | None) -> float | None:
    """Return how much faster ours is, by medians."""
    if ours is None or theirs is None:
        return None
    return (ours.nbytes / ours.p50_ms) / (theirs.nbytes / theirs.p50_ms)


def _target(name: str, sign: str, wanted: float, value: float | None) -> Target:
    if value is None:
        return Target(name, f"{sign} {wanted:g}", None, None)
    met = value >= wanted if sign == ">=" else value <= wanted
    return Target(name, f"{sign} {wanted:g}", round(value, 3), met)
