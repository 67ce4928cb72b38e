"""The transfer table of one link: what has begun and not ended, and what forbids more of it.

A link that goes down and a peer that takes a region back both have to stop what runs and refuse
what comes. One lock decides: each transfer is either seen by them, and stopped, or refused here.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import EngineError, LinkClosed, LinkError
from .context import region_gone

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..memory.descriptors import RegionDescriptor
    from ..transfer.ticket import Ticket
    from ..transfer.transfer import Transfer


class Stoppable(Protocol):
    """A transfer that is cut into others."""

    ticket: Ticket

    def stop(self, error: EngineError) -> None:
        """Begin nothing more, and end with `error`."""


class TransferTable:
    """The outstanding transfers of a link. Thread-safe; does no input or output.

    A transfer in the table keeps its local regions in use.

    Attributes:
        error: why the link is down and nothing more begins; None while it is up.
        numbers: of transfers; no two of a link have the same.
        revoked: the peer's regions that it has taken back.
        compiled: plans of GPU memory that were compiled, checked and granted: their blocks take the
            shortest way. By the plan's id and the layers.
    """

    def __init__(self, peer: str, granted: Callable[[tuple[RegionDescriptor, ...]], bool]) -> None:
        self.error: EngineError | None = None
        self.numbers = itertools.count(1)
        self.revoked: set[int] = set()
        self.compiled: dict[tuple[int, tuple[int, ...] | None] | None, Any] = {}
        self._peer = peer
        self._granted = granted
        self._lock = threading.Lock()
        self._transfers: dict[int, Transfer] = {}
        self._conversions: set[Stoppable] = set()

    def get(self, number: int) -> Transfer | None:
        """Find the transfer of this number, if it has not ended."""
        return self._transfers.get(number)

    def transfers(self) -> list[Transfer]:
        """Return all that have not ended."""
        return list(self._transfers.values())

    def conversions(self) -> list[Stoppable]:
        """Return all that have not ended."""
        return list(self._conversions)

    def uses(self, region_id: int) -> list[Transfer]:
        """List the transfers that touch a region of the peer's."""
        return [
            transfer
            for transfer in self.transfers()
            if any(region.region_id == region_id for region in transfer.remote_regions)
        ]

    def add(self, transfer: Transfer) -> None:
        """Take a transfer in, before it begins.

        Raises:
            RegionGone, LinkError: it must not begin.
        """
        acquired = 0
        try:
            for mine in transfer.local_regions:
                mine.acquire()
                acquired += 1
            with self._lock:
                if self.error is not None:
                    raise self.down_error(transfer.ticket.operation)
                if self.revoked:
                    self._check_revoked(transfer)
                self._transfers[transfer.id] = transfer
        except EngineError:
            for mine in transfer.local_regions[:acquired]:
                mine.release()
            raise

    def add_compiled(self, transfer: Transfer, compiled: Any) -> bool:
        """Take in a transfer of blocks; False if the peer has not granted access yet.

        Raises:
            RegionGone, LinkError: it must not begin.
        """
        local, remote = compiled.plan.local, compiled.plan.remote.regions
        local.acquire()
        try:
            with self._lock:
                if self.error is not None:
                    raise self.down_error(transfer.ticket.operation)
                granted = self.compiled.get(compiled.key) is compiled
                if not granted:
                    if self.revoked:
                        self._check_revoked(transfer)
                    granted = self._granted(remote)
                    if granted:
                        self.compiled[compiled.key] = compiled
                self._transfers[transfer.id] = transfer
        except EngineError:
            local.release()
            raise
        return granted

    def add_conversion(self, conversion: Stoppable) -> None:
        """Take in a transfer that is cut into others. It keeps its local memory in use itself.

        Raises:
            LinkError: the link is down.
        """
        with self._lock:
            if self.error is not None:
                raise self.down_error(conversion.ticket.operation)
            self._conversions.add(conversion)

    def remove(self, transfer: Transfer) -> bool:
        """Release the memory of a transfer that has ended; False if it was not here."""
        with self._lock:
            if self._transfers.pop(transfer.id, None) is None:
                return False
        for region in transfer.local_regions:
            region.release()
        return True

    def remove_conversion(self, conversion: Stoppable) -> None:
        """Forget a conversion that has ended."""
        self._conversions.discard(conversion)

    def close(self, error: EngineError) -> bool:
        """Take nothing in any more, because of `error`; False if it was closed."""
        with self._lock:
            if self.error is not None:
                return False
            self.error = error
        return True

    def down_error(self, operation: str, imm: int | None = None) -> EngineError:
        """Return `error` again, for an operation that it ends, or that came after it."""
        error = self.error
        if not isinstance(error, LinkError):
            error = LinkClosed("the link is down" if error is None else error.message)
        return error.again(operation=operation, peer=self._peer, imm=imm)

    def revoke(self, region_id: int) -> None:
        """Take in nothing any more that touches this region of the peer's."""
        with self._lock:
            self.revoked.add(region_id)
            self.compiled = {
                key: compiled
                for key, compiled in self.compiled.items()
                if all(region.region_id != region_id for region in compiled.plan.remote.regions)
            }

    def _check_revoked(self, transfer: Transfer) -> None:
        for region in transfer.remote_regions:
            if region.region_id in self.revoked:
                raise region_gone(transfer.ticket, region.region_id)
