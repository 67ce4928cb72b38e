"""What the transports that stage GPU memory share: order after the compute that made the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from .compute_gate import StreamGate
    from .transfer import Transfer


def note_compute(transfer: Transfer, stream: torch.cuda.Stream | None) -> None:
    """Notes what a stream has been given so far, if the transfer's memory is a GPU's.

    Without a stream: what the caller has enqueued, as torch's own operations are ordered.
    """
    regions = transfer.local_regions
    transfer.after = compute_event(regions[0].device if regions else -1, stream)


def compute_event(device: int, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """What passes once a stream (the device's current one if None) has done what it has been given
    so far; None for host memory, whose device is -1."""
    if device < 0:
        return None
    import torch

    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream or torch.cuda.current_stream(device))
    return event


def hold_until_computed(
    gate: StreamGate, transfer: Transfer, start: Callable[[Transfer], None]
) -> None:
    """Starts a transfer once the compute before it is done. Refuses one on several GPUs."""
    try:
        transfer.device()
    except EngineError as error:
        transfer.stop(error)
        return
    event, transfer.after = transfer.after, None
    if event is None:
        start(transfer)
    else:
        gate.when(event, lambda: start(transfer), transfer.stop)
