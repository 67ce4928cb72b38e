"""CUDA IPC: one host, GPU memory, kernels that read and write the peer's memory directly.

Each side maps the other's allocations for its own GPU; a transfer is one kernel launch, whatever
the number of blocks. The link's control channel, a Unix socket, carries one `Arrived` a write for
hosts that wait; for streams that wait, the kernel itself adds to the receiver's device counter.
Host memory of the same two processes goes by `cma`, and so does, staged, what no kernel reaches: GPUs
without peer access, memory that the driver does not map, and transfers between GPU memory and host
memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DeviceError, EngineError, NotRegistered, PlanError, TransportUnavailable
from ...memory import cuda_driver as cuda
from ...memory.cuda_events import check_not_captured
from ...transfer.device_counters import slot_offset
from ...transfer.moves import BlockMove, TokenMove
from ...transfer.transfer import Transfer
from ...wire.messages import Arrived
from ..base import Availability, DataPath
from ..cma.path import CmaPath
from .peer_memory import PeerMappings, PeerReach

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from ...memory.descriptors import RegionDescriptor
    from ...memory.regions import MemoryRegion, RegisteredCache
    from ...transfer.plan import TransferPlan
    from ...transfer.transfer import Transfer
    from ..base import PathHost
    from .graph_write import GraphWrite
    from .lane import Lane, Launched
    from .plan import CudaPlan
    from .tokens import TokenLaunch


def available() -> Availability:
    """Return whether this machine may have CUDA. Starts nothing, so that a fork stays possible."""
    reason = cuda.absence()
    return Availability(not reason, reason or "there is an NVIDIA driver")


def probe() -> Availability:
    """Start the driver and ask which GPUs reach each other."""
    reason = cuda.absence()
    if reason:
        return Availability(False, reason)
    try:
        driver = cuda.driver()
        count = driver.device_count()
        cut_off = [
            f"{one}-{other}"
            for one in range(count)
            for other in range(count)
            if not driver.can_access(one, other)
        ]
    except DeviceError as error:
        return Availability(False, error.message)
    if not count:
        return Availability(False, "no GPU is visible: look at CUDA_VISIBLE_DEVICES")
    if count == 1:
        says = "1 GPU: processes that share it reach each other's memory"
    elif cut_off:
        says = (
            f"{count} GPUs, no peer access between {', '.join(cut_off)}: there, bytes go through "
            "pinned memory that both processes share"
        )
    else:
        says = f"{count} GPUs, each reaches the memory of the others"
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        says += (
            "; a peer's GPU that CUDA_VISIBLE_DEVICES hides here is tried with the first transfer, "
            "and if the driver does not map its memory, bytes go through pinned memory too"
        )
    return Availability(True, says)


class CudaIpcPath(DataPath):
    """Launches kernels on streams of its own, one a GPU of this side."""

    peer_reaches_memory = True
    asks_access = True
    kinds = frozenset({"host", "cuda"})

    def __init__(self, link: PathHost, pid: int) -> None:
        self.kernels = self
        self._link = link
        self._host = CmaPath(link, pid)
        self.handlers = {**self._host.handlers, Arrived: self._arrived}
        self._mappings = PeerMappings(link.peer.name, pid)
        self._reach = PeerReach(link, self._mappings)
        self._lock = threading.Lock()
        self._lanes: dict[int, Lane] = {}
        self._plans: dict[tuple[int, tuple[int, ...] | None], CudaPlan] = {}
        self._token_plans: dict[
            tuple[int, tuple[int, ...] | None], tuple[TransferPlan, tuple[TokenLaunch, ...]]
        ] = {}
        self._graph_writes: list[GraphWrite] = []
        self._current_stream: Callable[[int], int] | None = None
        self._halting = False
        self._limit_nbytes = link.core.paths.limit_nbytes("cuda_ipc")

    # Pieces.

    def submit(self, transfer: Transfer) -> None:
        move = transfer.move
        if isinstance(move, BlockMove):
            try:
                compiled = self.compile(move.plan, move.layers)
            except EngineError as error:
                transfer.stop(error)
            else:
                self.launch(transfer, compiled, None)
            return
        if isinstance(move, TokenMove):
            self._submit_tokens(transfer, move)
            return
        if not self._goes_direct(transfer):
            self._host.submit(transfer)  # host memory as it is, and what must be staged
            return
        kinds = {region.kind for region in transfer.local_regions}
        kinds |= {region.kind for region in transfer.remote_regions}
        with _Refusing(transfer):
            self._prepare(transfer, kinds)
            if not transfer.total_nbytes:
                transfer.end_empty()
                return
            self._launch_pieces(transfer)

    def _launch_pieces(self, transfer: Transfer) -> None:
        from ....kernels.pieces import copy_pieces, make_table
        from ....kernels.signal import Signal

        device = transfer.local_regions[0].device
        lane = self._lane(device)
        bases = self._remote_addresses(transfer.remote_regions, device)
        local = transfer.local[:, 0].astype(np.int64)
        remote = bases[transfer.remote_index] + transfer.remote_offset
        src, dst = (local, remote) if transfer.write else (remote, local)
        table = make_table(src, dst, transfer.nbytes)
        counter = self._counter(transfer, device)
        signal = None if counter is None else Signal(lane.state, counter)

        def kernels(columns: torch.Tensor | None) -> Launched:
            from .lane import Launched

            assert columns is not None
            copy_pieces(table, columns, signal=signal, max_programs=self._link.core.max_programs)
            return Launched((columns,))

        lane.launch(transfer, transfer.total_nbytes, table.columns, kernels)

    # Blocks.

    def takes(self, move: BlockMove | TokenMove) -> bool:
        return self.reaches(move.plan)

    def reaches(self, plan: TransferPlan) -> bool:
        """Say whether kernels reach a plan's memory and are quicker than staging it."""
        if self._link.core.verify:
            return False  # a kernel leaves nothing in between to compare: staged
        if self._limit_nbytes and plan.piece_nbytes < self._limit_nbytes:
            return False
        return not self._reach.obstacle((plan.local,), plan.remote.regions)

    def launch(
        self, transfer: Transfer, compiled: CudaPlan, stream: torch.cuda.Stream | None
    ) -> None:
        """Move blocks by one launch for each kind of piece in the plan.

        Ids in host memory are checked already; those on the GPU are checked by the kernel.
        """
        try:
            counter = 0
            if transfer.imm is not None and transfer.write:
                counter = compiled.counters + slot_offset(transfer.imm)
                transfer.on_placed = functools.partial(
                    self._tell_placed, transfer, compiled.counted
                )
            if not transfer.total_nbytes:
                transfer.end_empty()
                return
            device = compiled.plan.local.device
            raw_stream = None
            if transfer.after is None:
                raw_stream = self._raw_stream(transfer, stream, device)
            lane = self._lanes.get(device) or self._lane(device)
        except EngineError as error:
            transfer.stop(error)
            return
        move = transfer.move
        assert isinstance(move, BlockMove)
        lane.copy_blocks(transfer, compiled.copies, move.ids, raw_stream, counter)

    def _raw_stream(self, transfer: Transfer, stream: torch.cuda.Stream | None, device: int) -> int:
        """Return the caller's stream, or the device's current one: after what it has been given."""
        if stream is None:
            if self._current_stream is None:
                import torch

                self._current_stream = torch._C._cuda_getCurrentRawStream
            raw = self._current_stream(device)
        else:
            raw = stream.cuda_stream
        if stream is not None and stream.device_index != device:
            raise PlanError(
                f"the stream is one of GPU {stream.device_index}, the cache is on GPU {device}",
                operation=transfer.ticket.operation,
                peer=self._link.peer.name,
            )
        check_not_captured(raw, transfer.ticket.operation, self._link.peer.name)
        return raw

    def _submit_tokens(self, transfer: Transfer, move: TokenMove) -> None:
        """Move tokens by one launch for each copy group of planes."""
        plan = move.plan
        with _Refusing(transfer):
            self._prepare(transfer, {plan.local.kind, plan.remote_kind})
            if not transfer.total_nbytes:
                transfer.end_empty()
                return
            from .tokens import launch_tokens

            device = transfer.local_regions[0].device
            launches = self._compiled_tokens(plan, move.layers, device)
            counter = self._counter(transfer, device)
            cap = self._link.core.max_programs
            launch_tokens(self._lane(device), transfer, move, launches, counter, cap)

    def prepare(self, plan: TransferPlan, layers: Sequence[int] | None) -> None:
        if not self.reaches(plan):
            self._host.prepare(plan, layers)
            return
        import torch

        from ...transfer.block_ids import CheckedIds
        from .plan import MANY_IDS
        from .tokens import warm_tokens

        device = plan.local.device
        lane = self._lane(device)
        if plan.blocks_pair:
            compiled = self.compile(plan, layers)
            with self._making_tables(device), torch.cuda.device(device):
                # A block that does not exist: the kernels are loaded and run, and touch nothing.
                nowhere = torch.full((1,), -1, dtype=torch.int64, device=device)
                lane.try_out(compiled.copies, CheckedIds(nowhere, nowhere, True, 1), MANY_IDS)
        else:
            launches = self._compiled_tokens(plan, layers, device)
            if plan.remote.regions:
                self._mappings.counters(device, plan.remote.regions[0])
            with self._making_tables(device), torch.cuda.device(device):
                warm_tokens(launches, self._link.core.max_programs, torch.device("cuda", device))
        lane.warm()

    def repeat(self, transfer: Transfer, compiled: CudaPlan, ids: Any) -> GraphWrite:
        """Make a write that a CUDA graph repeats."""
        from .graph_write import GraphWrite

        device = compiled.plan.local.device
        lane = self._lane(device)
        write = GraphWrite(self._link, transfer, compiled, ids, device)
        with self._lock:
            if self._halting:
                raise TransportUnavailable("the link is down", operation="graph_write")
            self._graph_writes.append(write)
        lane.ring()
        return write

    def _watch(self) -> bool:
        """Pass on what graph writes have done; whether there was anything."""
        if not self._graph_writes:
            return False
        seen = False
        for write in list(self._graph_writes):
            seen |= write.poll()
            if write.closed:
                with self._lock:
                    self._graph_writes.remove(write)
        return seen

    def tick(self) -> None:
        self._host.tick()
        if self._graph_writes and self._watch():
            for lane in list(self._lanes.values()):
                lane.ring()  # more may come: from now on it looks more often than ticks do

    def compile(self, plan: TransferPlan, layers: Sequence[int] | None) -> CudaPlan:
        """Return a plan's launches for some layers, made with the first call."""
        from .plan import compile_plan

        device = plan.local.device
        self._check_kinds({plan.local.kind, plan.remote_kind}, [plan.local], "transfer")
        key = (id(plan), None if layers is None else tuple(layers))
        with self._lock:
            compiled = self._plans.get(key)
            if compiled is None:
                addresses = self._remote_addresses(plan.remote.regions, device)
                cap = self._link.core.max_programs
                counters = self._mappings.counters(device, plan.remote.regions[0])
                counted = self._mappings.counted(device, plan.remote.regions[0])
                with self._making_tables(device):
                    compiled = compile_plan(
                        plan, layers, addresses, counters, device, cap, counted=counted
                    )
                self._plans[key] = compiled
            return compiled

    @contextlib.contextmanager
    def _making_tables(self, device: int) -> Iterator[None]:
        """Let torch make tables on the current stream, whatever other threads capture.

        Raises:
            PlanError: this thread captures a graph from that stream.
        """
        import torch

        raw = torch._C._cuda_getCurrentRawStream(device)
        check_not_captured(raw, "compile", self._link.peer.name)
        with cuda.driver().beside_captures():
            yield

    def _compiled_tokens(
        self, plan: TransferPlan, layers: Sequence[int] | None, device: int
    ) -> tuple[TokenLaunch, ...]:
        import torch

        from .tokens import compile_tokens

        key = (id(plan), None if layers is None else tuple(layers))
        with self._lock:
            entry = self._token_plans.get(key)
            if entry is None:
                here, there = plan.addresses, self._remote_addresses(plan.remote.regions, device)
                src, dst = (here, there) if plan.writes else (there, here)
                where = torch.device("cuda", device)
                with self._making_tables(device):
                    entry = (plan, compile_tokens(plan.tokens, layers, src, dst, where))
                self._token_plans[key] = entry
            return entry[1]

    # Both.

    def _goes_direct(self, transfer: Transfer) -> bool:
        """Return whether a kernel moves the transfer; if not, `cma` does, by staging if a GPU is in
        it."""
        if transfer.move is not None:
            return True  # `takes` has said so
        if self._link.core.verify:
            return False
        pieces = max(1, len(transfer.nbytes))
        return transfer.total_nbytes / pieces >= self._limit_nbytes and not self._reach.obstacle(
            transfer.local_regions, transfer.remote_regions
        )

    def _prepare(self, transfer: Transfer, kinds: set[str]) -> None:
        """Refuse what this path cannot move; arranges the count of what it can."""
        self._check_kinds(kinds, transfer.local_regions, transfer.ticket.operation)
        if transfer.write and transfer.imm is not None:
            here, there = transfer.local_regions[0].device, transfer.remote_regions[0]
            counted = self._mappings.counted(here, there)
            transfer.on_placed = functools.partial(self._tell_placed, transfer, counted)

    def _check_kinds(
        self, kinds: set[str], local: Sequence[MemoryRegion | RegisteredCache], operation: str
    ) -> None:
        peer = self._link.peer.name
        devices = {region.device for region in local}
        if len(kinds) > 1 or kinds - {"cuda"}:
            why = "one end is host memory and the other GPU memory: stage it on one side first"
        elif len(devices) > 1 or -1 in devices:
            why = "the local regions are on several GPUs: make one transfer for each"
        else:
            return
        raise NotRegistered(why, operation=operation, peer=peer)

    def _tell_placed(self, transfer: Transfer, counted: bool) -> None:
        """Tell the peer's host what has arrived, and whether its device's counter has it."""
        assert transfer.imm is not None
        nbytes = transfer.total_nbytes
        self._link.send(Arrived(transfer.imm, nbytes, 1, device_nbytes=nbytes if counted else 0))

    def _remote_addresses(self, regions: tuple[RegionDescriptor, ...], device: int) -> Any:
        addresses = [self._mappings.address(device, region) for region in regions]
        return np.array(addresses, np.int64)

    def _counter(self, transfer: Transfer, device: int) -> int | None:
        """Address of the peer's device counter for a write's imm."""
        if not transfer.write or transfer.imm is None:
            return None
        region: RegionDescriptor = transfer.remote_regions[0]
        return self._mappings.counters(device, region) + slot_offset(transfer.imm)

    def _lane(self, device: int) -> Lane:
        from .lane import Lane

        with self._lock:
            lane = self._lanes.get(device)
            if lane is None:
                if self._halting:
                    raise TransportUnavailable("the link is down", operation="transfer")
                lane = self._lanes[device] = Lane(
                    device, self._link.core.identity.name, self._watch
                )
            return lane

    def _arrived(self, message: Arrived) -> bool:
        if message.device_nbytes:
            self._link.core.device_counters.added(message.imm, message.device_nbytes)
        return False  # the link counts it for hosts

    def forget(self, region_id: int) -> None:
        # Unmapping may wait for the GPU, and this is the progress thread.
        threading.Thread(target=self._mappings.forget, args=(region_id,), daemon=True).start()

    def halt(self, halted: Callable[[], None]) -> None:
        with self._lock:
            self._halting = True
            lanes = list(self._lanes.values())
            writes = list(self._graph_writes)
        if not lanes:
            self._host.halt(halted)
            return

        def drain() -> None:
            for write in writes:
                write.close()
            for lane in lanes:
                lane.close()
            self._mappings.close()
            self._host.halt(halted)

        threading.Thread(target=drain, name="kvferry-drain", daemon=True).start()


class _Refusing:
    """Ends a transfer with the error that its preparation raised: `submit` never raises."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> bool:
        if not isinstance(error, EngineError):
            return False
        self._transfer.stop(error)
        return True
