"""What a user sets for the vLLM connector, in `kv_connector_extra_config`, with its defaults."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...engine.transports.selection import TRANSPORTS
from ..agent.arguments import MAX_SECONDS
from .params import PRIVATE_NETWORKS

if TYPE_CHECKING:
    from collections.abc import Mapping

Mode = Literal["push", "pull"]


@dataclass(frozen=True)
class Settings:
    """One engine's settings.

    Attributes:
        mode: `push`: prefill writes, each layer as its forward pass ends it; `pull`: decode reads
            when all is computed. The decode engine's setting counts.
        host: the address that other engines reach this one by. `$KVFERRY_HOST` is its default.
        port: of rank 0's agent, rank 1 has the next, and so on; 0 takes free ones, which only a
            router that calls prefill first can do with. `$KVFERRY_PORT` is its default.
        transports: which to offer; all that work here if empty.
        timeout_s: how long a decode request may wait for its KV.
        lease_s: how long prefill keeps the KV of a finished request that nobody asks for.
        verify: compare a checksum of everything moved.
        in_step_nbytes: of loads that a step of vLLM's may wait for; 0 for none. See `steps.py`.
        max_programs: that a kernel which moves KV may run at a time on a GPU beside the model's; 0
            for no limit.
        daemon: of the cluster's daemon, `tcp://host:port`; none if "". `$KVFERRY_DAEMON` is its
            default.
        service: where this engine's HTTP server is, `http://host:port`, for routers that ask the
            daemon. `$KVFERRY_SERVICE` is its default.
        http: `host:port` where rank 0's agent serves /metrics and /trace, rank 1 at the next port, and
            so on; not served if "". `$KVFERRY_HTTP` is its default.
        peers: whom decode may ask for KV, since a request names an address: networks (`10.1.0.0/16`),
            addresses, host names, `*.name` for all below it, `*` for anybody. This machine and
            private networks if empty.
        keys: a key file (`kvferry keys new`); needed where `host` is no address of this machine.
            `$KVFERRY_KEYS` is its default.
    """

    mode: Mode = "push"
    host: str = "127.0.0.1"
    port: int = 0
    transports: tuple[str, ...] = ()
    peers: tuple[str, ...] = PRIVATE_NETWORKS
    timeout_s: float = 120.0
    lease_s: float = 120.0
    verify: bool = False
    in_step_nbytes: int = 16 << 20  # 10 ms at 1.6 GB/s, which tcp reaches between two processes
    max_programs: int = 0
    keys: str = ""
    daemon: str = ""
    service: str = ""
    http: str = ""

    def http_of(self, place: int) -> str:
        """Return where an agent serves its figures; "" if it does not.

        Args:
            place: of the agent, counted over all ranks of all data-parallel engines.
        """
        host, _, port = self.http.rpartition(":")
        return f"{host}:{int(port) + place if int(port) else 0}" if self.http else ""

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Settings:
        """Read `kv_connector_extra_config`; keys of other connectors are ignored.

        Raises:
            ValueError: a value makes no sense; names the key.
        """
        mode = extra.get("mode", cls.mode)
        if mode not in ("push", "pull"):
            raise ValueError(f"kv_connector_extra_config: mode is {mode!r}: use 'push' or 'pull'")
        transports = extra.get("transports", ())
        if isinstance(transports, str) or not set(transports) <= set(TRANSPORTS):
            raise ValueError(
                f"kv_connector_extra_config: transports is {transports!r}: give a list out of "
                f"{', '.join(TRANSPORTS)}"
            )
        peers = extra.get("peers") or PRIVATE_NETWORKS
        if isinstance(peers, str) or not all(isinstance(each, str) and each for each in peers):
            raise ValueError(
                f"kv_connector_extra_config: peers is {peers!r}: give a list of networks, addresses "
                "and host names"
            )
        found: dict[str, Any] = {}
        for key in ("port", "timeout_s", "lease_s", "in_step_nbytes", "max_programs"):
            default = getattr(cls, key)
            value = extra.get(key, os.environ.get("KVFERRY_PORT", 0) if key == "port" else default)
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = -1.0
            if not 0 <= number < math.inf:
                raise ValueError(f"kv_connector_extra_config: {key} is {value!r}: give a number")
            found[key] = type(default)(number)
        for key in ("host", "daemon", "service", "http", "keys"):
            given = extra.get(key) or os.environ.get(f"KVFERRY_{key.upper()}")
            found[key] = str(given or getattr(cls, key))
        if not 0 < found["timeout_s"] <= MAX_SECONDS - found["lease_s"]:
            raise ValueError(
                f"kv_connector_extra_config: timeout_s is {found['timeout_s']:g} and lease_s "
                f"{found['lease_s']:g}: timeout_s must be above 0, and both together at most "
                f"{MAX_SECONDS:g}"
            )
        service, http = found["service"], found["http"]
        if service and not service.startswith(("http://", "https://")):
            raise ValueError(
                f"kv_connector_extra_config: service is {service!r}: write http://host:port"
            )
        if http and not http.rpartition(":")[2].isdecimal():
            raise ValueError(f"kv_connector_extra_config: http is {http!r}: write host:port")
        return cls(
            mode=mode,
            transports=tuple(transports),
            peers=tuple(peers),
            verify=bool(extra.get("verify", False)),
            **found,
        )


# What the connector would move wrongly, in silence: (where in vLLM's configuration, what it may be at
# most, how to turn it off). Attributes that a version of vLLM lacks are not set there.
_LIMITS = (
    ("parallel_config.pipeline_parallel_size", 1, "pipeline_parallel_size=1"),
    # Tokens are dealt over ranks, and a block of the manager is one on each of them.
    ("parallel_config.decode_context_parallel_size", 1, "decode_context_parallel_size=1"),
    ("parallel_config.prefill_context_parallel_size", 1, "prefill_context_parallel_size=1"),
    # A layer's save is called once a micro-batch: the first call would send what the second computes.
    ("parallel_config.enable_dbo", False, "no --enable-dbo"),
    ("parallel_config.ubatch_size", 1, "ubatch_size=0"),
    # Scales made as the engine runs are each engine's own.
    ("cache_config.calculate_kv_scales", False, "no --calculate-kv-scales"),
    # vLLM does not clear blocks that a connector says it loads, and a load by tokens leaves the rest of
    # the last one as another group's precision left it.
    ("kv_cache_config.has_mixed_precision_kv_cache", False, "one kv_cache_dtype for all layers"),
)


def check_supported(**configs: Any) -> None:
    """Refuse an engine whose KV would be moved wrongly.

    Args:
        configs: vLLM's `parallel_config`, `cache_config` and `kv_cache_config`.

    Raises:
        ValueError: names what is set, and what to set instead.
    """
    for path, most, fix in _LIMITS:
        config, _, name = path.partition(".")
        value = getattr(configs[config], name, most)
        if value > most:
            raise ValueError(f"KVFerryConnector does not work with {name}={value}: set {fix}")
