"""The progress thread: whom it tells of what."""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING

import pytest

from kvferry.engine.runtime.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 15.0


@pytest.fixture
def progress() -> Iterator[Progress]:
    progress = Progress("test", lambda now: None)
    yield progress
    progress.stop()


def test_an_event_of_a_closed_descriptor_is_not_told_to_the_next_of_its_number(
    progress: Progress,
) -> None:
    first_out, first_in = os.pipe()
    second_out, second_in = os.pipe()
    told: list[str] = []
    looked_again = threading.Event()

    def first(_: int) -> None:
        os.read(first_out, 1)
        if not told:
            told.append("first")
            # As when a link goes down and another is opened, with the process that it watches.
            progress.unwatch(second_out)
            os.close(second_out)
            pidfd = os.pidfd_open(os.getpid())
            assert pidfd == second_out
            progress.watch(pidfd, select.EPOLLIN, lambda _: told.append("a living process"))
            os.write(first_in, b"x")
        else:
            looked_again.set()

    progress.watch(first_out, select.EPOLLIN, first)
    progress.watch(second_out, select.EPOLLIN, lambda _: told.append("second"))
    os.write(first_in, b"x")
    os.write(second_in, b"x")
    progress.start()
    assert looked_again.wait(PATIENCE_S)
    progress.stop()
    assert told in (["first"], ["second", "first"])
    for fd in (first_out, first_in, second_out, second_in):
        os.close(fd)


def test_what_is_watched_while_the_thread_looks_is_told(progress: Progress) -> None:
    progress.start()
    told = threading.Event()
    out, into = os.pipe()
    os.write(into, b"x")

    def ready(_: int) -> None:
        progress.unwatch(out)
        told.set()

    progress.watch(out, select.EPOLLIN, ready)
    assert told.wait(PATIENCE_S)
    for fd in (out, into):
        os.close(fd)
