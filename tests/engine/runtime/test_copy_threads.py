"""Copier threads: what the kernel does not give back holds up neither others nor the end."""

from __future__ import annotations

import threading
import time

from kvferry.engine.runtime.copy_threads import MAX_STAND_INS, STUCK_S, Copiers

PATIENCE_S = 15.0


def stuck(copiers: Copiers, opened: threading.Event, count: int) -> None:
    """Returns once so many tasks have begun, which end when `opened` is set."""
    for _ in range(count):
        begun = threading.Event()

        def task(begun: threading.Event = begun) -> None:
            begun.set()
            opened.wait(PATIENCE_S)

        copiers.run(task)
        assert begun.wait(PATIENCE_S)


def test_another_thread_starts_where_all_are_stuck_up_to_a_bound() -> None:
    copiers, opened = Copiers("stuck"), threading.Event()
    stuck(copiers, opened, copiers.count)
    for _ in range(MAX_STAND_INS):
        done = threading.Event()
        copiers.run(done.set)
        copiers.tick(time.monotonic())
        assert not done.is_set()  # they are busy, no more
        copiers.tick(time.monotonic() + 2 * STUCK_S)
        assert done.wait(PATIENCE_S)
        stuck(copiers, opened, 1)
    done = threading.Event()
    copiers.run(done.set)
    copiers.tick(time.monotonic() + 2 * STUCK_S)
    assert len(copiers._threads) == copiers.count + MAX_STAND_INS
    opened.set()
    assert done.wait(PATIENCE_S)
    threads = copiers._threads
    copiers.stop(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)


def test_the_end_waits_no_longer_than_it_may() -> None:
    copiers, opened = Copiers("stuck"), threading.Event()
    stuck(copiers, opened, 1)
    threads = copiers._threads
    copiers.stop(0.01)
    assert any(thread.is_alive() for thread in threads)
    opened.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
