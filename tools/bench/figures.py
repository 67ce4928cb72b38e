"""What benchmarks share: how a GPU is timed, what the versions are, how a report is written.

Needs the standard library alone; where a GPU is timed, torch too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class WrongBytes(Exception):
    """Bytes arrived wrong: no figure is worth printing."""


def events() -> tuple[Any, Any]:
    """Make two CUDA events that a time can be read from."""
    import torch

    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)


def sleep(cycles: int = 1_000_000) -> None:
    """Let the current stream wait (half a millisecond by itself): the host enqueues meanwhile."""
    import torch

    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def gpu_median_s(
    work: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None
) -> float:
    """Time what `work` enqueues on the current stream, by CUDA events: the median, in seconds.

    Args:
        before: enqueues what is not timed, before each.
    """
    import torch

    pairs = []
    for _ in range(repeats):
        begin, end = events()
        before()
        begin.record()
        work()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in pairs))


def p99(values: Sequence[float]) -> float:
    """Return the value that one of a hundred exceeds."""
    return sorted(values)[len(values) * 99 // 100]


def gpu_versions() -> dict[str, str]:
    """Of everything that a figure of a GPU depends on."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": str(torch.version.cuda),
    }


def version(name: str, otherwise: str = "not installed") -> str:
    """Of an installed distribution; nothing of it is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return otherwise


def device_names() -> list[str]:
    """Of the first two GPUs, or of the only one."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(min(2, torch.cuda.device_count()))]


def far_gpu() -> int:
    """Return the GPU of the other end: the second one, or the only one, for both ends."""
    import torch

    return min(1, torch.cuda.device_count() - 1)


def write_json(path: str | Path | None, report: object) -> None:
    """Write a report of dataclasses, if a path is given."""
    if path is not None:
        text = json.dumps(report, indent=1, default=dataclasses.asdict)
        Path(path).write_text(text, encoding="utf-8")


def options(doc: str | None, *, gpu: bool = False, **flags: str | None) -> Any:
    """Read the options of a benchmark that runs where there is no typer: `--json FILE` and flags.

    Args:
        gpu: whether there must be one; else the program ends.
        flags: what each does, if its name does not say it.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", metavar="FILE")
    for flag, what in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=what)
    given = parser.parse_args()
    if gpu:
        import torch

        if not torch.cuda.is_available():
            sys.exit("torch sees no CUDA device")
    return given
