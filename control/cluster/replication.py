"""One membership that several daemons keep together in a store.

A request is judged by `membership.py`, from what the store is known to have. What it would change is
proposed to the store, and the answer waits until the store has told that it is so: every daemon
learns every change, its own too, from the store alone and in the store's order. A change that came
after another is not made; its asker gets no answer, and asks again.

Heartbeats change nothing that the store knows, and do not wait for it. While it is away, agents stay
registered, and what would change something is denied.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, ClassVar

import msgspec

from .messages import Denied, Register, Registered
from .store import Away, Back, Failed, Peer, PeerSeen, Picture, Seen, Settled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .membership import Membership, Proposal
    from .messages import AnyAnswer, AnyRequest
    from .store import Store

NOT_YET = "the store has not answered this daemon yet"
ELSEWHERE = "it left, or its lease ended, at another daemon"
MAX_WAITING = 10_000  # changes on their way to the store; about 1 KiB each

log = logging.getLogger("kvferry.daemon")


class _Waiting(msgspec.Struct):
    """A change on its way, and who waits for it (nobody: a wish of this daemon)."""

    proposal: Proposal
    ask: AnyRequest | None
    answer: AnyAnswer | None
    key: bytes
    envelope: list[bytes]


class Cluster:
    """Takes requests of the daemon's loop to `membership` by way of `store`. Same thread throughout.

    Args:
        reply: sends an answer that had to wait.

    Attributes:
        peers: the other daemons, by number.
        away: why the store does not answer; "" while it does.
    """

    def __init__(
        self, membership: Membership, store: Store, reply: Callable[[list[bytes], AnyAnswer], None]
    ) -> None:
        self.peers: dict[int, Peer] = {}
        self.away = NOT_YET
        self._membership = membership
        self._store = store
        self._reply = reply
        self._tickets = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._busy: set[str] = set()  # names with a change on its way
        self._due: list[tuple[int, _Waiting]] = []  # settled, and not yet seen
        self._owed: dict[str, Proposal] = {}  # ends of leases that the store does not know yet
        self._revision = 0

    def answer(
        self, ask: AnyRequest, now_s: float, key: bytes, envelope: list[bytes]
    ) -> AnyAnswer | None:
        """Return what a request is answered with, or None: `reply` gets it later, or it is asked
        again."""
        if not self._revision:
            return Denied(ask.request, "store", self.away)
        answer, proposal = self._membership.judge(ask, now_s, key)
        if proposal is None:
            return answer
        if self.away:
            return Denied(ask.request, "store", self.away[:1024])
        if proposal.name not in self._busy and len(self._waiting) < MAX_WAITING:
            self._propose(_Waiting(proposal, ask, answer, key, envelope))
        return None

    def work(self, now_s: float) -> None:
        """Take what the store has told, and tell it what has come about here."""
        for event in self._store.events():
            try:
                self._told[type(event)](self, event, now_s)
            except Exception:  # the others' records are none the worse for it
                log.exception("a record of the store could not be taken; please report this")
        while self._due and self._due[0][0] <= self._revision:
            self._finish(self._due.pop(0)[1], now_s)
        for wish in self._membership.wishes():
            if wish.record is None:
                self._owed[wish.name] = wish
            elif wish.name not in self._busy and not self.away:
                self._propose(_Waiting(wish, None, None, b"", []))
        if self._owed and not self.away:
            for name in [name for name in self._owed if name not in self._busy]:
                self._propose(_Waiting(self._owed.pop(name), None, None, b"", []))

    def close(self) -> None:
        """Leave the cluster to the other daemons."""
        self._store.close()

    @property
    def ready(self) -> bool:
        """Whether the store has told what it has."""
        return bool(self._revision)

    # What the store tells

    def _picture(self, picture: Picture, now_s: float) -> None:
        self.away = ""
        self._membership.floor = picture.floor
        self._membership.learn_all(picture.records, picture.revision, now_s)
        self.peers = {n: peer for n, peer in picture.peers.items() if self._is_other(n)}
        self._revision = picture.revision
        for _, lost in (due for due in self._due if due[0] > picture.revision):
            self._busy.discard(lost.proposal.name)  # this store has forgotten it
        self._due = [due for due in self._due if due[0] <= picture.revision]

    def _seen(self, seen: Seen, now_s: float) -> None:
        reason = ELSEWHERE if seen.record is None else ""
        self._membership.learn(seen.name, seen.record, seen.revision, now_s, reason)
        self._revision = seen.revision

    def _peer_seen(self, seen: PeerSeen, _: float) -> None:
        self.peers = {n: known for n, known in self.peers.items() if n != seen.daemon}
        if seen.peer is not None and self._is_other(seen.daemon):
            self.peers[seen.daemon] = seen.peer
        self._revision = seen.revision

    def _settled(self, settled: Settled, _: float) -> None:
        waiting = self._waiting.pop(settled.ticket)
        if settled.revision:
            self._due.append((settled.revision, waiting))
        else:  # something came before it
            self._busy.discard(waiting.proposal.name)

    def _went_away(self, away: Away, _: float) -> None:
        self.away = away.reason

    def _came_back(self, _: Back, __: float) -> None:
        self.away = ""
        log.warning("the store answers again")

    def _is_other(self, daemon: int) -> bool:
        return daemon != self._membership.daemon

    def _propose(self, waiting: _Waiting) -> None:
        ticket = next(self._tickets)
        self._waiting[ticket] = waiting
        self._busy.add(waiting.proposal.name)
        self._store.propose(ticket, waiting.proposal)

    def _finish(self, waiting: _Waiting, now_s: float) -> None:
        """It is so, and known here."""
        self._busy.discard(waiting.proposal.name)
        ask, answer = waiting.ask, waiting.answer
        if isinstance(ask, Register) and isinstance(answer, Registered):
            # Judged again, because only the store knew the generation: it is the member now.
            answer, proposal = self._membership.judge(ask, now_s, waiting.key)
            if proposal is not None:
                return  # it was, and something came after it: it asks again
        if answer is not None:
            self._reply(waiting.envelope, answer)

    def _failed(self, failed: Failed, _: float) -> None:
        waiting = self._waiting.pop(failed.ticket)
        self._busy.discard(waiting.proposal.name)
        if waiting.ask is not None:
            self._reply(
                waiting.envelope, Denied(waiting.ask.request, "store", failed.reason[:1024])
            )
        elif waiting.proposal.record is None:
            self._owed[waiting.proposal.name] = waiting.proposal

    _told: ClassVar[Mapping[type, Callable[..., None]]] = {
        Picture: _picture,
        Seen: _seen,
        PeerSeen: _peer_seen,
        Settled: _settled,
        Failed: _failed,
        Away: _went_away,
        Back: _came_back,
    }
