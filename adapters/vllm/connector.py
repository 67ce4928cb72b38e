"""vLLM's KV connector: prefill in one engine, decode in another, by one line of configuration.

    --kv-transfer-config '{"kv_connector": "KVFerryConnector",
                           "kv_connector_module_path": "kvferry.adapters.vllm",
                           "kv_role": "kv_both"}'

vLLM makes it twice, once for its scheduler and once in every worker; this file is the thin end that
vLLM calls, the two sides are `scheduler.py` and `worker.py`. Written against vLLM 0.32,
and the parts of the interface that 0.30, 0.31 and 0.33 share with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.request import RequestStatus

from .cache import Backend, Heads, describe_caches, read_groups
from .orders import Orders
from .scheduler import SchedulerSide
from .settings import Settings, check_supported
from .stats import KVFerryPromMetrics, KVFerryStats
from .worker import WorkerSide

if TYPE_CHECKING:
    import torch

ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


@dataclass
class KVFerryMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler side tells the workers for one step."""

    orders: Orders = field(default_factory=Orders)


@dataclass
class KVFerryHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker tells the scheduler side, once: where its agent is."""

    address: str


class KVFerryConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Moves KV cache between vLLM engines.

    Raises:
        ValueError: a setting or a kind of cache that cannot be moved; says which.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        parallel = vllm_config.parallel_config
        self._settings = Settings.read(transfer.kv_connector_extra_config)
        self._engine_id = str(transfer.engine_id)
        check_supported(
            parallel_config=parallel,
            cache_config=vllm_config.cache_config,
            kv_cache_config=kv_cache_config,
        )
        self._groups = read_groups(kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                self._engine_id,
                self._settings,
                groups=self._groups,
                tp_size=parallel.tensor_parallel_size,
                role=ROLES[transfer.kv_role],
                token_nbytes=self._token_nbytes_in_step(vllm_config, kv_cache_config),
            )

    @staticmethod
    def _token_nbytes_in_step(vllm_config: Any, kv_cache_config: Any) -> int:
        """Bytes of a token's KV; 0 where a step must not wait for a load.

        A failure in a step is told by blocks. vLLM refuses that where there are several groups of
        layers; where it recomputes, other requests may find the blocks in its prefix cache before
        they are; and steps that are scheduled before the one before has ended go on without them.
        """
        groups = kv_cache_config.kv_cache_groups
        if (
            len(groups) != 1
            or vllm_config.kv_transfer_config.kv_load_failure_policy != "fail"
            or vllm_config.scheduler_config.async_scheduling
            or vllm_config.speculative_config is not None
        ):
            return 0
        spec = groups[0].kv_cache_spec
        return int(spec.page_size_bytes * len(groups[0].layer_names) // spec.block_size)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Any: the layout is described, whatever it is."""
        return None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """No: batches that compute a prompt are not whole graphs in vLLM's own choice, so that their
        layers go out one by one; what a whole graph computed goes out when it has ended."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVFerryStats:
        return KVFerryStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVFerryPromMetrics:
        return KVFerryPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def get_kv_connector_stats(self) -> KVFerryStats | None:
        """Return what ended since the last call, on a worker."""
        figures = self._worker.figures.take() if self._worker is not None else {}
        return KVFerryStats(figures) if any(figures.values()) else None

    # Scheduler side

    @property
    def _side(self) -> SchedulerSide:
        assert self._scheduler is not None, "called on a worker's connector"
        return self._scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """The agents' addresses, by rank."""
        self._side.addresses = [metadata[rank].address for rank in sorted(metadata)]

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Where blocks of windows are kept, and how many are free, which the daemon places by."""
        self._side.holds.bind(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        self._side.new_request(request)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """Return every group that is moved: a request's own blocks are loaded."""
        return tuple(group.table for group in self._groups)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        count = self._side.num_remote_tokens(request, num_computed_tokens)
        return count, count > 0 and not self._side.loads_in_step(request)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._side.blocks_allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVFerryMetadata(self._side.take_orders(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        self._side.transfers_ended(
            connector_output.finished_sending or (),
            connector_output.finished_recving or (),
            connector_output.failed_recving or (),
            connector_output.invalid_block_ids or (),
        )

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        ended_well = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        return self._side.request_ended(request, block_ids, completed=request.status in ended_well)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_work

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Register the caches and start this rank's agent."""
        config = self._vllm_config
        parallel, model = config.parallel_config, config.model_config
        first = next(iter(kv_caches))
        if kv_caches[first].device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"KVFerryConnector moves caches in host memory and on NVIDIA GPUs; layer {first} is "
                f"on {kv_caches[first].device}"
            )
        rank, tp_size = parallel.rank % parallel.tensor_parallel_size, parallel.tensor_parallel_size
        backend = self._backend()
        total = 1 if model.use_mla else model.get_total_num_kv_heads()  # a latent has no heads
        # All ranks' caches are alike but for the heads that they hold.
        described = [
            describe_caches(kv_caches, self._groups, backend, Heads.of_rank(total, tp_size, each))
            for each in range(tp_size)
        ]
        layout, names = described[rank]
        self._worker = WorkerSide(
            engine_id=self._engine_id,
            rank=rank,
            role=ROLES[config.kv_transfer_config.kv_role],
            settings=self._settings,
            layout=layout,
            names=names,
            caches=kv_caches,
            num_blocks=self._kv_cache_config.num_blocks,
            ranks=[each for each, _ in described] if tp_size > 1 else (),
            # Engines of a data-parallel server share its settings, and often a host.
            first_place=tp_size * int(getattr(parallel, "data_parallel_index", 0)),
            model=str(model.served_model_name or model.model),  # what clients call it
        )

    def _backend(self) -> Backend:
        """Return what fills the caches of all groups."""
        context = self._vllm_config.compilation_config.static_forward_context
        layers = [context[group.layers[0]] for group in self._groups]
        names = dict.fromkeys(layer.get_attn_backend().get_name() for layer in layers)
        isas = dict.fromkeys(str(getattr(layer, "isa", "")) for layer in layers)
        numbers = str(self._vllm_config.cache_config.cache_dtype)
        return Backend("+".join(names), "+".join(isas), vllm.__version__, numbers)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return KVFerryHandshake(self._worker.agent.address) if self._worker else None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The first call of a step, before its forward pass."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.before_forward(self._step)

    @property
    def _step(self) -> Orders:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KVFerryMetadata)
        return metadata.orders

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.begin_receives(self._step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests are computed when they are loaded, all layers of them."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        if self._worker is not None:
            self._worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.after_forward()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        results = self._worker.take_results(idle=self._step.idle)
        return KVConnectorTransferResults(
            finished_sending=results.sent,
            finished_recving=results.received,
            failed_recving=results.failed,
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Of loads that this step waited for; others are reported by request."""
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()


def register() -> None:
    """Make the connector known to vLLM by name alone; vLLM calls it as a plug-in."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "KVFerryConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "KVFerryConnector", "kvferry.adapters.vllm.connector", "KVFerryConnector"
        )
