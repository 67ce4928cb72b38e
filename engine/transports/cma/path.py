"""Cross-memory attach: one host, host memory, one copy made by the kernel; GPU memory by staging.

`process_vm_writev` and `process_vm_readv` reach any memory of a process that we may ptrace, so the
engine's own tensors need no preparation. The link's control channel, a Unix socket, carries one
`Arrived` a write. Neither keys nor bounds are checked in the kernel: the peer grants each region
once (`link/access.py`), and the link checks every range against its descriptor before it gets here.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import threading
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from ...errors import (
    Cancelled,
    EngineError,
    LinkError,
    PeerLost,
    ProtocolError,
    QuotaExceeded,
    RegionGone,
    TransportUnavailable,
)
from ...memory import iovec
from ...runtime.copy_threads import Batch
from ...runtime.pipeline import Finisher
from ...runtime.quota import Quota
from ...transfer.moves import BlockMove
from ...transfer.pieces import MAX_PIECE_NBYTES
from ...transfer.transfer import Transfer
from ...wire import tables
from ...wire.messages import Arrived, Check, Checked, Refuse
from ..base import Availability, DataPath
from ..segments import answer_to_nothing, checksum_mismatch
from ..workers import Workers
from .shared_staging import SharedStaging

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from ...transfer.moves import TokenMove
    from ...transfer.plan import TransferPlan
    from ...transfer.template import BoundBlocks, BoundTemplate, Column, Share
    from ...transfer.transfer import Transfer
    from ..base import PathHost

# A transfer is cut so that every copier has a share: at most this much, so that a long one stops
# soon (flat from 2 to 32 MiB), and at least that much, because waking a copier costs 50 microseconds.
CHUNK_NBYTES = 4 << 20
MIN_CHUNK_NBYTES = 256 << 10
# What the peer is asked to check at a time: it computes 1 GB/s, so this keeps it busy for 50 ms.
CHECKS_AT_ONCE = 16
# A chunk ends with the piece that reaches its limit.
MAX_CHECK_NBYTES = CHUNK_NBYTES + MAX_PIECE_NBYTES
# A copy that is no larger, of no more pieces, is an inline copy of the thread that begins it, if that does
# inline copies: one takes 5 to 40 microseconds, and a copier needs 50 to 150 to wake and take the interpreter.
INLINE_NBYTES = 64 << 10
INLINE_PIECES = 32
# The addresses of so few pieces are made at once; of more, each copier makes those of its share while
# the others copy.
FEW_PIECES = 1024
# Pieces smaller than this are joined where they are neighbours at the peer: the kernel pins the pages
# of each remote entry anew, 0.75 us, and joining costs a seventh of that.
JOINED_BELOW_NBYTES = 2048
YAMA = "/proc/sys/kernel/yama/ptrace_scope"
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


def yama_scope() -> int:
    """Read Yama's ptrace_scope; 0 where there is no Yama."""
    try:
        with open(YAMA) as file:
            return int(file.read())
    except FileNotFoundError:
        return 0


def probe() -> Availability:
    """Try the system call on this process itself, and look at what Yama would allow."""
    word = np.arange(2, dtype=np.uint64)
    try:
        read_word(os.getpid(), word.ctypes.data)
    except OSError as error:
        return Availability(
            False,
            f"process_vm_readv is refused ({error.strerror}): a container's seccomp profile does "
            "that; allow it, or use tcp",
        )
    scope = yama_scope()
    if scope >= 2:
        return Availability(
            False,
            f"{YAMA} is {scope}, which refuses all attachment: set it to 0 or 1, or use tcp",
        )
    return Availability(True, "process_vm_writev works" + (", Yama scope 1" if scope else ""))


def permit_peers() -> None:
    """Under Yama scope 1, lets processes of the same user reach this one's memory."""
    if yama_scope() == 1:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def read_word(pid: int, address: int) -> bytes:
    """Read 16 bytes of another process, to find out whether it may be reached.

    Raises:
        OSError: it may not.
    """
    word = np.zeros(2, np.uint64)
    here, there = iovec.one(word.ctypes.data, 16), iovec.one(address, 16)
    iovec.process_vm(pid, here, there, 16, write=False)
    return word.tobytes()


def refusal(error: OSError) -> str:
    """Say why an attachment failed, and what to do."""
    if error.errno == errno.EPERM:
        return (
            "the kernel does not let one engine reach the other's memory (different users, "
            "Yama, or a container without CAP_SYS_PTRACE): run both alike, or use tcp"
        )
    return f"one engine cannot reach the other's memory ({error.strerror}): use tcp"


