"""The classes that SGLang makes for `--disaggregation-transfer-backend kvferry`.

They subclass SGLang's `Common*` classes, which keep the bootstrap server, the rank mapping and the
states of requests. Written against SGLang 0.5.23; `sglang_prefill.py` and `sglang_decode.py` know
nothing of SGLang.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import (
    CommonKVBootstrapServer,
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.utils.network import NetworkAddress

from ..engine.errors import EngineError, ProtocolError
from ..engine.transfer import TransferEngine
from .sglang_decode import MEET_TIMEOUT_S, DecodeSide, Target
from .sglang_memory import register_buffers
from .sglang_messages import Abort, Geometry, Publish, frames, parse
from .sglang_prefill import PrefillSide
from .sglang_rooms import Chunk
from .sglang_settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .sglang_rooms import Room

LISTEN_MS = 200  # how often the listener looks whether it shall end

log = logging.getLogger("kvferry.sglang")


class KVFerryKVManager(CommonKVManager):  # type: ignore[misc]
    """One rank's side of all transfers, prefill or decode.

    Raises:
        NotRegistered: memory or a state type that is not moved.
        ValueError: a feature of SGLang's that is not supported here; names it.
    """

    reports_transfer_latency = True

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: Any = False
    ) -> None:
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        if self.defer_decode_allocation:
            raise ValueError(
                "kvferry does not support --disaggregation-decode-allocation-policy "
                "prefill_complete: leave it at its default"
            )
        if self.kv_shard_size > 1:
            raise ValueError("kvferry does not support --enable-kv-cache-sharding: leave it out")
        settings = Settings.read()
        self._closed = False
        self.enable_staging = False
        self.engine = TransferEngine(
            transports=settings.transports,
            host=settings.host or self.local_ip,
            verify=settings.verify,
            name=f"sglang-{disaggregation_mode.value}-{self.local_ip}:{self.rank_port}",
            require_tokens=True,
        )
        try:
            held = register_buffers(self.engine, args)
        except EngineError:
            self.engine.close()
            raise
        geometry = Geometry(
            page_size=int(args.page_size),
            tp_size=self.attn_tp_size,
            tp_rank=int(args.engine_rank) % self.attn_tp_size,
            state_tp_size=self.state_tp_size,
            pp_size=self.pp_size,
            dcp_size=self.dcp_size,
            dcp_rank=self.dcp_rank,
            total_heads=_total_heads(args, self.attn_tp_size),
            mla=bool(is_mla_backend),
            hybrid_mla=bool(self.is_hybrid_mla_backend),
            swa_layout=getattr(args, "swa_kv_cache_layout", None) or "",
            components=held.components,
        )
        self.prefill: PrefillSide | None = None
        self.decode: DecodeSide | None = None
        if disaggregation_mode == DisaggregationMode.PREFILL:
            self.prefill = PrefillSide(
                self.engine,
                held,
                geometry,
                self,
                name=Target(self.local_ip, self.rank_port).name,
                rank=self._prefill_unique_rank(),
            )
        else:
            self.decode = DecodeSide(
                self.engine,
                geometry,
                self,
                _send_to_prefill,
                host_name=self.local_ip,
                port=self.rank_port,
            )
            self._start_heartbeat_checker_thread()
        self._listener = threading.Thread(
            target=self._listen, name="kvferry-sglang-listen", daemon=True
        )
        self._listener.start()

    def close(self) -> None:
        """Ends every transfer and the threads. SGLang itself ends its processes instead."""
        self._closed = True
        for side in (self.prefill, self.decode):
            if side is not None:
                side.close()
        if self.decode is not None:
            self._heartbeat_shutdown.set()
        self._listener.join(5.0)
        self.engine.close()
        # Otherwise the context waits for its sockets when it is garbage-collected, for ever.
        self._zmq_ctx.destroy(linger=0)

    # What SGLang's sender calls

    def add_transfer_request(
        self,
        bootstrap_room: int,
        kv_indices: Any,
        index_slice: Any,
        is_last_chunk: bool,
        aux_index: int | None = None,
        state_indices: Sequence[Any] | None = None,
        num_kv_tokens: int | None = None,
        *,
        wait_event: Any = None,
        indices_event: Any = None,
        trace_ctx: Any = None,
    ) -> None:
        """Moves a chunk: pages of this prefill rank into those at `index_slice` of decode's."""
        assert self.prefill is not None
        if bootstrap_room not in self.transfer_infos:
            return  # a rank that nobody asks for anything, or a request that is over
        if self._should_skip_cp_replicated_state_transfer():
            state_indices = None
        chunk = Chunk(
            kv_indices,
            index_slice,
            aux_index if is_last_chunk else None,
            state_indices,
            (wait_event, indices_event),
        )
        self.update_status(bootstrap_room, KVPoll.Transferring)
        self.prefill.send(bootstrap_room, chunk)

    # What the sides tell: `Host` of `sglang_prefill.py`

    def conclude(self, room: int, reason: str) -> str:
        """See `sglang_prefill.Host`."""
        status = self.conclude_transfer(
            bootstrap_room=room,
            status=KVPoll.Failed if reason else KVPoll.Success,
            targets=[],  # decode ranks are told by `Ended`, which names the attempt
            failure_reason=reason or None,
        )
        if status == KVPoll.Success:
            return ""
        return reason or "prefill gave this request up"

    def bootstrapped(self, room: Room, prefix_len: int) -> None:
        """See `sglang_prefill.Host`."""
        self.transfer_infos[room.number] = room.parts
        self.resolve_kv_replica_factor(room.parts)
        self.req_to_decode_prefix_len[room.number] = prefix_len
        self.update_status(room.number, KVPoll.WaitingForInput)

    def tell(self, host: str, port: int, message: Any) -> None:
        """See `sglang_prefill.Host`."""
        address = NetworkAddress(host, port)
        try:
            self._send_multipart_locked(address.to_tcp(), frames(message), is_ipv6=address.is_ipv6)
        except Exception as error:  # decode sees the link go down, or asks again
            log.warning("kvferry: cannot tell decode rank %s:%s: %s", host, port, error)

    # What SGLang's receiver calls

    def build_receiver_metadata_message(
        self,
        *,
        bootstrap_room: int,
        required_dst_info_num: int,
        kv_indices: Any,
        aux_index: int | None,
        state_indices: Sequence[Any] | None,
        decode_prefix_len: int | None,
        is_dummy: bool,
        device_kv_indices: Any = None,
    ) -> Publish:
        """Where a request's KV goes; the receiver adds which link it may come over."""
        assert self.decode is not None
        states = state_indices if state_indices is not None and not is_dummy else ()
        return Publish(
            engine_id=self.engine.engine_id,
            generation=0,
            host=self.local_ip,
            port=self.rank_port,
            room=bootstrap_room,
            attempt=self.decode.attempt(bootstrap_room),
            pages=b"" if is_dummy else _packed(kv_indices),
            aux_index=-1 if aux_index is None else int(aux_index),
            states=tuple(None if ids is None else _packed(ids) for ids in states),
            required=int(required_dst_info_num),
            prefix_len=int(decode_prefix_len or 0),
            dummy=bool(is_dummy),
        )

    # `Host` of `sglang_decode.py`

    def arrived(self, room: int, prefill_rank: int) -> None:
        """See `sglang_decode.Host`."""
        self.apply_prefill_status(
            bootstrap_room=room, status=KVPoll.Success, prefill_rank=prefill_rank
        )

    def failed(self, room: int, reason: str) -> None:
        """See `sglang_decode.Host`."""
        if self.request_status.get(room) not in (None, KVPoll.Success, KVPoll.Failed):
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)

    def _listen(self) -> None:
        """Hands every message to its side."""
        side = self.prefill or self.decode
        assert side is not None
        while not self._closed:
            if not self.server_socket.poll(LISTEN_MS):
                continue
            try:
                message = parse(self.server_socket.recv_multipart())
                if message is not None:
                    side.handle(message)
            except ProtocolError as error:
                log.warning("kvferry: %s", error)
            except Exception:  # one message must not end the thread that serves all
                log.exception("kvferry: a message of the SGLang backend was not handled")


