"""A prefill and a decode process with ranks of SGLang's servers, as tests drive them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.child import Child

if TYPE_CHECKING:
    import numpy.typing as npt

    Pages = list[int]
    Arrays = list[npt.NDArray[np.uint8]]

ANSWER_S = 90.0  # reached only when something hangs
SENTINEL = 0xA5


class Servers:
    """A prefill and a decode process; ranks and rooms of theirs are numbered anew for each test."""

    def __init__(self, packages: str) -> None:
        self._packages = packages
        self.transport = ""
        self.prefill, self.decode = self._process(), self._process()
        self.port = 0
        self._numbers = itertools.count(1)
        self._ranks: list[tuple[Child, str]] = []

    def _process(self) -> Child:
        return Child("tests.adapters.sglang.rank_process", self._packages, answer_s=ANSWER_S)

    def begin(self, transport: str) -> None:
        """For one test: what the one before has killed starts again, with a new bootstrap server."""
        self.transport = transport
        if self.prefill.process.poll() is not None:
            self.prefill = self._process()
        if self.decode.process.poll() is not None:
            self.decode = self._process()
        self.port = self.prefill.call("bootstrap")
        self.decode.call(
            "cut_off_after", ANSWER_S
        )  # so that a machine that stalls changes no outcome

    def rank(self, mode: str, **options: Any) -> str:
        process = self.prefill if mode == "prefill" else self.decode
        name = f"{mode}-{next(self._numbers)}"
        process.call("start", name, mode, transports=self.transport, **options)
        self._ranks.append((process, name))
        return name

    def room(self) -> int:
        return next(self._numbers)

    def stop_ranks(self) -> None:
        ranks, self._ranks = self._ranks, []
        for process, name in reversed(ranks):
            if process.process.poll() is None:
                process.call("stop", name)

    def end(self) -> None:
        self.prefill.end()
        self.decode.end()


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


def check(source: Arrays, target: Arrays, moved: dict[int, int]) -> None:
    """Items have moved, from the first to the second number, and nothing else was written."""
    assert len(source) == len(target)
    for here, there in zip(source, target, strict=True):
        expected = np.full_like(there, SENTINEL)
        for src, dst in moved.items():
            expected[dst] = here[src]
        assert np.array_equal(there, expected)


class Ranks:
    """Servers of several ranks: one room on all of them."""

    def __init__(self, servers: Servers, sizes: tuple[int, int], **options: Any) -> None:
        self.servers = servers
        heads = options.get("total_heads", 4)
        self.sources, self.targets = (
            [
                servers.rank(
                    mode,
                    fill=100 + rank if mode == "prefill" else None,
                    tp_size=size,
                    tp_rank=rank,
                    heads=max(1, heads // size),
                    **options,
                )
                for rank in range(size)
            ]
            for mode, size in zip(("prefill", "decode"), sizes, strict=True)
        )

    def move(self, src: Pages, dst: Pages, states: Any = (None, None)) -> list[str]:
        """How the room ended on every rank."""
        prefill, decode, room = self.servers.prefill, self.servers.decode, self.servers.room()
        for source in self.sources:
            prefill.call("new_sender", source, room, len(src), 1)
        for target in self.targets:
            decode.call("new_receiver", target, room, self.servers.port)
        for target in self.targets:
            if decode.call("wait", target, room, "waiting") != "waiting":
                return [decode.call("failure", target, room)]
        for target in self.targets:
            decode.call("publish", target, room, dst, 2, states[1])
        for source in self.sources:
            assert prefill.call("wait", source, room, "waiting") == "waiting"
            prefill.call("send", source, room, src, states[0])
        ended = [prefill.call("wait", source, room) for source in self.sources]
        return ended + [decode.call("wait", target, room) for target in self.targets]

    def pools(self) -> tuple[Arrays, Arrays]:
        """Of each side: all ranks' heads side by side, for each layer's K and V."""
        whole = []
        for process, names in (
            (self.servers.prefill, self.sources),
            (self.servers.decode, self.targets),
        ):
            ranks = [process.call("read", name)[0] for name in names]
            whole.append([np.concatenate(parts, axis=2) for parts in zip(*ranks, strict=True)])
        return whole[0], whole[1]
