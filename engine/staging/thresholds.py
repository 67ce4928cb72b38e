"""Direct or staged: by transport and piece size, from a table that was measured on the machine.

Direct: the kernel, the system call or the NIC reads and writes the blocks themselves. Staged: pieces
are gathered into contiguous host memory, moved as one, and scattered at the other end. Each end
decides for itself, since nothing on the wire shows it. `kvferry bench paths --save` measures the
table; without one the defaults hold. GPU memory that a transport does not reach is always staged.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..errors import PlanError
from ..memory.fields import DECODE_ERRORS, Uint63

if TYPE_CHECKING:
    from collections.abc import Mapping

NEVER_DIRECT = 1 << 62
VARIABLE = "KVFERRY_PATHS"

# The smallest piece that goes direct. cuda_ipc: with ids in order of destination, direct is best at
# every size over NVLink (decision 0006). cma: staging gains below 256 to 1,024 bytes, and costs memory
# (decision 0017). tcp: decision 0003, both ends on two cores of a 2.5 GHz Xeon, 128 B 0.31 : 0.39 GB/s,
# 256 B 0.55 : 0.43.
DEFAULTS: Mapping[str, int] = {"cuda_ipc": 0, "cma": 0, "tcp": 256}


class DirectThresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table. Immutable; safe to use from any thread.

    Attributes:
        direct_from_nbytes: by transport, the smallest piece that goes direct; `NEVER_DIRECT` stages
            everything. A transport that is missing has its default.
        measured_on: the machine, for whoever reads the file.
    """

    direct_from_nbytes: dict[str, Uint63] = {}
    measured_on: str = ""

    def limit_nbytes(self, transport: str) -> int:
        """Return the smallest piece that goes direct over `transport`."""
        return self.direct_from_nbytes.get(transport, DEFAULTS.get(transport, 0))

    def direct(self, transport: str, piece_nbytes: float) -> bool:
        """Return whether pieces of this size (their mean, if they differ) go direct."""
        return piece_nbytes >= self.limit_nbytes(transport)

    def save(self, path: Path | None = None) -> Path:
        """Write the table where `load` finds it; return the file."""
        path = path or table_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(self)))
        fresh.replace(path)  # engines that start meanwhile read the old table or the new one
        return path


def table_file() -> Path:
    """Return where the table of this machine is: `$KVFERRY_PATHS`, or in the user's cache
    folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kvferry" / "paths.json"


@functools.cache
def load(path: Path | None = None) -> DirectThresholds:
    """Return the saved table, or the defaults if there is none. Read once a process.

    Raises:
        PlanError: the file is there, but is no table.
    """
    path = path or table_file()
    try:
        data = path.read_bytes()
    except OSError:
        return DirectThresholds()
    try:
        return msgspec.json.decode(data, type=DirectThresholds)
    except DECODE_ERRORS as error:
        raise PlanError(
            f"{path} is no table of paths ({error}): delete it, or measure it anew with "
            "kvferry bench paths --save",
            operation="start",
        ) from error