class CmaPath(DataPath):
    """Copies host memory by the engine's copier threads, and GPU memory through `SharedStaging`."""

    peer_reaches_memory = True
    kinds = frozenset({"host", "cuda"})
    asks_access = True

    def __init__(self, link: PathHost, pid: int) -> None:
        self._link = link
        self._staging = SharedStaging(link, pid)
        self._pid = pid
        self._lock = threading.Lock()
        self._workers = Workers(link, "a copy")
        self._unchecked: dict[tuple[int, int], tuple[Transfer, int, int]] = {}  # by chunk
        self._asks: deque[tuple[Transfer, int, slice, int, int]] = deque()  # that wait for a turn
        # The peer's: a thread of its own, since a checksum is slower than a copy, and copiers are
        # every link's.
        self._checker = Finisher(f"{link.core.identity.name}-check")
        self._checks = Quota("checksums", CHECKS_AT_ONCE)
        self.handlers = {
            **self._staging.handlers,
            Check: self._check_soon,
            Checked: self._checked,
            Refuse: self._refused,
        }

    def prepare(self, plan: TransferPlan, layers: Sequence[int] | None) -> None:
        if plan.local.device >= 0:
            self._staging.prepare(plan.local.device)

    def submit(self, transfer: Transfer) -> None:
        move = transfer.move
        if isinstance(move, BlockMove):
            self._submit_blocks(transfer, move)
        else:
            self._submit_pieces(transfer)

    def _submit_pieces(self, transfer: Transfer) -> None:
        if self._is_staged(transfer):
            self._staging.submit(transfer)
            return
        if not self._announce(transfer):
            return
        remote = transfer.remote_iovec()
        limit_nbytes = self._share_nbytes(transfer)
        # All parts are cut before the first one starts: a copier that has woken up would take the
        # interpreter lock in between.
        parts = iovec.chunks(transfer.nbytes, limit_nbytes, tables.MAX_PIECES)
        self._start(
            transfer,
            [
                functools.partial(self._copy, transfer, number, part, remote[part])
                for number, part in enumerate(parts)
            ],
        )

    def _is_staged(self, transfer: Transfer) -> bool:
        """Tell whether staging is needed: GPU memory at either end, or the table of paths says
        so."""
        regions = (*transfer.local_regions, *transfer.remote_regions)
        if any(region.kind != "host" for region in regions):
            return True
        pieces = len(transfer.nbytes)
        if not pieces:
            return False
        return not self._link.core.paths.direct("cma", transfer.total_nbytes / pieces)

    def takes(self, move: BlockMove | TokenMove) -> bool:
        if self._link.core.verify or self._link.core.paths.limit_nbytes("cma"):
            return False  # checksums, and the choice of a path, want a list of pieces
        if move.on_gpu:
            return False  # ids that nobody here has looked at
        plan = move.plan
        return type(move) is BlockMove and plan.local.kind == plan.remote_kind == "host"

    def _submit_blocks(self, transfer: Transfer, move: BlockMove) -> None:
        """Copy blocks whose pieces are multiplied out by the threads that copy."""
        src, dst = move.ids.src, move.ids.dst
        bound = move.plan.bound(src, dst, move.layers)
        if bound is None:
            transfer.take(move.pieces())
            self._submit_pieces(transfer)
        elif self._announce(transfer):
            count = move.ids.num_blocks
            if count * bound.num_rows <= INLINE_PIECES and transfer.total_nbytes <= INLINE_NBYTES:
                self._start_small(transfer, *bound.few(src, dst))
                return
            blocks = bound.blocks(src, dst)
            shares = bound.shares(count, self._share_nbytes(transfer), tables.MAX_PIECES)
            copy = functools.partial(self._copy_share, transfer, bound, blocks)
            if count * bound.num_rows <= FEW_PIECES:
                whole = bound.iovecs(bound.everything, blocks)
                copy = functools.partial(self._copy_slice, transfer, count, *whole)
            self._start(transfer, [functools.partial(copy, share) for share in shares])

    def _announce(self, transfer: Transfer) -> bool:
        """Note that the write is counted at its end; end an empty transfer, and return False."""
        if transfer.write and transfer.imm is not None:
            transfer.on_placed = functools.partial(self._count, transfer.imm, transfer)
        if not transfer.total_nbytes and transfer.begin():
            transfer.end(0)
        return transfer.total_nbytes > 0

    def _share_nbytes(self, transfer: Transfer) -> int:
        share_nbytes = -(-transfer.total_nbytes // self._link.core.copiers.count)
        return min(CHUNK_NBYTES, max(MIN_CHUNK_NBYTES, share_nbytes))

    def _start(self, transfer: Transfer, tasks: list[Callable[[], None]]) -> None:
        workers = self._workers
        batch = Batch(self._link.core.copiers, tasks, workers.enter_and_run, workers.lend_hand)
        transfer.ticket._help = functools.partial(self._help, transfer, batch)

    def _help(self, transfer: Transfer, batch: Batch) -> None:
        """On a thread that waits for the transfer."""
        try:
            batch.help()
        except BaseException as error:
            # A signal's handler raised (Ctrl-C, an alarm), perhaps between a copy and the note of
            # its end. The transfer ends, and the link lives on.
            why = f"the wait for it was interrupted by a {type(error).__name__}"
            end: EngineError = transfer.ticket._make_error(Cancelled, why)
            if isinstance(error, EngineError):
                end = error
            transfer.stop(end)
            batch.give_up(functools.partial(transfer.interrupted, end))
            raise

    def _start_small(
        self, transfer: Transfer, local: iovec.FewEntries, remote: iovec.FewEntries
    ) -> None:
        copy = functools.partial(self._move, transfer, local, remote, transfer.total_nbytes)
        guarded = functools.partial(self._workers.enter_and_run, copy)
        if not self._link.core.copiers.do_here(guarded):
            self._start(transfer, [copy])

    def _refused(self, message: Refuse) -> bool:
        if self._staging.refused(message):
            return False  # the link ends the transfer
        return self._answered(message.transfer, message.first) is None

    def _answered(self, transfer: int, chunk: int) -> tuple[Transfer, int, int] | None:
        """Take a chunk's transfer, size and checksum off the list; fail the link if it was not
        asked."""
        with self._lock:
            entry = self._unchecked.pop((transfer, chunk), None)
        if entry is None:
            self._link.fail(answer_to_nothing())
        else:
            self._ask_next()
        return entry

    def tick(self) -> None:
        self._staging.tick()

    def halt(self, halted: Callable[[], None]) -> None:
        self._workers.close()
        checked = functools.partial(self._checker.close, halted)
        self._staging.halt(lambda: self._workers.halt(checked))

    def _copy(self, transfer: Transfer, number: int, part: slice, remote: iovec.Iovec) -> None:
        if transfer.stopped is not None:
            return
        nbytes = int(transfer.nbytes[part].sum())
        local = transfer.local[part].copy()
        if nbytes < len(local) * JOINED_BELOW_NBYTES:
            local, remote = iovec.join_remote(local, remote)
        checked = None
        if self._link.core.verify:
            checked = functools.partial(self._ask_check, transfer, number, part, nbytes)
        self._move(transfer, local, remote, nbytes, checked)

    def _copy_share(
        self,
        transfer: Transfer,
        bound: BoundTemplate,
        blocks: BoundBlocks,
        share: Share,
    ) -> None:
        if transfer.stopped is None:
            self._move(transfer, *bound.iovecs(share, blocks), share.nbytes)

    def _copy_slice(
        self, transfer: Transfer, count: int, local: Column, remote: Column, share: Share
    ) -> None:
        part = slice(share.rows.start * count, share.rows.stop * count)
        self._move(transfer, local[part], remote[part], share.nbytes)

    def _move(
        self,
        transfer: Transfer,
        local: npt.NDArray[np.integer] | iovec.FewEntries,
        remote: npt.NDArray[np.integer] | iovec.FewEntries,
        nbytes: int,
        placed: Callable[[], None] | None = None,
    ) -> None:
        """Copy, unless the transfer has been stopped. What is `placed` ends, if that is not
        given."""
        if not transfer.begin():
            return
        transfer.ticket._mark("on wire")
        try:
            iovec.process_vm(self._pid, local, remote, nbytes, write=transfer.write)
        except OSError as error:
            if error.errno is None:
                raise  # no system call's: a signal's handler raised it on a thread that waits
            transfer.stop(self._error(error, transfer))
            transfer.end(0)
            return
        if placed is None:
            transfer.end(nbytes)
        else:
            placed()

    def _count(self, imm: int, transfer: Transfer) -> None:
        """Count a write that is placed; the peer counts the bytes that it verifies."""
        nbytes, verify = transfer.total_nbytes, self._link.core.verify
        done = Arrived(imm, 0, 1, write_nbytes=nbytes) if verify else Arrived(imm, nbytes, 1)
        self._link.send(done)

    def _error(self, error: OSError, transfer: Transfer) -> EngineError:
        peer, operation = self._link.peer.name, transfer.ticket.operation
        if error.errno == errno.ESRCH:
            lost = PeerLost(
                "the peer's process has ended", operation=operation, peer=peer, process_gone=True
            )
            self._link.suspect()
            return lost
        if error.errno == errno.EPERM:
            return TransportUnavailable(refusal(error), operation=operation, peer=peer)
        kind: type[EngineError] = RegionGone
        why = (
            f"memory of a region is not mapped any more ({error.strerror}): it was freed while "
            "registered, here or at the peer"
        )
        if error.errno != errno.EFAULT:
            kind, why = LinkError, f"the kernel could not copy: {error.strerror}"
        return kind(why, operation=operation, peer=peer, imm=transfer.imm)

    # Verification: the sender's checksum is compared where the bytes lie, before they count.

    def _ask_check(self, transfer: Transfer, number: int, part: slice, nbytes: int) -> None:
        """Ask for the checksum of a chunk that is placed, once the peer has few to compute."""
        try:
            crc = iovec.checksum(transfer.local[part])
        except RegionGone as error:
            transfer.stop(error)
            transfer.end(0)
            return
        with self._lock:
            self._asks.append((transfer, number, part, nbytes, crc))
        self._ask_next()

    def _ask_next(self) -> None:
        with self._lock:
            if not self._asks or len(self._unchecked) >= CHECKS_AT_ONCE:
                return
            transfer, number, part, nbytes, crc = self._asks.popleft()
            self._unchecked[transfer.id, number] = (transfer, nbytes, crc)
        self._link.send(
            Check(
                transfer=transfer.id,
                chunk=number,
                regions=tables.region_rows(transfer.remote_regions).tobytes(),
                pieces=tables.piece_rows(transfer, part).tobytes(),
                count=transfer.write,
                crc=crc,
                imm=transfer.imm,
            )
        )

    def _check_soon(self, ask: Check) -> bool:
        """Has the link's own thread check, unless the path has been halted by then."""
        try:
            self._checks.take()
        except QuotaExceeded as error:
            self._link.fail(error)
        else:
            check = functools.partial(self._check, ask)
            self._checker.put(functools.partial(self._workers.enter_and_run, check))
        return True

    def _check(self, ask: Check) -> None:
        """Compare the peer's checksum with one over this process's memory."""
        link = self._link
        try:
            try:
                nbytes, crc = self._checksum(ask)
            finally:
                self._checks.give()  # before the answer, which lets the peer ask for another
        except LinkError as error:
            link.fail(error)
        except EngineError as error:
            link.send(Refuse(ask.transfer, type(error).__name__, error.message, ask.chunk))
        else:
            if ask.count and crc != ask.crc:
                mismatch = checksum_mismatch(link.peer.name, ask.imm)
                link.reject(ask.transfer, ask.imm, mismatch, first=ask.chunk)
                return
            if ask.count and ask.imm is not None:
                link.count(ask.imm, nbytes, 0)
            link.send(Checked(ask.transfer, ask.chunk, crc))

    def _checksum(self, ask: Check) -> tuple[int, int]:
        """Return how many bytes the peer asks about, and their checksum."""
        admitted = tables.admit(self._link.core.regions, ask.regions, ask.pieces)
        try:
            if admitted.nbytes > MAX_CHECK_NBYTES:
                raise ProtocolError(
                    f"a checksum of {admitted.nbytes} bytes is asked for: a chunk has at most "
                    f"{MAX_CHECK_NBYTES}"
                )
            return admitted.nbytes, iovec.checksum(admitted.iov)
        finally:
            admitted.release()

    def _checked(self, answer: Checked) -> bool:
        entry = self._answered(answer.transfer, answer.chunk)
        if entry is not None:
            transfer, nbytes, crc = entry
            if crc == answer.crc:
                transfer.end(nbytes)
            else:
                transfer.stop(checksum_mismatch(self._link.peer.name, None))
                transfer.end(0)
        return True
