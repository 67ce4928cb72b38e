"""Counters: how a receiver knows that a handoff is complete, whatever order its bytes came in.

A counter holds the bytes and writes that have arrived under one imm. Counting bytes, not messages,
makes completion independent of order, of the number of rails, of chunking and of which path was
taken (after the immediate counter of TransferEngine, Perplexity 2025).

An arrival may come before its `expect`: it is kept, up to a bound. An arrival for a retired imm is
a late write of an attempt that was given up: it is noted and can complete nothing.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, SupportsIndex

from ..errors import EngineError, ImmInUse, OutOfRange, UnknownImmOverflow
from .ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

IMM_LIMIT = 1 << 32
MAX_UNKNOWN_IMMS = 65_536  # arrivals kept for imms that nobody expects yet; a counter is ~200 bytes
RETIRED_REMEMBERED = 65_536  # imms of which a late arrival is recognised
MAX_UNFIT = 64  # imms that are passed over for a better one: 10 microseconds
MAX_TAKEN = 65_536  # imms that are waited for at a time where each needs a word of its own


def check_imm(imm: SupportsIndex, operation: str) -> int:
    """Return an imm, NumPy's too, as the int that goes over the wire.

    Raises:
        OutOfRange: it is not a 32-bit number.
    """
    imm = operator.index(imm)
    if 0 <= imm < IMM_LIMIT:
        return imm
    raise OutOfRange(f"imm {imm} is not a 32-bit number", operation=operation, imm=imm)


def check_total(name: str, total: SupportsIndex | None, imm: int) -> int | None:
    """Return what a counter is to reach, NumPy's too, as an int.

    Raises:
        OutOfRange: it is no number from 0.
    """
    if total is None:
        return None
    try:
        number = operator.index(total)
    except TypeError:
        number = -1
    if number < 0:
        raise OutOfRange(
            f"{name} must be an integer from 0, not {total!r}", operation="expect", imm=imm
        )
    return number


class _Counter:
    __slots__ = (
        "announced_nbytes",
        "arrived_nbytes",
        "arrived_writes",
        "by_origin",
        "engine_id",
        "lost",
        "nbytes",
        "sources",
        "ticket",
        "writes",
    )

    def __init__(self) -> None:
        self.arrived_nbytes = 0
        self.arrived_writes = 0
        self.announced_nbytes = 0  # which writes that arrived consist of
        self.nbytes: int | None = None
        self.writes: int | None = None
        self.ticket: Ticket | None = None
        self.sources: set[object] = set()  # links that write to it: their loss fails it
        self.lost: EngineError | None = None  # a source ended before anybody expected this imm
        self.engine_id = ""  # whose arrivals and aborts count; "": anybody's
        # Bytes, writes and announced bytes, before it is expected.
        self.by_origin: dict[str, tuple[int, int, int]] = {}

    def narrow(self, engine_id: str) -> None:
        """From now on only that engine counts, and of what came before only its own."""
        self.engine_id = engine_id
        if engine_id and set(self.by_origin) - {engine_id}:
            self.arrived_nbytes, self.arrived_writes, self.announced_nbytes = self.by_origin.get(
                engine_id, (0, 0, 0)
            )
            self.lost = None  # perhaps another's; the link's own end is told to whoever waits
        self.by_origin.clear()

    def takes(self, origin: str) -> bool:
        return not self.engine_id or self.engine_id == origin

    def reached(self) -> bool:
        return (self.nbytes is None or self.arrived_nbytes >= self.nbytes) and (
            self.writes is None
            or (self.arrived_writes >= self.writes and self.arrived_nbytes >= self.announced_nbytes)
        )


class CounterTable:
    """All counters of one engine. Safe to use from any thread."""

    def __init__(self, max_unknown: int = MAX_UNKNOWN_IMMS) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, _Counter] = {}
        self._unknown: dict[int, _Counter] = {}
        self._aborted: OrderedDict[int, dict[str, EngineError]] = OrderedDict()
        # imm: bytes that a stream has seen and nobody has told of yet, and bytes of writes whose end
        # is still to be told of
        self._retired: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._next_imm = itertools.count(1)
        self._max_unknown = max_unknown
        self._closed: EngineError | None = None
        self.late_writes = 0
        self.late_nbytes = 0
        self.foreign_writes = 0

    def new_imm(
        self,
        taken: Callable[[int], bool] = lambda _: False,
        unfit: Callable[[int], bool] = lambda _: False,
    ) -> int:
        """Return an imm that no live, waiting or recently retired counter has, and that is not
        `taken`; nor `unfit`, unless many are.

        Raises:
            ImmInUse: all that were looked at are taken.
        """
        passed = 0
        with self._lock:
            while passed < MAX_TAKEN + MAX_UNFIT:
                imm = next(self._next_imm) % IMM_LIMIT
                if not imm or imm in self._live or imm in self._unknown or imm in self._retired:
                    continue
                if not taken(imm) and (passed >= MAX_UNFIT or not unfit(imm)):
                    return imm
                passed += 1
        raise ImmInUse(
            f"{MAX_TAKEN} imms are waited for at a time: end some of their tickets first",
            operation="new_imm",
        )

    @property
    def pending(self) -> int:
        """Counters that somebody waits for."""
        return len(self._live)

    def expect(
        self,
        imm: int,
        *,
        nbytes: int | None,
        writes: int | None,
        sources: Iterable[object],
        timeout_s: float,
        peer: str = "",
        engine_id: str = "",
    ) -> Ticket:
        """Return a ticket that ends when `nbytes` bytes and `writes` writes have arrived under
        `imm`.

        Args:
            engine_id: the engine that writes: what others write or abort under this imm counts for
                nothing, and is noted in `foreign_writes`. Anybody's counts if "".

        Raises:
            ImmInUse: somebody already waits on this imm. OutOfRange: it has more than 32 bits, or
                a total is no number from 0.
        """
        imm = check_imm(imm, "expect")
        nbytes, writes = check_total("nbytes", nbytes, imm), check_total("writes", writes, imm)

        def retire(ticket: Ticket) -> None:
            with self._lock:
                counter = self._live.get(imm)
                if counter is not None and counter.ticket is ticket:
                    self._retire(imm)

        ticket = Ticket("expect", peer=peer, imm=imm, timeout_s=timeout_s)
        ticket.add_done_callback(retire)
        with self._lock:
            if self._closed is not None:
                raise self._closed
            live = self._live.get(imm)
            if live is not None and live.ticket is not None and live.ticket.done():
                self._retire(imm)  # ended a moment ago on another thread
            elif live is not None:
                raise ImmInUse(
                    "this imm is still live: wait for its ticket, or take another with new_imm()",
                    operation="expect",
                    imm=imm,
                )
            aborts = self._aborted.pop(imm, {})
            aborted = aborts.get(engine_id) if engine_id else next(iter(aborts.values()), None)
            counter = self._unknown.pop(imm, None) or _Counter()
            counter.narrow(engine_id)
            self._retired.pop(imm, None)
            counter.nbytes, counter.writes, counter.ticket = nbytes, writes, ticket
            counter.sources.update(sources)
            self._live[imm] = counter
            reached = counter.reached()
            total = counter.arrived_nbytes
            error = aborted if reached else aborted or counter.lost
        if error is not None:
            ticket._fail(error)
        elif reached:
            ticket._finish(total)
        return ticket

    def arrived(
        self,
        imm: int,
        nbytes: int,
        writes: int,
        source: object,
        origin: str = "",
        *,
        write_nbytes: int = 0,
        staged: bool = False,
    ) -> None:
        """Count bytes that are already visible in memory, from `source`, a link to `origin`.

        Args:
            write_nbytes: of these writes, besides `nbytes`: counted by other calls, and a ticket for
                writes ends when all of them are.
            staged: the bytes came through this end's staging.

        Raises:
            UnknownImmOverflow: too many imms that nobody expects; the caller closes the link.
        """
        announced = write_nbytes + (nbytes if writes else 0)
        with self._lock:
            counter = self._live.get(imm)
            if counter is not None and counter.ticket is not None and counter.ticket.done():
                self._retire(imm)
                counter = None
            if counter is None:
                if imm in self._retired:
                    seen, unended = self._retired[imm]
                    if nbytes and nbytes <= seen:
                        self._retired[imm] = (seen - nbytes, unended)
                        return
                    if write_nbytes and not nbytes and write_nbytes <= unended:
                        self._retired[imm] = (seen, unended - write_nbytes)
                        return
                    self.late_writes += writes
                    self.late_nbytes += nbytes
                    return
                counter = self._unknown.get(imm)
                if counter is None:
                    if len(self._unknown) >= self._max_unknown:
                        self._forget_lost()
                    if len(self._unknown) >= self._max_unknown:
                        raise UnknownImmOverflow(
                            f"{self._max_unknown} imms have arrivals that nobody expects: "
                            "call expect() for what the peer was asked to write",
                            operation="count",
                            imm=imm,
                        )
                    counter = self._unknown[imm] = _Counter()
                before = counter.by_origin.get(origin, (0, 0, 0))
                counter.by_origin[origin] = (
                    before[0] + nbytes,
                    before[1] + writes,
                    before[2] + announced,
                )
            elif not counter.takes(origin):
                self.foreign_writes += writes
                return
            counter.arrived_nbytes += nbytes
            counter.arrived_writes += writes
            counter.announced_nbytes += announced
            counter.sources.add(source)
            if nbytes and counter.ticket is not None:
                counter.ticket._mark("first byte")
                if staged:
                    counter.ticket._mark_staged("scattered", nbytes)
            ticket = counter.ticket if counter.ticket is not None and counter.reached() else None
            total = counter.arrived_nbytes
        if ticket is not None:
            ticket._finish(total)

    def fail(self, imm: int, error: EngineError, *, origin: str = "") -> None:
        """End the counter with `error`, from the engine `origin`; an `expect` still to come fails, too."""
        with self._lock:
            counter = self._live.get(imm)
            if counter is not None and not counter.takes(origin):
                self.foreign_writes += 1
                return
            if counter is None:
                if set(self._unknown.get(imm, _Counter()).by_origin) <= {origin}:
                    self._unknown.pop(imm, None)
                if imm not in self._retired:
                    self._aborted.setdefault(imm, {})[origin] = error
                    while len(self._aborted) > self._max_unknown:
                        self._aborted.popitem(last=False)
                return
            ticket = counter.ticket
        if ticket is not None:
            ticket._fail(error)

    def source_lost(self, source: object, make_error: Callable[[int], EngineError]) -> None:
        """End every counter that `source` writes to.

        What it wrote to imms that nobody expects yet is kept: a peer may have written everything
        and gone home before this side asks.
        """
        with self._lock:
            lost = [
                (imm, counter.ticket)
                for imm, counter in self._live.items()
                if source in counter.sources and counter.ticket is not None
            ]
            for imm, counter in self._unknown.items():
                if source in counter.sources:
                    counter.lost = make_error(imm)
        for imm, ticket in lost:
            ticket._fail(make_error(imm))

    def tickets(self) -> list[Ticket]:
        """Return the pending tickets."""
        with self._lock:
            return [c.ticket for c in self._live.values() if c.ticket is not None]

    def close(self, error: EngineError) -> list[Ticket]:
        """Let `expect` raise `error` from now on; return the pending tickets, for the caller to end."""
        with self._lock:
            self._closed = error
        return self.tickets()

    def _forget_lost(self) -> None:
        for imm in [imm for imm, counter in self._unknown.items() if counter.lost is not None]:
            del self._unknown[imm]

    def _retire(self, imm: int) -> None:
        counter = self._live.pop(imm)
        seen = unended = 0
        if counter.ticket is not None and counter.ticket.exception() is None:
            seen = max(0, (counter.nbytes or 0) - counter.arrived_nbytes)
            unended = max(0, counter.arrived_nbytes - counter.announced_nbytes)
        self._retired[imm] = (seen, unended)
        while len(self._retired) > RETIRED_REMEMBERED:
            self._retired.popitem(last=False)
