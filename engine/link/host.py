"""What a data path may ask of its link: `PathHost`, put together of the link's parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import EngineError, PeerAborted
from ..transfer.counters import check_imm
from ..wire import messages as wire
from .context import refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..memory.regions import MemoryRegion
    from ..transfer.transfer import Transfer
    from .access import Access
    from .context import LinkContext
    from .transfers import TransferTable


class Host:
    """One link, as its path and the peer's counting see it. Thread-safe.

    Args:
        heard: the peer gave a sign of life.
    """

    def __init__(
        self,
        context: LinkContext,
        table: TransferTable,
        access: Access,
        heard: Callable[[], None],
    ) -> None:
        self.core, self.peer = context.core, context.peer
        self.send, self.fail, self.suspect = context.send, context.fail, context.suspect
        self.heard = heard
        self.transfer, self.down_error = table.get, table.down_error
        self.has_access, self.grant = access.has, access.answer
        self._source = context
        self._table = table

    @property
    def closed(self) -> bool:
        """Whether the link is down."""
        return self._table.error is not None

    def count(
        self, imm: int, nbytes: int, writes: int, *, write_nbytes: int = 0, staged: bool = False
    ) -> None:
        """Count bytes of the peer's that are visible here.

        Args:
            write_nbytes: more bytes of these writes, which other calls count.
            staged: the bytes came through staging.
        """
        try:
            self.core.counters.arrived(
                imm,
                nbytes,
                writes,
                self._source,
                self.peer.engine_id,
                write_nbytes=write_nbytes,
                staged=staged,
            )
        except EngineError as error:
            error.peer = self.peer.name
            self.fail(error)
        if self._table.error is not None:
            self.lost()  # it came while the link went down: nobody must wait for the rest

    def lost(self) -> None:
        """End the counters that wait for bytes over this link: no more will come."""
        self.core.counters.source_lost(
            self._source, lambda imm: self._table.down_error("expect", imm)
        )

    def reject(self, transfer: int, imm: int | None, error: EngineError, *, first: int = 0) -> None:
        """Refuse part of a peer's write: both ends' tickets end."""
        if imm is not None:
            error.imm = imm
            self.core.counters.fail(imm, error, source=self._source, origin=self.peer.engine_id)
        self.send(wire.Refuse(transfer, type(error).__name__, error.message, first))

    def refusal(self, transfer: Transfer, error: str, reason: str) -> EngineError:
        """Return the error for a transfer that the peer refused with an error of this class name."""
        return refused(transfer.ticket, error, reason)

    def abort(self, imm: int, reason: str) -> None:
        """Tell the peer that this imm's counter will never reach its total."""
        if not isinstance(reason, str):
            raise TypeError(f"abort() needs its reason as text, not as {type(reason).__name__}")
        self.send(wire.Abort(check_imm(imm, "abort"), reason[:1000]))

    # What the peer says.

    def claimed(self, claim: wire.Claim) -> None:
        """Answer a peer that asks for access to a region which its path needs no keys for."""
        self.grant(claim, _no_keys)

    def arrived(self, message: wire.Arrived) -> None:
        """Count what the peer has placed in memory here without this process's help."""
        self.count(message.imm, message.nbytes, message.writes, write_nbytes=message.write_nbytes)

    def signalled(self, message: wire.Arrived) -> bool:
        """Count a signal; of a path whose bytes are counted where they are placed, nothing else."""
        if message.nbytes:
            return False
        self.arrived(message)
        return True

    def aborted(self, message: wire.Abort) -> None:
        """End the counter of an imm that the peer gives up."""
        self.core.counters.fail(
            message.imm,
            PeerAborted(
                f"the peer gave up: {message.reason}",
                operation="expect",
                peer=self.peer.name,
                imm=message.imm,
            ),
            source=self._source,
            origin=self.peer.engine_id,
        )


def _no_keys(_: MemoryRegion) -> tuple[int, ...]:
    return ()