class KVFerryKVSender(CommonKVSender):  # type: ignore[misc]
    """One request at a prefill rank. It has failed only when nobody reads its pages any more."""

    kv_mgr: KVFerryKVManager

    def _poll_with_status(self, check_status: Any) -> Any:
        status = super()._poll_with_status(check_status)
        side = self.kv_mgr.prefill
        if status == KVPoll.Failed and side is not None:
            settled = side.settled(self.bootstrap_room, "this request failed at prefill")
            return status if settled else KVPoll.Transferring
        return status

    def abort(self) -> None:
        """Ends the request; SGLang frees its pages as soon as this returns."""
        super().abort()
        self._settle("prefill aborted this request")

    def failure_exception(self) -> None:
        """Raises why it failed; perhaps on another rank, while this one still sends."""
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

    kv_mgr: KVFerryKVManager
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
        """The request's state; before its pages are published also whether the links are up."""
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
        """Publishes where the request's KV goes, to every prefill rank."""
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
        generation = self._generations.get(_target(bootstrap_info).name, 0)
        publish = msgspec.structs.replace(message, generation=generation)
        sent: bool = super()._send_bootstrap_message(
            bootstrap_info=bootstrap_info, message=frames(publish), operation=operation
        )
        return sent

    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        self._stop_writers()

    def abort(self) -> None:
        """Ends the request; its pages are free once `poll` says that it failed."""
        super().abort()
        self._stop_writers()

    def failure_exception(self) -> None:
        """Raises why it failed; SGLang frees its pages as soon as this returns."""
        self._settle()
        super().failure_exception()

    def clear(self) -> None:
        """SGLang is done with the request."""
        self._settle()
        super().clear()

    def _settle(self) -> None:
        """Returns once nobody can write to the pages: at once after success and before publication."""
        if self._side.attempt(self.bootstrap_room):
            self._stop_writers()
            self._side.settle(self.bootstrap_room)

    def _stop_writers(self) -> None:
        """Asks the prefill ranks, once, to write nothing more."""
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
                _send_to_prefill(target, abort)
            except Exception as error:  # its link is taken down then
                log.warning("kvferry: cannot tell prefill rank %s: %s", target.name, error)

    def _targets(self) -> list[Target]:
        """The prefill ranks that write."""
        infos = getattr(self, "bootstrap_infos", None) or ()
        return [_target(info) for info in infos if not info["is_dummy"]]

    def _fail(self, reason: str) -> Any:
        self.kv_mgr.record_failure(self.bootstrap_room, reason)
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
        self.conclude_state = KVPoll.Failed
        return KVPoll.Failed


class KVFerryKVBootstrapServer(CommonKVBootstrapServer):  # type: ignore[misc]
    """SGLang's bootstrap server, as it is."""


def _target(bootstrap_info: Any) -> Target:
    return Target(str(bootstrap_info["rank_ip"]), int(bootstrap_info["rank_port"]))


def _send_to_prefill(target: Target, message: Any) -> None:
    info = {"rank_ip": target.host, "rank_port": target.port}
    sock, lock = CommonKVReceiver._connect_to_bootstrap_server(info)
    with lock:
        sock.send_multipart(frames(message))


def _total_heads(args: Any, tp_size: int) -> int:
    """KV heads of the model; 0 where SGLang does not say (MLA)."""
    total = int(getattr(args, "total_kv_head_num", 0) or 0)
    return total or int(getattr(args, "kv_head_num", 0) or 0) * tp_size


def _packed(ids: Any) -> bytes:
    return np.asarray(ids, np.int32).tobytes()
