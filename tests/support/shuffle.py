"""A transport for tests that wraps any other: what arrived is told late, out of order and in bursts.

That is what devices without ordering do (EFA's), and nothing of the engine may mind. Every link of a
process is wrapped once `install` has run: `tests/conftest.py` and `tests/support/peer_process.py` call it
where the environment has `KVFERRY_TEST_SHUFFLE`, whose value is the seed.
"""

from __future__ import annotations

import os
import random
import threading
from typing import TYPE_CHECKING, Any

from kvferry.engine.link.link import Link
from kvferry.engine.transports.base import DataPath
from kvferry.engine.wire.messages import Acknowledge, Arrived

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvferry.engine.transfer.transfer import Transfer
    from kvferry.engine.transports.base import PathHost, RailState

VARIABLE = "KVFERRY_TEST_SHUFFLE"
LONGEST_BURST = 24
PATIENCE_S = 0.004  # nothing is held longer than this after the last arrival


class Shuffler:
    """Holds deliveries until a burst is full or nothing has come for a while; then in any order."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._held: list[Callable[[], None]] = []
        self._delivering = threading.RLock()
        self._burst = 1
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="shuffle", daemon=True)
        self._thread.start()

    def add(self, delivery: Callable[[], None]) -> None:
        with self._changed:
            self._held.append(delivery)
            self._changed.notify_all()

    def drain(self) -> None:
        """Delivers all that is held, on the caller's thread; what another thread delivers is over."""
        with self._delivering:
            with self._changed:
                held, self._held = self._held, []
            self._random.shuffle(held)
            for delivery in held:
                delivery()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._held))
                if self._closed and not self._held:
                    return
                while len(self._held) < self._burst and self._changed.wait(PATIENCE_S):
                    pass
            self._burst = self._random.randint(1, LONGEST_BURST)
            self.drain()


class _HostView:
    """What a path sees of its link, whose counts go through the shuffler."""

    def __init__(self, link: PathHost, shuffler: Shuffler) -> None:
        self._link = link
        self._shuffler = shuffler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def count(self, imm: int, nbytes: int, writes: int, **options: Any) -> None:
        self._shuffler.add(lambda: self._link.count(imm, nbytes, writes, **options))


class ShufflePath(DataPath):
    """Any path, with its arrivals shuffled."""

    def __init__(self, link: PathHost, make_path: Callable[[Any], DataPath], seed: int) -> None:
        self._link = link
        self.shuffler = Shuffler(seed)
        self._inner = make_path(_HostView(link, self.shuffler))
        self.peer_reaches_memory = self._inner.peer_reaches_memory
        self.asks_access = self._inner.asks_access
        self.kinds = self._inner.kinds
        self.handlers = {
            **self._inner.handlers,
            Acknowledge: self._acknowledged,
            Arrived: self._arrived,
        }

    def start(self) -> None:
        self._inner.start()

    def submit(self, transfer: Transfer) -> None:
        self._inner.submit(transfer)

    def before(self, transfer: Transfer, stream: Any) -> None:
        self._inner.before(transfer, stream)

    def takes(self, move: Any) -> bool:
        return self._inner.takes(move)

    def prepare(self, plan: Any, layers: Sequence[int] | None) -> None:
        self._inner.prepare(plan, layers)

    def granted(self, region: Any, keys: tuple[int, ...]) -> None:
        self._inner.granted(region, keys)

    def forget(self, region_id: int) -> None:
        self._inner.forget(region_id)

    def rail_states(self) -> tuple[RailState, ...]:
        return self._inner.rail_states()

    def tick(self) -> None:
        self._inner.tick()

    def drain(self) -> None:
        self._inner.drain()
        self.shuffler.drain()

    def _acknowledged(self, message: Acknowledge) -> bool:
        self.shuffler.add(lambda: self._late(message))
        return True

    def _late(self, message: Acknowledge) -> None:
        self._inner.handlers[Acknowledge](message)

    def _arrived(self, message: Arrived) -> bool:
        if message.nbytes and not self.peer_reaches_memory:
            return False
        imm, nbytes, writes = message.imm, message.nbytes, message.writes
        more = message.write_nbytes
        self.shuffler.add(lambda: self._link.count(imm, nbytes, writes, write_nbytes=more))
        return True

    def halt(self, halted: Callable[[], None]) -> None:
        def end() -> None:
            self.shuffler.close()
            halted()

        self._inner.halt(end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def install() -> None:
    """Wraps every link of this process, if the environment asks for it."""
    if VARIABLE not in os.environ:
        return
    seed = int(os.environ[VARIABLE])
    plain = Link.__init__

    def shuffled(
        link: Link,
        core: Any,
        sock: Any,
        peer: Any,
        transport: str,
        make_path: Callable[[PathHost], DataPath],
    ) -> None:
        plain(link, core, sock, peer, transport, lambda it: ShufflePath(it, make_path, seed))

    Link.__init__ = shuffled  # type: ignore[method-assign, assignment]
