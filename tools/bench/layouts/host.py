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
from typing import Any

import numpy as np
import torch

from kvferry.engine.layout.join import join_planes
from kvferry.engine.layout.kv_layout import KVLayout
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.kernels.cast import cast_reference
from kvferry.kernels.scaling import scales_reference
from kvferry.tools.bench.peers import Peer

LAYERS = 8
TIMEOUT_S = 120.0
NHD, HND = "plane block token head dim", "plane block head token dim"
PLAIN = "plain push"


class WrongBytes(Exception):
    """What arrived is not what was sent."""


@dataclasses.dataclass(frozen=True)
class Side:
    """A cache: its order, tokens a block, type, and the scales of fp8: layer, head or block."""

    dims: str
    tokens: int
    dtype: str = "bfloat16"
    scales: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: what the writer has, and what the other process."""

    name: str
    src: Side
    dst: Side
    heads: int = 8
    dim: int = 128


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians over the rounds; `ratio` is to the plain push of the same round."""

    name: str
    gb_per_s: float
    ratio: float
    spread: float


SAME = Side(NHD, 16)
CASES = (
    Case(PLAIN, SAME, SAME),
    Case("NHD 16 to HND 64", SAME, Side(HND, 64)),
    Case("HND 64 to NHD 16", Side(HND, 64), SAME),
    Case("NHD 32 to NHD 48", Side(NHD, 32), Side(NHD, 48)),
    Case("NHD 16 to HND 64, runs of 128 bytes", SAME, Side(HND, 64), dim=64),
    Case("bf16 to fp8, a scale a layer", SAME, Side(HND, 64, "float8_e4m3fn", "layer")),
    Case("bf16 to fp8, a scale a head", SAME, Side(HND, 64, "float8_e4m3fn", "head")),
    Case("bf16 to fp8, a scale a block and head", SAME, Side(HND, 64, "float8_e4m3fn", "block")),
)


def logical(case: Case, num_tokens: int, layer: int) -> torch.Tensor:
    """`[plane, token, head, dim]`, the same in both processes."""
    generator = torch.Generator().manual_seed(layer)
    shape = (2, num_tokens, case.heads, case.dim)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


class Cache:
    """One side's cache and the table of its one request."""

    def __init__(self, case: Case, side: Side, num_tokens: int, *, filled: bool) -> None:
        self.case, self.side, self.num_tokens = case, side, num_tokens
        blocks = -(-num_tokens // side.tokens)
        sizes = {
            "plane": 2,
            "block": blocks,
            "token": side.tokens,
            "head": case.heads,
            "dim": case.dim,
        }
        shape = [sizes[name] for name in side.dims.split()]
        dtype = getattr(torch, side.dtype)
        self.table = np.random.default_rng(side.tokens).permutation(blocks)
        self.pools = [torch.zeros(shape, dtype=dtype) for _ in range(LAYERS)]
        heads = 1 if side.scales == "layer" else case.heads
        fixed = np.full((LAYERS, heads), 0.02, np.float32)
        scales = {"k": fixed, "v": fixed} if side.scales in ("layer", "head") else None
        self.layout = KVLayout.from_tensors(self.pools, side.dims, scales=scales)
        self.block_scales: list[torch.Tensor] = []
        if side.scales == "block":
            self.block_scales = [torch.zeros(2, blocks, case.heads, 1) for _ in range(LAYERS)]
            beside = KVLayout.from_tensors(
                self.block_scales,
                "plane block head dim",
                planes=["k_scale", "v_scale"],
                tokens_per_block=side.tokens,
            )
            self.layout = join_planes(self.layout, beside)
        for layer in range(LAYERS) if filled else ():
            self._at(layer)[:, self._blocks, self._places] = logical(case, num_tokens, layer)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.pools, *self.block_scales]

    @property
    def _blocks(self) -> torch.Tensor:
        return torch.from_numpy(self.table[np.arange(self.num_tokens) // self.side.tokens])

    @property
    def _places(self) -> torch.Tensor:
        return torch.arange(self.num_tokens) % self.side.tokens

    def _at(self, layer: int) -> torch.Tensor:
        """`[plane, block, token, head, dim]`."""
        pool = self.pools[layer]
        return pool if self.side.dims == NHD else pool.transpose(2, 3)

    def is_right(self) -> bool:
        """Whether it holds what a filled cache would have sent, to the bit."""
        for layer in range(LAYERS):
            real = logical(self.case, self.num_tokens, layer)
            scale = torch.ones(1)
            if self.block_scales:
                scale = self._scales_of_blocks(layer, real)
            elif self.side.scales:
                scale = torch.tensor(0.02)
            if real.dtype != self.pools[layer].dtype:
                real = cast_reference(real, 1 / scale, self.pools[layer].dtype)
            got = self._at(layer)[:, self._blocks, self._places]
            if not torch.equal(got.view(torch.uint8), real.view(torch.uint8)):
                return False
        return True

    def _scales_of_blocks(self, layer: int, real: torch.Tensor) -> torch.Tensor:
        """What the scales must be, by token; all ones if they are something else."""
        pad = -self.num_tokens % self.side.tokens
        padded = torch.nn.functional.pad(real.float(), (0, 0, 0, 0, 0, pad))
        by_block = padded.reshape(2, -1, self.side.tokens, *real.shape[2:])
        largest = by_block.abs().amax(dim=(2, 4))
        scales = scales_reference(largest, self.pools[layer].dtype)  # [plane, block, head]
        if not torch.equal(self.block_scales[layer][:, self.table, :, 0], scales):
            return torch.ones(1)
        return scales[:, torch.arange(self.num_tokens) // self.side.tokens, :, None]


def measure(*, total_nbytes: int = 32 << 20, rounds: int = 7) -> list[Row]:
    """Moves that many bytes of bf16 with each case, `rounds` times.

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
                cache = Cache(case, case.src, _num_tokens(case, total_nbytes), filled=True)
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
        nbytes = _num_tokens(case, total_nbytes) * case.heads * case.dim * 2 * 2 * LAYERS
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
        cache = Cache(case, case.dst, _num_tokens(case, self._total_nbytes), filled=False)
        self._caches.append(cache)
        return self._engine.register_cache(cache.layout, cache.tensors).descriptor, cache.table

    def is_right(self) -> bool:
        """Whether the last cache holds what was sent."""
        return self._caches[-1].is_right()

    def close(self) -> None:
        self._engine.close()


def _num_tokens(case: Case, total_nbytes: int) -> int:
    return total_nbytes // (LAYERS * 2 * case.heads * case.dim * 2)


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
