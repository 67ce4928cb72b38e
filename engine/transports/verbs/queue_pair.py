"""One reliable connected queue pair: connected once, posted to in batches, stopped once; its errors.

Work requests are posted through the library's extended calls, which fill the device's queue in
place: no object a work request. `kvferry bench verbs` measures both ways.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

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
from .cards import ETHERNET, QueueCard

if TYPE_CHECKING:
    from ...transfer.transfer import Transfer
    from .cards import GidPair
    from .device import Device
    from .work_requests import Share

SEND_DEPTH = 256  # work requests in flight: at 64 KiB each, 16 MiB, more than any wire's latency
RECEIVE_DEPTH = 512
REPLENISH = 128  # receives posted at once, in one call, and credits given back at once
RECEIVE_ID = 1 << 62  # marks the completions of receives, whose other fields an error leaves open

# 268 ms a try and seven tries: a peer that is gone is noticed in about two seconds, and an emulated
# processor that stands still for 200 ms is not taken for one. Not 7 retries: software RoCE (Linux 6.1)
# takes that to mean for ever.
ACK_TIMEOUT, RETRIES = 16, 6
RNR_TIMER, RNR_RETRIES = 12, 6  # 0.64 ms each; 7 would mean for ever


class Batch(NamedTuple):
    """Work requests that were posted together; the last one is signalled."""

    number: int
    requests: int
    nbytes: int
    transfer: Transfer | None
    slot: int


class QueuePair:
    """A queue pair of one rail. Used by the rail's thread alone, but for `stop`.

    Attributes:
        number, psn, card: what the peer needs to connect to it.
        peer_number: the peer's end.
        queue: shares of transfers that wait to be posted.
        flying: batches that are posted and not completed, oldest first.
        room: work requests that may still be posted.
        credits: how many of them may carry an imm: the peer's receives that are left.
        posted: receives that are posted here.
        oldest, waited_s: `reopen.py`: the oldest batch at its last look, and for how long.
    """

    def __init__(self, device: Device, completions: Any, *, pad: tuple[int, int]) -> None:
        """`pad`: address and local key of memory that a receive names, of which it uses nothing."""
        library = self._library = device.library
        enums = self._enums = library.enums
        self._device = device
        capabilities = library.qp.QPCap(
            max_send_wr=SEND_DEPTH,
            max_recv_wr=RECEIVE_DEPTH,
            max_send_sge=device.max_sge,
            max_recv_sge=1,
        )
        attributes = library.qp.QPInitAttrEx(
            qp_type=enums.IBV_QPT_RC,
            scq=completions,
            rcq=completions,
            cap=capabilities,
            pd=device.pd,
            comp_mask=enums.IBV_QP_INIT_ATTR_PD | enums.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
            send_ops_flags=enums.IBV_QP_EX_WITH_RDMA_WRITE
            | enums.IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
            | enums.IBV_QP_EX_WITH_RDMA_READ,
        )
        self.pair = library.qp.QPEx(device.context, attributes)
        self.number = int(self.pair.qp_num)
        self.psn = secrets.randbelow(1 << 24)
        self.card = QueueCard(self.number, self.psn)
        self.queue: deque[Share] = deque()
        self.flying: deque[Batch] = deque()
        self.peer_number = -1
        self.room = SEND_DEPTH
        self.credits = 0
        self.posted = 0
        self.oldest = -1
        self.waited_s = 0.0
        self._used = 0
        self._next = 0
        self._stopped = False
        self._stopping = threading.Lock()  # the library crashes on a queue pair that is closed
        self.entries = [library.wr.SGE(0, 0, 0) for _ in range(device.max_sge)]
        # Made once and posted again and again: the library copies what they say.
        nothing = library.wr.SGE(pad[0], 0, pad[1])
        self._receives: list[Any] = []
        for _ in range(REPLENISH):
            following = self._receives[-1] if self._receives else None
            self._receives.append(
                library.wr.RecvWR(RECEIVE_ID, num_sge=1, sg=[nothing], next_wr=following)
            )

    def connect(self, route: GidPair, peer: QueueCard) -> None:
        """Make it ready to receive and to send. Raises the library's error."""
        library, nic = self._library, self._device.nic
        attributes = library.qp.QPAttr(port_num=nic.port)
        attributes.dest_qp_num = peer.number
        attributes.rq_psn, attributes.sq_psn = peer.psn, self.psn
        attributes.path_mtu = route.mtu
        attributes.qp_access_flags = self._device.access
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = self._device.max_reads
        attributes.timeout, attributes.retry_cnt = ACK_TIMEOUT, RETRIES
        attributes.min_rnr_timer, attributes.rnr_retry = RNR_TIMER, RNR_RETRIES
        if route.gid is None:
            address = library.addr.AHAttr(dlid=route.lid, port_num=nic.port, is_global=0)
        else:
            path = library.addr.GlobalRoute(
                dgid=library.addr.GID(route.gid), sgid_index=route.gid_index, hop_limit=64
            )
            lid = 0 if nic.link_layer == ETHERNET else route.lid
            address = library.addr.AHAttr(dlid=lid, gr=path, is_global=1, port_num=nic.port)
        attributes.ah_attr = address
        self.peer_number = peer.number
        self.pair.to_init(attributes)
        for _ in range(RECEIVE_DEPTH // REPLENISH):
            self.replenish()
        self._used = 0
        self.credits = RECEIVE_DEPTH
        self.pair.to_rts(attributes)

    def replenish(self) -> None:
        """Post `REPLENISH` receives in one call."""
        self.pair.post_recv(self._receives[-1])
        self.posted += REPLENISH

    def received(self) -> bool:
        """Count a receive that was used up; return whether the peer is to be given `REPLENISH` credits for
        it."""
        self.posted -= 1
        self._used += 1
        if self._used < REPLENISH:
            return False
        self._used = 0
        self.replenish()
        return True

    def launch(self, count: int, nbytes: int, transfer: Transfer | None, slot: int = -1) -> Batch:
        """Take note of a batch that is about to be posted."""
        batch = Batch(self._next, count, nbytes, transfer, slot)
        self._next += 1
        self.flying.append(batch)
        self.room -= count
        return batch

    def landed(self, number: int) -> list[Batch]:
        """Return the batches that have completed with that of this number: they complete in
        order."""
        done = []
        while self.flying and self.flying[0].number <= number:
            batch = self.flying.popleft()
            self.room += batch.requests
            done.append(batch)
        return done

    def stop(self) -> None:
        """Nothing is sent or received over it any more. From any thread; safe to call twice."""
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            attributes = self._library.qp.QPAttr(port_num=self._device.nic.port)
            attributes.qp_state = self._enums.IBV_QPS_ERR
            with contextlib.suppress(self._library.error):  # it never was connected, or is gone
                self.pair.modify(attributes, self._enums.IBV_QP_STATE)

    def close(self) -> None:
        """Give it back to the device. Safe to call twice."""
        with self._stopping:
            self._stopped = True
            with contextlib.suppress(self._library.error):
                self.pair.close()
        for request in (*self._receives, *self.entries):
            request.close()
        self._receives, self.entries = [], []


WRITE, READ = "write", "read"


def post(pair: QueuePair, kind: str, rows: list[Any], imm: int | None, number: int) -> None:
    """Post one batch: one doorbell, the last work request signalled.

    Args:
        rows: remote address, remote key, then address, bytes and local key of each entry.
        imm: goes with every work request of a write, or with none.
        number: the batch's.

    Raises:
        The library's error: none of them was posted.
    """
    device_queue, entries = pair.pair, pair.entries
    device_queue.wr_start()
    device_queue.wr_id = number
    device_queue.wr_flags = 0
    last = len(rows) - 1
    one = entries[0]
    for position, (address, key, *local) in enumerate(rows):
        if position == last:
            device_queue.wr_flags = pair._enums.IBV_SEND_SIGNALED
        if kind == READ:
            device_queue.wr_rdma_read(key, address)
        elif imm is None:
            device_queue.wr_rdma_write(key, address)
        else:
            device_queue.wr_rdma_write_imm(key, address, imm)
        if len(local) == 3:
            one.addr, one.length, one.lkey = local
            device_queue.wr_set_sge(one)
        else:
            count = len(local) // 3
            for entry, start in zip(entries, range(0, len(local), 3), strict=False):
                entry.addr, entry.length, entry.lkey = local[start : start + 3]
            device_queue.wr_set_sge_list(count, entries[:count])
    device_queue.wr_complete()


def imm_of(completion: Any) -> int:
    """Return the imm of a completed receive, in this machine's byte order, as pyverbs gives the
    wire's."""
    return socket.ntohl(completion.imm_data)


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


def completion_error(status: int, vendor_code: int, *, rail: str) -> RailError:
    """Return the error of a completion that went wrong."""
    kind, name, meaning = _MEANINGS.get(status, _OTHER)
    return kind(
        f"{meaning} ({name or f'status {status}'}, vendor code {vendor_code:#x}) on rail {rail}",
        operation="transfer",
        vendor_code=vendor_code,
    )


def call_error(error: Exception, *, rail: str) -> RailError:
    """Return the error of a call that the library refused."""
    kind = DeviceLost if getattr(error, "errno", 0) == 5 else RailError  # EIO: it was unplugged
    return kind(f"{error} on rail {rail}", operation="transfer")


def same_error(error: RailError, *, operation: str, imm: int | None) -> EngineError:
    """Return the rail's error for one of the transfers that it ends."""
    return type(error)(
        error.message,
        operation=operation,
        peer=error.peer,
        imm=imm,
        vendor_code=error.vendor_code,
        rail=error.rail,
    )
