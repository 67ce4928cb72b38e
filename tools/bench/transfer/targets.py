"""The figures that the project has set itself, judged from one run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvferry.tools.bench.transfer.driver import WRITE
from kvferry.tools.bench.transfer.report import Report, Result, Target
from kvferry.tools.bench.transfer.roster import CMA, MEMCPY, MOONCAKE, NIXL, NIXL_TCP, SOCKET

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvferry.tools.bench.transfer.roster import Shapes

MIB = 1 << 20


def judge(report: Report, shapes: Shapes) -> Report:
    """The report with its targets."""
    judges = _Judge(report, shapes)
    return msgspec.structs.replace(report, targets=tuple(judges.targets()))


class _Judge:
    def __init__(self, report: Report, shapes: Shapes) -> None:
        self._report = report
        self._large = shapes.large_blocks.name
        self._small = shapes.small_blocks.name
        self._handoff = shapes.small_handoff.name

    def targets(self) -> Iterable[Target]:
        cma, tcp = self._get(CMA), self._best_tcp(self._large)
        nixl, nixl_tcp, mooncake = (self._get(key) for key in (NIXL, NIXL_TCP, MOONCAKE))
        yield _at_least("cma / scattered memcpy", 0.8, _speed_up(cma, self._memcpy()))
        yield _at_least("cma / NIXL over CMA", 1.6, _speed_up(cma, nixl))
        yield _at_least("tcp / plain Python socket", 1.0, _speed_up(tcp, self._get(SOCKET)))
        yield _at_least("tcp / NIXL over TCP", 3.0, _speed_up(tcp, nixl_tcp))
        yield _at_least("tcp / Mooncake over TCP", 3.0, _speed_up(tcp, mooncake))
        yield _at_least(
            "cma: small blocks / large blocks", 0.8, _speed_up(self._get(CMA, self._small), cma)
        )
        yield _at_least(
            "tcp: small blocks / large blocks", 0.8, _speed_up(self._best_tcp(self._small), tcp)
        )
        peers = [each.cpu_s_per_gib for each in (nixl, nixl_tcp, mooncake) if each is not None]
        for name, ours in (("cma", cma), ("tcp", tcp)):
            value = ours.cpu_s_per_gib / min(peers) if ours is not None and peers else None
            yield _at_most(f"{name}: CPU / the thriftiest peer's", 1.0, value)
        small = self._get(CMA, self._handoff)
        yield _at_most("cma: small handoff, p50 ms", 1.0, small.p50_ms if small else None)
        agent = next((m for m in self._report.idle_memory if m.name == "Agent"), None)
        measured = agent is not None and not agent.reason
        total = agent.imports_nbytes + agent.object_nbytes if agent is not None else 0
        yield _at_most("idle agent beside torch, MiB", 30.0, total / MIB if measured else None)

    def _get(self, engine: str, shape: str = "") -> Result | None:
        return self._report.find(shape or self._large, engine, WRITE)

    def _memcpy(self) -> Result | None:
        return _fastest(
            r for r in self._report.results if (r.shape, r.engine) == (self._large, MEMCPY)
        )

    def _best_tcp(self, shape: str) -> Result | None:
        return _fastest(
            result
            for rails in self._report.settings.rails
            if (result := self._report.find(shape, f"tcp-{rails}", WRITE)) is not None
        )


def _fastest(results: Iterable[Result]) -> Result | None:
    return min(results, key=lambda result: result.p50_ms, default=None)


def _speed_up(ours: Result | None, theirs: Result | None) -> float | None:
    """How much faster ours is, by medians."""
    if ours is None or theirs is None:
        return None
    return (ours.nbytes / ours.p50_ms) / (theirs.nbytes / theirs.p50_ms)


def _at_least(name: str, wanted: float, value: float | None) -> Target:
    met = None if value is None else value >= wanted
    return Target(name, f">= {wanted:g}", None if value is None else round(value, 3), met)


def _at_most(name: str, wanted: float, value: float | None) -> Target:
    met = None if value is None else value <= wanted
    return Target(name, f"<= {wanted:g}", None if value is None else round(value, 3), met)
