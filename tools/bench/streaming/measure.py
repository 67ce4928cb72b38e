"""Measures the vLLM worker's streaming beside a forward pass, on one GPU and more. Needs what kvferry
needs, not vLLM:

PYTHONPATH=src python3 -m kvferry.tools.bench.streaming.measure --json report.json

Each rank of prefill and of decode is a process with a GPU of its own, the connector's worker side and
caches as vLLM registers them. Only prefill computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvferry.adapters.vllm.cache import Backend, CacheGroup, Heads, describe_caches
from kvferry.adapters.vllm.orders import Orders, ReceiveOrder, SendOrder
from kvferry.adapters.vllm.settings import Settings
from kvferry.adapters.vllm.worker import WorkerSide
from kvferry.tools.bench import figures
from kvferry.tools.bench.figures import WrongBytes
from kvferry.tools.bench.peers import Peer, close_all
from kvferry.tools.bench.streaming.model import DEEPSEEK_V3, LLAMA_70B, Shape, StandIn

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS_A_BLOCK = 16
POOL_FACTOR = 2
BACKEND = Backend("FLASH_ATTN", "", "0.32.0")
ALONE, STREAMED, AFTER, PULLED = "alone", "streamed", "after", "pulled"
KINDS: tuple[str, ...] = (ALONE, STREAMED, AFTER, PULLED)
WAIT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a model, ranks at each end, a prompt, and how often."""

    shape: Shape
    ranks: int
    num_tokens: int
    device: str = "cuda"
    repeats: int = 9
    max_programs: int = Settings.max_programs

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // TOKENS_A_BLOCK)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of moving a prompt, medians, milliseconds.

    Attributes:
        nbytes: moved from all ranks.
        forward_ms: the slowest rank's forward pass, by events of its GPU.
        slower: than the forward pass alone.
        visible_ms: from the end of the last rank's forward pass until all of decode's agents knew
            that they had everything; below zero if that was before.
        noticed_ms: the same, until the threads that ask as vLLM's does had been told.
        tail_ms: of the forward pass, what comes after the last layer's attention, when the last of
            the cache is computed.
    """

    model: str
    ranks: int
    num_tokens: int
    kind: str
    nbytes: int
    forward_ms: float
    slower: float
    visible_ms: float
    noticed_ms: float
    tail_ms: float


class Sample(NamedTuple):
    """One prompt, as in `Row`."""

    forward_ms: float
    tail_ms: float
    visible_ms: float = 0.0
    noticed_ms: float = 0.0
    nbytes: int = 0


class Rank:
    """What a process holds: a worker, its caches and, at prefill, a model."""

    def __init__(self, case: Case, side: str, rank: int, mode: str, port: int) -> None:
        shape, device = case.shape, case.device
        self.case, self.side, self.rank = case, side, rank
        self.cuda = device == "cuda"
        if self.cuda:
            first = min(case.ranks, torch.cuda.device_count() - 1) if side == "decode" else 0
            torch.cuda.set_device(first + rank)
        else:
            torch.set_num_threads(1)
        heads = max(1, shape.kv_heads // case.ranks)
        content = shape.latent or 2 * shape.head_dim
        blocks = POOL_FACTOR * case.num_blocks
        sizes = (blocks, TOKENS_A_BLOCK, heads, content)
        pools = [
            torch.zeros(sizes, dtype=torch.bfloat16, device=device) for _ in range(shape.layers)
        ]
        names = [f"model.layers.{layer}.self_attn.attn" for layer in range(shape.layers)]
        group = CacheGroup(0, "mla" if shape.latent else "full", tuple(names), TOKENS_A_BLOCK)
        # vLLM's order of sizes; in memory tokens come before heads.
        views = [pool[:, :, 0] if shape.latent else pool.transpose(1, 2) for pool in pools]
        self.caches = dict(zip(names, views, strict=True))
        total = 1 if shape.latent else shape.kv_heads
        layouts = [
            describe_caches(self.caches, [group], BACKEND, Heads.of_rank(total, case.ranks, each))
            for each in range(case.ranks)
        ]
        layout, self.names = layouts[rank]
        self.rows = [pool.view(blocks * TOKENS_A_BLOCK, heads * content) for pool in pools]
        if self.cuda:
            torch.cuda.synchronize()
        self.worker = WorkerSide(
            engine_id=side,
            rank=rank,
            role=side,
            settings=Settings(
                mode=mode,  # type: ignore[arg-type]
                transports=("cuda_ipc" if self.cuda else "cma",),
                max_programs=case.max_programs,
            ),
            layout=layout,
            names=self.names,
            caches=self.caches,
            num_blocks=blocks,
            ranks=[each for each, _ in layouts] if case.ranks > 1 else (),
        )
        self._began_s = 0.0
        self.model: StandIn | None = None
        if side == "prefill":
            if case.ranks > 1:
                torch.distributed.init_process_group(
                    "nccl" if self.cuda else "gloo",
                    init_method=f"tcp://127.0.0.1:{port}",
                    rank=rank,
                    world_size=case.ranks,
                )
            reduce = torch.distributed.all_reduce if case.ranks > 1 else _nothing
            self.model = StandIn(shape, case.ranks, case.num_tokens, device, reduce)

    def address(self) -> str:
        return self.worker.agent.address

    def close(self) -> None:
        self.worker.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def slots(self, blocks: list[int]) -> torch.Tensor:
        """Return where the prompt's tokens are in the rows."""
        rows = torch.tensor(blocks).repeat_interleave(TOKENS_A_BLOCK) * TOKENS_A_BLOCK
        rows += torch.arange(TOKENS_A_BLOCK).repeat(len(blocks))
        return rows[: self.case.num_tokens].to(self.case.device)

    def digest(self, blocks: list[int]) -> list[int]:
        """Return a number a layer of what the prompt's blocks hold, in order."""
        index = torch.tensor(blocks, device=self.case.device)
        out = []
        for rows in self.rows:
            held = rows.view(torch.int16).view(-1, TOKENS_A_BLOCK * rows.shape[1])[index].long()
            weights = torch.arange(1, held.numel() + 1, device=held.device).view_as(held)
            out.append(int(((held & 0xFFFF) * weights).sum()))
        return out

    def forward(
        self, order: SendOrder | None, blocks: list[int], kind: str
    ) -> tuple[float, float, float]:
        """Return one step of vLLM's model runner: milliseconds of it and of its tail, and when it
        ended."""
        assert self.model is not None
        worker, orders = self.worker, Orders(sends=[order] if order is not None else [])
        slots = self.slots(blocks)
        worker.before_forward(orders)
        streams = kind in (STREAMED, PULLED)

        def computed(layer: int) -> None:
            if layer == len(self.names) - 1:
                clock.mark()
            if streams:
                worker.layer_computed(self.names[layer])

        clock = _Clock(self.cuda)
        self.model.forward(self.rows, slots, computed)
        clock.mark()
        worker.begin_receives(orders)
        worker.after_forward()
        times_ms, ended_s = clock.read()
        worker.take_results(idle=False)
        return times_ms[1], times_ms[1] - times_ms[0], ended_s

    def finish(self, req_id: str) -> None:
        """The request ended: waits until its blocks are free."""
        orders = Orders(finished_sends=[req_id])
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            self.worker.before_forward(orders)
            orders = Orders()
            if req_id in self.worker.take_results(idle=True).sent:
                return
        raise TimeoutError(f"{req_id} is still being sent")

    def begin(self, order: ReceiveOrder) -> None:
        """Ask prefill."""
        self._began_s = time.monotonic()
        self.worker.begin_receives(Orders(receives=[order]))

    def received(self, req_id: str) -> tuple[float, float, int]:
        """When the agents had all of it, when vLLM's thread would have known, and the bytes."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            results = self.worker.take_results(idle=True)
            if results.received:
                noticed_s = time.monotonic()
                figures = self.worker.figures.take()
                if req_id in results.failed:
                    raise RuntimeError(f"{req_id} was not loaded: {figures}")
                (nbytes,), (seconds,) = figures["load_nbytes"], figures["load_seconds"]
                return self._began_s + seconds, noticed_s, nbytes
        raise TimeoutError(f"{req_id} did not arrive")


class _Clock:
    """Times what a GPU's current stream is given, or what the host does."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            event, _ = figures.events()
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.monotonic())

    def read(self) -> tuple[list[float], float]:
        """Milliseconds from the beginning to each mark after it, and when the last one was."""
        begin, *marks = self._marks
        if not self._cuda:
            return [(mark - begin) * 1e3 for mark in marks], marks[-1]
        marks[-1].synchronize()
        ended_s = time.monotonic()
        return [begin.elapsed_time(mark) for mark in marks], ended_s


