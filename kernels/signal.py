"""How a launch tells a peer that it is done: one addition to a 64-bit counter, by its last program."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


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
