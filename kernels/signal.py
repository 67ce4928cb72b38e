"""How a launch tells a peer that it is done: one addition to a 64-bit counter, by its last program."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .errors import ShapeError
from .runtime import kernels_run_on

if TYPE_CHECKING:
    from .paged import PagedCache

WORD_NBYTES = 8


class Signal(NamedTuple):
    """Whom a launch tells that it is done: a 64-bit counter, here or at a peer.

    Attributes:
        state: int32 `[2]` on the launching device, zero at first: programs finished (the kernel
            puts it back to zero) and how many of them met a bad id (stays until the owner clears
            it; until then no launch signals). Two launches that may overlap need two.
        counter_address: of the counter, as this device sees it; a multiple of 8.
    """

    state: torch.Tensor
    counter_address: int


def check_signal(cache: PagedCache, signal: Signal | None, bad_ids: torch.Tensor | None) -> None:
    """Raises ShapeError unless the signal suits a launch on the cache's device."""
    if signal is None:
        return
    if not kernels_run_on(cache.device):
        raise ShapeError("a signal needs a GPU: a copy on a CPU is done on return")
    if bad_ids is not None:
        raise ShapeError("give either bad_ids or a signal, whose state[1] is that flag")
    state = signal.state
    if state.dtype != torch.int32 or tuple(state.shape) != (2,) or state.stride(0) != 1:
        raise ShapeError(f"signal.state must be int32 [2], not {state.dtype} {list(state.shape)}")
    if state.device != cache.device:
        raise ShapeError(f"signal.state is on {state.device}, the cache on {cache.device}")
    if state.data_ptr() % WORD_NBYTES:
        raise ShapeError("signal.state must begin at a multiple of 8 bytes")
    if signal.counter_address <= 0 or signal.counter_address % 8:
        raise ShapeError(f"counter address {signal.counter_address:#x} is no multiple of 8")
