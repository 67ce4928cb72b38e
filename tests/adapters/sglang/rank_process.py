"""A process with ranks of SGLang's prefill or decode servers: real managers, senders and receivers.

    rank_process.py PIPE PACKAGES

It does what SGLang's scheduler does: makes a manager over a rank's buffers, polls, hands over pages.
Pages, states and metadata are NumPy arrays of bytes; the managers are given pointers to them.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.adapters.sglang import sglang_imports
from tests.support.agent_process import Gate
from tests.support.child import pipe_of_child, serve

os.environ["SGLANG_HOST_IP"] = "127.0.0.1"
sglang_imports.install(Path(sys.argv[2]))

from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll, StateType  # noqa: E402
from sglang.srt.disaggregation.utils import DisaggregationMode  # noqa: E402

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

SENTINEL = 0xA5
POLL_S = 0.002
WAIT_S = 60.0  # reached only when something hangs
NAMES = {0: "failed", 1: "bootstrapping", 2: "waiting", 3: "transferring", 4: "success"}


class Buffers:
    """One rank's memory: `kv` of `[page, token, head, dim]` for each layer's K and V (MLA: for each
    layer), `states` of `[slot, bytes]`, `aux` of `[slot, bytes]`."""

    def __init__(self, options: dict[str, Any], fill: int | None) -> None:
        random = np.random.default_rng(fill or 0)

        def buffer(*shape: int) -> Bytes:
            if fill is None:
                return np.full(shape, SENTINEL, np.uint8)
            return random.integers(0, 256, shape, dtype=np.uint8)

        layers = options.get("layers", [0, 1, 2])
        self.mla = options.get("mla", False)
        self.pages, self.page_size = options.get("pages", 32), options.get("page_size", 4)
        self.heads, self.total = options.get("heads", 2), options.get("total_heads", 2)
        shape = (self.pages, self.page_size, self.heads, options.get("dim", 8))
        self.layer_ids = layers if self.mla else [*layers, *layers]
        self.kv = [buffer(*shape) for _ in self.layer_ids]
        self.aux = [buffer(8, 16), buffer(8, 40)]
        self.state_types = options.get("states", [])
        self.states = [[buffer(12, 24), buffer(12, 56)] for _ in self.state_types]

    def args(self, options: dict[str, Any]) -> Any:
        args = KVArgs()
        args.engine_rank = options.get("tp_rank", 0)
        args.gpu_id = 0
        args.pp_rank = options.get("pp_rank", 0)
        args.prefill_start_layer = 0
        args.prefill_end_layer = None
        args.system_dp_rank = 0
        args.rust_http_port = None
        args.kv_cache_dtype_str = "bfloat16"
        args.page_size = self.page_size
        args.ib_device = None
        args.kv_layer_ids = self.layer_ids
        if not self.mla:
            args.kv_head_num, args.total_kv_head_num = self.heads, self.total
        args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = _infos(self.kv)
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = _infos(self.aux)
        args.state_types = [StateType(name) for name in self.state_types]
        infos = [_infos(component) for component in self.states]
        args.state_data_ptrs = [info[0] for info in infos]
        args.state_data_lens = [info[1] for info in infos]
        args.state_item_lens = [info[2] for info in infos]
        args.state_layer_ids = [[] for _ in infos]
        args.state_dim_per_tensor = [[] for _ in infos]
        args.state_conv_shard_groups = [[] for _ in infos]
        args.state_slice_outer_counts = [[] for _ in infos]
        args.is_hybrid_mla_backend = False
        args.swa_kv_cache_layout = "nhd" if "swa" in self.state_types else None
        args.mla_compression_ratios = None
        return args


def _infos(arrays: list[Bytes]) -> tuple[list[int], list[int], list[int]]:
    return (
        [int(array.ctypes.data) for array in arrays],
        [array.nbytes for array in arrays],
        [array[0].nbytes for array in arrays],
    )


class Rank:
    """One rank of a server."""

    def __init__(self, mode: str, options: dict[str, Any], fill: int | None) -> None:
        from kvferry.adapters.sglang.manager import KVFerryKVManager

        os.environ["KVFERRY_TRANSPORTS"] = options.get("transports", "")
        sglang_imports.PARALLEL.attn_tp_size = options.get("tp_size", 1)
        sglang_imports.PARALLEL.attn_tp_rank = options.get("tp_rank", 0)
        self.buffers = Buffers(options, fill)
        self.requests: dict[int, Any] = {}
        self.manager = KVFerryKVManager(
            self.buffers.args(options),
            DisaggregationMode(mode),
            SimpleNamespace(enable_pd_role_switch=False),
            self.buffers.mla,
        )


class Commands:
    """What a test can make the process do: every public method is a command."""

    def __init__(self) -> None:
        self._ranks: dict[str, Rank] = {}
        self._servers: list[Any] = []
        self._gate = Gate()
        self._released = False

    def bootstrap(self) -> int:
        """Starts SGLang's bootstrap server; returns its port."""
        from kvferry.adapters.sglang.manager import KVFerryKVBootstrapServer

        for old in self._servers:
            old.close()
        self._servers.clear()
        server = KVFerryKVBootstrapServer("127.0.0.1", 0)
        self._servers.append(server)
        deadline_s = time.monotonic() + WAIT_S
        while not (getattr(server, "_runner", None) and server._runner.addresses):
            assert time.monotonic() < deadline_s, "the bootstrap server does not start"
            time.sleep(POLL_S)
        port: int = server._runner.addresses[0][1]
        sglang_imports.DISAGG.disaggregation_bootstrap_port = port
        return port

    def start(self, name: str, mode: str, fill: int | None = None, **options: Any) -> None:
        self._ranks[name] = Rank(mode, options, fill)

    def stop(self, name: str) -> None:
        self._ranks.pop(name).manager.close()

    def cut_off_after(self, seconds: float) -> None:
        """How long decode waits for prefill's answer before it takes the link down."""
        from kvferry.adapters.sglang import decode as sglang_decode

        sglang_decode.ANSWER_S = seconds

    def set_timeout(self, name: str, which: str, seconds: float) -> None:
        setattr(self._ranks[name].manager, which, seconds)

    # Requests

    def new_sender(self, name: str, room: int, num_pages: int, aux_index: int) -> None:
        from kvferry.adapters.sglang.requests import KVFerryKVSender

        rank = self._ranks[name]
        sender = rank.requests[room] = KVFerryKVSender(rank.manager, "127.0.0.1:0", room)
        sender.init(num_pages, aux_index)

    def new_receiver(self, name: str, room: int, port: int) -> None:
        from kvferry.adapters.sglang.requests import KVFerryKVReceiver

        rank = self._ranks[name]
        address = f"127.0.0.1:{port}"
        deadline_s = time.monotonic() + WAIT_S
        while not rank.manager.try_ensure_parallel_info(address):
            assert time.monotonic() < deadline_s, "prefill is not registered"
            time.sleep(POLL_S)
        receiver = rank.requests[room] = KVFerryKVReceiver(rank.manager, address, room)
        receiver.init(0)

    def publish(
        self, name: str, room: int, pages: list[int], aux: int, states: Any = None, prefix: int = 0
    ) -> None:
        self._ranks[name].requests[room].send_metadata(
            np.array(pages, np.int32), aux, states, decode_prefix_len=prefix
        )

    def send(self, name: str, room: int, pages: list[int], states: Any = None) -> None:
        self._ranks[name].requests[room].send(np.array(pages, np.int32), states)

    def prefix_len(self, name: str, room: int) -> int:
        length: int = self._ranks[name].requests[room].pop_decode_prefix_len()
        return length

    def poll(self, name: str, room: int) -> str:
        return NAMES[int(self._ranks[name].requests[room].poll())]

    def wait(self, name: str, room: int, *states: str, patience_s: float = 0.0) -> str:
        """Polls, as a scheduler does, until the request is in one of these states, or at its end; ""
        if it is not when `patience_s` has passed."""
        deadline_s = time.monotonic() + (patience_s or WAIT_S)
        seen = set()
        while time.monotonic() < deadline_s:
            state = self.poll(name, room)
            seen.add(state)
            if state in (*states, "failed", "success"):
                return state
            time.sleep(POLL_S)
        if patience_s:
            return ""
        raise AssertionError(f"room {room} of {name} came to {seen}, never to {states}")

    def failure(self, name: str, room: int) -> str:
        """What SGLang raises for a request that failed."""
        try:
            self._ranks[name].requests.pop(room).failure_exception()
        except Exception as error:
            return str(error)
        return ""

    def abort(self, name: str, room: int) -> None:
        self._ranks[name].requests[room].abort()

    def clear(self, name: str, room: int) -> None:
        self._ranks[name].requests.pop(room).clear()

    def left_over(self, name: str) -> dict[str, int]:
        """What a rank remembers of requests; nothing once all are cleared."""
        manager: Any = self._ranks[name].manager
        found = {"status": len(manager.request_status), "failures": len(manager.failure_records)}
        if manager.prefill is not None:
            found |= {"rooms": len(manager.prefill._rooms), "infos": len(manager.transfer_infos)}
        else:
            found |= {"attempts": len(manager.decode._attempts)}
        return found

    # Memory

    def read(self, name: str) -> tuple[list[Bytes], list[list[Bytes]], list[Bytes]]:
        buffers = self._ranks[name].buffers
        return buffers.kv, buffers.states, buffers.aux

    def erase(self, name: str) -> None:
        """What a scheduler does with pages that are free: gives them to others."""
        buffers = self._ranks[name].buffers
        for array in (*buffers.kv, *(a for c in buffers.states for a in c), *buffers.aux):
            array[...] = SENTINEL

    # Faults

    def hold(self) -> None:
        """From now on nothing that this process moves gets through."""
        self._gate.close()

    def held(self) -> bool:
        """Waits until something is held."""
        reached: bool = self._gate.reached.wait(WAIT_S)
        return reached

    def release(self) -> None:
        self._released = True
        self._gate.open()

    def release_later(self) -> None:
        """While the next command runs: it has to wait for what is held."""
        self._released = False
        threading.Timer(0.3, self.release).start()

    def released(self) -> bool:
        return self._released

    def drop_links(self, name: str) -> None:
        for link in self._ranks[name].manager.engine.links:
            link.close()

    def transports(self, name: str) -> list[str]:
        return [link.transport for link in self._ranks[name].manager.engine.links]

    def plug_in(self) -> dict[str, Any]:
        """Registers the backend as SGLang does; what its own look-ups then find."""
        from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES
        from sglang.srt.disaggregation import utils
        from sglang.srt.plugins.hook_registry import HookRegistry

        from kvferry.adapters.sglang import register

        for _ in range(2):  # SGLang does it in every process; again must not hurt
            register()
            HookRegistry.apply_hooks()
        backend = utils.TransferBackend("kvferry")
        found = {
            kind.value: getattr(utils.get_kv_class(backend, kind), "__name__", None)
            for kind in utils.KVClassType
        }
        fake = utils.get_kv_class(utils.TransferBackend.FAKE, utils.KVClassType.SENDER).__name__
        return {
            "choices": DISAGG_TRANSFER_BACKEND_CHOICES.count("kvferry"),
            "members": [member.value for member in utils.TransferBackend],
            "classes": found,
            "fake": fake,
        }

    def close(self) -> None:
        self._gate.open()
        for name in list(self._ranks):
            self.stop(name)
        for server in self._servers:
            server.close()


if __name__ == "__main__":
    assert {NAMES[KVPoll.Failed], NAMES[KVPoll.Success]} == {"failed", "success"}
    serve(pipe_of_child(), Commands())
