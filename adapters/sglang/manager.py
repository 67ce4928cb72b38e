"""What SGLang makes in every rank for `--disaggregation-transfer-backend kvferry`.

It subclasses SGLang's `Common*` classes, which keep the bootstrap server, the rank mapping and the
states of requests. Written against SGLang 0.5.23; `prefill.py` and `decode.py` know nothing of SGLang.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import (
    CommonKVBootstrapServer,
    CommonKVManager,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.utils.network import NetworkAddress

from ...engine.errors import EngineError
from ...engine.transfer_engine import TransferEngine
from .decode import DecodeSide
from .memory import register_buffers
from .messages import Geometry, Publish, Target, frames
from .prefill import PrefillSide
from .rooms import Chunk
from .settings import Settings
from .sockets import Listener, send_to_prefill

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .rooms import Room

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
            numbers=str(getattr(server_args, "kv_cache_dtype", "auto")),
            components=held.components,
        )
        self.prefill: PrefillSide | None = None
        self.decode: DecodeSide | None = None
        if disaggregation_mode == DisaggregationMode.PREFILL:
            self.prefill = PrefillSide(
                self.engine,
                held,
                geometry,
                tell=self.tell,
                bootstrapped=self.bootstrapped,
                conclude=self.conclude,
                name=Target(self.local_ip, self.rank_port).name,
                rank=self._prefill_unique_rank(),
            )
        else:
            self.decode = DecodeSide(
                self.engine,
                geometry,
                send=send_to_prefill,
                arrived=self.arrived,
                failed=self.failed,
                host_name=self.local_ip,
                port=self.rank_port,
            )
            self._start_heartbeat_checker_thread()
        side = self.prefill or self.decode
        assert side is not None
        self._listener = Listener(self.server_socket, side.handlers)

    def close(self) -> None:
        """End every transfer and the threads. SGLang itself ends its processes instead."""
        self._listener.close()
        for side in (self.prefill, self.decode):
            if side is not None:
                side.close()
        if self.decode is not None:
            self._heartbeat_shutdown.set()
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
        """Move a chunk: pages of this prefill rank into those at `index_slice` of decode's."""
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

    # What the prefill side tells; see `PrefillSide`

    def conclude(self, room: int, reason: str) -> str:
        """Tell SGLang how a room ended; return why it failed after all, or ""."""
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
        """Let SGLang begin a room that every decode rank has published."""
        self.transfer_infos[room.number] = room.parts
        self.resolve_kv_replica_factor(room.parts)
        self.req_to_decode_prefix_len[room.number] = prefix_len
        self.update_status(room.number, KVPoll.WaitingForInput)

    def tell(self, host: str, port: int, message: Any) -> None:
        """Send a message to a decode rank; what cannot be sent is logged."""
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
        """Return where a request's KV goes; the receiver adds which link it may come over."""
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

    # What the decode side tells

    def arrived(self, room: int, prefill_rank: int) -> None:
        """Count a prefill rank that has written all of its part."""
        self.apply_prefill_status(
            bootstrap_room=room, status=KVPoll.Success, prefill_rank=prefill_rank
        )

    def failed(self, room: int, reason: str) -> None:
        """Fail a room. Its pages may not be free yet."""
        if self.request_status.get(room) not in (None, KVPoll.Success, KVPoll.Failed):
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)


class KVFerryKVBootstrapServer(CommonKVBootstrapServer):  # type: ignore[misc]
    """SGLang's bootstrap server, as it is."""


def _total_heads(args: Any, tp_size: int) -> int:
    """KV heads of the model; 0 where SGLang does not say (MLA)."""
    total = int(getattr(args, "total_kv_head_num", 0) or 0)
    return total or int(getattr(args, "kv_head_num", 0) or 0) * tp_size


def _packed(ids: Any) -> bytes:
    return np.asarray(ids, np.int32).tobytes()
