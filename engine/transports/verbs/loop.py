"""The thread of one verbs link: it does what is given to it, posts, polls and sleeps.

Any thread leaves tasks in its inbox, and wakes it. It looks at its rails' completions, hands them up,
and sleeps in epoll once there are none and nothing is on its way.
"""

from __future__ import annotations

import functools
import os
import select
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from ...runtime import fork
from ..workers import guard
from . import queue_pair as verbs_qp
from .queue_pair import imm_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...errors import RailError
    from ...transfer.transfer import Transfer
    from ..base import PathHost
    from .queue_pair import Batch, QueuePair
    from .rail import Rail

POLLS_BEFORE_SLEEP = 4  # looks at empty queues while something is in flight; a sleep costs 2 calls
LOOK_AROUND_S = 0.5  # how often the thread looks whether its devices are there and get on
PASSES_BEFORE_LOOK = 256  # a thread that never sleeps looks around, too


class Events(NamedTuple):
    """Whom the thread tells what happens, and asks. All on that thread.

    Attributes:
        completed: completions of a rail have come; what has arrived is counted already.
        broke: the library refused a call for a rail: why, still without the rail's and the peer's
            names, and the batch that was being posted.
        look_around: some time has passed.
        patience_s: how long it may sleep, at most.
        busy: whether something is on its way that it would miss in its sleep.
        halted: the thread ends: nothing of this process may touch memory over the link after this.
    """

    completed: Callable[[Rail, list[Any]], None]
    broke: Callable[[Rail, RailError, Batch | None], None]
    look_around: Callable[[], None]
    patience_s: Callable[[], float]
    busy: Callable[[], bool]
    halted: Callable[[], None]


class Loop:
    """One link's rails and the thread that serves them."""

    def __init__(self, link: PathHost, rails: list[Rail], events: Events) -> None:
        self.rails = rails
        self._link = link
        self._events = events
        self._inbox: deque[Callable[[], None]] = deque()
        self._counting = threading.Lock()
        self._lock = threading.Condition()
        self._halted: Callable[[], None] | None = None
        self._ended = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._watched: dict[int, Rail] = {}
        self._thread = threading.Thread(
            target=self._run, name=f"{link.core.identity.name}-verbs", daemon=True
        )
        fork.disown_in_child(self)

    # From any thread.

    def start(self) -> None:
        """Start the thread, which listens to all rails."""
        for rail in self.rails:
            self.watch(rail)
        self._thread.start()

    def soon(self, task: Callable[[], None]) -> None:
        """Run `task` on the thread."""
        self._inbox.append(task)
        if threading.current_thread() is not self._thread:
            self._wake()

    def drain(self) -> None:
        """Count what has arrived and is not counted."""
        for rail in self.rails:
            for _ in range(rail.most_polls):  # a peer that goes on sending does not keep us here
                left = self._poll(rail)
                if not left:
                    break
                self.soon(functools.partial(self._events.completed, rail, left))

    def halt(self, halted: Callable[[], None]) -> None:
        """End the thread, then calls `halted` once. Never blocks."""
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

    def forked(self) -> list[int]:
        """Return what a child shares with this process."""
        return [] if self._epoll.closed else [self._epoll.fileno(), self._wake_fd]

    # On the thread.

    def watch(self, rail: Rail) -> None:
        """Listen to a rail's completions."""
        self._watched[rail.fd] = rail
        self._epoll.register(rail.fd, select.EPOLLIN)

    def take_leave(self, rail: Rail) -> list[Any]:
        """Listen no more to a rail that is stopped; return the completions that it had left,
        counted."""
        left = rail.flushed()
        with self._counting:
            self._count(rail, left)
        if rail.fd in self._watched:
            del self._watched[rail.fd]
            self._epoll.unregister(rail.fd)
        return left

    def post(
        self,
        rail: Rail,
        pair: QueuePair,
        kind: str,
        rows: list[Any],
        imm: int | None,
        batch: tuple[int, int, Transfer | None, int],
    ) -> None:
        """Post a batch, that of `QueuePair.launch`; one that is refused breaks the rail."""
        flying = pair.launch(*batch)
        if imm is not None:
            pair.credits -= flying.requests
        try:
            verbs_qp.post(pair, kind, rows, imm, flying.number)
        except (rail.device.library.error, OSError) as error:
            self._events.broke(rail, verbs_qp.call_error(error, rail=rail.name), flying)
            return
        if kind == verbs_qp.WRITE:
            rail.sent_nbytes += flying.nbytes

    # Completions.

    def _poll(self, rail: Rail) -> list[Any]:
        """Take completions and counts what arrived, in one step for whoever asks next: when the
        peer's goodbye is read, what it wrote before is counted. Returns all of them."""
        with self._counting:
            try:
                completions = rail.poll()
            except rail.device.library.error as error:
                failure = verbs_qp.call_error(error, rail=rail.name)
                self.soon(functools.partial(self._events.broke, rail, failure, None))
                return []
            self._count(rail, completions)
        return completions

    def _count(self, rail: Rail, completions: list[Any]) -> None:
        staged = rail.staged.number if rail.staged is not None else -1
        for completion in completions:
            if completion.status == 0 and completion.wr_id & verbs_qp.RECEIVE_ID:
                rail.received_nbytes += completion.byte_len
                if completion.qp_num != staged:
                    self._link.count(imm_of(completion), completion.byte_len, 0)

    # The thread.

    def _wake(self) -> None:
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        guard(self._link, "a verbs link", self._serve)
        with self._lock:
            self._lock.wait_for(lambda: self._halted is not None)
        self._tear_down()

    def _serve(self) -> None:
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
                    self._events.look_around()
                continue
            idle += 1
            if idle <= POLLS_BEFORE_SLEEP and (
                self._events.busy() or any(p.flying for rail in self.rails for p in rail.queues)
            ):
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
                    self._events.completed(rail, completions)
        return found

    def _sleep(self) -> None:
        for fd, _ in self._epoll.poll(min(LOOK_AROUND_S, self._events.patience_s())):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
            elif fd in self._watched:
                self._watched[fd].take_event()
        self._events.look_around()

    def _tear_down(self) -> None:
        self._events.halted()
        self._epoll.close()
        with self._lock:
            self._ended = True
            halted = self._halted
        os.close(self._wake_fd)
        if halted is not None:
            halted()
