"""Triton if it is installed, and stand-ins that fail when used if it is not.

Machines without Triton (it exists for Linux alone) still import every kernel file for its reference.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

triton: Any = None
tl: Any = None
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError:
    pass  # `jit` says so when a kernel is launched


class _Missing:
    """A kernel on a machine without Triton."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: object) -> Callable[..., None]:
        raise RuntimeError(f"kernel {self.name} needs Triton: pip install triton (Linux only)")


def jit(
    *, fixed: tuple[str, ...] = (), unaligned: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`, or a stand-in that raises on launch.

    Args:
        fixed: parameters that never lead to another compilation, whatever their value.
        unaligned: pointers whose alignment never does.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if triton is None:
            return _Missing(function.__name__)
        return triton.jit(
            function, do_not_specialize=fixed, do_not_specialize_on_alignment=unaligned
        )

    return decorate
