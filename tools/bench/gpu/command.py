"""`kvferry bench transfer --gpu`: a cache's blocks from GPU memory to GPU memory, over every path."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
from typing import TYPE_CHECKING, Any

from kvferry.tools.bench import figures
from kvferry.tools.bench.peers import PeerEnded
from kvferry.tools.bench.transfer.pairs import environ, package_root

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = "kvferry.bench.transfer-gpu/1"
NIXL_TIMEOUT_S = 180.0
VERSIONS = ("torch", "triton", "numpy", "msgspec", "kvferry")


class GpuBenchError(RuntimeError):
    """The benchmark could not run, or bytes arrived wrong; one sentence says which."""


def measure(*, quick: bool, nixl_python: str | None) -> dict[str, Any]:
    """Run everything that this machine can; the report as plain types.

    Args:
        nixl_python: an interpreter that has NIXL, or None to leave it out.

    Raises:
        GpuBenchError: no GPU, or wrong bytes.
    """
    import torch

    if not torch.cuda.is_available():
        raise GpuBenchError("torch sees no CUDA device; kvferry doctor says more")
    from kvferry.tools.bench.gpu import measure as gpu_measure
    from kvferry.tools.bench.gpu import staged as gpu_staged

    report: dict[str, Any] = {
        "schema": SCHEMA,
        "devices": figures.device_names(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: figures.version(name, "") for name in VERSIONS},
        "left_out": {},
    }
    try:
        direct = gpu_measure.measure(quick=quick)
        gpu_measure.show(direct)
        report["direct"] = dataclasses.asdict(direct)
        staged = gpu_staged.measure(quick=quick)
    except figures.WrongBytes:
        raise GpuBenchError("bytes arrived wrong") from None
    except PeerEnded as error:
        raise GpuBenchError(str(error)) from None
    gpu_staged.show(staged)
    report["staged"] = dataclasses.asdict(staged)
    if nixl_python is not None:
        add_nixl(report, nixl_python)
    return report


def add_nixl(report: dict[str, Any], python: str) -> None:
    """Run NIXL in a process of its own, by the interpreter that has it.

    That sees nothing of this environment but kvferry, and need not have torch.

    Raises:
        GpuBenchError: NIXL's bytes arrived wrong.
    """
    command = [python, "-m", "kvferry.tools.bench.gpu.nixl"]
    with package_root() as folder:
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=NIXL_TIMEOUT_S,
                check=False,
                env=environ(folder),
            )
        except subprocess.TimeoutExpired:
            report["left_out"]["nixl"] = f"it did not end within {NIXL_TIMEOUT_S:.0f} s"
            return
        except OSError as error:
            report["left_out"]["nixl"] = f"{python} cannot be run: {error.strerror}"
            return
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = [row for row in found if "left_out" not in row]
    reasons = [row["left_out"] for row in found if "left_out" in row]
    if done.returncode and not reasons:
        said = done.stderr.strip().splitlines()
        reasons = [f"exit status {done.returncode}{f': {said[-1]}' if said else ''}"]
    if reasons or not rows:
        report["left_out"]["nixl"] = reasons[0] if reasons else "it measured nothing"
    if not rows:
        return
    report["nixl"] = rows
    for row in rows:
        speed = row["total_nbytes"] / row["us"] / 1e3
        print(
            f"NIXL, {row['total_nbytes'] >> 20} MiB of {row['piece_nbytes'] >> 10} KiB: "
            f"{row['us']:.0f} us, {speed:.1f} GB/s"
        )
    if not all(row["right"] for row in rows):
        raise GpuBenchError("the bytes that NIXL moved arrived wrong")


def run(*, quick: bool, nixl_python: str | None, json_path: Path | None, plot: Path | None) -> None:
    """Measure, prints and writes. Raises GpuBenchError."""
    report = measure(quick=quick, nixl_python=nixl_python)
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}")
    figures.write_json(json_path, report)
    if plot is not None:
        from kvferry.tools.bench.gpu import plot as gpu_plot

        gpu_plot.save(report, plot)
