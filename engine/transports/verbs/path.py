"""Verbs: RDMA between hosts, straight from registered memory to registered memory.

A link has one rail for each pair of devices (`rail.py`), and one thread that posts, polls and sleeps
(`loop.py`). Long runs go direct (`direct.py`), small pieces and all GPU memory through staging
(`frames.py`). A rail that breaks is taken out, what was on its way there fails by name, and it is
opened again in the background (`reopen.py`). Nothing assumes an order between writes.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from ...errors import (
    DeviceLost,
    EngineError,
    LinkFlushed,
    RailError,
    RetryExceeded,
)
from ...transfer.compute_gate import hold_until_computed
from ...wire.messages import (
    Acknowledge,
    Claim,
    Credits,
    RailClosed,
    RailDown,
    RailOpen,
    RailOpened,
    RailReady,
    ReadRequest,
    Refuse,
    SlotFree,
)
from ..base import Availability, DataPath, RailState
from ..segments import begin_counted
from ..workers import Workers
from . import device as verbs_device
from . import library as verbs_library
from . import queue_pair as verbs_qp
from .direct import Direct
from .frames import Frames
from .loop import LOOK_AROUND_S, Events, Loop
from .queue_pair import REPLENISH, imm_of
from .reopen import Reopener, Watch, why_too_small
from .slots import SLOTS_NBYTES
from .work_requests import pieces_of, starts_of_requests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...memory.descriptors import RegionDescriptor
    from ...transfer.plan import TransferPlan
    from ...transfer.transfer import Transfer
    from ..base import PathHost
    from .queue_pair import Batch, QueuePair
    from .rail import Meeting, Rail
    from .work_requests import Pieces

# Where one work request takes longer than its bytes need, frames are faster: `kvferry bench verbs` on
# emulated devices has them at 1.14 of direct writes with pieces of 8 KiB, and at 0.93 with 16 KiB.
STAGED_BELOW_NBYTES = 16 << 10
STAGED_FROM_REQUESTS = 8  # a few work requests are posted sooner than a frame is put together

log = logging.getLogger(__name__)


def available() -> Availability:
    """Return whether this machine may have RDMA. Loads nothing."""
    reason = verbs_device.absence() or verbs_library.absence()
    return Availability(not reason, reason or "there is an RDMA device")


def ready(nics: verbs_device.Nics) -> Availability:
    """Load the library and open an engine's devices, so that a handshake need not."""
    reason = verbs_device.absence(nics.names) or verbs_library.absence()
    if reason:
        return Availability(False, reason)
    try:
        library = verbs_library.load()
        devices = nics.devices()
    except (ImportError, EngineError) as error:
        return Availability(False, str(error))
    names = ", ".join(f"{d.name} ({d.nic.rate_gbps:g} Gb/s)" for d in devices)
    core = f", rdma-core {library.version}" if library.version else ""
    return Availability(True, f"{names}; {library.source}{core}")


def probe() -> Availability:
    """As `ready`, with devices of its own."""
    nics = verbs_device.Nics()
    try:
        return ready(nics)
    finally:
        nics.close()