def _nothing(_: torch.Tensor) -> None:
    """One rank has nothing to add up."""


class Bench:
    """All ranks of one case, in one mode of the connector."""

    def __init__(self, case: Case, mode: str) -> None:
        self.case, self.mode = case, mode
        self._random = np.random.default_rng(case.num_tokens)
        self._number = 0
        port = _free_port()
        self._peers = {
            side: [Peer(Rank, case, side, rank, mode, port) for rank in range(case.ranks)]
            for side in ("prefill", "decode")
        }
        self._addresses = self.call("prefill", "address")
        self.call("decode", "address")

    def close(self) -> None:
        close_all([*self._peers["prefill"], *self._peers["decode"]])

    def call(self, side: str, *command: Any) -> list[Any]:
        """Return every rank of a side at once."""
        self.tell(side, *command)
        return self.answers(side)

    def tell(self, side: str, *command: Any) -> None:
        for peer in self._peers[side]:
            peer.tell(*command)

    def answers(self, side: str) -> list[Any]:
        return [peer.answer() for peer in self._peers[side]]

    def once(self, kind: str, *, check: bool = False) -> Sample:
        """Return one prompt."""
        case = self.case
        total = POOL_FACTOR * case.num_blocks
        src, dst = (self._random.permutation(total)[: case.num_blocks].tolist() for _ in range(2))
        if kind == ALONE:
            forward_ms, tail_ms, _ = _slowest(self.call("prefill", "forward", None, src, kind))
            return Sample(forward_ms, tail_ms)
        self._number += 1
        name = f"r{self._number}"
        tokens = case.num_tokens
        order = ReceiveOrder(name, name, "prefill", self._addresses, [dst], tokens, 0)
        self.call("decode", "begin", order)
        self.tell("decode", "received", name)
        sending = SendOrder(name, name, [src], tokens)
        forward_ms, tail_ms, ended_s = _slowest(self.call("prefill", "forward", sending, src, kind))
        loads = self.answers("decode")
        self.call("prefill", "finish", name)
        if check and self.call("prefill", "digest", src) != self.call("decode", "digest", dst):
            raise WrongBytes(f"{case.shape.name}, {kind}")
        arrived_s, noticed_s, _ = _slowest(loads)
        visible_ms, noticed_ms = ((at_s - ended_s) * 1e3 for at_s in (arrived_s, noticed_s))
        nbytes = sum(load[2] for load in loads)
        return Sample(forward_ms, tail_ms, visible_ms, noticed_ms, nbytes)


