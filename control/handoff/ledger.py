"""What one side remembers of a session's handoffs: which live, and how the others ended.

A message can come late. A `Request` that arrives after its `Cancel` was confirmed would otherwise
start a write into blocks that decode has given away. So every serial that is over stays known, and
what has to be forgotten is forgotten in order: all serials up to a floor count as over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .messages import HandoffMessage

REMEMBERED = 4096  # final answers a session; about 300 bytes each


class Ledger:
    """The serials of one session, in bounded memory.

    Attributes:
        up: whether the session's link is up: a session that is down starts nothing new.
        live: the key of the machine of each live serial.
    """

    def __init__(self, peer: str, remembered: int = REMEMBERED) -> None:
        self.peer = peer
        self.up = True
        self.live: dict[int, int] = {}
        self._answers: dict[int, HandoffMessage] = {}
        self._floor = -1
        self._remembered = remembered

    @property
    def idle(self) -> bool:
        """Whether the link is down and no handoff lives any more."""
        return not (self.up or self.live)

    def begin(self, serial: int, key: int) -> None:
        """A serial that is not over becomes live."""
        self.live[serial] = key

    def settle(self, serial: int, answer: HandoffMessage) -> None:
        """A serial is over, whether or not it ever lived; `answer` is final."""
        self.live.pop(serial, None)
        if serial in self._answers:
            return
        self._answers[serial] = answer
        if len(self._answers) > self._remembered:
            oldest = next(iter(self._answers))
            del self._answers[oldest]
            self._floor = max(self._floor, oldest)

    def answer(self, serial: int) -> HandoffMessage | None:
        """Return the final answer that this side gave about a serial, if it is remembered."""
        return self._answers.get(serial)

    def over(self, serial: int) -> bool:
        """Return whether a serial that does not live may never live (again)."""
        return serial in self._answers or serial <= self._floor
