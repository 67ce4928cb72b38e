"""The decode side of the SGLang backend: links to prefill ranks, and who may still write for a room.

A decode rank dials the engine of each prefill rank once their caches have been compared, and publishes
pages only for a link that is up. Pages are free when every prefill rank that was told of them has said
that it writes nothing more for that attempt, or when the link that it could write over cannot carry a
write any more (`Link.quiesced`).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

from ...engine.connect.handshake import TOKEN_NBYTES
from ...engine.errors import EngineError
from .messages import VERSION, Ended, Meet, Refused, Register

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ...engine.link.link import Link
    from ...engine.transfer_engine import TransferEngine
    from .messages import Geometry, Target

# Between two registrations with a prefill rank that does not answer, twice as long each time: a new one
# makes the answer to the one before worthless.
RETRY_S, RETRY_MOST_S = 2.0, 16.0
MEET_TIMEOUT_S = 30.0  # until a request that waits for a link fails
ANSWER_S = 5.0  # for prefill to say that it has stopped, before its link is taken down
WARN_S = 10.0

log = logging.getLogger("kvferry.sglang")


class _Prefill:
    """One prefill rank, and the link to it."""

    def __init__(self) -> None:
        self.generation = 0
        self.token = b""
        self.asked_s = 0.0
        self.retry_s = 0.0
        self.dialing = False
        self.link: Link | None = None
        self.reason = ""  # why there is no link
        self.refused = False

    @property
    def open_link(self) -> Link | None:
        """The link, if it is up."""
        return self.link if self.link is not None and not self.link.closed else None


class _Attempt:
    """One request's pages, from their publication until nobody can write to them.

    Attributes:
        writers: prefill ranks that may still write, each over one link.
    """

    def __init__(self, room: int, name: str, writers: dict[str, Link]) -> None:
        self.room = room
        self.name = name
        self.writers = writers
        self.stopping_s = 0.0
        self.warned_s = 0.0


class DecodeSide:
    """One decode rank.

    Args:
        send: sends a message to a prefill rank; raises what SGLang's sockets raise.
        arrived: called with a room and the number of a prefill rank that has written all of its part.
        failed: called with a room that has failed, and why. Its pages may not be free yet.
        host_name, port: where prefill ranks answer to.

    Attributes:
        handlers: of prefill ranks' messages, by type; called on the listener's thread.
    """

    def __init__(
        self,
        engine: TransferEngine,
        geometry: Geometry,
        *,
        send: Callable[[Target, Register], None],
        arrived: Callable[[int, int], None],
        failed: Callable[[int, str], None],
        host_name: str,
        port: int,
    ) -> None:
        self._engine = engine
        self._geometry = geometry
        self._send = send
        self._arrived = arrived
        self._failed = failed
        self._host_name = host_name
        self._port = port
        self._changed = threading.Condition()
        self._prefills: dict[str, _Prefill] = {}
        self._attempts: dict[int, _Attempt] = {}
        self._closed = False
        self.handlers: Mapping[type, Callable[[Any], None]] = {
            Meet: self._meet,
            Refused: self._refused,
            Ended: self._ended,
        }

    def close(self) -> None:
        """Begin nothing more; the engine's owner closes it afterwards."""
        with self._changed:
            self._closed = True

    # Links

    def reach(self, target: Target) -> tuple[int, str]:
        """Sees to a link to a prefill rank. Never blocks for it; ask again.

        Returns:
            The generation of a link that is up, or 0; and why there will be none, or "".
        """
        with self._changed:
            prefill = self._prefills.setdefault(target.name, _Prefill())
            if prefill.open_link is not None:
                return prefill.generation, ""
            if prefill.dialing or time.monotonic() - prefill.asked_s < prefill.retry_s:
                return 0, prefill.reason if prefill.refused else ""
            prefill.link = None
            prefill.refused = False
            prefill.retry_s = min(max(RETRY_S, 2 * prefill.retry_s), RETRY_MOST_S)
            prefill.generation += 1
            prefill.token = secrets.token_bytes(TOKEN_NBYTES)
            prefill.asked_s = time.monotonic()
            register = Register(
                VERSION,
                self._engine.engine_id,
                prefill.generation,
                self._host_name,
                self._port,
                prefill.token,
                self._geometry,
            )
        self._send(target, register)
        return 0, ""

    def why_unreached(self, targets: Sequence[Target]) -> str:
        """Return why requests that wait for these prefill ranks have waited in vain."""
        with self._changed:
            for target in targets:
                prefill = self._prefills.get(target.name)
                if prefill is None or prefill.open_link is None:
                    reason = prefill.reason if prefill is not None else ""
                    return (
                        f"no link to prefill rank {target.name} in {MEET_TIMEOUT_S:.0f} s: "
                        f"{reason or 'it does not answer'}"
                    )
        return ""

    def _refused(self, message: Refused) -> None:
        with self._changed:
            prefill = self._prefills.get(message.prefill)
            if prefill is None or prefill.generation != message.generation:
                return
            prefill.refused = True
            prefill.reason = f"prefill rank {message.prefill} refuses: {message.reason}"
        log.error("kvferry: %s", prefill.reason)

    def _meet(self, meet: Meet) -> None:
        with self._changed:
            prefill = self._prefills.get(meet.prefill)
            if prefill is None or prefill.generation != meet.generation or self._closed:
                return
            prefill.dialing = True
        threading.Thread(
            target=self._dial, args=(prefill, meet), name="kvferry-sglang-dial", daemon=True
        ).start()

    def _dial(self, prefill: _Prefill, meet: Meet) -> None:
        link, reason = None, ""
        try:
            link = self._engine.connect(meet.address, token=prefill.token)
        except EngineError as error:
            reason = error.message
            log.warning("kvferry: cannot connect to prefill rank %s: %s", meet.prefill, error)
        with self._changed:
            prefill.dialing = False
            prefill.link, prefill.reason = link, reason
            prefill.retry_s = 0.0 if link is not None else prefill.retry_s
            self._changed.notify_all()
        if link is not None:
            log.info("kvferry: linked to prefill rank %s over %s", meet.prefill, link.transport)
            link.down.add_done_callback(lambda _: self._link_lost(meet.prefill, link))

    def _link_lost(self, name: str, link: Link) -> None:
        error = link.error
        why = error.message if error is not None else "it is closed"
        with self._changed:
            rooms = [
                attempt.room
                for attempt in self._attempts.values()
                if attempt.writers.get(name) is link
            ]
        for room in rooms:
            self._failed(room, f"the link to prefill rank {name} is lost: {why}")

    # Rooms

    def publish(self, room: int, targets: Sequence[Target]) -> dict[str, int]:
        """Begin an attempt; return the generation of the link to each prefill rank.

        From here on these ranks may write, until they have said that they do not, or cannot.

        Raises:
            EngineError: a link is gone; nothing was begun.
        """
        with self._changed:
            writers: dict[str, Link] = {}
            for target in targets:
                prefill = self._prefills.get(target.name)
                link = prefill.open_link if prefill is not None else None
                if link is None:
                    raise EngineError(
                        f"the link to prefill rank {target.name} is gone", operation="publish"
                    )
                writers[target.name] = link
            attempt = _Attempt(room, secrets.token_hex(8), writers)
            self._attempts[room] = attempt
            generations = {t.name: self._prefills[t.name].generation for t in targets}
        for name, link in writers.items():
            if link.closed:  # perhaps before anybody knew of this attempt
                self._link_lost(name, link)
        return generations

    def attempt(self, room: int) -> str:
        """Return the name of the attempt that may still be written to; "" if there is none."""
        with self._changed:
            attempt = self._attempts.get(room)
            return attempt.name if attempt is not None else ""

    def settled(self, room: int) -> bool:
        """Return whether nobody can write to the pages of a room that has failed; asked again and
        again."""
        with self._changed:
            attempt = self._attempts.get(room)
            if attempt is None:
                return True
            now_s = time.monotonic()
            attempt.stopping_s = attempt.stopping_s or now_s
            for name, link in list(attempt.writers.items()):
                if link.quiesced.done() and link.quiesced.exception() is None:
                    del attempt.writers[name]
            if not attempt.writers:
                del self._attempts[room]
                return True
            late = now_s - attempt.stopping_s > ANSWER_S
            warn = late and now_s - attempt.warned_s > WARN_S
            if warn:
                attempt.warned_s = now_s
            waiting = dict(attempt.writers)
        if late:
            for link in waiting.values():
                link.close(0.0)
        if warn:
            log.warning(
                "kvferry: the pages of room %s are kept: prefill rank %s does not answer and may still "
                "write to them until its process ends",
                room,
                ", ".join(waiting),
            )
        return False

    def settle(self, room: int) -> None:
        """As `settled`, and waits for it. SGLang's watchdog is its deadline: nothing else is safe."""
        while not self.settled(room):
            with self._changed:
                self._changed.wait(0.02)

    def finished(self, room: int) -> None:
        """A room has succeeded: every prefill rank has said so."""
        with self._changed:
            self._attempts.pop(room, None)

    def _ended(self, ended: Ended) -> None:
        with self._changed:
            attempt = self._attempts.get(ended.room)
            if attempt is None or attempt.name != ended.attempt:
                return
            attempt.writers.pop(ended.prefill, None)
            self._changed.notify_all()
        if ended.reason:
            self._failed(ended.room, f"prefill rank {ended.prefill}: {ended.reason}")
        else:
            self._arrived(ended.room, ended.rank)
