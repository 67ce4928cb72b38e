"""One request at each side, as SGLang's scheduler holds it: the sender and the receiver.

SGLang gives a request's pages to others as soon as it is `Failed`, so these fail only when nobody reads
or writes the pages any more.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver, CommonKVSender

from ...engine.errors import EngineError
from .decode import MEET_TIMEOUT_S, DecodeSide
from .messages import Abort, frames
from .sockets import send_to_prefill, target_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from ...engine.transfer_engine import TransferEngine
    from .messages import Publish, Target
    from .prefill import PrefillSide

log = logging.getLogger("kvferry.sglang")


class Manager(Protocol):
    """What a request asks of the manager that SGLang makes it with."""

    prefill: PrefillSide | None
    decode: DecodeSide | None
    engine: TransferEngine
    local_ip: str
    rank_port: int
    failure_lock: threading.Lock
    failure_records: dict[int, str]

    def record_failure(self, room: int, reason: str) -> None:
        """Keep why a request failed."""

    def update_status(self, room: int, status: Any) -> None:
        """Set a request's state."""


class KVFerryKVSender(CommonKVSender):  # type: ignore[misc]
    """One request at a prefill rank. It has failed only when nobody reads its pages any more."""

    kv_mgr: Manager

    def _poll_with_status(self, check_status: Any) -> Any:
        status = super()._poll_with_status(check_status)
        side = self.kv_mgr.prefill
        if status == KVPoll.Failed and side is not None:
            settled = side.settled(self.bootstrap_room, "this request failed at prefill")
            return status if settled else KVPoll.Transferring
        return status

    def abort(self) -> None:
        """End the request; SGLang frees its pages as soon as this returns."""
        super().abort()
        self._settle("prefill aborted this request")

    def failure_exception(self) -> None:
        """Raise why it failed; perhaps on another rank, while this one still sends."""
        self._settle("this request failed on another prefill rank")
        super().failure_exception()

    def clear(self) -> None:
        """SGLang is done with the request."""
        self._settle("prefill cleared this request")
        super().clear()
        if self.kv_mgr.prefill is not None:
            self.kv_mgr.prefill.forget(self.bootstrap_room)

    def _settle(self, reason: str) -> None:
        if self.kv_mgr.prefill is not None:
            self.kv_mgr.prefill.settle(self.bootstrap_room, reason)


class KVFerryKVReceiver(CommonKVReceiver):  # type: ignore[misc]
    """One request at a decode rank. It has failed only when nobody can write to its pages any more."""

    kv_mgr: Manager
    _published = False
    _waiting_since_s = 0.0
    _stop_asked = ""  # the attempt whose writers were asked to stop

    @property
    def _side(self) -> DecodeSide:
        side = self.kv_mgr.decode
        assert side is not None
        return side

    def _register_kv_args(self) -> bool:
        """Registration is per prefill rank, not per request: `poll` sees to it."""
        return self.bootstrap_infos is not None

    def poll(self) -> Any:
        """Return the request's state; before its pages are published also whether the links are
        up."""
        status = super().poll()
        if status == KVPoll.Success:
            self._side.finished(self.bootstrap_room)
        elif status == KVPoll.Failed:
            self._stop_writers()
            if not self._side.settled(self.bootstrap_room):
                return KVPoll.Transferring
        elif status == KVPoll.WaitingForInput and not self._published:
            return self._poll_links()
        return status

    def _poll_links(self) -> Any:
        """`WaitingForInput` once every prefill rank that will write has a link to this one."""
        self._waiting_since_s = self._waiting_since_s or time.monotonic()
        targets = self._targets()
        up = True
        for target in targets:
            generation, reason = self._side.reach(target)
            if reason:
                return self._fail(reason)
            up = up and bool(generation)
        if up:
            return KVPoll.WaitingForInput
        if time.monotonic() - self._waiting_since_s > MEET_TIMEOUT_S:
            return self._fail(self._side.why_unreached(targets))
        return KVPoll.Bootstrapping

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: Sequence[Any] | None = None,
        decode_prefix_len: int | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        """Publish where the request's KV goes, to every prefill rank."""
        if self.bootstrap_infos is not None:
            try:
                self._generations = self._side.publish(self.bootstrap_room, self._targets())
            except EngineError as error:
                self._fail(error.message)
                return
            self._published = True
        super().send_metadata(
            kv_indices, aux_index, state_indices, decode_prefix_len, *args, **options
        )

    def _send_bootstrap_message(
        self, *, bootstrap_info: Any, message: Publish, operation: str
    ) -> bool:
        """SGLang sends every prefill rank the same; the generation of its link is its own."""
        generation = self._generations.get(target_of(bootstrap_info).name, 0)
        publish = msgspec.structs.replace(message, generation=generation)
        sent: bool = super()._send_bootstrap_message(
            bootstrap_info=bootstrap_info, message=frames(publish), operation=operation
        )
        return sent

    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        self._stop_writers()

    def abort(self) -> None:
        """End the request; its pages are free once `poll` says that it failed."""
        super().abort()
        self._stop_writers()

    def failure_exception(self) -> None:
        """Raise why it failed; SGLang frees its pages as soon as this returns."""
        self._settle()
        super().failure_exception()

    def clear(self) -> None:
        """SGLang is done with the request."""
        self._settle()
        super().clear()

    def _settle(self) -> None:
        """Return once nobody can write to the pages: at once after success and before
        publication."""
        if self._side.attempt(self.bootstrap_room):
            self._stop_writers()
            self._side.settle(self.bootstrap_room)

    def _stop_writers(self) -> None:
        """Ask the prefill ranks, once, to write nothing more."""
        attempt = self._side.attempt(self.bootstrap_room) if self._published else ""
        if not attempt or self._stop_asked:
            return
        self._stop_asked = attempt
        manager = self.kv_mgr
        with manager.failure_lock:
            reason = manager.failure_records.get(self.bootstrap_room)
        abort = Abort(
            manager.engine.engine_id,
            manager.local_ip,
            manager.rank_port,
            self.bootstrap_room,
            attempt,
            f"decode gave this request up: {reason or 'it failed on another rank'}",
        )
        for target in self._targets():
            try:
                send_to_prefill(target, abort)
            except Exception as error:  # its link is taken down then
                log.warning("kvferry: cannot tell prefill rank %s: %s", target.name, error)

    def _targets(self) -> list[Target]:
        """Return the prefill ranks that write."""
        infos = getattr(self, "bootstrap_infos", None) or ()
        return [target_of(info) for info in infos if not info["is_dummy"]]

    def _fail(self, reason: str) -> Any:
        self.kv_mgr.record_failure(self.bootstrap_room, reason)
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
        self.conclude_state = KVPoll.Failed
        return KVPoll.Failed
