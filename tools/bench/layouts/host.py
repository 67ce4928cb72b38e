"""The work of `kvferry bench layouts --host`: caches that differ, over a cma link of two processes.

Every row is one write of the same tokens, begun and waited for by the writer: over cma that is when
they are placed. Rows take turns, and each is compared with the push between equal caches of its own
round, so that what else the machine does touches both. Results are compared first.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from typing import Any, NamedTuple

import torch

from kvferry.engine.transfer_engine import TransferEngine
from kvferry.tools.bench.figures import WrongBytes
from kvferry.tools.bench.layouts.caches import HND, NHD, Cache, Shape
from kvferry.tools.bench.peers import Peer

LAYERS = 8
TIMEOUT_S = 120.0


class Case(NamedTuple):
    """One row: what the writer has, and what the other process."""

    name: str
    src: Shape
    dst: Shape


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians over the rounds; `ratio` is to the plain push of the same round."""

    name: str
    gb_per_s: float
    ratio: float
    spread: float


SAME, FP8 = Shape(NHD, 16), torch.float8_e4m3fn
CASES = (
    Case("plain push", SAME, SAME),
    Case("NHD 16 to HND 64", SAME, Shape(HND, 64)),
    Case("HND 64 to NHD 16", Shape(HND, 64), SAME),
    Case("NHD 32 to NHD 48", Shape(NHD, 32), Shape(NHD, 48)),
    Case("NHD 16 to HND 64, runs of 128 bytes", Shape(NHD, 16, dim=64), Shape(HND, 64, dim=64)),
    Case("bf16 to fp8, a scale a layer", SAME, Shape(HND, 64, dtype=FP8, scales=1)),
    Case("bf16 to fp8, a scale a head", SAME, Shape(HND, 64, dtype=FP8, scales=8)),
    Case(
        "bf16 to fp8, a scale a block and head",
        SAME,
        Shape(HND, 64, dtype=FP8, scales=8, by_block=True),
    ),
)


def _sent(cache: Cache, layer: int) -> torch.Tensor:
    """Return the numbers `[plane, token, head, dim]` of a request, the same in both processes."""
    generator = torch.Generator().manual_seed(layer)
    shape = (2, cache.num_tokens, cache.shape.num_heads, cache.shape.dim)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def measure(*, total_nbytes: int = 32 << 20, rounds: int = 7) -> list[Row]:
    """Move that many bytes of bf16 with each case, `rounds` times.

    Raises:
        WrongBytes: something else arrived than was sent.
    """
    peer = Peer(Receiver, total_nbytes)

    def ask(name: str, *arguments: Any) -> Any:
        peer.tell(name, *arguments)
        return peer.answer(TIMEOUT_S)

    try:
        with TransferEngine(transports=("cma",)) as engine:
            link = engine.connect(ask("address"))
            moves = []
            for number, case in enumerate(CASES):
                cache = Cache(case.src, _num_tokens(case, total_nbytes), layers=LAYERS)
                for layer in range(LAYERS):
                    cache.fill(layer, _sent(cache, layer))
                descriptor, table = ask("add", number)
                plan = engine.plan(engine.register_cache(cache.layout, cache.tensors), descriptor)
                moves.append((cache, plan, table))
                _move(link, *moves[-1])
                if not ask("is_right"):
                    raise WrongBytes(case.name)
            seconds = [[_move(link, *move) for move in moves] for _ in range(rounds)]
    finally:
        peer.kill()
    rows = []
    for number, case in enumerate(CASES):
        nbytes = _num_tokens(case, total_nbytes) * _token_nbytes(case)
        ratios = sorted(one[0] / one[number] for one in seconds)
        took = statistics.median(one[number] for one in seconds)
        ratio = statistics.median(ratios)
        rows.append(Row(case.name, nbytes / took / 1e9, ratio, ratios[-1] - ratios[0]))
    return rows


class Receiver:
    """The other process: has the caches that are written."""

    def __init__(self, total_nbytes: int) -> None:
        self._total_nbytes = total_nbytes
        self._caches: list[Cache] = []
        self._engine = TransferEngine(transports=("cma",))

    def address(self) -> Any:
        return self._engine.address

    def add(self, number: int) -> Any:
        """Make the cache of a case; its descriptor and its block table."""
        case = CASES[number]
        cache = Cache(case.dst, _num_tokens(case, self._total_nbytes), layers=LAYERS)
        self._caches.append(cache)
        return self._engine.register_cache(cache.layout, cache.tensors).descriptor, cache.table

    def is_right(self) -> bool:
        """Return whether the last cache holds what was sent."""
        cache = self._caches[-1]
        try:
            for layer in range(LAYERS):
                cache.check(layer, _sent(cache, layer))
        except WrongBytes:
            return False
        return True

    def close(self) -> None:
        self._engine.close()


def _token_nbytes(case: Case) -> int:
    """Bytes of one token, of all layers and planes."""
    return LAYERS * 2 * case.src.token_nbytes


def _num_tokens(case: Case, total_nbytes: int) -> int:
    return total_nbytes // _token_nbytes(case)


def _move(link: Any, cache: Cache, plan: Any, table: Any) -> float:
    began_s = time.perf_counter()
    link.write_tokens(plan, cache.table, table, stop=cache.num_tokens).wait(TIMEOUT_S)
    return time.perf_counter() - began_s


def show(rows: list[Row]) -> None:
    """The table."""
    print(f"cma, two processes, {len(os.sched_getaffinity(0))} cores; GB/s of source bytes")
    print(f"{'':38} {'GB/s':>6} {'of plain':>9} {'spread':>7}")
    for row in rows:
        print(f"{row.name:38} {row.gb_per_s:6.2f} {row.ratio:9.2f} {row.spread:7.2f}")
