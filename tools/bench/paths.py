"""`kvferry bench paths`: from which piece size each transport is faster without staging."""

from __future__ import annotations

import contextlib
import platform
import time
from pathlib import Path  # noqa: TC003 - typer reads it at run time
from typing import Annotated, Any

import numpy as np
import typer

from kvferry.engine.errors import EngineError
from kvferry.engine.staging.thresholds import NEVER_DIRECT, DirectThresholds
from kvferry.engine.transfer_engine import TransferEngine
from kvferry.engine.transports.selection import TRANSPORTS
from kvferry.tools.bench.peers import Peer, PeerEnded

SIZES_NBYTES = (64, 128, 256, 512, 1 << 10, 4 << 10, 16 << 10, 64 << 10)
TOTAL_NBYTES = 16 << 20
MOST_PIECES = 16 << 10
POOL_FACTOR = 4
REPEATS = 7
BETTER = 0.97  # direct wins unless staging gains more than the noise of a run
WAYS = (0, NEVER_DIRECT)  # direct, staged


def paths(
    save: Annotated[
        bool, typer.Option("--save", help="Write the table where engines look for it.")
    ] = False,
    file: Annotated[
        Path | None, typer.Option("--file", help="Write it there instead.", metavar="FILE")
    ] = None,
) -> None:
    """Measure pieces of many sizes, direct and staged, over every transport that works here.

    Both ends are processes of this machine. GPU memory is measured over cuda_ipc if there is any;
    over the other transports it is always staged. Exits 1 if nothing could be measured.
    """
    table: dict[str, int] = {}
    for transport in TRANSPORTS:
        try:
            speeds = measure(transport)
        except (EngineError, Missing) as error:
            typer.echo(f"{transport}: left out: {error}")
            continue
        table[transport] = crossover(speeds)
        typer.echo(f"{transport}:  piece    direct    staged  GB/s")
        for nbytes, (direct, staged) in speeds.items():
            typer.echo(f"{nbytes:>12} {direct:9.2f} {staged:9.2f}")
        typer.echo(f"  direct from {table[transport]} bytes")
    if not table:
        raise typer.Exit(1)
    if save or file is not None:
        where = f"{platform.node()}, {platform.machine()}, {platform.release()}"
        saved = DirectThresholds(direct_from_nbytes=table, measured_on=where).save(file)
        typer.echo(f"saved in {saved}")


class Missing(RuntimeError):
    """What a transport is measured with is not here."""


def crossover(speeds: dict[int, tuple[float, float]]) -> int:
    """Return the smallest piece from which on direct is at least as fast as staged, up to noise."""
    limit = NEVER_DIRECT
    for nbytes, (direct, staged) in sorted(speeds.items(), reverse=True):
        if direct < BETTER * staged:
            break
        limit = nbytes
    return 0 if limit == min(speeds) else limit


def measure(transport: str) -> dict[int, tuple[float, float]]:
    """GB/s, direct and staged, by piece size.

    Raises:
        EngineError: the transport does not work here. Missing: there is no GPU for it.
    """
    if transport == "cuda_ipc":
        import torch

        if not torch.cuda.is_available():
            raise Missing("torch sees no CUDA device")
    with Peer(_Receiver, transport) as peer:
        try:
            return _speeds(peer, transport, _pool(transport, here=True))
        except PeerEnded:
            raise Missing("the other process ended") from None


def _pool(transport: str, *, here: bool) -> Any:
    """Memory of the host, or for `cuda_ipc` of the first GPU; at the other end of the second."""
    nbytes = POOL_FACTOR * TOTAL_NBYTES
    if transport != "cuda_ipc":
        return np.ones(nbytes, np.uint8)
    import torch

    if not here:
        torch.cuda.set_device(min(1, torch.cuda.device_count() - 1))
    return torch.ones(nbytes, dtype=torch.uint8, device="cuda")


def _engines(transport: str, stack: contextlib.ExitStack) -> list[TransferEngine]:
    """Return one for each way."""
    return [
        stack.enter_context(
            TransferEngine(
                transports=(transport,),
                paths=DirectThresholds(direct_from_nbytes={transport: limit}),
            )
        )
        for limit in WAYS
    ]


class _Receiver:
    """The receiving process."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._stack = contextlib.ExitStack()

    def open(self) -> Any:
        """Make an engine for each way; where they are and their regions, or why there are none."""
        pool = _pool(self._transport, here=False)
        try:
            engines = _engines(self._transport, self._stack)
        except EngineError as error:
            return error
        return [(each.address.encode(), each.register(pool).descriptor) for each in engines]

    def close(self) -> None:
        self._stack.close()


def _speeds(peer: Peer, transport: str, pool: Any) -> dict[int, tuple[float, float]]:
    """Both ways in turn, so that what disturbs the machine disturbs both; the best of each."""
    answer = peer.call("open")
    if isinstance(answer, EngineError):
        raise answer
    speeds = {}
    random = np.random.default_rng(1)
    with contextlib.ExitStack() as stack:
        ends = []
        for engine, (address, remote) in zip(_engines(transport, stack), answer, strict=True):
            region = engine.register(pool)
            link = stack.enter_context(
                contextlib.closing(engine.connect(address, transport=transport))
            )
            ends.append((link, region, remote))
        for size in SIZES_NBYTES:
            count = min(MOST_PIECES, TOTAL_NBYTES // size)
            slots = POOL_FACTOR * TOTAL_NBYTES // size
            src = random.permutation(slots)[:count] * size
            dst = np.sort(random.permutation(slots)[:count]) * size
            best_s = [float("inf")] * len(ends)
            for _ in range(REPEATS + 1):
                for way, (link, region, remote) in enumerate(ends):
                    start_s = time.perf_counter()
                    link.write(region, src, remote, dst, size).wait()
                    best_s[way] = min(best_s[way], time.perf_counter() - start_s)
            direct, staged = (count * size / each / 1e9 for each in best_s)
            speeds[size] = (direct, staged)
    return speeds
