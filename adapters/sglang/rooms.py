"""One request's KV on its way out of a prefill rank: what moves, and who still reads its pages.

SGLang calls a request a room. Its pages are free, and its peers are told how it ended, only when no
transfer of it is left; what fails takes the rest of the room with it.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.errors import EngineError, PlanError
from ...engine.memory.cuda_events import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from ...engine.link.link import Link
    from ...engine.transfer.plan import TransferPlan
    from ...engine.transfer.ticket import Ticket
    from .layout import Plans
    from .messages import Publish

    Ids = npt.NDArray[np.int32]

log = logging.getLogger("kvferry.sglang")


class Part:
    """Where one decode rank wants a room. The attributes in the middle are those SGLang looks at.

    Attributes:
        link, plans: None for a dummy, to which nothing is sent.
    """

    def __init__(self, publish: Publish, link: Link | None, plans: Plans | None) -> None:
        self.publish = publish
        self.link = link
        self.plans = plans
        self.endpoint = publish.host
        self.dst_port = publish.port
        self.is_dummy = publish.dummy
        self.required_dst_info_num = publish.required
        self.pages = np.frombuffer(publish.pages, np.int32)
        self.states = [None if s is None else np.frombuffer(s, np.int32) for s in publish.states]


class Chunk:
    """What SGLang hands over at once: pages, and with the last of them metadata and state.

    Attributes:
        where: positions of the pages among those that decode has published.
        aux_index, states: of the last chunk.
        events: what must have happened before pages and their ids are read.
    """

    def __init__(
        self,
        pages: Ids,
        where: slice | Ids,
        aux_index: int | None,
        states: Sequence[Any] | None,
        events: Sequence[Any] = (),
    ) -> None:
        self.pages = pages
        self.where = where
        self.last = aux_index is not None
        self.aux_index = aux_index
        self.states = states
        self.events = [event for event in events if event is not None]


class Room:
    """One request. Safe to use from any thread.

    Args:
        number: SGLang's bootstrap room.
        idle: called, on any thread and perhaps several times, once nothing of it moves and it has
            succeeded or failed. Must not block.

    Attributes:
        parts: by decode engine.
        reason: why it fails; "" while it does not.
    """

    def __init__(self, number: int, timeout_s: float, idle: Callable[[Room], None]) -> None:
        self.number = number
        self.parts: dict[str, Part] = {}
        self.reason = ""
        self.concluded = False
        self._timeout_s = timeout_s
        self._idle = idle
        self._changed = threading.Condition()  # its lock is held again by callbacks: a RLock
        self._tickets: set[Ticket] = set()
        self._chunks = 0  # announced and not started
        self._last_started = False

    @property
    def drained(self) -> bool:
        """Whether none of its memory is read, nor will be for what SGLang has handed over."""
        with self._changed:
            return not self._tickets and bool(self.reason or not self._chunks)

    @property
    def _over(self) -> bool:
        """Whether it has succeeded or failed, and nothing of it moves."""
        complete = self._last_started and not self._chunks
        return not self._tickets and bool(self.reason or complete)

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until it is drained; False if `timeout_s` passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.drained, timeout_s)

    def claim(self) -> bool:
        """Return whether the caller is the one that concludes it."""
        with self._changed:
            first = self._over and not self.concluded
            self.concluded = self.concluded or first
            return first

    def expect_chunk(self) -> None:
        """A chunk will come by `move`."""
        with self._changed:
            self._chunks += 1

    def move(self, chunk: Chunk) -> None:
        """Start the transfers of a chunk that was announced. May block until it is computed."""
        try:
            if not self.reason:
                for event in chunk.events:
                    wait_for(event)
                for part in list(self.parts.values()):
                    if part.link is not None and part.plans is not None:
                        self._start(part, part.link, part.plans, chunk)
        except EngineError as error:
            self.fail(error.message)
        finally:
            with self._changed:
                self._chunks -= 1
                self._last_started = self._last_started or chunk.last
                self._changed.notify_all()
            self._look()

    def fail(self, reason: str) -> None:
        """Start nothing more and end what has begun; the first reason stays."""
        with self._changed:
            if self.concluded:
                return
            self.reason = self.reason or reason
            tickets = list(self._tickets)
            self._changed.notify_all()
        for ticket in tickets:
            ticket.cancel()
        self._look()

    def _start(self, part: Part, link: Link, plans: Plans, chunk: Chunk) -> None:
        """Start the transfers of one chunk to one decode rank.

        Raises:
            EngineError: a list of ids makes no sense, or the link is down.
        """
        there = part.pages[chunk.where]
        if len(there) != len(chunk.pages):
            raise PlanError(
                f"prefill sends {len(chunk.pages)} pages at {chunk.where}, but decode has published "
                f"{len(part.pages)} pages in all",
                operation="send",
                peer=link.peer.name,
            )
        self._write(link, plans.kv, chunk.pages, there)
        if not chunk.last:
            return
        for number, plan in enumerate(plans.states):
            here = _at(chunk.states, number)
            states = _at(part.states, number)
            if len(here) != len(states):
                raise PlanError(
                    f"state component {number} has {len(here)} indices at prefill and "
                    f"{len(states)} at decode",
                    operation="send",
                    peer=link.peer.name,
                )
            self._write(link, plan, here, states)
        self._write(link, plans.aux, [chunk.aux_index], [part.publish.aux_index])

    def _write(self, link: Link, plan: TransferPlan | None, here: Any, there: Any) -> None:
        if plan is None or not len(here):
            return
        with self._changed:
            if self.reason:
                return
            ticket = link.write_blocks(plan, here, there, timeout_s=self._timeout_s)
            self._tickets.add(ticket)
        ticket.add_done_callback(self._ended)

    def _ended(self, ticket: Ticket) -> None:
        with self._changed:
            self._tickets.discard(ticket)
            self._changed.notify_all()
        error = ticket.exception()
        if error is not None and not self.reason:
            self.fail(getattr(error, "message", None) or str(error))
        self._look()

    def _look(self) -> None:
        with self._changed:
            over = self._over and not self.concluded
        if over:
            self._idle(self)


def _at(lists: Sequence[Any] | None, number: int) -> Any:
    found = lists[number] if lists is not None and number < len(lists) else None
    return [] if found is None else found
