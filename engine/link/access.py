"""Access: leave to reach a region of a peer's memory without its help.

Where a transport writes straight into the peer's memory (`cma`), no code of the peer's sees the
access, so no key can be checked on arrival. There, the first transfer of a link that names a region
asks its owner, who checks number, key, address and size, and remembers whom to ask back (`Revoke`)
before the memory is freed. One round trip for each region of a link; later transfers pass at the
cost of a look into a set.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

from ..errors import DeadlineExceeded, EngineError, OutOfRange
from ..wire import messages as wire
from .context import refused, region_gone

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..memory.descriptors import RegionDescriptor
    from ..memory.regions import MemoryRegion
    from ..transfer.transfer import Transfer
    from .context import LinkContext
    from .transfers import TransferTable


class Access:
    """Both ends of one link's access: what the peer granted here, and what was granted to it."""

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._granted: set[RegionDescriptor] = set()
        self._claims: dict[int, RegionDescriptor] = {}
        self._parked: list[tuple[Transfer, set[RegionDescriptor]]] = []
        self._exposed: set[int] = set()

    # The end that wants to write or read.

    def admit(self, transfer: Transfer) -> bool:
        """Say whether the transfer may start now; else park it until the peer has answered."""
        wanted = set(transfer.remote_regions)
        if wanted <= self._granted:
            return True
        claims = []
        with self._lock:
            missing = wanted - self._granted
            if not missing:
                return True
            self._parked.append((transfer, missing))
            for region in missing - set(self._claims.values()):
                number = next(self._numbers)
                self._claims[number] = region
                claims.append(
                    wire.Claim(number, region.region_id, region.key, region.address, region.nbytes)
                )
        for claim in claims:
            self._context.send(claim)
        return False

    def has(self, regions: tuple[RegionDescriptor, ...]) -> bool:
        """Say whether all of the regions were granted."""
        return self._granted.issuperset(regions)

    def knows(self, region_id: int) -> bool:
        """Say whether a region of the peer's is granted, or asked for."""
        with self._lock:
            return any(
                region.region_id == region_id
                for regions in (self._granted, self._claims.values())
                for region in regions
            )

    def answered(
        self,
        answer: wire.Granted,
        revoked: set[int],
        granted: Callable[[RegionDescriptor, tuple[int, ...]], None],
    ) -> list[Transfer]:
        """Take the peer's answer; return the transfers that may start now.

        Args:
            revoked: regions that the peer has taken back; it may have crossed with the answer.
            granted: called with a region that the peer lets this end reach, and its keys, before anybody
                else knows.
        """
        with self._lock:
            region = self._claims.pop(answer.claim, None)
            if region is None:
                return []
            waiting = [transfer for transfer, missing in self._parked if region in missing]
            if not answer.error and region.region_id not in revoked:
                granted(region, answer.keys)
                self._granted.add(region)
                for _, missing in self._parked:
                    missing.discard(region)
                ready = [transfer for transfer, missing in self._parked if not missing]
                self._parked = [entry for entry in self._parked if entry[1]]
            else:
                ready = []
                self._parked = [entry for entry in self._parked if region not in entry[1]]
        if answer.error:
            for transfer in waiting:
                transfer.stop(refused(transfer.ticket, answer.error, answer.reason))
        return ready

    def drop(self, region_id: int) -> None:
        """Forget a region that the peer has taken back."""
        with self._lock:
            self._granted = {r for r in self._granted if r.region_id != region_id}

    def clear(self) -> None:
        """Drop what is parked: the link is down."""
        with self._lock:
            self._parked.clear()

    # The end that owns the memory.

    def answer(
        self, claim: wire.Claim, register: Callable[[MemoryRegion], tuple[int, ...]]
    ) -> None:
        """Check what the peer holds in its hands, and answer.

        Args:
            register: makes the region reachable, and returns the keys that the peer needs for it.
        """
        table = self._context.core.regions
        try:
            region = table.admit(claim.region, claim.key)
            # Noted first: `deregister` closes the region, then asks whom it was exposed to.
            self._exposed.add(claim.region)
            if (region.address, region.nbytes) != (claim.address, claim.nbytes):
                raise OutOfRange(
                    f"region {claim.region} is not where, or not as large as, the descriptor says",
                    operation="access",
                )
            region.acquire()
            try:
                keys = register(region)
            finally:
                region.release()
        except EngineError as error:
            answer = wire.Granted(claim.claim, type(error).__name__, error.message)
        else:
            answer = wire.Granted(claim.claim, keys=keys)
        self._context.send(answer)

    def exposed(self, region_id: int) -> bool:
        """Say whether the peer may be using the region."""
        return region_id in self._exposed

    def returned(self, region_id: int) -> None:
        """Note that the peer has stopped using the region."""
        self._exposed.discard(region_id)


class Revocation:
    """Both ends of one link's revocations: a region is taken back before its memory is freed.

    The owner asks (`Revoke`) and waits. The peer begins nothing more with the region, stops what
    runs, and confirms (`Revoked`) when nothing of it touches the region any more.

    Args:
        forget: the path keeps nothing of a region any more.
    """

    def __init__(
        self,
        context: LinkContext,
        table: TransferTable,
        access: Access,
        forget: Callable[[int], None],
    ) -> None:
        self._context = context
        self._forget = forget
        self._table = table
        self._access = access
        self._asked: dict[int, threading.Event] = {}

    # The end that owns the memory.

    def ask(self, region_id: int, deadline_s: float) -> None:
        """Return once the peer has stopped using a region of this engine.

        Raises:
            DeadlineExceeded: it did not answer, and its process lives.
        """
        quiesced = self._context.quiesced
        if not self._access.exposed(region_id) or quiesced.done():
            return
        answered = self._asked.setdefault(region_id, threading.Event())
        quiesced.add_done_callback(lambda _: answered.set())
        self._context.send(wire.Revoke(region_id))
        if answered.wait(max(0.0, deadline_s - time.monotonic())):
            self._asked.pop(region_id, None)
        else:
            raise DeadlineExceeded(
                f"the peer may still write into region {region_id}: its memory is kept until the "
                "peer's process ends",
                operation="deregister",
                peer=self._context.peer.name,
            )

    def answered(self, message: wire.Revoked) -> None:
        """Wake who asked: the peer has confirmed."""
        region_id = message.region
        event = self._asked.get(region_id)
        if event is not None:
            self._access.returned(region_id)
            event.set()

    # The end that uses it.

    def obey(self, message: wire.Revoke) -> None:
        """Stop what runs to a region that the peer takes back; nothing new begins.

        One that this end has nothing to do with is not remembered: its owner refuses it.
        """
        region_id = message.region
        if not (self._access.knows(region_id) or self._table.uses(region_id)):
            self._context.send(wire.Revoked(region_id))
            return
        self._table.revoke(region_id)
        self._access.drop(region_id)
        for transfer in self._table.uses(region_id):
            transfer.stop(region_gone(transfer.ticket, region_id))
        self._confirm(region_id)

    def ended(self, transfer: Transfer) -> None:
        """Confirm what the peer may be waiting for, now that a transfer has ended."""
        used = {region.region_id for region in transfer.remote_regions}
        for region_id in self._table.revoked & used:
            self._confirm(region_id)

    def _confirm(self, region_id: int) -> None:
        if not self._table.uses(region_id):
            self._forget(region_id)
            self._context.send(wire.Revoked(region_id))
