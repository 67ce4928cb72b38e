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

from typing import TYPE_CHECKING, ClassVar

from ..errors import BlocksMismatch, HandoffTimeout
from .drain import Draining
from .events import (
    OperationEnded,
    Send,
    Settle,
    SourceFinished,
    SourceOffered,
    SourceReady,
    StartWrite,
    UserCancelled,
)
from .machine import Machine
from .messages import (
    Accepted,
    Done,
    HandoffId,
    Ready,
    Request,
    Sent,
    count_blocks,
    skip_in_tables,
)
from .recall import Recalling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..errors import HandoffError
    from .events import Action, Layers, TimerFired
    from .machine import Reactions, Timing

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
        self._layers: list[Layers] = []  # computed, not written yet
        self._next_layer = 0
        self._source_finished = False
        self._written_nbytes = 0

    def offered(self, source: SourceOffered) -> list[Action]:
        """Return the first actions of a handoff that begins with its source, or the match of a
        wanted."""
        self.source = source
        self._set_timer("source", source.timeout_s)
        if self.request is None:
            self.state = OFFERED
        else:
            self._match(self.request, source)
        return self._taken()

    def wanted(self, request: Request, peer: str) -> list[Action]:
        """Return the first actions of a handoff that begins with its request, or the match of an
        offer."""
        self.request = request
        self.session, self.handoff, self.peer = request.session, request.handoff, peer
        self._do(Send(Accepted(self.session, self.handoff)))
        self._set_timer("deadline", request.timeout_s + self.timing.grace_s)
        if self.source is None:
            self.state = WANTED
        else:
            self._match(request, self.source)
        return self._taken()

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

    def _layers_ready(self, event: SourceReady) -> None:
        self._computed(*event.layers)

    def _all_ready(self, _: SourceFinished) -> None:
        if self.source is not None and not self._source_finished:
            self._computed(self._next_layer, self.source.num_layers, last=True)

    def _computed(self, first: int, stop: int, *, last: bool = False) -> None:
        """Layers became ready; all there are with `last`."""
        if self._source_finished:
            return
        self._source_finished = last
        if first < stop:
            if self._layers:  # nobody has asked yet: all of it is one write then
                first, _ = self._layers.pop()
            self._layers.append((first, stop))
            self._next_layer = stop
        if self.state == WRITING:
            self._write_ready_layers()
        elif self.state == PREPARING:
            self._announce_if_finished()

    # Push, and everything before a peer can reach the source

    def _asked_again(self, _: Request) -> None:
        self._do(Send(Accepted(self.session, self.handoff)))

    def _nobody_asked(self, _: TimerFired) -> None:
        self._give_up(self._error(HandoffTimeout, "nobody asked for the blocks in time"))

    def _too_late(self, _: TimerFired) -> None:
        self._give_up(self._error(HandoffTimeout, f"not complete in time ({self.state})"))

    def _write_ready_layers(self) -> None:
        if self.request is None:
            return
        for layers in self._layers:
            self._do(StartWrite(self._new_op(), self.request, self._tables, layers))
        self._layers.clear()
        self._settle_if_written()

    def _write_ended(self, event: OperationEnded) -> None:
        if event.op not in self._ops:
            return
        self._ops.discard(event.op)
        if event.error is not None:
            self._give_up(self._transfer_error(event.error))
            return
        self._written_nbytes += event.nbytes
        self._settle_if_written()

    def _settle_if_written(self) -> None:
        if self._source_finished and not self._ops and self.state == WRITING:
            self._do(Settle(Sent(self.session, self.handoff, self._written_nbytes)))
            self._succeed(self._written_nbytes)

    def _give_up(self, error: HandoffError) -> None:
        if self.state == READY:
            self._recall(error)
        elif self.request is not None:
            super()._give_up(error)
        else:  # nobody was told of the source
            self._release()
            self._fail(error)
            self._finish()

    # Pull

    def _announce_if_finished(self) -> None:
        if self._source_finished:
            self.state = READY
            num_blocks = count_blocks(self._tables)
            ready = Ready(self.session, self.handoff, num_blocks, self._tables)
            self._repeat(ready)

    def _read(self, message: Done) -> None:
        self._succeed(message.nbytes)

    def _not_read(self, _: TimerFired) -> None:
        self._give_up(self._error(HandoffTimeout, "decode did not finish reading in time"))

    _computing: ClassVar[Reactions] = {SourceReady: _layers_ready, SourceFinished: _all_ready}
    _wanted: ClassVar[Reactions] = {
        **Draining.moving,
        Request: _asked_again,
        "source": _too_late,
        "deadline": _too_late,
    }
    reactions: ClassVar[Mapping[str, Reactions]] = {
        **Draining.reactions,
        **Recalling.reactions,
        OFFERED: {
            **_computing,
            "source": _nobody_asked,
            UserCancelled: Machine._user_cancelled,
        },
        WANTED: _wanted,
        WRITING: {**_wanted, **_computing, OperationEnded: _write_ended},
        PREPARING: {**_wanted, **_computing},
        READY: {
            **Recalling.exposed,
            Done: _read,
            "source": _not_read,
            "deadline": _not_read,
        },
    }
