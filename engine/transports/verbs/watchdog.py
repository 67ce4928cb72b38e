"""Notices a rail that completes nothing of what is posted: a device that tries for ever.

Most devices give up by themselves and say so. Software RoCE does not where its own interface takes
no packet of the size that the two ends agreed on: it would hold a transfer's memory until the link
went down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...errors import RailStalled

if TYPE_CHECKING:
    from .queue_pair import Batch, QueuePair
    from .rail import Rail

# A device gives up after seven tries, each of 268 ms to four times that (`queue_pair.py`): 7.5 s at most.
STALLED_S = 10.0
SLOWEST_NBYTES_PER_S = 1 << 20  # and so much longer as a batch takes on a wire that is this slow
SUSPECT_S = 1.0  # then the port is asked whether its packets have shrunk, which explains all
DOWN_S = 4.0  # a port that is down for less may be back before its device gives up
LONGEST_LOOK_S = 1.0  # more between two looks is time in which this process stood still itself


class Stall(NamedTuple):
    """A rail that gets nowhere, its batch that has waited longest, and why it is taken out."""

    rail: Rail
    batch: Batch
    error: RailStalled


class Watch:
    """The rails of one link, looked at from time to time. Used by the link's thread alone."""

    def __init__(self) -> None:
        self._looked_s = 0.0

    def look(self, rails: list[Rail], now_s: float) -> list[Stall]:
        """The rails to take out. While completions come, it compares two numbers a queue pair."""
        elapsed_s = min(now_s - self._looked_s, LONGEST_LOOK_S)
        self._looked_s = now_s
        found = []
        for rail in rails:
            for pair in rail.queues:
                why = _why_stalled(rail, pair, elapsed_s)
                if why:
                    error = RailStalled(why, operation="transfer")
                    found.append(Stall(rail, pair.flying[0], error))
                    break
        return found


def _why_stalled(rail: Rail, pair: QueuePair, elapsed_s: float) -> str:
    if not pair.flying:
        pair.oldest = -1
        return ""
    oldest = pair.flying[0]
    if oldest.number != pair.oldest:
        pair.oldest, pair.waited_s = oldest.number, 0.0
        return ""
    pair.waited_s += elapsed_s
    if pair.waited_s < SUSPECT_S:
        return ""
    shrunk = why_too_small(rail)
    if shrunk:
        return shrunk
    posted = sum(batch.requests for batch in pair.flying)
    stalled = (
        f"nothing of {posted} posted work requests has completed for {pair.waited_s:.0f} s on rail "
        f"{rail.name}"
    )
    if pair.waited_s >= DOWN_S and not rail.device.active:
        return f"the port of {rail.device.name} is down: {stalled}"
    if pair.waited_s < STALLED_S + oldest.nbytes / SLOWEST_NBYTES_PER_S:
        return ""
    return (
        f"{stalled}, and its device does not give up: does every interface and switch on the "
        f"way take packets of {packet_nbytes(rail.mtu)} bytes (MTU), and what does the kernel's log say of it?"
    )


def why_too_small(rail: Rail) -> str:
    """That the port no longer takes packets of the size that was agreed on, or ""."""
    agreed_nbytes, now_nbytes = packet_nbytes(rail.mtu), packet_nbytes(rail.device.mtu)
    if now_nbytes >= agreed_nbytes:
        return ""
    return (
        f"{rail.device.name} now takes packets of {now_nbytes} bytes, and {agreed_nbytes} were "
        f"agreed on for rail {rail.name}: somebody has changed the interface's MTU"
    )


def packet_nbytes(mtu: int) -> int:
    """What the verbs' code of an MTU means: 1 to 5 are 256 to 4,096 bytes."""
    return 128 << mtu
