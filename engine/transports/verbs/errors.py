"""What a bad completion means, as one of this wing's errors."""

from __future__ import annotations

from ...errors import (
    DeviceLost,
    EngineError,
    LinkFlushed,
    LocalAccessError,
    RailError,
    ReceiverNotReady,
    RemoteAccessError,
    RemoteOperationError,
    RetryExceeded,
)

SUCCESS, FLUSHED = 0, 5

# Number of ibv_wc_status: class, name in the verbs' own words, and what it means here. The numbers
# are part of the verbs' binary interface.
_MEANINGS: dict[int, tuple[type[RailError], str, str]] = {
    1: (LocalAccessError, "LOC_LEN_ERR", "a work request was longer than the device takes"),
    2: (LocalAccessError, "LOC_QP_OP_ERR", "the device rejected a work request"),
    4: (LocalAccessError, "LOC_PROT_ERR", "a work request left this side's registered memory"),
    5: (LinkFlushed, "WR_FLUSH_ERR", "the rail had broken before this was sent"),
    6: (LocalAccessError, "MW_BIND_ERR", "the device rejected a memory window"),
    7: (RemoteOperationError, "BAD_RESP_ERR", "the peer's device answered nonsense"),
    8: (LocalAccessError, "LOC_ACCESS_ERR", "the peer wrote where this side allows no write"),
    9: (RemoteOperationError, "REM_INV_REQ_ERR", "the peer's device rejected the request"),
    10: (RemoteAccessError, "REM_ACCESS_ERR", "the region's owner has no such key or range"),
    11: (RemoteOperationError, "REM_OP_ERR", "the peer's device could not carry it out"),
    12: (
        RetryExceeded,
        "RETRY_EXC_ERR",
        "the peer's device does not answer: cable, switch, or MTU",
    ),
    13: (ReceiverNotReady, "RNR_RETRY_EXC_ERR", "the peer has posted no receives"),
    17: (DeviceLost, "FATAL_ERR", "the device failed"),
    18: (DeviceLost, "RESP_TIMEOUT_ERR", "the device does not answer"),
}
_OTHER = (RailError, "", "the device reports an error")


def from_status(status: int, vendor_code: int, *, rail: str, peer: str) -> RailError:
    """The error of a completion that went wrong."""
    kind, name, meaning = _MEANINGS.get(status, _OTHER)
    return kind(
        f"{meaning} ({name or f'status {status}'}, vendor code {vendor_code:#x}) on rail {rail}",
        operation="transfer",
        peer=peer,
        vendor_code=vendor_code,
        rail=rail,
    )


def from_exception(error: Exception, *, rail: str, peer: str) -> RailError:
    """The error of a call that the library refused."""
    kind = DeviceLost if getattr(error, "errno", 0) == 5 else RailError  # EIO: it was unplugged
    return kind(f"{error} on rail {rail}", operation="transfer", peer=peer, rail=rail)


def again(error: RailError, *, operation: str, peer: str, imm: int | None) -> EngineError:
    """The rail's error for one of the transfers that it ends."""
    return type(error)(
        error.message,
        operation=operation,
        peer=peer,
        imm=imm,
        vendor_code=error.vendor_code,
        rail=error.rail,
    )
