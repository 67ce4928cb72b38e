"""The machine that a benchmark runs on, for the head of its report."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec

from kvferry.tools.bench.figures import version

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where it ran. `load` is the load average of the last minute before it began."""

    cpu: str
    cores: int
    memory_nbytes: int
    system: str
    huge_pages: str
    load: float
    versions: dict[str, str]


def describe(versions: dict[str, str]) -> Machine:
    """This machine; `versions` are those of libraries in other environments."""
    pages = HUGE_PAGES.read_text(encoding="ascii") if HUGE_PAGES.exists() else ""
    own = {name: version(name) for name in ("kvferry", "numpy", "torch")}
    return Machine(
        cpu=_field("/proc/cpuinfo", "model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_nbytes=memory_nbytes("MemTotal"),
        system=f"{platform.system()} {platform.release()}",
        huge_pages=pages.partition("[")[2].partition("]")[0] if pages else "unknown",
        load=round(os.getloadavg()[0], 2),
        versions={"python": platform.python_version()} | own | versions,
    )


def memory_nbytes(field: str) -> int:
    """Return a field of /proc/meminfo in bytes; 0 if it has none."""
    value = _field("/proc/meminfo", field)
    return int(value.split()[0]) << 10 if value else 0


def _field(path: str, name: str) -> str:
    """Return what follows the colon of the first line that begins with `name`."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
