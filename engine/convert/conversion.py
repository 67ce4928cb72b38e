"""A transfer of numbers that change their type, cut into chunks so that its staging is bounded.

Layer by layer, and within a layer by pieces, what travels is cut into chunks of a few MiB, which are
ordinary transfers under one imm; the receiver counts bytes, so it does not see where they were cut.
While one is on the wire the next is gathered and converted. A transfer of any size holds `AHEAD`
chunks at a time, and the tables of one layer.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import EngineError, PlanError
from ..transfer.compute_gate import compute_event
from ..transfer.ticket import Ticket
from .chunk import ConvertChunk, Part, element_types_of, failure, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from ..runtime.copy_threads import Copiers
    from ..transfer.compute_gate import StreamGate
    from ..transfer.moves import Move, Op, TokenMove
    from ..transfer.plan import TransferPlan
    from ..transfer.transfer import Transfer
    from .workspace import Workspaces

    Ids = npt.NDArray[np.int64]

CHUNK_NBYTES = 4 << 20  # that travel; converting takes up to ten times as much beside it
# On a GPU the host's work for a chunk is what counts, and staging is all that it takes there.
GPU_CHUNK_NBYTES = 16 << 20
AHEAD = 2


def chunks_of(move: TokenMove, nbytes: int) -> Iterator[list[Part]]:
    """Cut a transfer into chunks of about `nbytes` that travel, made as they are asked for.

    A chunk is larger where one block whose scale is made has more.
    """
    plan = move.plan
    tokens = plan.tokens
    chosen = tokens.layers if move.layers is None else sorted(set(move.layers))
    waiting: list[Part] = []
    size = yielded = 0
    for layer in chosen:
        found = tokens.moves(
            move.src_tables, move.dst_tables, move.start, move.stop, layers=(layer,)
        )
        parts = [part for moves in found for part in parts_of(moves)]
        for some in _cut(parts, nbytes, writes=plan.writes):
            waiting += some
            size += sum(part.wire_nbytes(plan.writes) for part in some)
            if size >= nbytes:
                yield waiting
                yielded += 1
                waiting, size = [], 0
    if waiting or not yielded:
        yield waiting  # of nothing at all an empty one, which tells the receiver


def _cut(parts: list[Part], nbytes: int, *, writes: bool) -> Iterator[list[Part]]:
    """Return one layer's parts, cut where they may be cut."""
    by_block: list[Part] = []
    for part in parts:
        if part.moves.copy_group.dst_scales is not None:
            by_block.append(part)
            continue
        each = max(1, part.wire_nbytes(writes) // max(1, len(part.rows)))
        step = max(1, nbytes // each)
        for first in range(0, len(part.rows), step):
            yield [part._replace(rows=part.rows[first : first + step])]
    if not by_block:
        return
    blocks = [part.moves.dst_block[part.rows] for part in by_block]
    known = np.unique(np.concatenate(blocks))
    sizes = np.zeros(len(known), np.int64)
    for part, block in zip(by_block, blocks, strict=True):
        each = part.wire_nbytes(writes) // max(1, len(part.rows))
        sizes += each * np.bincount(np.searchsorted(known, block), minlength=len(known))
    chunk = (np.cumsum(sizes) - sizes) // nbytes  # of each block
    for number in np.unique(chunk).tolist():
        chosen = known[chunk == number]
        first, last = chosen[0], chosen[-1]  # blocks are cut in their order
        some = [
            part._replace(rows=part.rows[(block >= first) & (block <= last)])
            for part, block in zip(by_block, blocks, strict=True)
        ]
        yield [part for part in some if len(part.rows)]


class Submit(Protocol):
    """Makes a move a transfer, which `start` begins. As `Submitter.submit`."""

    def __call__(
        self, op: Op, move: Move, start: Callable[[Transfer], None], *, computed: bool
    ) -> Ticket: ...


class Conversion:
    """One transfer of numbers that change their type. Its ticket ends when all chunks have."""

    def __init__(
        self,
        op: Op,
        move: TokenMove,
        workspaces: Workspaces,
        copiers: Copiers,
        gate: StreamGate,
        *,
        peer: str,
        submit: Submit,
        begin: Callable[[Transfer], None],
        ended: Callable[[Conversion], None],
    ) -> None:
        """Check everything, and note what a stream (the current one if None) has been given so far,
        if the memory is a GPU's; moves nothing yet.

        Args:
            submit: makes a chunk a transfer of the link's.
            begin: hands a transfer of pieces to the path.
            ended: called when it has ended.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: as for `TokenPlan.moves`; or the cache here
                is spread over several devices.
        """
        plan = move.plan
        on_gpu = plan.local.kind == "cuda"
        if plan.local.kind != ("cuda" if plan.local.device >= 0 else "host"):
            raise PlanError(
                "numbers change their type, and the cache here is on several GPUs, or partly in "
                "host memory: register a cache for each"
            )
        move.nbytes  # noqa: B018 - checks the tables
        self._op, self._plan = op, plan
        self._workspaces, self._copiers, self._gate = workspaces, copiers, gate
        self._submit, self._begin_pieces, self._on_ended = submit, begin, ended
        self._deadline_s = time.monotonic() + op.timeout_s
        self.ticket = Ticket(
            op.kind, peer=peer, imm=op.imm, timeout_s=op.timeout_s, stop_hook=self.stop
        )
        self._computed = compute_event(plan.local.device, op.stream)
        self._chunks = chunks_of(move, GPU_CHUNK_NBYTES if on_gpu else CHUNK_NBYTES)
        self._lock = threading.Lock()
        self._making = threading.Lock()  # of the chunks: copiers wait for it, nobody who stops them
        self._at_work = 0  # chunks that are being made, or moved
        self._inner: set[Ticket] = set()
        self._error: EngineError | None = None
        self._all_begun = False
        self._moved_nbytes = 0

    def start(self) -> Ticket:
        """Begin it, once the compute before it is done. The local memory stays acquired until it
        ends, between chunks too."""
        if self._computed is None:
            self._begin()
        else:
            self._gate.when(self._computed, self._begin, self.stop)
        return self.ticket

    def _begin(self) -> None:
        for _ in range(AHEAD):
            self._copiers.run(self._next)

    def _next(self) -> None:
        """Make one chunk and send it on its way. On a copier."""
        with self._lock:
            if self._error is not None or self._all_begun:
                return
            self._at_work += 1
        try:
            inner = self._begin_chunk()
        except Exception as error:
            self._chunk_ended(0, failure(error))
            return
        if inner is None:
            self._chunk_ended(0, None)
            return
        ticket, chunk = inner
        with self._lock:
            self._inner.add(ticket)
            stopped = self._error is not None
        if stopped:
            ticket.cancel()
        ticket.add_done_callback(partial(self._inner_ended, chunk))

    def _begin_chunk(self) -> tuple[Ticket, ConvertChunk] | None:
        """Return the next chunk and its ticket; None if there is none."""
        with self._making:
            parts = next(self._chunks, None)
        if parts is None:
            self._all_begun = True
            return None
        chunk = ConvertChunk(self._plan, parts, self._workspaces)
        left_s = max(1e-3, self._deadline_s - time.monotonic())
        ticket = self._submit(
            self._op._replace(timeout_s=left_s),
            chunk,
            partial(chunk.start, self._begin_pieces, self._copiers),
            computed=True,
        )
        return ticket, chunk

    def _inner_ended(self, chunk: ConvertChunk, inner: Ticket) -> None:
        """On the thread that ended it."""
        chunk.release()
        error = inner.exception()
        assert error is None or isinstance(error, EngineError)
        with self._lock:
            self._inner.discard(inner)
        self._chunk_ended(inner.nbytes, error)
        if error is None and not self._all_begun:
            self._copiers.run(self._next)

    def _chunk_ended(self, nbytes: int, error: EngineError | None) -> None:
        with self._lock:
            self._at_work -= 1
            self._moved_nbytes += nbytes
            first = error is not None and self._error is None
            self._error = self._error or error
        if first:
            self._stop_inner()
        self._end_if_over()

    def _end_if_over(self) -> None:
        with self._lock:
            over = not self._at_work and (self._error is not None or self._all_begun)
        if not over:
            return
        ended = (
            self.ticket._finish(self._moved_nbytes)
            if self._error is None
            else self.ticket._fail(self._error)
        )
        if ended:
            self._on_ended(self)
            self._plan.local.release()

    def stop(self, error: EngineError) -> None:
        """Begin nothing more; it ends with `error` once no chunk is at work."""
        with self._lock:
            self._error = self._error or error
        self._stop_inner()
        self._end_if_over()

    def _stop_inner(self) -> None:
        with self._lock:
            inner = list(self._inner)
        for ticket in inner:
            ticket.cancel()


def warm(workspaces: Workspaces, plan: TransferPlan) -> None:
    """Allocate what a transfer on a GPU takes there, and loads its kernels. May take seconds.

    Raises:
        DeviceError: the GPU's driver refuses.
    """
    device = plan.local.device
    places = []
    try:
        for _ in range(AHEAD):
            places.append(workspaces.take(device))
            places[-1].reserve(GPU_CHUNK_NBYTES)
        for pair in plan.tokens.pairs:
            for copy_group in pair.copy_groups:
                types = element_types_of(copy_group)
                scaled = copy_group.src_scales is not None or copy_group.dst_scales is not None
                places[0].try_out(types, converts=copy_group.converts, scaled=scaled)
    finally:
        for place in places:
            workspaces.give(device, place)
