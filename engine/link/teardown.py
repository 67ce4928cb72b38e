"""How a link goes down: what runs is stopped, the path halted, goodbyes exchanged.

A side says `Bye` when no thread of its process touches memory over the link any more. The link has
quiesced when that is known of both ends, or the other end's process is gone.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

from ..errors import DeadlineExceeded, EngineError, LinkClosed, PeerLost
from ..wire.messages import Bye, ByeToo

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..convert.workspace import Workspaces
    from ..transports.base import DataPath
    from ..wire.channel import ControlChannel
    from .access import Access
    from .context import LinkContext
    from .liveness import FailureDetector
    from .transfers import TransferTable


class Teardown:
    """The last part of one link's life. `go_down` may be called from any thread, and the path calls
    back from any; the rest is the progress thread's."""

    def __init__(
        self,
        context: LinkContext,
        lost: Callable[[], None],
        path: DataPath,
        table: TransferTable,
        access: Access,
        channel: ControlChannel,
        detector: FailureDetector,
        workspaces: Workspaces,
    ) -> None:
        self._workspaces = workspaces
        self._context = context
        self._lost = lost
        self._path = path
        self._table = table
        self._access = access
        self._channel = channel
        self._detector = detector
        self._deadline_s = 0.0
        self._halted = False  # nothing of this process touches memory over the link
        self._peer_stopped = False  # nor of the peer's
        self._peer_silent = False  # nothing more will come over the control channel

    def go_down(self, error: EngineError) -> None:
        """Take the link down; every pending ticket ends. Of several errors the first counts."""
        if not self._table.close(error):
            return
        context = self._context
        self._deadline_s = time.monotonic() + context.core.peer_timeout_s
        for transfer in self._table.transfers():
            transfer.stop(self._table.down_error(transfer.ticket.operation))
        for conversion in self._table.conversions():
            conversion.stop(self._table.down_error(conversion.ticket.operation))
        self._lost()
        self._access.clear()
        self._path.halt(functools.partial(self._workspaces.halt, self._path_halted))
        context.down._fail(error)

    def tick(self, now: float) -> None:
        """Look after a link that is down and has not quiesced."""
        late = self._deadline_s and now > self._deadline_s
        if late and not self._path.peer_reaches_memory:
            self._close_channel()
        # A frozen peer that reaches memory may yet wake and say goodbye; if nothing else tells
        # that its process is gone, its entry in /proc does.
        closed = self._halted and self._channel.closed
        if closed and not self._detector.watches_process and not self._peer_stopped:
            self._peer_stopped = self._detector.process_gone()
            self._end_if_quiesced()

    def said_bye(self, message: Bye) -> None:
        """The peer says goodbye: nothing of its process touches memory over the link any more."""
        self._peer_stopped = True
        self._path.drain()
        why = f": {message.reason}" if message.reason else ""
        self._context.fail(PeerLost(f"the peer closed the link{why}", operation="link"))
        if self._halted:
            self._close_channel()  # two goodbyes crossed: neither is answered

    def answered_bye(self, _: ByeToo) -> bool:
        """Note that the peer says so in answer to this side's goodbye, if there was one."""
        if self._table.error is None:
            return False
        self._peer_stopped = True
        self._close_channel()
        return True

    def channel_ended(self) -> None:
        """The control channel has ended: everything that the peer said is read."""
        self._peer_silent = True
        self._channel.unwatch()
        if self._table.error is None:
            self._context.suspect()
        elif self._halted:
            self._close_channel()

    def process_ended(self) -> None:
        """The peer's process has ended."""
        self._detector.unwatch()
        while not self._channel.closed and self._channel.receive():
            pass  # it may have finished its work, and said so, just before
        self._path.drain()
        self._peer_stopped = True
        self._context.fail(
            PeerLost(
                "the peer's process has ended",
                operation="link",
                peer=self._context.peer.name,
                process_gone=True,
            )
        )
        self._close_channel()
        self._end_if_quiesced()

    def discard(self) -> None:
        """Close what is still open: the engine's threads have stopped.

        Ends `quiesced` badly where a peer's live process may still reach memory.
        """
        self._close_channel()
        self._detector.close()
        self._context.quiesced._fail(
            DeadlineExceeded(
                "this engine was closed while the peer could still reach its memory",
                operation="quiesce",
                peer=self._context.peer.name,
            )
        )

    def _path_halted(self) -> None:
        """No thread of this process touches memory over this link any more."""
        for transfer in self._table.transfers():
            transfer.abandon(self._table.down_error(transfer.ticket.operation))
        self._halted = True
        error = self._table.error
        if self._peer_stopped:
            self._channel.send(ByeToo())
            self._close_channel()
        else:
            reason = "" if isinstance(error, LinkClosed) else str(error)
            self._channel.send(Bye(reason[:1000]))
            lost = isinstance(error, PeerLost) and not self._path.peer_reaches_memory
            if lost or self._peer_silent:
                self._close_channel()
        self._end_if_quiesced()

    def _close_channel(self) -> None:
        if self._channel.close():
            self._end_if_quiesced()

    def _end_if_quiesced(self) -> None:
        """End `quiesced` once nothing on either side can touch memory over this link."""
        if not (self._halted and self._channel.closed):
            return
        if self._path.peer_reaches_memory and not self._peer_stopped:
            return  # its process lives and may still copy: wait for the process descriptor
        self._detector.unwatch()
        self._detector.close()
        self._context.quiesced._finish(0)
