"""The prefill side of the SGLang backend: decode ranks that have registered, rooms that move.

Three kinds of threads come in here: SGLang's scheduler, the manager's listener, and the engine's.
Workers of this side do what may block.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

from ...engine.errors import EngineError
from .layout import Planner
from .messages import VERSION, Abort, Ended, Meet, Publish, Refused, Register
from .rooms import Chunk, Part, Room

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ...engine.link.link import Link
    from ...engine.transfer_engine import TransferEngine
    from .layout import Plans
    from .memory import Held
    from .messages import Geometry, ToDecode

WORKERS = 4  # as SGLang's own backends have; a chunk that waits for its computation holds one
TRANSFER_TIMEOUT_S = 300.0  # as long as SGLang lets decode wait by default
MEET_TIMEOUT_S = 30.0
LINK_WAIT_S = 2.0  # decode publishes once its end is up; this end follows within the handshake
STOP_S = (
    1.0  # from cancelling until the link is taken down; a chunk's last piece takes milliseconds
)
ENDED_REMEMBERED = 4096

log = logging.getLogger("kvferry.sglang")


class _Peer:
    """One decode rank, and the one link that its registration is for."""

    def __init__(self, register: Register, plans: Plans) -> None:
        self.register = register
        self.plans = plans
        self.link: Link | None = None


class PrefillSide:
    """One prefill rank.

    Args:
        tell: sends a message to the decode rank at a host and port; what cannot be sent is logged.
        bootstrapped: called with a room that every decode rank has published, and the length of the
            prefix that decode has.
        conclude: tells SGLang how a room ended; returns why it failed after all, or "".
        name: its endpoint, which names it to decode ranks.
        rank: SGLang's number of it.

    Attributes:
        handlers: of decode ranks' messages, by type; called on the listener's thread.
    """

    def __init__(
        self,
        engine: TransferEngine,
        held: Held,
        geometry: Geometry,
        *,
        tell: Callable[[str, int, ToDecode], None],
        bootstrapped: Callable[[Room, int], None],
        conclude: Callable[[int, str], str],
        name: str,
        rank: int,
    ) -> None:
        self._engine = engine
        self._planner = Planner(held, geometry)
        self._tell = tell
        self._bootstrapped = bootstrapped
        self._conclude_here = conclude
        self._name = name
        self._rank = rank
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._rooms: dict[int, Room] = {}
        # Attempts that are over: what is told of them later, by another way, is too late.
        self._ended: OrderedDict[str, str] = OrderedDict()
        self.handlers: Mapping[type, Callable[[Any], None]] = {
            Register: self._register,
            Publish: self._publish,
            Abort: self._abort,
        }
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._workers = [
            threading.Thread(target=self._run, name=f"kvferry-sglang-{n}", daemon=True)
            for n in range(WORKERS)
        ]
        for worker in self._workers:
            worker.start()

    def close(self) -> None:
        """End the workers; the engine's owner closes it afterwards."""
        with self._lock:
            rooms = list(self._rooms.values())
        for room in rooms:
            room.fail("this prefill rank is closing")
        for _ in self._workers:
            self._work.put(None)
        for worker in self._workers:
            worker.join(STOP_S)

    # What decode ranks say, on the listener's thread

    def _register(self, register: Register) -> None:
        answer: ToDecode = Meet(self._name, register.generation, self._engine.address.encode())
        try:
            check_version(register)
            peer = _Peer(register, self._planner.plans(register.geometry))
            self._engine.admit(register.token, register.engine_id, MEET_TIMEOUT_S)
            with self._lock:
                self._peers[register.engine_id] = peer
        except EngineError as error:
            where = f"{register.host}:{register.port}"
            log.warning("kvferry: decode rank %s is refused: %s", where, error.message)
            answer = Refused(self._name, register.generation, error.message)
        self._tell(register.host, register.port, answer)

    def _publish(self, publish: Publish) -> None:
        with self._lock:
            over = self._ended.get(publish.attempt)
            peer = self._peers.get(publish.engine_id)
        link, plans = None, None
        if not publish.dummy and over is None:
            link, over = self._link_of(peer, publish)
            plans = peer.plans if peer is not None else None
        part = Part(publish, link, plans)
        if over is not None:
            self._end(publish, over)
            return
        room = self._room(publish.room)
        room.parts[publish.engine_id] = part
        if link is not None and link.closed:  # perhaps before anybody knew of this part
            room.fail(_lost(link))
        if room.concluded:
            self._end(publish, room.reason or "the request is over")
        elif len(room.parts) == publish.required:
            self._bootstrapped(room, publish.prefix_len)

    def _link_of(self, peer: _Peer | None, publish: Publish) -> tuple[Link | None, str | None]:
        """Return the link that a publication is for, or why there is none."""
        if peer is None or peer.register.generation != publish.generation:
            return None, "decode published this request for a link that is gone"
        if peer.link is None:
            try:  # decode has opened it, so this end is about to know it
                peer.link = self._engine.accept_link(
                    publish.engine_id, LINK_WAIT_S, token=peer.register.token
                )
            except EngineError as error:
                return None, error.message
            peer.link.down.add_done_callback(
                lambda _: self._work.put(partial(self._peer_lost, peer))
            )
        return (None, "the link to decode is down") if peer.link.closed else (peer.link, None)

    def _abort(self, abort: Abort) -> None:
        with self._lock:
            room = self._rooms.get(abort.room)
        part = room.parts.get(abort.engine_id) if room is not None else None
        if room is None or part is None or part.publish.attempt != abort.attempt:
            self._end(abort, abort.reason)
            return
        room.fail(abort.reason)  # whoever concludes the room answers
        if room.concluded:
            self._end(abort, room.reason or abort.reason)

    # What SGLang's scheduler says

    def send(self, number: int, chunk: Chunk) -> None:
        """Move a chunk of a room as soon as it is computed."""
        room = self._room(number)
        room.expect_chunk()
        self._work.put(lambda: room.move(chunk))

    def settled(self, number: int, reason: str) -> bool:
        """End a room that has failed elsewhere; whether its pages are free."""
        room = self._rooms.get(number)
        if room is None:
            return True
        room.fail(reason)
        return room.drained

    def settle(self, number: int, reason: str) -> None:
        """As `settled`, and waits for it: a link that does not let go is taken down."""
        room = self._rooms.get(number)
        if room is None:
            return
        room.fail(reason)
        if not room.wait_drained(STOP_S):
            for part in list(room.parts.values()):
                if part.link is not None:
                    part.link.close()
            room.wait_drained(TRANSFER_TIMEOUT_S)
        self._conclude(room)

    def forget(self, number: int) -> None:
        """SGLang has cleared a room."""
        with self._lock:
            self._rooms.pop(number, None)

    # How rooms end

    def _room(self, number: int) -> Room:
        with self._lock:
            room = self._rooms.get(number)
            if room is None:
                room = self._rooms[number] = Room(
                    number,
                    TRANSFER_TIMEOUT_S,
                    lambda it: self._work.put(lambda: self._conclude(it)),
                )
            return room

    def _conclude(self, room: Room) -> None:
        """Tell SGLang here, and every decode rank, how a room ended; once."""
        if not room.claim():
            return
        reason = self._conclude_here(room.number, room.reason)
        if reason:  # nobody may ever clear it: SGLang's request can have failed before it got here
            with self._lock:
                if self._rooms.get(room.number) is room:
                    del self._rooms[room.number]
        for part in list(room.parts.values()):
            self._end(part.publish, reason)

    def _end(self, asked: Publish | Abort, reason: str) -> None:
        """Nothing more is written for an attempt: who asked about it is told, unless by a dummy."""
        with self._lock:
            self._ended[asked.attempt] = reason or "it is over"
            while len(self._ended) > ENDED_REMEMBERED:
                self._ended.popitem(last=False)
        if isinstance(asked, Abort) or not asked.dummy:
            ended = Ended(self._name, self._rank, asked.room, asked.attempt, reason)
            self._tell(asked.host, asked.port, ended)

    def _peer_lost(self, peer: _Peer) -> None:
        with self._lock:
            if self._peers.get(peer.register.engine_id) is peer:
                del self._peers[peer.register.engine_id]
            rooms = list(self._rooms.values())
        for room in rooms:
            if any(part.link is peer.link for part in list(room.parts.values()) if part.link):
                room.fail(_lost(peer.link))

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:  # one room's trouble must not end the others' worker
                log.exception("kvferry: a worker of the SGLang backend failed")


def check_version(register: Register) -> None:
    """Both ends must speak alike.

    Raises:
        EngineError: they do not.
    """
    if register.version != VERSION:
        raise EngineError(
            f"prefill speaks version {VERSION} of kvferry's SGLang backend and decode "
            f"{register.version}: install equal versions",
            operation="register",
        )


def _lost(link: Link | None) -> str:
    error = link.error if link is not None else None
    return f"the link to decode is lost: {error.message if error is not None else 'it is closed'}"
