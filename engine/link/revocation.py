"""Revocation: a region is taken back from one peer before its memory is freed.

The owner asks (`Revoke`) and waits. The peer begins nothing more with the region, stops what runs,
and confirms (`Revoked`) when nothing of it touches the region any more.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from ..errors import DeadlineExceeded
from ..wire.messages import Revoke, Revoked
from ..wire.refusals import region_taken_back

if TYPE_CHECKING:
    from ..transports.base import DataPath, Transfer
    from .access import Grants
    from .context import LinkContext
    from .transfers import TransferTable


class Revocation:
    """Both ends of one link's revocations."""

    def __init__(
        self, context: LinkContext, path: DataPath, table: TransferTable, grants: Grants
    ) -> None:
        self._context = context
        self._path = path
        self._table = table
        self._grants = grants
        self._asked: dict[int, threading.Event] = {}

    # The end that owns the memory.

    def ask(self, region_id: int, deadline_s: float) -> None:
        """Returns once the peer has stopped using a region of this engine.

        Raises:
            DeadlineExceeded: it did not answer, and its process lives.
        """
        quiesced = self._context.quiesced
        if not self._grants.lent(region_id) or quiesced.done():
            return
        answered = self._asked.setdefault(region_id, threading.Event())
        quiesced.add_done_callback(lambda _: answered.set())
        self._context.send(Revoke(region_id))
        if answered.wait(max(0.0, deadline_s - time.monotonic())):
            self._asked.pop(region_id, None)
        else:
            raise DeadlineExceeded(
                f"the peer may still write into region {region_id}: its memory is kept until the "
                "peer's process ends",
                operation="deregister",
                peer=self._context.peer.name,
            )

    def answered(self, region_id: int) -> None:
        """The peer has confirmed."""
        event = self._asked.get(region_id)
        if event is not None:
            self._grants.returned(region_id)
            event.set()

    # The end that uses it.

    def obey(self, region_id: int) -> None:
        """The peer takes a region back: running transfers to it stop, no new one begins."""
        self._table.revoke(region_id)
        self._grants.drop(region_id)
        for transfer in self._table.uses(region_id):
            transfer.stop(
                region_taken_back(
                    region_id,
                    operation=transfer.ticket.operation,
                    peer=self._context.peer.name,
                    imm=transfer.imm,
                )
            )
        self._confirm(region_id)

    def ended(self, transfer: Transfer) -> None:
        """A transfer has ended, for which the peer may be waiting."""
        used = {region.region_id for region in transfer.remote_regions}
        for region_id in self._table.revoked & used:
            self._confirm(region_id)

    def _confirm(self, region_id: int) -> None:
        if not self._table.uses(region_id):
            self._path.forget(region_id)
            self._context.send(Revoked(region_id))
