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
# Imms that nobody expects yet, of one link; of all links that ended, together, as many. A counter is
# 700 bytes.
MAX_UNKNOWN_IMMS = 16_384
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


# A link and the engine at its other end.
_Who = tuple[object, str]


class _Counter:
    __slots__ = (
        "announced_nbytes",
        "arrived_nbytes",
        "arrived_writes",
        "early",
        "engine_id",
        "links",
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
        self.links: frozenset[object] = frozenset()  # that count; none: any
        self.engine_id = ""  # whose arrivals and aborts count; "": anybody's
        # Before it is expected: bytes, writes and announced bytes of each, and why one ended.
        self.early: dict[_Who, tuple[int, int, int]] = {}
        self.lost: dict[_Who, EngineError] = {}

    def begin(self, links: frozenset[object], engine_id: str) -> None:
        """From now on only these count, and of what came before only their own."""
        self.links, self.engine_id = links, engine_id
        self.sources.update(links)
        for who, (nbytes, writes, announced) in self.early.items():
            if self.takes(*who):
                self.arrived_nbytes += nbytes
                self.arrived_writes += writes
                self.announced_nbytes += announced
                self.sources.add(who[0])
        self.early = {}

    def takes(self, source: object, origin: str) -> bool:
        return (not self.links or source in self.links) and (
            not self.engine_id or self.engine_id == origin
        )

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
        self._aborted: dict[int, dict[_Who, EngineError]] = {}
        # What each link is charged with: imms that nobody expects, which it wrote to or gave up.
        self._kept: dict[_Who, set[int]] = {}
        self._given_up: dict[_Who, OrderedDict[int, None]] = {}
        self._orphans: OrderedDict[tuple[_Who, int], None] = OrderedDict()  # of links that ended
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
            sources: the links that write. What others write or abort under this imm counts for
                nothing, and is noted in `foreign_writes`; any link's counts if there are none.
            engine_id: the engine that writes, likewise; any engine's counts if "".

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
            counter = self._take_unknown(imm)
            counter.begin(frozenset(sources), engine_id)
            aborted = self._first(self._take_aborts(imm), counter)
            self._retired.pop(imm, None)
            counter.nbytes, counter.writes, counter.ticket = nbytes, writes, ticket
            self._live[imm] = counter
            reached = counter.reached()
            total = counter.arrived_nbytes
            error = aborted if reached else aborted or self._first(counter.lost, counter)
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
                self._keep_early(imm, (source, origin), (nbytes, writes, announced))
                return
            if not counter.takes(source, origin):
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

    def fail(
        self, imm: int, error: EngineError, *, source: object = None, origin: str = ""
    ) -> None:
        """End the counter with `error`, which came over `source`, a link to `origin`; an `expect`
        still to come fails, too."""
        who = (source, origin)
        with self._lock:
            counter = self._live.get(imm)
            if counter is not None and not counter.takes(source, origin):
                self.foreign_writes += 1
                return
            if counter is None:
                self._forget_early(imm, who)
                if imm not in self._retired:
                    self._aborted.setdefault(imm, {})[who] = error
                    mine = self._given_up.setdefault(who, OrderedDict())
                    mine[imm] = None
                    while len(mine) > self._max_unknown:
                        self._forget_abort(next(iter(mine)), who)
                return
            ticket = counter.ticket
        if ticket is not None:
            ticket._fail(error)

    def source_lost(self, source: object, make_error: Callable[[int], EngineError]) -> None:
        """End every counter that `source` writes to.

        What it wrote to imms that nobody expects yet is kept, up to a bound for all links that
        ended: a peer may have written everything and gone home before this side asks.
        """
        with self._lock:
            lost = [
                (imm, counter.ticket)
                for imm, counter in self._live.items()
                if source in counter.sources and counter.ticket is not None
            ]
            for who in [who for who in self._kept if who[0] == source]:
                for imm in self._kept.pop(who):
                    self._unknown[imm].lost[who] = make_error(imm)
                    self._orphans[who, imm] = None
            for who in [who for who in self._given_up if who[0] == source]:
                for imm in self._given_up.pop(who):
                    self._orphans[who, imm] = None
            while len(self._orphans) > self._max_unknown:
                (who, imm), _ = self._orphans.popitem(last=False)
                self._forget_early(imm, who)
                self._forget_abort(imm, who)
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

    # Arrivals and aborts of imms that nobody expects. The lock is held.

    def _keep_early(self, imm: int, who: _Who, share: tuple[int, int, int]) -> None:
        """Keep an arrival, at the expense of the link that it came over."""
        counter = self._unknown.get(imm)
        if counter is None or who not in counter.early:
            mine = self._kept.setdefault(who, set())
            if len(mine) >= self._max_unknown:
                raise UnknownImmOverflow(
                    f"the peer has written under {self._max_unknown} imms that nobody expects: "
                    "call expect() for what it was asked to write",
                    operation="count",
                    imm=imm,
                )
            mine.add(imm)
            if counter is None:
                counter = self._unknown[imm] = _Counter()
        before = counter.early.get(who, (0, 0, 0))
        counter.early[who] = (before[0] + share[0], before[1] + share[1], before[2] + share[2])

    def _take_unknown(self, imm: int) -> _Counter:
        """Return the counter of an imm, with what has come for it, and end what that is charged."""
        counter = self._unknown.pop(imm, None)
        if counter is None:
            return _Counter()
        for who in counter.early:
            self._uncharge(self._kept, imm, who)
        return counter

    def _take_aborts(self, imm: int) -> dict[_Who, EngineError]:
        """Return the aborts of an imm, and end what they are charged."""
        aborts = self._aborted.pop(imm, {})
        for who in aborts:
            self._uncharge(self._given_up, imm, who)
        return aborts

    def _forget_early(self, imm: int, who: _Who) -> None:
        counter = self._unknown.get(imm)
        if counter is not None and counter.early.pop(who, None) is not None:
            counter.lost.pop(who, None)
            self._uncharge(self._kept, imm, who)
            if not counter.early:
                del self._unknown[imm]

    def _forget_abort(self, imm: int, who: _Who) -> None:
        aborts = self._aborted.get(imm)
        if aborts is not None and aborts.pop(who, None) is not None:
            self._uncharge(self._given_up, imm, who)
            if not aborts:
                del self._aborted[imm]

    def _uncharge(
        self,
        charged: dict[_Who, set[int]] | dict[_Who, OrderedDict[int, None]],
        imm: int,
        who: _Who,
    ) -> None:
        mine = charged.get(who)
        if mine is None:
            self._orphans.pop((who, imm), None)
        elif isinstance(mine, set):
            mine.discard(imm)
        else:
            mine.pop(imm, None)

    @staticmethod
    def _first(errors: dict[_Who, EngineError], counter: _Counter) -> EngineError | None:
        """Return the first error that concerns a counter."""
        return next((error for who, error in errors.items() if counter.takes(*who)), None)

    def _retire(self, imm: int) -> None:
        counter = self._live.pop(imm)
        seen = unended = 0
        if counter.ticket is not None and counter.ticket.exception() is None:
            seen = max(0, (counter.nbytes or 0) - counter.arrived_nbytes)
            unended = max(0, counter.arrived_nbytes - counter.announced_nbytes)
        self._retired[imm] = (seen, unended)
        while len(self._retired) > RETIRED_REMEMBERED:
            self._retired.popitem(last=False)
