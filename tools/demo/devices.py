"""Where the demo computes: on GPUs if torch can use any, without asking torch, which takes seconds."""

from __future__ import annotations

import importlib.metadata

from kvferry.engine.errors import DeviceError
from kvferry.engine.memory import cuda_driver as cuda


class NoGpu(RuntimeError):
    """GPUs were asked for, and there are none; says why."""


def choose(wanted: str) -> tuple[str, str]:
    """The devices of prefill and decode, for `auto`, `cpu` or `cuda`.

    Raises:
        NoGpu: `cuda` is wanted, and cannot be had.
    """
    if wanted == "cpu":
        return "cpu", "cpu"
    reason, count = _gpus()
    if count:
        return "cuda:0", f"cuda:{min(1, count - 1)}"
    if wanted == "cuda":
        raise NoGpu(f"--device cuda: {reason}")
    return "cpu", "cpu"


def _gpus() -> tuple[str, int]:
    """Why there are none, or how many there are."""
    reason = cuda.absence()
    if reason:
        return reason, 0
    if "+cpu" in importlib.metadata.version("torch"):
        return "torch is built without CUDA", 0
    try:
        count = cuda.driver().device_count()
    except DeviceError as error:
        return error.message, 0
    return "" if count else "no GPU is visible: look at CUDA_VISIBLE_DEVICES", count
