"""One write or read on its way: who still touches its memory, and how it ends."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EngineError, NotRegistered
from ..memory import iovec
from .pieces import NO_PIECES

if TYPE_CHECKING:
    from collections.abc import Callable

    from .moves import Move
    from .pieces import BoundPieces
    from .ticket import Ticket


class Transfer:
    """A move that has been asked for, from its submission to the end of its ticket.

    Its ticket ends when no thread works on it any more: well when all bytes are placed, or with the
    first error. A stopped transfer begins no further work (invariant 2: a source block is not
    reused before every read from it has completed).

    Attributes:
        move: what was asked for, where the path multiplies it out by itself; None once it is a list
            of pieces.
        local, nbytes, remote_index, remote_offset: the list of pieces (`BoundPieces`).
        local_regions, remote_regions: that it touches; kept in use here until it ends.
        after: what must be done before its memory is touched, if anything: an event.
        start: begins it instead of the path's `submit`.
        on_placed: called once, before the ticket ends well; with the EngineError it raises, if any.
        on_stop: called once, when it is stopped while at work.
        scratch: whether its local pieces lie in memory of the engine's own, in no region.
    """

    __slots__ = (
        "_active",
        "_concluded",
        "_error",
        "_lock",
        "_on_end",
        "_placed_nbytes",
        "after",
        "id",
        "imm",
        "local",
        "local_regions",
        "move",
        "nbytes",
        "on_placed",
        "on_stop",
        "remote_index",
        "remote_offset",
        "remote_regions",
        "scratch",
        "start",
        "ticket",
        "total_nbytes",
        "write",
    )

    def __init__(
        self,
        number: int,
        move: Move,
        *,
        write: bool,
        ticket: Ticket,
        on_end: Callable[[Transfer], None],
        start: Callable[[Transfer], None] | None = None,
    ) -> None:
        self.id = number
        self.write = write
        self.imm = ticket.imm
        self.ticket = ticket
        self.local_regions = move.local
        self.remote_regions = move.remote
        pieces = move.listed
        self.move: Move | None = move if pieces is None else None
        self.local, self.nbytes, self.remote_index, self.remote_offset, _ = pieces or NO_PIECES
        self.total_nbytes = move.nbytes
        self.on_placed: Callable[[], None] | None = None
        self.on_stop: Callable[[], None] | None = None
        self.start = start
        self.after: Any = None
        self.scratch = False
        self._on_end = on_end
        self._lock = threading.Lock()
        self._active = 0
        self._placed_nbytes = 0
        self._error: EngineError | None = None
        self._concluded = False

    def take(self, pieces: BoundPieces, *, scratch: bool = False) -> None:
        """Give it the list of pieces, before its first work begins."""
        self.local, self.nbytes, self.remote_index, self.remote_offset, self.total_nbytes = pieces
        self.move, self.start, self.scratch = None, None, scratch

    @property
    def stopped(self) -> EngineError | None:
        """The error it will end with, if it was stopped."""
        return self._error

    def device(self) -> int:
        """Return the GPU that holds its local memory; -1 for host memory.

        Raises:
            NotRegistered: it is spread over several.
        """
        regions = self.local_regions
        devices = {region.device for region in regions} or {-1}
        if len(devices) > 1 or any(r.device < 0 and r.kind != "host" for r in regions):
            raise self.ticket._make_error(
                NotRegistered,
                "the local regions are on several GPUs, or partly in host memory: make one "
                "transfer for each",
            )
        return devices.pop()

    def remote_iovec(self) -> iovec.Iovec:
        """Return the pieces' virtual addresses in the peer's process."""
        if len(self.remote_regions) == 1:
            return iovec.make(self.remote_offset + self.remote_regions[0].address, self.nbytes)
        bases = np.array([region.address for region in self.remote_regions], np.int64)
        return iovec.make(bases[self.remote_index] + self.remote_offset, self.nbytes)

    def begin(self, count: int = 1) -> bool:
        """Begin `count` works on its memory; False if it has ended or must, and nothing may begin.

        A thread that works on the memory and an answer that is awaited from the peer are two works:
        a peer that answers early, or twice, must not free memory under a thread.
        """
        with self._lock:
            if self._error is not None or self._concluded:
                return False
            self._active += count
            return True

    def end(self, nbytes: int) -> None:
        """End work that was begun; `nbytes` bytes are placed."""
        with self._lock:
            self._active -= 1
            self._placed_nbytes += nbytes
            error = self._error
            if error is None and self._placed_nbytes < self.total_nbytes:
                return
            if self._active or self._concluded:
                return
            self._concluded = True
        if error is None and self.on_placed is not None:
            try:
                self.on_placed()
            except EngineError as failed:
                error = self._error = failed
        self._conclude(error)

    def end_empty(self) -> None:
        """End a transfer without bytes: nothing is to be done, and nothing waited for."""
        if self.begin():
            self.end(0)

    def stop(self, error: EngineError) -> None:
        """Begin nothing more; end with `error` once nobody works on it."""
        with self._lock:
            if self._concluded:
                return
            first = self._error is None
            if first:
                self._error = error
            at_work = self._active > 0
            self._concluded = not at_work
        if not at_work:
            self._conclude(self._error)
        elif first and self.on_stop is not None:
            self.on_stop()

    def abandon(self, error: EngineError) -> None:
        """End now: the caller knows that every thread of the path has left."""
        with self._lock:
            if self._concluded:
                return
            self._error = self._error or error
            self._concluded = True
        self._conclude(self._error)

    def interrupted(self, error: EngineError) -> None:
        """End now: every thread of the path has left, and the last one perhaps while it ended this."""
        with self._lock:
            self._error = self._error or error
            self._concluded = True
        self._conclude(self._error)

    def _conclude(self, error: EngineError | None) -> None:
        self._on_end(self)
        if error is None:
            self.ticket._finish(self.total_nbytes)
        else:
            self.ticket._fail(error)