def _slowest(ranks: list[Any]) -> list[float]:
    """Of each of the ranks' figures the largest."""
    return [max(each) for each in zip(*ranks, strict=True)]


def measure(case: Case, wanted: Sequence[str] = KINDS) -> list[Row]:
    """Ways of moving prompts, in turns. The first is beside nothing.

    Raises:
        WrongBytes: a prompt did not arrive as it was computed.
    """
    samples: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    for mode, of_mode in (("push", (ALONE, STREAMED, AFTER)), ("pull", (PULLED,))):
        kinds = tuple(kind for kind in of_mode if kind in wanted)
        if not kinds:
            continue
        with contextlib.closing(Bench(case, mode)) as bench:
            for kind in kinds:
                for _ in range(2):  # kernels are compiled, peers met
                    bench.once(kind, check=kind != ALONE)
            for turn in range(case.repeats):
                first = turn % len(kinds)  # a GPU's clock falls while it works
                for kind in kinds[first:] + kinds[:first]:
                    last = turn == case.repeats - 1 and kind != ALONE
                    samples[kind].append(bench.once(kind, check=last))
    found: list[Row] = []
    for kind in (kind for kind in KINDS if kind in wanted):
        columns = zip(*samples[kind], strict=True)
        medians = dict(zip(Sample._fields, map(statistics.median, columns), strict=True))
        nbytes = samples[kind][-1].nbytes
        alone_ms = found[0].forward_ms if found else medians["forward_ms"]
        slower = medians["forward_ms"] / alone_ms - 1
        head = (case.shape.name, case.ranks, case.num_tokens, kind)
        found.append(Row(*head, **medians | {"nbytes": nbytes, "slower": slower}))
    return found


CASES = (
    Case(LLAMA_70B, 1, 512),
    Case(LLAMA_70B, 1, 2048),
    Case(DEEPSEEK_V3, 1, 2048),
    Case(LLAMA_70B, 2, 2048),
    Case(DEEPSEEK_V3, 2, 2048),
)


def cases(num_gpus: int) -> list[Case]:
    """Return what so many GPUs can run."""
    return [case for case in CASES if case.ranks == 1 or 2 * case.ranks <= num_gpus]


def show(rows: Sequence[Row]) -> None:
    """Print them as a table."""
    print(
        f"{'model':<12} {'TP':>2} {'tokens':>6} {'':<9} {'MiB':>6} {'forward ms':>10} "
        f"{'slower':>7} {'visible ms':>10} {'noticed ms':>10} {'tail ms':>8}"
    )
    for row in rows:
        print(
            f"{row.model:<12} {row.ranks:>2} {row.num_tokens:>6} {row.kind:<9} "
            f"{row.nbytes / (1 << 20):6.0f} {row.forward_ms:10.2f} {row.slower:7.1%} "
            f"{row.visible_ms:10.3f} {row.noticed_ms:10.3f} {row.tail_ms:8.3f}",
            flush=True,
        )


def _free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def measure_all(chosen: Sequence[Case], wanted: Sequence[str] = KINDS) -> list[Row]:
    """Measure cases one after the other, and print each. Raises WrongBytes."""
    rows = []
    for case in chosen:
        found = measure(case, wanted)
        show(found)
        rows += found
    return rows


def main() -> None:
    options = figures.options(__doc__, gpu=True, caps="Try limits of programs instead.")
    chosen, wanted = cases(torch.cuda.device_count()), KINDS
    if options.caps:
        caps = (0, 8, 16, 24, 48, 0)
        chosen = [dataclasses.replace(CASES[0], max_programs=cap, repeats=30) for cap in caps]
        wanted = (ALONE, STREAMED)
    rows = []
    for case in chosen:
        print(f"at most {case.max_programs or 'any number of'} programs", flush=True)
        rows += measure_all([case], wanted)
    figures.write_json(options.json, rows)


if __name__ == "__main__":
    main()
