"""Verbs: RDMA between hosts, straight from registered memory to registered memory.

A link has one rail for each pair of devices (`verbs_rail`), and one thread that posts, polls and
sleeps. Long runs go direct: the device writes into the peer's blocks, every work request carries the
imm, and the peer counts the bytes that each completed receive reports. Small pieces, and all GPU
memory, go through staging (`verbs_frames`). A rail that breaks is taken out, what was on its way there fails by name,
and it is opened again in the background. Nothing assumes an order between writes.
"""

from __future__ import annotations

import functools
import logging
import os
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import (
    DeviceLost,
    EngineError,
    LinkFlushed,
    NotRegistered,
    RailError,
    RetryExceeded,
)
from ...transfer.staged import hold_until_computed, note_compute
from ...wire.messages import (
    Acknowledge,
    Arrived,
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
from ..base import Availability, DataPath, RailState, Transfer
from ..workers import Workers, guard
from . import device as verbs_device
from . import errors as verbs_errors
from . import library as verbs_library
from . import queue_pair as verbs_qp
from .frames import Frames
from .queue_pair import REPLENISH, Batch, QueuePair, imm_of
from .reopen import Reopener
from .slots import SLOTS_NBYTES
from .watchdog import Watch, why_too_small
from .work_requests import Pieces, Share, own_regions, pieces_of, split, starts_of_requests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from ...memory.descriptors import RegionDescriptor
    from ...transfer.plan import TransferPlan
    from ...wire.messages import LinkMessage
    from ..base import PathHost
    from .device import Device
    from .meeting import Meeting
    from .rail import Rail

# Where one work request takes longer than its bytes need, frames are faster: `kvferry bench verbs` on
# emulated devices has them at 1.14 of direct writes with pieces of 8 KiB, and at 0.93 with 16 KiB.
STAGED_BELOW_NBYTES = 16 << 10
STAGED_FROM_REQUESTS = 8  # a few work requests are posted sooner than a frame is put together
POLLS_BEFORE_SLEEP = 4  # looks at empty queues while something is in flight; a sleep costs 2 calls
LOOK_AROUND_S = 0.5  # how often the thread looks whether its devices are there and get on

PASSES_BEFORE_LOOK = 256  # a thread that never sleeps looks around, too

log = logging.getLogger(__name__)


def available() -> Availability:
    """Whether this machine may have RDMA. Loads nothing."""
    reason = verbs_device.absence() or verbs_library.absence()
    return Availability(not reason, reason or "there is an RDMA device")


def ready(nics: verbs_device.Nics) -> Availability:
    """Loads the library and opens an engine's devices, so that a handshake need not."""
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
    """One link's rails and the thread that serves them."""

    asks_leave = True
    kinds = frozenset({"host", "cuda"})

    def __init__(self, link: PathHost, meeting: Meeting) -> None:
        self.link = link
        self.rails = meeting.rails
        self.dialed = meeting.dialed
        self._meeting = meeting
        self._frames = Frames(self, meeting.slots)
        link.core.staging.add(SLOTS_NBYTES)
        self._reopener = Reopener(self)
        self._watch = Watch()
        self._look_s = 0.0
        self._inbox: deque[Callable[[], None]] = deque()
        self._keys: dict[int, tuple[int, ...]] = {}
        self._waiting: deque[Transfer] = deque()  # no rail is up
        self._turn = 0
        self._counting = threading.Lock()
        self._lock = threading.Condition()
        self._copies = Workers(link, "a copy")
        self._halted: Callable[[], None] | None = None
        self._ended = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._watched: dict[int, Rail] = {}
        self._thread = threading.Thread(
            target=self._run, name=f"{link.core.identity.name}-verbs", daemon=True
        )

    # What the link calls, from any thread.

    def start(self) -> None:
        for rail in self.rails:
            self.watch(rail)
            if rail.up:
                self.link.send(RailReady(rail.number, rail.epoch))
        self._thread.start()
        if self.link.core.regions.gpus():
            self.copy(self._frames.warm)

    def prepare(self, plan: TransferPlan, layers: Sequence[int] | None) -> None:
        if plan.local.device >= 0 and self._copies.enter():
            self._copies.run(self._frames.warm)

    def before(self, transfer: Transfer, stream: torch.cuda.Stream | None) -> None:
        note_compute(transfer, stream)

    def submit(self, transfer: Transfer) -> None:
        hold_until_computed(self.link.core.gate, transfer, self._submit)

    def _submit(self, transfer: Transfer) -> None:
        if transfer.write and transfer.imm is not None:
            # Every byte is counted where it arrives; the write, once all of them did.
            done = Arrived(transfer.imm, 0, 1, write_nbytes=transfer.total_nbytes)
            transfer.on_placed = functools.partial(self.link.send, done)
        self.soon(functools.partial(self._begin, transfer))

    def rail_states(self) -> tuple[RailState, ...]:
        return tuple(
            RailState(r.number, r.device.name, r.up, r.sent_nbytes, r.received_nbytes, r.error)
            for r in self.rails
        )

    def granted(self, region: RegionDescriptor, keys: tuple[int, ...]) -> None:
        self._keys[region.region_id] = keys

    def forget(self, region_id: int) -> None:
        self._keys.pop(region_id, None)

    def drain(self) -> None:
        for rail in self.rails:
            left = self._poll(rail)
            if left:
                self.soon(functools.partial(self._complete, rail, left))

    def handle(self, message: LinkMessage) -> bool:
        if isinstance(message, Claim):
            self.soon(functools.partial(self.link.grant, message, self._register))
        elif isinstance(message, Acknowledge):
            self.soon(functools.partial(self._frames.acknowledged, message))
        elif isinstance(message, SlotFree):
            self.soon(functools.partial(self._frames.freed, message.slot))
        elif isinstance(message, ReadRequest):
            self.soon(functools.partial(self._frames.serve, message))
        elif isinstance(message, Refuse):
            return not self._frames.expects_refusal(message)  # the link ends the transfer
        elif isinstance(message, Credits):
            self.soon(functools.partial(self._credit, message))
        elif isinstance(message, RailDown):
            rail = self._rail(message.rail, message.epoch)
            if rail is not None:
                # At once, before any later message is read: who then gives memory back because
                # the peer gave up must not be written to any more.
                rail.stop()
                self.soon(functools.partial(self._peer_took_out, rail, message))
        elif isinstance(message, (RailClosed, RailOpen, RailOpened, RailReady)):
            self.soon(functools.partial(self._reopener.handle, message))
        else:
            return False
        return True

    def halt(self, halted: Callable[[], None]) -> None:
        with self._lock:
            self._halted = halted
            ended = self._ended
            self._lock.notify_all()
        if ended:
            halted()
        elif not self._thread.is_alive():
            self._tear_down()
        else:
            self._wake()

    # What the path's other parts call.

    def soon(self, task: Callable[[], None]) -> None:
        """Runs `task` on the link's thread."""
        self._inbox.append(task)
        if threading.current_thread() is not self._thread:
            self._wake()

    def copy(self, task: Callable[[], None]) -> None:
        """Runs `task` on a copier thread; the path does not halt before it has ended."""
        if self._copies.enter():
            self.link.core.copiers.run(functools.partial(self._copies.run, task))

    def watch(self, rail: Rail) -> None:
        """Listens to a rail's completions."""
        self._watched[rail.fd] = rail
        self._epoll.register(rail.fd, select.EPOLLIN)

    def next_rail(self) -> Rail | None:
        """A rail that can take a frame, in turn; None if none can now."""
        for _ in self.rails:
            self._turn = (self._turn + 1) % len(self.rails)
            rail = self.rails[self._turn]
            if rail.up and rail.staged is not None and rail.staged.room and rail.staged.credits:
                return rail
        return None

    def post_frame(self, rail: Rail, slot: int, row: list[int], nbytes: int) -> None:
        """Posts one frame."""
        pair = rail.staged
        if pair is not None:
            self._post(rail, pair, verbs_qp.WRITE, [row], slot, (1, nbytes, None, slot))

    def rail_up(self, rail: Rail) -> None:
        """A rail is connected at both ends: what waited for one goes on."""
        rail.up = True
        waiting, self._waiting = self._waiting, deque()
        for transfer in waiting:
            self._begin(transfer)
        self._frames.advance()

    def rail_closed(self, rail: Rail) -> None:
        """The peer has dealt with all that came over a rail."""
        self._frames.rail_closed(rail)

    def settle(self, rail: Rail) -> None:
        """If a rail is out and nothing that came over it is left to do, tells the peer so."""
        if not rail.open and not self._frames.scattering(rail):
            self._reopener.closed_here(rail)

    # Transfers.

    def _begin(self, transfer: Transfer) -> None:
        if transfer.stopped is not None:
            return
        if not transfer.total_nbytes:
            if transfer.begin():
                transfer.end(0)
            return
        # No RDMA device knows memory that is in no region, or a GPU's: frames copy it.
        regions = (*transfer.local_regions, *transfer.remote_regions)
        unknown = transfer.scratch or any(region.kind != "host" for region in regions)
        if self.link.core.verify or unknown:
            self._frames.submit(transfer)
            return
        pieces = pieces_of(transfer)
        if self._suits_frames(pieces):
            self._frames.submit(transfer)
            return
        try:
            self._go_direct(transfer, pieces)
        except EngineError as error:
            error.operation, error.imm = transfer.ticket.operation, transfer.imm
            error.peer = self.link.peer.name
            transfer.stop(error)

    def _suits_frames(self, pieces: Pieces) -> bool:
        count = len(starts_of_requests(pieces, self.rails[0].device.max_sge))
        nbytes = int(pieces.nbytes.sum())
        return count >= STAGED_FROM_REQUESTS and nbytes < count * STAGED_BELOW_NBYTES

    def _go_direct(self, transfer: Transfer, pieces: Pieces) -> None:
        ways = [(rail, pair) for rail in self.rails if rail.up for pair in rail.direct]
        if not ways:
            self._waiting.append(transfer)
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
            self._post_queue(rail, pair)

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

    def _register(self, region: Any) -> tuple[int, ...]:
        """The keys of one of this engine's regions, for the peer: none of GPU memory, which frames
        reach."""
        if region.device >= 0:
            return ()
        return tuple(device.register(region).remote for device in self._meeting.devices)

    def _post_queue(self, rail: Rail, pair: QueuePair) -> None:
        """Posts of a queue pair's waiting shares what it has room and credits for."""
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
            self._post(rail, pair, kind, rows, imm, (count, nbytes, transfer, -1))

    def _post(
        self,
        rail: Rail,
        pair: QueuePair,
        kind: str,
        rows: list[Any],
        imm: int | None,
        batch: tuple[int, int, Transfer | None, int],
    ) -> None:
        flying = pair.launch(*batch)
        if imm is not None:
            pair.credits -= flying.requests
        try:
            verbs_qp.post(pair, kind, rows, imm, flying.number)
        except (rail.device.library.error, OSError) as error:
            name = self.link.peer.name
            failure = verbs_errors.from_exception(error, rail=rail.name, peer=name)
            self._take_out(rail, failure, flying)
            return
        if kind == verbs_qp.WRITE:
            rail.sent_nbytes += flying.nbytes

    def _credit(self, message: Credits) -> None:
        for rail in self.rails:
            for pair in rail.queues:
                if pair.peer_number == message.queue:
                    pair.credits = min(pair.credits + message.count, verbs_qp.RECEIVE_DEPTH)
                    self._post_queue(rail, pair)
        self._frames.advance()

    # Completions.

    def _poll(self, rail: Rail) -> list[Any]:
        """Takes completions and counts what arrived, in one step for whoever asks next: when the
        peer's goodbye is read, what it wrote before is counted. Returns all of them."""
        with self._counting:
            try:
                completions = rail.poll()
            except rail.device.library.error as error:
                failure = verbs_errors.from_exception(
                    error, rail=rail.name, peer=self.link.peer.name
                )
                self.soon(functools.partial(self._take_out, rail, failure, None))
                return []
            self._count(rail, completions)
        return completions

    def _count(self, rail: Rail, completions: list[Any]) -> None:
        staged = rail.staged.number if rail.staged is not None else -1
        for completion in completions:
            if completion.status == 0 and completion.wr_id & verbs_qp.RECEIVE_ID:
                rail.received_nbytes += completion.byte_len
                if completion.qp_num != staged:
                    self.link.count(imm_of(completion), completion.byte_len, 0)

    def _complete(self, rail: Rail, completions: list[Any]) -> None:
        """On the link's thread: what follows from completions, beside counting."""
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
                    self.link.send(Credits(pair.number, REPLENISH))
            else:
                for batch in pair.landed(number):
                    self._landed(batch)
                self._post_queue(rail, pair)
        if completions:
            self._frames.advance()

    def _landed(self, batch: Batch) -> None:
        if batch.transfer is not None:
            batch.transfer.end(batch.nbytes)
        else:
            self._frames.left(batch.slot)

    def _went_wrong(self, rail: Rail, pair: QueuePair, completion: Any, receive: bool) -> None:
        if rail.error is not None:
            return
        error = verbs_errors.from_status(
            completion.status, completion.vendor_err, rail=rail.name, peer=self.link.peer.name
        )
        culprit = None
        if not rail.device.lost and not rail.device.active:
            # Devices blame whatever their send ran into; what helps is to know this.
            error = RetryExceeded(
                f"the port of {rail.device.name} is down: {error.message}",
                peer=self.link.peer.name,
                rail=rail.name,
                vendor_code=error.vendor_code,
            )
        elif isinstance(error, RetryExceeded):
            shrunk = why_too_small(rail)
            if shrunk:
                error.message = f"{shrunk}: {error.message}"
        if receive:
            error = LinkFlushed(
                f"a write of the peer broke the rail, which this side's device refused: {error.message}",
                peer=self.link.peer.name,
                rail=rail.name,
                vendor_code=error.vendor_code,
            )
        else:
            culprit = next((b for b in pair.flying if b.number == completion.wr_id), None)
        self._take_out(rail, error, culprit)

    # Rails that break.

    def _rail(self, number: int, epoch: int) -> Rail | None:
        """The rail of this number, in that life of it."""
        if number < len(self.rails) and self.rails[number].epoch == epoch:
            return self.rails[number]
        return None

    def _peer_took_out(self, rail: Rail, message: RailDown) -> None:
        if rail.epoch == message.epoch and rail.open:
            error = LinkFlushed(
                f"the peer took rail {rail.name} out: {message.reason}",
                peer=self.link.peer.name,
                rail=rail.name,
            )
            self.take_out(rail, error)

    def take_out(self, rail: Rail, error: RailError) -> None:
        """Takes a rail out that cannot be used."""
        self._take_out(rail, error, None)

    def _take_out(self, rail: Rail, error: RailError, culprit: Batch | None) -> None:
        """Stops a rail and ends what was on its way there; the link lives on with the others."""
        if rail.error is not None or not rail.open:
            return
        rail.error = error
        log.info("kvferry: rail %s is out: %s", rail.name, error)
        # First, so that the peer stops its end before it reads that a transfer has failed.
        self.link.send(RailDown(rail.number, rail.epoch, error.message[:1000]))
        rail.stop()
        left = rail.flushed()
        with self._counting:
            self._count(rail, left)
        self._complete(rail, [c for c in left if c.status == 0])
        flying = [batch for pair in rail.queues for batch in pair.flying]
        queued = [share.transfer for pair in rail.queues for share in pair.queue]
        if rail.fd in self._watched:
            del self._watched[rail.fd]
            self._epoll.unregister(rail.fd)
        rail.close()  # from here on the device touches nothing for it
        flushed = LinkFlushed(
            f"the rail broke before this was through: {error.message}", rail=rail.name
        )
        for batch in flying:
            why = error if batch is culprit else flushed
            if batch.transfer is None:
                self._frames.lost(batch.slot, self._again(why, "transfer", None))
            else:
                transfer = batch.transfer
                transfer.stop(self._again(why, transfer.ticket.operation, transfer.imm))
                transfer.end(0)
        for transfer in queued:
            transfer.stop(self._again(flushed, transfer.ticket.operation, transfer.imm))
        self.settle(rail)
        self._frames.advance()

    def _again(self, error: RailError, operation: str, imm: int | None) -> EngineError:
        return verbs_errors.again(error, operation=operation, peer=self.link.peer.name, imm=imm)

    # The thread.

    def _wake(self) -> None:
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        guard(self.link, "a verbs link", self._loop)
        with self._lock:
            self._lock.wait_for(lambda: self._halted is not None)
        self._tear_down()

    def _loop(self) -> None:
        idle = passes = 0
        while True:
            while self._inbox:
                self._inbox.popleft()()
            if self._halted is not None:
                return
            if self._poll_all():
                idle = 0
                passes += 1
                if passes % PASSES_BEFORE_LOOK == 0:
                    self._look_around()
                continue
            idle += 1
            if idle <= POLLS_BEFORE_SLEEP and self._in_flight():
                continue
            for rail in self.rails:
                rail.arm()
            if self._poll_all() or self._inbox:
                continue
            self._sleep()
            idle = 0

    def _poll_all(self) -> bool:
        found = False
        for rail in self.rails:
            if rail.open:
                completions = self._poll(rail)
                if completions:
                    found = True
                    self._complete(rail, completions)
        return found

    def _in_flight(self) -> bool:
        return self._frames.busy or any(pair.flying for rail in self.rails for pair in rail.queues)

    def _sleep(self) -> None:
        for fd, _ in self._epoll.poll(min(LOOK_AROUND_S, self._reopener.patience_s())):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
            elif fd in self._watched:
                self._watched[fd].take_event()
        self._look_around()

    def _look_around(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._look_s:
            self._look_s = now_s + LOOK_AROUND_S
            self._look_at_devices()
            for rail, batch, error in self._watch.look(self.rails, now_s):
                error.peer = self.link.peer.name
                self._take_out(rail, error, batch)
        self._reopener.look(now_s)

    def _look_at_devices(self) -> None:
        for rail in self.rails:
            if rail.open and rail.device.lost:
                gone = DeviceLost(
                    f"device {rail.device.name} is gone: unplugged, or its driver removed",
                    peer=self.link.peer.name,
                    rail=rail.name,
                )
                self._take_out(rail, gone, None)

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
        self.link.core.staging.add(-SLOTS_NBYTES)
        self._epoll.close()
        with self._lock:
            self._ended = True
            halted = self._halted
        os.close(self._wake_fd)
        if halted is not None:
            halted()
