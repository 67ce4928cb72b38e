"""What operations of a link end with: the link's end, the peer's refusal, a region taken back."""

from __future__ import annotations

from ..errors import (
    ChecksumMismatch,
    EngineError,
    LinkClosed,
    LinkError,
    OutOfRange,
    PeerLost,
    RailError,
    RegionGone,
    RegionRefused,
)

_REFUSALS: dict[str, type[EngineError]] = {
    "ChecksumMismatch": ChecksumMismatch,
    "RegionGone": RegionGone,
    "OutOfRange": OutOfRange,
    "RailError": RailError,
}


def link_down(
    error: EngineError | None, *, operation: str, peer: str, imm: int | None = None
) -> EngineError:
    """The link's error again, for an operation that it ends, or that came after it."""
    if isinstance(error, PeerLost):
        return PeerLost(
            error.message,
            operation=operation,
            peer=peer,
            imm=imm,
            process_gone=error.process_gone,
        )
    kind = type(error) if isinstance(error, LinkError) else LinkClosed
    message = error.message if error is not None else "the link is down"
    return kind(message, operation=operation, peer=peer, imm=imm)


def refused(error: str, reason: str, operation: str, peer: str, imm: int | None) -> EngineError:
    """The error for a transfer that the peer refused with an error of this class name."""
    return _REFUSALS.get(error, RegionRefused)(
        f"the peer refused: {reason}", operation=operation, peer=peer, imm=imm
    )


def region_taken_back(
    region_id: int, *, operation: str, peer: str, imm: int | None = None
) -> RegionGone:
    """The error for a transfer to or from a region that its owner has deregistered."""
    return RegionGone(
        f"the peer has deregistered region {region_id}", operation=operation, peer=peer, imm=imm
    )
