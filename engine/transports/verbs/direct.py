"""The direct path of a verbs link: devices write into the peer's blocks, and read out of them.

Pieces become work requests, in equal shares for all queue pairs that are up. Every work request of a
counted write carries its imm, and the peer counts the bytes that each completed receive reports.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EngineError, NotRegistered
from . import queue_pair as verbs_qp
from .work_requests import Share, own_regions, split

if TYPE_CHECKING:
    from ...memory.descriptors import RegionDescriptor
    from ...transfer.transfer import Transfer
    from ..base import PathHost
    from .device import Device
    from .loop import Loop
    from .queue_pair import QueuePair
    from .rail import Rail
    from .work_requests import Pieces


class Direct:
    """Transfers of one link that go direct. Used by the link's thread, but for keys."""

    def __init__(self, link: PathHost, loop: Loop) -> None:
        self._link = link
        self._loop = loop
        self._keys: dict[int, tuple[int, ...]] = {}
        self._waiting: deque[tuple[Transfer, Pieces]] = deque()  # no rail is up
        self._turn = 0

    def granted(self, region: RegionDescriptor, keys: tuple[int, ...]) -> None:
        """Take the keys of a region of the peer's, one for each of its devices. From any thread."""
        self._keys[region.region_id] = keys

    def forget(self, region_id: int) -> None:
        """Forget the keys of a region. From any thread."""
        self._keys.pop(region_id, None)

    def submit(self, transfer: Transfer, pieces: Pieces) -> None:
        """Start a transfer, now or once a rail is up; errors end it."""
        try:
            self._submit(transfer, pieces)
        except EngineError as error:
            error.operation, error.imm = transfer.ticket.operation, transfer.imm
            error.peer = self._link.peer.name
            transfer.stop(error)

    def resume(self) -> None:
        """Start what waited for a rail: one is up."""
        waiting, self._waiting = self._waiting, deque()
        for transfer, pieces in waiting:
            if transfer.stopped is None:
                self.submit(transfer, pieces)

    def _submit(self, transfer: Transfer, pieces: Pieces) -> None:
        ways = [(rail, pair) for rail in self._loop.rails if rail.up for pair in rail.direct]
        if not ways:
            self._waiting.append((transfer, pieces))
            return
        # Small transfers take turns; a large one has a share for each queue.
        self._turn += 1
        ways = ways[self._turn % len(ways) :] + ways[: self._turn % len(ways)]
        keys: dict[tuple[Device, int], tuple[Any, Any]] = {}
        for (rail, pair), share in zip(ways, split(pieces, len(ways)), strict=False):
            pair_of_keys = keys.get((rail.device, rail.peer_nic))
            if pair_of_keys is None:
                pair_of_keys = keys[rail.device, rail.peer_nic] = self._both_keys(transfer, rail)
            pair.queue.append(Share(transfer, share, rail.device.max_sge, pair_of_keys))
            self.advance(rail, pair)

    def advance(self, rail: Rail, pair: QueuePair) -> None:
        """Post of a queue pair's waiting shares what it has room and credits for."""
        while pair.queue and rail.up:
            share = pair.queue[0]
            transfer = share.transfer
            count = min(share.batch, share.left, pair.room)
            counted = transfer.write and transfer.imm is not None
            if counted:
                count = min(count, pair.credits)
            if transfer.stopped is None and not count:
                return
            if transfer.stopped is not None or not transfer.begin():
                pair.queue.popleft()
                continue
            rows, nbytes = share.take(count)
            if not share.left:
                pair.queue.popleft()
            if transfer.write:
                transfer.ticket._mark("on wire")
            kind = verbs_qp.WRITE if transfer.write else verbs_qp.READ
            imm = transfer.imm if counted else None
            self._loop.post(rail, pair, kind, rows, imm, (count, nbytes, transfer, -1))

    def _both_keys(self, transfer: Transfer, rail: Rail) -> tuple[Any, Any]:
        local = [rail.device.register(region).local for region in own_regions(transfer)]
        remote = []
        for region in transfer.remote_regions:
            keys = self._keys.get(region.region_id, ())
            if rail.peer_nic >= len(keys):
                raise NotRegistered(
                    f"the peer gave no key of region {region.region_id} for its device "
                    f"{rail.peer_nic}"
                )
            remote.append(keys[rail.peer_nic])
        return np.array(local, np.int64), np.array(remote, np.int64)
