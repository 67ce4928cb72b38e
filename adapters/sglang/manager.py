"""The classes that SGLang makes for `--disaggregation-transfer-backend kvferry`.

They subclass SGLang's `Common*` classes, which keep the bootstrap server, the rank mapping and the
states of requests. Written against SGLang 0.5.23; `sglang_prefill.py` and `sglang_decode.py` know
nothing of SGLang.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import (
    CommonKVBootstrapServer,
    CommonKVManager,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.utils.network import NetworkAddress

from ...engine.errors import EngineError, ProtocolError
from ...engine.transfer_engine import TransferEngine
from .decode import DecodeSide, Target
from .memory import register_buffers
from .messages import Geometry, Publish, frames, parse
from .prefill import PrefillSide
from .requests import KVFerryKVReceiver, KVFerryKVSender, send_to_prefill
from .rooms import Chunk
from .settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .rooms import Room

__all__ = [
    "KVFerryKVBootstrapServer",
    "KVFerryKVManager",
    "KVFerryKVReceiver",
    "KVFerryKVSender",
]

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
                send_to_prefill,
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
        self.transfer_infos.pop(room, None)
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


class KVFerryKVBootstrapServer(CommonKVBootstrapServer):  # type: ignore[misc]
    """SGLang's bootstrap server, as it is."""


def _total_heads(args: Any, tp_size: int) -> int:
    """KV heads of the model; 0 where SGLang does not say (MLA)."""
    total = int(getattr(args, "total_kv_head_num", 0) or 0)
    return total or int(getattr(args, "kv_head_num", 0) or 0) * tp_size


def _packed(ids: Any) -> bytes:
    return np.asarray(ids, np.int32).tobytes()
