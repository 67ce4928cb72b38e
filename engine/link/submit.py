"""Transfers of one link from their submission to their end.

What is submitted is checked, entered in the table, and begun: at once, or when the peer has given
leave to reach its region. What ends frees its memory, and a peer that counts on it is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import NotRegistered, PeerLost
from ..memory.descriptors import RegionDescriptor
from ..memory.regions import MemoryRegion, check_ranges
from ..transfer.counters import check_imm
from ..transfer.pieces import NO_PIECES, as_columns, bind
from ..transfer.ticket import DEFAULT_TIMEOUT_S, Ticket
from ..transports.base import Transfer
from ..wire.messages import Abort

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ..memory.regions import RegisteredCache
    from ..transfer.pieces import BoundPieces, Offsets
    from ..transfer.plan import TransferPlan
    from ..transports.base import DataPath
    from .access import Grants
    from .context import LinkContext
    from .revocation import Revocation
    from .transfers import TransferTable


class Submitter:
    """Begins and ends the transfers of a link. Thread-safe.

    Attributes:
        context, path, table, grants: what it works with.
    """

    def __init__(
        self,
        context: LinkContext,
        path: DataPath,
        table: TransferTable,
        grants: Grants,
        revocation: Revocation,
    ) -> None:
        self.context = context
        self.path = path
        self.table = table
        self.grants = grants
        self._revocation = revocation
        self._peer = context.peer
        # The regions of plans that have been checked and granted: looked at once, not each time.
        self._passed: dict[int, tuple[RegionDescriptor, ...]] = {}

    def submit_pieces(
        self,
        operation: str,
        mine: MemoryRegion,
        theirs: RegionDescriptor,
        offsets: tuple[Offsets, Offsets],
        nbytes: Offsets,
        imm: int | None,
        timeout_s: float,
    ) -> Ticket:
        """Checks and begins a transfer between two regions, as `Link.write` and `Link.read`.

        Args:
            offsets: bytes from the start of `mine`, and of `theirs`.
        """
        (here, sizes), there = as_columns(*offsets, nbytes)
        self._check_registered(operation, mine, theirs)
        check_ranges(here, sizes, mine.nbytes, "local")
        index = np.zeros(len(sizes), np.int64)
        pieces = bind(here + mine.address, sizes, index, there, (theirs,))
        return self.submit(operation, (mine,), pieces, (theirs,), imm, timeout_s)

    def submit(
        self,
        operation: str,
        local_regions: tuple[MemoryRegion | RegisteredCache, ...],
        pieces: BoundPieces,
        remote_regions: tuple[RegionDescriptor, ...],
        imm: int | None,
        timeout_s: float,
        start: Callable[[Transfer], None] | None = None,
        nbytes: int | None = None,
        stream: torch.cuda.Stream | None = None,
        *,
        computed: bool = False,
    ) -> Ticket:
        """Checks and begins a transfer of pieces, or of `nbytes` bytes that `start` begins.

        Args:
            computed: whether its memory is ready, whatever streams still have to do.

        Raises:
            NotRegistered, OutOfRange, RegionGone, LinkError: before any byte moves.
        """
        if imm is not None:
            imm = check_imm(imm, operation)
        known = start is not None and self._passed.get(id(remote_regions)) is remote_regions
        if not known:
            self.check_regions(operation, local_regions, remote_regions)
        ticket = Ticket(operation, peer=self._peer.name, imm=imm, timeout_s=timeout_s)
        transfer = self.make(
            ticket,
            local_regions,
            remote_regions,
            write=operation == "write",
            pieces=pieces,
            nbytes=nbytes,
        )
        transfer.start = start
        self.table.add(transfer)
        if not computed:
            self.path.before(transfer, stream)
        if (
            (known and not self.table.revoked)
            or not self.path.asks_leave
            or self.grants.admit(transfer)
        ):
            if start is not None:
                self._passed[id(remote_regions)] = remote_regions
            self.begin(transfer)
        return ticket

    def make(
        self,
        ticket: Ticket,
        local_regions: tuple[MemoryRegion | RegisteredCache, ...],
        remote_regions: tuple[RegionDescriptor, ...],
        *,
        write: bool,
        pieces: BoundPieces = NO_PIECES,
        nbytes: int | None = None,
    ) -> Transfer:
        """A transfer that `ticket` can stop, and that is not in the table yet: of pieces, or of
        `nbytes` bytes that move by other means."""
        transfer = Transfer(
            next(self.table.numbers),
            write=write,
            pieces=pieces,
            local_regions=local_regions,
            remote_regions=remote_regions,
            imm=ticket.imm,
            ticket=ticket,
            on_end=self.ended,
        )
        ticket._stop_hook = transfer.stop
        if nbytes is not None:
            transfer.total_nbytes = nbytes
        return transfer

    def copies_on_gpu(self, plan: TransferPlan) -> bool:
        """Whether a kernel of the path moves a plan's blocks, in the order of streams."""
        return self.path.orders_streams and self.path.takes_blocks(plan)

    def knows(self, remote_regions: tuple[RegionDescriptor, ...]) -> bool:
        """Whether a transfer that named these regions has been begun."""
        return remote_regions is self._passed.get(id(remote_regions))

    def check_regions(
        self,
        operation: str,
        local_regions: tuple[MemoryRegion | RegisteredCache, ...],
        remote_regions: tuple[RegionDescriptor, ...],
    ) -> None:
        """Checks that the link moves memory of these kinds, and that the peer is the one they name.

        Raises:
            NotRegistered: it is not so.
        """
        kinds = {region.kind for region in local_regions}
        kinds |= {region.kind for region in remote_regions}
        for kind in kinds - self.path.kinds:
            raise NotRegistered(
                f"a {self.context.transport} link does not move {kind} memory: register GPU memory "
                "before connect(), or name the transport there",
                operation=operation,
                peer=self._peer.name,
            )
        for region in remote_regions:
            if region.engine_id != self._peer.engine_id:
                raise NotRegistered(
                    f"region {region.region_id} belongs to another engine than this link's peer, "
                    "or to one that has restarted: fetch its descriptor again",
                    operation=operation,
                    peer=self._peer.name,
                )

    def ask_leave(self, plan: TransferPlan) -> None:
        """Waits until the peer has let this link reach a plan's regions, if it has to be asked."""
        if not self.copies_on_gpu(plan) or self.context.core.progress.on_thread:
            return
        self.submit(
            "prepare",
            (),
            NO_PIECES,
            plan.remote.regions,
            None,
            DEFAULT_TIMEOUT_S,
            _nothing,
            0,
        ).wait()

    def begin(self, transfer: Transfer) -> None:
        """Hands a transfer to the path: nothing stands in its way."""
        (transfer.start or self.path.submit)(transfer)

    def ended(self, transfer: Transfer) -> None:
        """A transfer has ended: its memory is free, and a peer that counts on it is told."""
        if not self.table.remove(transfer):
            return
        error = transfer.stopped
        if error is not None and transfer.write and transfer.imm is not None:
            self.context.send(Abort(transfer.imm, error.message[:1000]))
        if self.table.revoked:
            self._revocation.ended(transfer)

    def expire(self, now: float) -> None:
        """Ends what is past its deadline; on the progress thread."""
        for transfer in self.table.transfers():
            deadline_s = transfer.ticket.deadline_s
            if deadline_s is not None and now > deadline_s:
                self._expire(transfer, now - deadline_s)
        for conversion in self.table.conversions():
            deadline_s = conversion.ticket.deadline_s
            if deadline_s is not None and now > deadline_s:
                conversion.ticket._expire()  # it may wait for a stream, with no transfer begun

    def _check_registered(self, operation: str, mine: object, theirs: object) -> None:
        if not isinstance(mine, MemoryRegion):
            problem = f"a {type(mine).__name__} is no region: register() it first"
        elif mine.descriptor.engine_id != self.context.core.identity.engine_id:
            problem = f"region {mine.region_id} is registered with another engine of this process"
        elif not isinstance(theirs, RegionDescriptor):
            problem = (
                f"a {type(theirs).__name__} is no descriptor: give the peer's region.descriptor"
            )
        else:
            return
        raise NotRegistered(problem, operation=operation, peer=self._peer.name)

    def _expire(self, transfer: Transfer, late_s: float) -> None:
        transfer.ticket._expire()
        if late_s > self.context.core.peer_timeout_s and self.table.get(transfer.id) is not None:
            # A thread is stuck in it, or the peer never acknowledged: only taking the link down
            # makes its memory safe.
            self.context.fail(
                PeerLost(
                    "the peer did not take a transfer within its deadline",
                    operation=transfer.ticket.operation,
                    peer=self._peer.name,
                    imm=transfer.imm,
                )
            )


def _nothing(transfer: Transfer) -> None:
    if transfer.begin():
        transfer.end(0)
