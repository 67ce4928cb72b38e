"""SGLang's real disaggregation classes with kvferry under them, a prefill and a decode process.

Needs SGLang's wheel, which `tools/sglang_wheel/environment.py` unpacks into a cache. Its server needs
GPUs and is not started: `sglang_ranks/sglang_imports.py` says what is real and what is not, and
`sglang_ranks/rank_process.py` does what its scheduler does.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvferry.tools.pinned import CannotInstall
from kvferry.tools.sglang_wheel.environment import ensure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from tests.child import Child
    from tests.needs import lack

    Pages = list[int]
else:
    from child import Child  # in the folder above: `pythonpath` in pyproject.toml
    from needs import lack

SCRIPT = Path(__file__).parent / "sglang_ranks" / "rank_process.py"
ANSWER_S = 90.0  # reached only when something hangs
SENTINEL = 0xA5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def packages() -> str:
    """The folder that SGLang is unpacked in."""
    try:
        return str(ensure())
    except CannotInstall as error:
        lack(f"SGLang's wheel cannot be had here: {error}")


class Servers:
    """A prefill and a decode process; ranks and rooms of theirs are numbered anew for each test."""

    def __init__(self, packages: str, transport: str) -> None:
        self._arguments = (packages, transport)
        self.transport = transport
        self.prefill, self.decode = self.new_process(), self.new_process()
        self.port = self.prefill.call("bootstrap")
        self._numbers = itertools.count(1)
        self._ranks: list[tuple[Child, str]] = []

    def new_process(self) -> Child:
        return Child(SCRIPT, *self._arguments, answer_s=ANSWER_S)

    def rank(self, mode: str, **options: Any) -> str:
        process = self.prefill if mode == "prefill" else self.decode
        name = f"{mode}-{next(self._numbers)}"
        process.call("start", name, mode, **options)
        self._ranks.append((process, name))
        return name

    def room(self) -> int:
        return next(self._numbers)

    def stop_ranks(self) -> None:
        ranks, self._ranks = self._ranks, []
        for process, name in reversed(ranks):
            if process.process.poll() is None:
                process.call("stop", name)

    def revive(self) -> None:
        """Starts again what a test has killed."""
        if self.prefill.process.poll() is not None:
            self.prefill = self.new_process()
        if self.decode.process.poll() is not None:
            self.decode = self.new_process()
        self.port = self.prefill.call("bootstrap")

    def end(self) -> None:
        self.prefill.end()
        self.decode.end()


@pytest.fixture(scope="module", params=["cma", "tcp"])
def both(packages: str, request: pytest.FixtureRequest) -> Iterator[Servers]:
    made = Servers(packages, request.param)
    yield made
    made.end()


@pytest.fixture
def servers(both: Servers) -> Iterator[Servers]:
    both.revive()
    yield both
    both.stop_ranks()


class Pair:
    """One prefill and one decode rank, and requests between them."""

    def __init__(self, servers: Servers, **options: Any) -> None:
        self.servers = servers
        self.source = servers.rank("prefill", fill=servers.room(), **options)
        self.target = servers.rank("decode", **options)

    def meet(self, src: Pages, dst: Pages, aux: tuple[int, int] = (1, 2), **publish: Any) -> int:
        """A request whose pages decode has published, and prefill knows."""
        room = self.servers.room()
        self.servers.prefill.call("new_sender", self.source, room, len(src), aux[0])
        self.servers.decode.call("new_receiver", self.target, room, self.servers.port)
        assert self.servers.decode.call("wait", self.target, room, "waiting") == "waiting"
        self.servers.decode.call("publish", self.target, room, dst, aux[1], **publish)
        assert self.servers.prefill.call("wait", self.source, room, "waiting") == "waiting"
        return room

    def ends(self, room: int) -> tuple[str, str]:
        return (
            self.servers.prefill.call("wait", self.source, room),
            self.servers.decode.call("wait", self.target, room),
        )

    def clear(self, room: int) -> None:
        self.servers.prefill.call("clear", self.source, room)
        self.servers.decode.call("clear", self.target, room)

    def failures(self, room: int) -> tuple[str, str]:
        return (
            self.servers.prefill.call("failure", self.source, room),
            self.servers.decode.call("failure", self.target, room),
        )

    def nothing_left(self) -> None:
        assert set(self.servers.prefill.call("left_over", self.source).values()) == {0}
        assert set(self.servers.decode.call("left_over", self.target).values()) == {0}


def check(
    source: list[npt.NDArray[np.uint8]],
    target: list[npt.NDArray[np.uint8]],
    moved: dict[int, int],
) -> None:
    """Items have moved, from the first to the second number, and nothing else was written."""
    assert len(source) == len(target)
    for here, there in zip(source, target, strict=True):
        expected = np.full_like(there, SENTINEL)
        for src, dst in moved.items():
            expected[dst] = here[src]
        assert np.array_equal(there, expected)


def test_pages_go_chunk_by_chunk_with_metadata_last(servers: Servers) -> None:
    pair = Pair(servers)
    src, dst = [7, 3, 4, 5, 20, 30], [1, 9, 8, 10, 11, 2]
    room = pair.meet(src, dst)
    for chunk in (src[:2], src[2:5], src[5:]):
        servers.prefill.call("send", pair.source, room, chunk)
    assert pair.ends(room) == ("success", "success")
    assert servers.decode.call("transports", pair.target) == [servers.transport]
    kv, _, aux = servers.prefill.call("read", pair.source)
    theirs, _, their_aux = servers.decode.call("read", pair.target)
    check(kv, theirs, dict(zip(src, dst, strict=True)))
    check(aux, their_aux, {1: 2})
    pair.clear(room)
    pair.nothing_left()