class VerbsPath(DataPath):
    """One link's rails, what goes over them direct and in frames, and what happens when one breaks.

    Attributes:
        rails: of the link.
        loop: its thread.
    """

    asks_access = True
    kinds = frozenset({"host", "cuda"})

    def __init__(self, link: PathHost, meeting: Meeting) -> None:
        self._link = link
        self._meeting = meeting
        self.rails = meeting.rails
        events = Events(
            completed=self._complete,
            broke=self.take_out,
            look_around=self._look_around,
            patience_s=lambda: self._reopener.patience_s(),
            busy=lambda: self._frames.busy,
            halted=self._tear_down,
        )
        self.loop = Loop(link, self.rails, events)
        self._direct = Direct(link, self.loop)
        self._frames = Frames(
            link, self.loop, meeting.slots, copy=self._copy, taken_apart=self._settle
        )
        link.core.staging.add(SLOTS_NBYTES)
        self._reopener = Reopener(
            link,
            self.loop,
            dialed=meeting.dialed,
            closed_there=self._frames.rail_closed,
            up=self._rail_up,
            broke=self.take_out,
        )
        self._watch = Watch()
        self._look_s = 0.0
        self._copies = Workers(link, "a copy")
        later = self._later
        self.handlers = {
            Claim: later(lambda claim: link.grant(claim, self._register)),
            Acknowledge: later(self._frames.acknowledged),
            SlotFree: later(self._frames.freed),
            ReadRequest: later(self._frames.serve),
            Refuse: self._refused,
            Credits: later(self._credit),
            RailDown: self._rail_down,
            RailClosed: later(self._reopener.handle),
            RailOpen: later(self._reopener.handle),
            RailOpened: later(self._reopener.handle),
            RailReady: later(self._reopener.handle),
        }

    # What the link calls, from any thread.

    def start(self) -> None:
        for rail in self.rails:
            if rail.up:
                self._link.send(RailReady(rail.number, rail.epoch))
        self.loop.start()
        if self._link.core.regions.gpus():
            self._copy(self._frames.warm)

    def prepare(self, plan: TransferPlan, layers: Sequence[int] | None) -> None:
        if plan.local.device >= 0:
            self._copies.enter_and_run(self._frames.warm)

    def submit(self, transfer: Transfer) -> None:
        hold_until_computed(self._link.core.gate, transfer, self._submit)

    def _submit(self, transfer: Transfer) -> None:
        if begin_counted(self._link, transfer):
            self.loop.soon(functools.partial(self._begin, transfer))

    def rail_states(self) -> tuple[RailState, ...]:
        return tuple(
            RailState(r.number, r.device.name, r.up, r.sent_nbytes, r.received_nbytes, r.error)
            for r in self.rails
        )

    def granted(self, region: RegionDescriptor, keys: tuple[int, ...]) -> None:
        self._direct.granted(region, keys)

    def forget(self, region_id: int) -> None:
        self._direct.forget(region_id)

    def drain(self) -> None:
        self.loop.drain()

    def tick(self) -> None:
        self._frames.tick()

    def halt(self, halted: Callable[[], None]) -> None:
        self.loop.halt(halted)

    # The peer's messages, on the progress thread.

    def _later(self, handle: Callable[[Any], None]) -> Callable[[Any], bool]:
        """Has a message handled on the link's thread."""

        def handler(message: Any) -> bool:
            self.loop.soon(functools.partial(handle, message))
            return True

        return handler

    def _refused(self, message: Refuse) -> bool:
        return not self._frames.expects_refusal(message)  # the link ends the transfer

    def _rail_down(self, message: RailDown) -> bool:
        number = message.rail
        if number < len(self.rails) and self.rails[number].epoch == message.epoch:
            rail = self.rails[number]
            # At once, before any later message is read: who then gives memory back because the
            # peer gave up must not be written to any more.
            rail.stop()
            self.loop.soon(functools.partial(self._peer_took_out, rail, message))
        return True

    # Transfers, on the link's thread.

    def _begin(self, transfer: Transfer) -> None:
        if transfer.stopped is not None:
            return
        # No RDMA device knows memory that is in no region, or a GPU's: frames copy it.
        regions = (*transfer.local_regions, *transfer.remote_regions)
        unknown = transfer.scratch or any(region.kind != "host" for region in regions)
        if self._link.core.verify or unknown:
            self._frames.submit(transfer)
            return
        pieces = pieces_of(transfer)
        if self._suits_frames(pieces):
            self._frames.submit(transfer)
        else:
            self._direct.submit(transfer, pieces)

    def _suits_frames(self, pieces: Pieces) -> bool:
        count = len(starts_of_requests(pieces, self.rails[0].device.max_sge))
        nbytes = int(pieces.nbytes.sum())
        return count >= STAGED_FROM_REQUESTS and nbytes < count * STAGED_BELOW_NBYTES

    def _register(self, region: Any) -> tuple[int, ...]:
        """Return the keys of one of this engine's regions, for the peer: none of GPU memory, which
        frames reach."""
        if region.device >= 0:
            return ()
        return tuple(device.register(region).remote for device in self._meeting.devices)

    def _credit(self, message: Credits) -> None:
        for rail in self.rails:
            for pair in rail.queues:
                if pair.peer_number == message.queue:
                    pair.credits = min(pair.credits + message.count, verbs_qp.RECEIVE_DEPTH)
                    self._direct.advance(rail, pair)
        self._frames.advance()

    def _copy(self, task: Callable[[], None]) -> None:
        """Run `task` on a copier thread; the path does not halt before it has ended."""
        if self._copies.enter():
            self._link.core.copiers.run(functools.partial(self._copies.run, task))

    def _rail_up(self, rail: Rail) -> None:
        """A rail is connected at both ends: what waited for one goes on."""
        rail.up = True
        self._direct.resume()
        self._frames.advance()

    def _settle(self, rail: Rail) -> None:
        """If a rail is out and nothing that came over it is left to do, tells the peer so."""
        if not rail.open and not self._frames.scattering(rail):
            self._reopener.closed_here(rail)

    # Completions.

    def _complete(self, rail: Rail, completions: list[Any]) -> None:
        """What follows from completions, beside counting."""
        pairs = {pair.number: pair for pair in rail.queues}
        for completion in completions:
            pair = pairs.get(completion.qp_num)
            if pair is None or not rail.open:
                continue  # of an earlier life
            number = completion.wr_id
            receive = bool(number & verbs_qp.RECEIVE_ID)
            if completion.status:
                self._went_wrong(rail, pair, completion, receive)
            elif receive:
                if pair is rail.staged:
                    self._frames.arrived(rail, imm_of(completion), completion.byte_len)
                if not rail.error and pair.received():
                    self._link.send(Credits(pair.number, REPLENISH))
            else:
                for batch in pair.landed(number):
                    if batch.transfer is not None:
                        batch.transfer.end(batch.nbytes)
                    else:
                        self._frames.left(batch.slot)
                self._direct.advance(rail, pair)
        if completions:
            self._frames.advance()

    def _went_wrong(self, rail: Rail, pair: QueuePair, completion: Any, receive: bool) -> None:
        if rail.error is not None:
            return
        code = completion.vendor_err
        error = verbs_qp.completion_error(completion.status, code, rail=rail.name)
        culprit = None
        if not rail.device.lost and not rail.device.active:
            # Devices blame whatever their send ran into; what helps is to know this.
            why = f"the port of {rail.device.name} is down: {error.message}"
            error = RetryExceeded(why, vendor_code=code)
        elif isinstance(error, RetryExceeded):
            shrunk = why_too_small(rail)
            if shrunk:
                error.message = f"{shrunk}: {error.message}"
        if receive:
            error = LinkFlushed(
                f"a write of the peer broke the rail, which this side's device refused: {error.message}",
                vendor_code=code,
            )
        else:
            culprit = next((b for b in pair.flying if b.number == completion.wr_id), None)
        self.take_out(rail, error, culprit)

    # Rails that break.

    def _peer_took_out(self, rail: Rail, message: RailDown) -> None:
        if rail.epoch == message.epoch and rail.open:
            why = f"the peer took rail {rail.name} out: {message.reason}"
            self.take_out(rail, LinkFlushed(why))

    def take_out(self, rail: Rail, error: RailError, culprit: Batch | None = None) -> None:
        """Stop a rail and end what was on its way there; the link lives on with the others.

        Args:
            error: gets the names of the rail and the peer.
            culprit: what this error is of; what else was on its way was flushed.
        """
        if rail.error is not None or not rail.open:
            return
        error.rail, error.peer = rail.name, self._link.peer.name
        rail.error = error
        log.info("kvferry: rail %s is out: %s", rail.name, error)
        # First, so that the peer stops its end before it reads that a transfer has failed.
        self._link.send(RailDown(rail.number, rail.epoch, error.message[:1000]))
        rail.stop()
        left = self.loop.take_leave(rail)
        self._complete(rail, [c for c in left if c.status == 0])
        flying = [batch for pair in rail.queues for batch in pair.flying]
        queued = [share.transfer for pair in rail.queues for share in pair.queue]
        rail.close()  # from here on the device touches nothing for it
        why_flushed = f"the rail broke before this was through: {error.message}"
        flushed = LinkFlushed(why_flushed, peer=error.peer, rail=rail.name)
        for batch in flying:
            why = error if batch is culprit else flushed
            if batch.transfer is None:
                lost = verbs_qp.same_error(why, operation="transfer", imm=None)
                self._frames.lost(batch.slot, lost)
            else:
                _stop(batch.transfer, why)
                batch.transfer.end(0)
        for transfer in queued:
            _stop(transfer, flushed)
        self._settle(rail)
        self._frames.advance()

    # What the thread does now and then, and at last.

    def _look_around(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._look_s:
            self._look_s = now_s + LOOK_AROUND_S
            for rail in self.rails:
                if rail.open and rail.device.lost:
                    why = f"device {rail.device.name} is gone: unplugged, or its driver removed"
                    self.take_out(rail, DeviceLost(why))
            for rail, batch, error in self._watch.look(self.rails, now_s):
                self.take_out(rail, error, batch)
        self._reopener.look(now_s)

    def _tear_down(self) -> None:
        """Nothing of this process touches memory over the link after this."""
        for rail in self.rails:
            rail.stop()
            rail.close()
        copied = threading.Event()
        self._copies.halt(copied.set)
        copied.wait()
        self._frames.close()
        self._meeting.close()
        self._link.core.staging.add(-SLOTS_NBYTES)


def _stop(transfer: Transfer, error: RailError) -> None:
    """End a transfer with an error of its own: that of its rail."""
    operation = transfer.ticket.operation
    transfer.stop(verbs_qp.same_error(error, operation=operation, imm=transfer.imm))
