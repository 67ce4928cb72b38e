"""The failure detector of one link: whether the peer still lives.

A process of this host is watched by its process descriptor, every peer by its heartbeats. A socket
that ended without a goodbye makes it a suspect: the cause is looked for before the link fails. One that
is silent may be busy: its kernel says whether it runs, or from another host, that it is there at all.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import TYPE_CHECKING

from ..errors import PeerLost
from ..wire.messages import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..context import EngineContext
    from ..errors import EngineError
    from ..wire.identity import Identity
    from ..wire.messages import LinkMessage

HEARTBEAT_S = 0.25
SUSPICION_S = 0.08  # a closed socket without goodbye: how long the cause is looked for
_PF_EXITING = 0x4  # of the flags in /proc/PID/stat
# How long a live process may be too busy to answer: it imports, compiles or pins memory, and holds the
# interpreter lock meanwhile. /proc cannot tell it from one that hangs, nor can its host's answers.
BUSY_PEER_S = 10.0


class FailureDetector:
    """Watches one peer. `heard`, `suspect` and `close` may be called from any thread.

    Args:
        send: sends heartbeats.
        fail: called with a `PeerLost`.
        owed_s: tells how long its host has not answered (`ControlChannel.owed_s`).
    """

    def __init__(
        self,
        core: EngineContext,
        peer: Identity,
        *,
        send: Callable[[LinkMessage], None],
        fail: Callable[[EngineError], None],
        owed_s: Callable[[], float],
    ) -> None:
        self._core = core
        self._peer = peer
        self._send = send
        self._fail = fail
        self._owed_s = owed_s
        self._same_host = peer.host_id == core.identity.host_id
        self._lock = threading.Lock()  # of the suspicion and the descriptor
        self._suspected_s = 0.0
        self._pidfd = _open_pidfd(peer.pid) if self._same_host else -1
        self._heard_s = self._awake_s = time.monotonic()
        self._beat_s = 0.0

    def start(self, process_ended: Callable[[], None]) -> None:
        """Begin to watch the peer's process, if it is one of this host."""
        if self._pidfd >= 0:
            self._core.progress.watch(self._pidfd, select.EPOLLIN, lambda _: process_ended())

    @property
    def watches_process(self) -> bool:
        """Whether the end of the peer's process will be noticed by itself."""
        return self._pidfd >= 0

    def heard(self) -> None:
        """The peer gave a sign of life."""
        self._heard_s = time.monotonic()

    def forgive(self, seconds: float) -> None:
        """This process itself was asleep: the peer's silence does not count."""
        self._heard_s += seconds
        self._awake_s = time.monotonic()

    def suspect(self) -> bool:
        """Return a socket ended without goodbye; False if the peer is a suspect already."""
        with self._lock:
            if self._suspected_s:
                return False
            self._suspected_s = time.monotonic()
        return True

    def tick(self, now: float) -> None:
        """Send heartbeats, and judges; on the progress thread, while the link is up."""
        if (
            self._suspected_s
            and now - self._suspected_s > SUSPICION_S
            and not self._dying(now - self._suspected_s)
        ):
            self._fail(
                PeerLost(
                    "the peer closed its connection without a goodbye",
                    operation="link",
                    peer=self._peer.name,
                )
            )
            return
        # Before a heartbeat goes out: what is owed now was sent a tick ago at least.
        silent_s = now - self._heard_s
        if silent_s > self._core.peer_timeout_s and not self._merely_busy(now, silent_s):
            frozen = "it is frozen, or hangs" if self._answers(now) else "it is unreachable"
            self._fail(
                PeerLost(
                    f"the peer has been silent for {silent_s:.1f} s: {frozen}",
                    operation="heartbeat",
                    peer=self._peer.name,
                )
            )
            return
        if now - self._beat_s >= HEARTBEAT_S:
            self._beat_s = now
            self._send(Heartbeat())

    def process_gone(self) -> bool:
        """Return whether the peer's process has ended, by its entry in /proc."""
        return _process_state(self._peer.pid) in ("", "Z", "X")

    def unwatch(self) -> None:
        """The end of the peer's process is not told any more."""
        if self._pidfd >= 0:
            self._core.progress.unwatch(self._pidfd)

    def close(self) -> None:
        """Close the process descriptor. Safe to call again."""
        with self._lock:
            pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def _dying(self, suspected_s: float) -> bool:
        """Return whether the end of the peer's process, which closes its sockets first, is about to
        be told."""
        if self._pidfd < 0 or suspected_s > self._core.peer_timeout_s:
            return False
        fields = _process_fields(self._peer.pid)
        return len(fields) > 6 and bool(int(fields[6]) & _PF_EXITING)

    def _merely_busy(self, now: float, silent_s: float) -> bool:
        """Return whether a peer is there, but has not had the time (or the interpreter lock)."""
        if silent_s > BUSY_PEER_S:
            return False
        if self._same_host:
            return _process_state(self._peer.pid) in ("R", "S", "D")
        return self._answers(now)

    def _answers(self, now: float) -> bool:
        """Return whether the peer's host acknowledges what it is sent."""
        # What was sent after a sleep of this process has not been owed for longer than that.
        return min(self._owed_s(), now - self._awake_s) <= self._core.peer_timeout_s


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1  # too old a kernel, or another namespace: sockets and heartbeats remain


def _process_state(pid: int) -> str:
    """Return the letter that /proc has for a process's state; "" if there is no such process."""
    fields = _process_fields(pid)
    return fields[0] if fields else ""


def _process_fields(pid: int) -> list[str]:
    """Return what /proc/PID/stat says after the name, from the state on; [] if there is no such
    process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
