"""Prefill's side of a handoff: in push it writes, in pull it is read.

It begins with whichever comes first, the source blocks or the request for them:

    offered     source blocks, nobody has asked yet            → matched
    wanted      a request, the source is not known yet         → matched
    writing     push: layers go out as they become ready       → finished
    preparing   pull: not everything is computed yet           → ready
    ready       pull: decode was told where to read            → finished

and from anywhere, after a failure, through `drain.py` (all that moves bytes, or exposes none yet)
or `recall.py` (ready: decode may be reading).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import (
    BlocksMismatch,
    HandoffCancelled,
    HandoffTimeout,
    LinkLost,
    SendFailed,
)
from .drain import DRAINING, Draining
from .events import (
    LinkDown,
    OperationEnded,
    Quiesced,
    Received,
    Send,
    SendRefused,
    Settle,
    SourceFinished,
    SourceOffered,
    SourceReady,
    StartWrite,
    TimerFired,
    UserCancelled,
)
from .messages import (
    Accepted,
    Cancel,
    Cancelled,
    Done,
    Failed,
    HandoffId,
    Ready,
    Request,
    Sent,
    count_blocks,
    skip_in_tables,
)
from .recall import RECALL_STATES, Recalling

if TYPE_CHECKING:
    from ..errors import HandoffError
    from .events import Action, Event, Layers
    from .machine import Timing
    from .messages import Message

OFFERED = "offered"
WANTED = "wanted"
WRITING = "writing"
PREPARING = "preparing"
READY = "ready"


class PrefillHandoff(Draining, Recalling):
    """One request's source blocks on their way to one decode agent.

    Owns the source blocks from `SourceOffered` until `ReleaseBlocks`.
    """

    operation = "send"
    side = "prefill"

    def __init__(self, request_id: str, timing: Timing) -> None:
        super().__init__(0, HandoffId(request_id, 1, 0), "", timing)
        self.request: Request | None = None
        self.source: SourceOffered | None = None
        self._tables: tuple[bytes, ...] = ()  # the source blocks that decode asked for
        self._ready: Ready | None = None
        self._layers: list[Layers] = []  # computed, not written yet
        self._next_layer = 0
        self._source_finished = False
        self._written_nbytes = 0

    def offered(self, source: SourceOffered) -> list[Action]:
        """The first actions of a handoff that begins with its source, or the match of a wanted."""
        self.source = source
        self._set_timer("source", source.timeout_s)
        if self.request is None:
            self.state = OFFERED
        else:
            self._match(self.request, source)
        return self._taken()

    def wanted(self, request: Request, peer: str) -> list[Action]:
        """The first actions of a handoff that begins with its request, or the match of an offer."""
        self.request = request
        self.session, self.handoff, self.peer = request.session, request.handoff, peer
        self._do(Send(Accepted(self.session, self.handoff)))
        self._set_timer("deadline", request.timeout_s + self.timing.grace_s)
        if self.source is None:
            self.state = WANTED
        else:
            self._match(request, self.source)
        return self._taken()

    def _concerns(self, message: Message) -> bool:
        return self.request is not None and super()._concerns(message)

    def _match(self, request: Request, source: SourceOffered) -> None:
        self._tables = skip_in_tables(source.tables, request.skip_blocks)
        if not request.stop_token and count_blocks(self._tables) != request.num_blocks:
            self._give_up(
                self._error(
                    BlocksMismatch,
                    f"decode has {request.skip_blocks} blocks and asks for {request.num_blocks}, "
                    f"prefill has {count_blocks(source.tables)}",
                )
            )
        elif request.mode == "push":
            self.state = WRITING
            self._write_ready_layers()
        else:
            self.state = PREPARING
            self._announce_if_finished()

    def _react(self, event: Event) -> None:
        if isinstance(event, SourceReady | SourceFinished):
            self._computed(event)
        elif self.state == DRAINING:
            self._react_draining(event)
        elif self.state in RECALL_STATES:
            self._react_recalling(event)
        elif self.state == READY:
            self._react_exposed(event)
        else:
            self._react_unexposed(event)

    def _computed(self, event: SourceReady | SourceFinished) -> None:
        """Layers became ready; they count only while the handoff is on its way."""
        if self.source is None or self._source_finished:
            return
        if isinstance(event, SourceReady):
            first, last = event.layers
        else:
            first, last = self._next_layer, self.source.num_layers
            self._source_finished = True
        if first < last:
            if self._layers:  # nobody has asked yet: all of it is one write then
                first, _ = self._layers.pop()
            self._layers.append((first, last))
            self._next_layer = last
        if self.state == WRITING:
            self._write_ready_layers()
        elif self.state == PREPARING:
            self._announce_if_finished()

    # Push, and everything before a peer can reach the source

    def _react_unexposed(self, event: Event) -> None:
        match event:
            case OperationEnded(op=op, nbytes=nbytes, error=error) if op in self._ops:
                self._ops.discard(op)
                self._write_ended(nbytes, error)
            case Received(message=Request()):
                self._do(Send(Accepted(self.session, self.handoff)))
            case Received(message=Cancel(reason=reason)):
                error = self._error(
                    HandoffCancelled, f"the peer cancelled: {reason}", retryable=True
                )
                self._drain(error, self._cancelled())
            case Received(message=Failed() | Cancelled() as message):
                self._give_up(self._error_of_peer(message))
            case TimerFired(kind="source") if self.state == OFFERED:
                self._give_up(self._error(HandoffTimeout, "nobody asked for the blocks in time"))
            case TimerFired(kind="source" | "deadline"):
                self._give_up(self._error(HandoffTimeout, f"not complete in time ({self.state})"))
            case UserCancelled(reason=reason):
                self._give_up(self._error(HandoffCancelled, reason))
            case LinkDown(reason=reason) if self.request is not None:
                self._give_up(self._error(LinkLost, f"the link went down: {reason}"))

    def _write_ready_layers(self) -> None:
        if self.request is None:
            return
        for layers in self._layers:
            self._do(StartWrite(self._new_op(), self.request, self._tables, layers))
        self._layers.clear()
        self._settle_if_written()

    def _write_ended(self, nbytes: int, error: Exception | None) -> None:
        if error is not None:
            self._give_up(self._transfer_error(error))
            return
        self._written_nbytes += nbytes
        self._settle_if_written()

    def _settle_if_written(self) -> None:
        if self._source_finished and not self._ops and self.state == WRITING:
            self._do(Settle(Sent(self.session, self.handoff, self._written_nbytes)))
            self._succeed(self._written_nbytes)

    def _give_up(self, error: HandoffError) -> None:
        """Gives up while no peer can reach the source: what moves is this side's own."""
        if self.request is None:
            self._release()
            self._fail(error)
            self._finish()
        else:
            self._drain(error, self._failed(error))

    # Pull

    def _announce_if_finished(self) -> None:
        if self._source_finished:
            self.state = READY
            num_blocks = count_blocks(self._tables)
            self._ready = Ready(self.session, self.handoff, num_blocks, self._tables)
            self._start_repeating(self._ready)

    def _react_exposed(self, event: Event) -> None:
        match event:
            case Received(message=Done(nbytes=nbytes)):
                self._succeed(nbytes)
            case Received(message=Failed() | Cancelled() as message):
                self._fail(self._error_of_peer(message))
                self._give_back()
            case TimerFired(kind="retry") if self._ready is not None:
                self._send_repeatedly(self._ready)
            case TimerFired(kind="source" | "deadline"):
                self._recall(self._error(HandoffTimeout, "decode did not finish reading in time"))
            case UserCancelled(reason=reason):
                self._recall(self._error(HandoffCancelled, reason))
            case SendRefused(reason=reason):
                self._recall(self._error(SendFailed, f"cannot send to the peer: {reason}"))
            case LinkDown():
                self._react_link_down(event)
            case Quiesced():
                self._react_link_down(LinkDown("the peer is gone", quiesced=True))
