"""Machines that break one rule each, to show that the hostile world catches what it should."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry.control.handoff.decode import DecodePull, DecodePush
from kvferry.control.handoff.events import LinkDown, Received
from kvferry.control.handoff.ledger import Ledger
from kvferry.control.handoff.prefill import WRITING, PrefillHandoff

from .world import NUM_LAYERS

if TYPE_CHECKING:
    from kvferry.control.errors import HandoffError
    from kvferry.control.handoff.events import Action, Event, SourceOffered, TimerFired
    from kvferry.control.handoff.messages import HandoffMessage, Request


class FreesOnCancel(DecodePush):
    def _recall(self, error: HandoffError) -> None:
        self._fail(error)
        self._give_back()


class FreesOnLinkDown(DecodePush):
    def _link_down(self, event: LinkDown) -> None:
        super()._link_down(LinkDown(event.reason, quiesced=True))


class RetiresEarly(DecodePush):
    def _recall(self, error: HandoffError) -> None:
        super()._recall(error)
        self._retire()


class TrustsSilence(DecodePush):
    def _unanswered(self, _: TimerFired) -> None:
        self._give_back()


class WaitsForEver(DecodePush):
    def start(self) -> list[Action]:
        actions = super().start()
        self.timers.discard("deadline")
        return [a for a in actions if getattr(a, "kind", "") != "deadline"]


class LeavesMidRead(DecodePull):
    def _drain(self, error: HandoffError, answer: HandoffMessage) -> None:
        self._ops.clear()
        super()._drain(error, answer)


class ConfirmsBeforeDraining(PrefillHandoff):
    def _drain(self, error: HandoffError, answer: HandoffMessage) -> None:
        self._ops.clear()
        super()._drain(error, answer)


class FreesBeforeWritten(PrefillHandoff):
    def _settle_if_written(self) -> None:
        self._ops.clear()
        super()._settle_if_written()


class FreesWhileRead(PrefillHandoff):
    def _recall(self, error: HandoffError) -> None:
        self._fail(error)
        self._give_back()


class WritesTwice(PrefillHandoff):
    def handle(self, event: Event) -> list[Action]:
        actions = super().handle(event)
        if isinstance(event, Received) and self.state == WRITING:
            self._layers.append((0, NUM_LAYERS))
            self._write_ready_layers()
        return actions + self._taken()


class WritesUncomputed(PrefillHandoff):
    def _match(self, request: Request, source: SourceOffered) -> None:
        self._layers = [(0, source.num_layers)]
        self._source_finished = True
        super()._match(request, source)


class ForgetsWhatIsOver(Ledger):
    def over(self, serial: int) -> bool:
        return False

    def answer(self, serial: int) -> HandoffMessage | None:
        return None


class ForgetsTheFloor(Ledger):
    def over(self, serial: int) -> bool:
        return self.answer(serial) is not None
