"""Rank sets whose ranks share nothing but the first prefill rank: they end a request alike.

Two prefill ranks and two decode ranks, each decode rank takes from one prefill rank. The deadlines
are far beyond what a test waits: nothing here may end by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvferry.control.errors import HandoffError, HandoffTimeout
from tests.support.agent_process import DIM, NUM_LAYERS, TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.agents import Remote

DEGREE = 2
HEADS = 2
SRC, DST = [4, 1, 6], [2, 7, 3]
NUM_TOKENS = len(SRC) * TOKENS
FAR_S = 600.0
NAMES = ["prefill-0", "prefill-1", "decode-0", "decode-1"]


class Ranks:
    """All ranks, each in a process of its own; handoffs by the name of their rank."""

    def __init__(self, start: Callable[..., Remote]) -> None:
        self._start = start
        self.there: dict[str, Remote] = {}
        self.handoffs: dict[str, int] = {}
        for name in NAMES:
            self.start(name)
        self.connect()

    def start(self, name: str) -> None:
        role, _, number = name.partition("-")
        self.there[name] = self._start(name, role, degree=DEGREE, rank=int(number))

    def connect(self) -> None:
        addresses = [self.there[f"prefill-{n}"].address for n in range(DEGREE)]
        for n in range(DEGREE):
            assert self.call(f"decode-{n}", "connect_ranks", addresses) == [f"prefill-{n}"]

    def call(self, name: str, command: str, *arguments: Any, **options: Any) -> Any:
        return self.there[name].call(command, *arguments, **options)

    def receive(self, name: str, mode: str) -> None:
        self.handoffs[name] = self.call(
            name, "receive_from_ranks", "r", DST, num_tokens=NUM_TOKENS, mode=mode, timeout_s=FAR_S
        )

    def send(self, name: str, seed: int) -> None:
        self.call(name, "fill", SRC, seed)
        self.handoffs[name] = self.call(name, "send_to_ranks", "r", SRC, 1, timeout_s=FAR_S)

    def wait(self, name: str) -> int:
        return self.call(name, "wait", self.handoffs[name])  # type: ignore[no-any-return]

    def fails(self, name: str) -> HandoffError:
        """How it failed; its blocks are free."""
        with pytest.raises(HandoffError) as caught:
            self.wait(name)
        self.call(name, "wait_for_blocks", self.handoffs[name])
        return caught.value


@pytest.mark.slow
def test_whichever_rank_is_killed_the_request_fails_on_all_and_they_go_on(
    start_agent: Callable[..., Remote], transport: str
) -> None:
    ranks = Ranks(start_agent)
    rounds = [
        ("decode-1", "push"),
        ("prefill-1", "pull"),
        ("prefill-0", "push"),
        ("decode-0", "pull"),
    ]
    if transport == "tcp":
        rounds = [("decode-1", "pull"), ("prefill-1", "push")]
    for number, (victim, mode) in enumerate(rounds):
        # Pair 0 has everything, pair 1 is in the middle of it, and one of the four dies.
        ranks.receive("decode-0", mode)
        ranks.receive("decode-1", mode)
        ranks.send("prefill-0", number)
        assert ranks.wait("prefill-0") == NUM_LAYERS * NUM_TOKENS * 2 * HEADS * DIM
        computing = ranks.call("prefill-1", "open_send", "r", SRC, timeout_s=FAR_S)
        ranks.handoffs["prefill-1"] = computing
        ranks.call("prefill-1", "write_layers", computing, range(1))
        assert not ranks.call("decode-0", "done", ranks.handoffs["decode-0"])
        ranks.there[victim].kill()
        for name in NAMES:
            if name not in (victim, "prefill-0"):  # whose own bytes were placed before
                assert not isinstance(ranks.fails(name), HandoffTimeout)
        # Blocks that came back are not written any more.
        for name in ("decode-0", "decode-1"):
            if name != victim:
                assert set(ranks.call(name, "touched")) <= set(DST)
                ranks.call(name, "fill", DST, 99)
        if victim != "prefill-1":
            ranks.call("prefill-1", "write_layers", computing, range(1, NUM_LAYERS))
            ranks.call("prefill-1", "settle")
        for name in ("decode-0", "decode-1"):
            assert name == victim or ranks.call(name, "holds", DST, 99)

        # The rank comes back, and the request is tried again.
        ranks.start(victim)
        ranks.connect()
        ranks.receive("decode-0", mode)
        ranks.receive("decode-1", mode)
        if victim.startswith("decode"):  # its count of attempts began anew
            assert ranks.fails(victim).retryable
            ranks.receive(victim, mode)
        for n in range(DEGREE):
            ranks.send(f"prefill-{n}", number + n)
        assert len({ranks.wait(name) for name in NAMES}) == 1
        assert all(ranks.call(f"decode-{n}", "holds", DST, number + n) for n in range(DEGREE))

    # A rank dies before it has asked.
    ranks.receive("decode-0", "push")
    ranks.there["decode-1"].kill()
    assert "rank 1 of decode is gone" in str(ranks.fails("decode-0"))
