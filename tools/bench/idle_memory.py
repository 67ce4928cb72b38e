"""Resident memory of an idle engine and an idle agent, beside torch and beside their imports.

Each is measured in a process of its own, which imports torch first: an inference engine has torch
whatever it embeds. Not a `Peer`: that imports the parent's main module, which would be counted.
"""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

SETTLE_S = 0.5  # threads have started and ticked by then
TIMEOUT_S = 60.0


class IdleMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Resident memory of an idle object, in a process that had imported torch before.

    `imports_nbytes` is what importing its module added, `object_nbytes` what making it added.
    `reason` says why there are no figures; empty if there are.
    """

    name: str
    torch_nbytes: int
    imports_nbytes: int
    object_nbytes: int
    reason: str = ""


def start() -> Callable[[], tuple[IdleMemory, ...]]:
    """Start to measure every subject; the returned function waits and says what came out."""
    command = [sys.executable, "-m", "kvferry.tools.bench.idle_memory"]
    running = {
        name: subprocess.Popen(
            [*command, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in _SUBJECTS
    }
    return lambda: tuple(_finish(name, process) for name, process in running.items())


def _finish(name: str, process: subprocess.Popen[str]) -> IdleMemory:
    try:
        output, complaints = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return IdleMemory(name, 0, 0, 0, f"it did not start in {TIMEOUT_S:.0f} s")
    if process.returncode:
        lines = complaints.strip().splitlines()
        return IdleMemory(name, 0, 0, 0, lines[-1] if lines else f"status {process.returncode}")
    torch_nbytes, imported_nbytes, made_nbytes = json.loads(output)
    return IdleMemory(
        name, torch_nbytes, imported_nbytes - torch_nbytes, made_nbytes - imported_nbytes
    )


def _make_engine(module: Any) -> Any:
    return module.TransferEngine()


def _make_agent(module: Any) -> Any:
    import torch

    from kvferry.engine.layout.kv_layout import KVLayout

    tensors = [torch.zeros(2, 8, 16, 4, 32, dtype=torch.bfloat16) for _ in range(2)]
    layout = KVLayout.from_tensors(tensors, "plane block token head dim")
    return module.Agent(name="idle", role="both", layout=layout, tensors=tensors)


_SUBJECTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "TransferEngine": ("kvferry.engine.transfer_engine", _make_engine),
    "Agent": ("kvferry.adapters.agent.agent", _make_agent),
}


def _resident_nbytes() -> int:
    gc.collect()
    # Not VmRSS of `status`: that is kept in approximate counters.
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(rollup.partition("Rss:")[2].split()[0]) << 10


def main(name: str) -> None:
    """Print resident bytes with torch, with the subject's module, and with the idle subject."""
    importlib.import_module("torch")
    torch_nbytes = _resident_nbytes()
    path, make = _SUBJECTS[name]
    module = importlib.import_module(path)
    imported_nbytes = _resident_nbytes()
    subject = make(module)
    time.sleep(SETTLE_S)
    made_nbytes = _resident_nbytes()
    subject.close()
    print(json.dumps([torch_nbytes, imported_nbytes, made_nbytes]))


if __name__ == "__main__":
    main(sys.argv[1])
