"""The kernel as a CUDA graph repeats it: imm, number of ids and gate are read where it runs."""

from __future__ import annotations

import pytest
import torch

from kvferry.kernels import copy as copy_module
from kvferry.kernels.tiles import Tuning
from kvferry.tools.bench.kernels.operations import push_reference
from tests.kernels.conftest import Case, Pool

NUM_BLOCKS = 9
CASE = Case("graph", "block token dim", (NUM_BLOCKS, 4, 32), num_tensors=2)
TUNING = Tuning(512, 1)
SLOTS, ROWS = 8, 4
FAR = 1 << 40


class Repeated:
    """A push of at most five blocks, its words, and what must have become of them."""

    def __init__(self, device: str, max_programs: int | None) -> None:
        self.source, self.pool = Pool(CASE, device, seed=1), Pool(CASE, device, seed=None)
        self.expected = self.pool.clone()
        self.src, self.dst = (torch.full((5,), FAR, device=device) for _ in range(2))
        self.order = torch.zeros(2, dtype=torch.int64, device=device)
        self.counters = torch.zeros(SLOTS, dtype=torch.int64, device=device)
        self.state = torch.zeros(1, dtype=torch.int64, device=device)
        self.gate = torch.zeros(2, dtype=torch.int64, device=device)
        self.log = torch.zeros((ROWS, 2), dtype=torch.int64, device=device)
        self.max_programs = max_programs

    def launch(self, imm: int, src: list[int], dst: list[int], count: int | None = None) -> None:
        for row, ids in ((self.src, src), (self.dst, dst)):
            row.fill_(FAR)
            row[: len(ids)] = torch.tensor(ids)
        self.order.copy_(torch.tensor([imm, len(src) if count is None else count]))
        source, pool = self.source.cache, self.pool.cache
        cut = copy_module.kernel_constants(source.geometry, pool.geometry, 16, TUNING)
        tiles = -(-len(self.src) * cut.block_chunks // cut.chunks)
        loop = self.max_programs is not None
        copy_module.copy_kernel[(self.max_programs,) if loop else (tiles, source.num_entries)](
            source.bases,
            self.src,
            pool.bases,
            self.dst,
            None,
            self.state,
            self.order,
            self.gate,
            self.log,
            self.counters.data_ptr(),
            source.nbytes(1),
            source.num_entries,
            len(self.src),
            NUM_BLOCKS,
            NUM_BLOCKS,
            *cut.arguments,
            loop,
            SLOTS,
            ROWS,
            num_warps=TUNING.num_warps,
        )

    def moves(self, src: list[int], dst: list[int]) -> None:
        """Notes what must have been moved besides, and checks everything."""
        rows = [torch.tensor(ids, dtype=torch.int64, device=self.src.device) for ids in (src, dst)]
        push_reference(self.source.entries, rows[0], self.expected.entries, rows[1])
        assert self.pool.equals(self.expected)
        assert self.state.tolist() == [0]

    def logged(self, number: int) -> tuple[int, int, int, int]:
        """Imm and failure, and ids, of a launch; its number in both halves of the row."""
        first, second = self.log[number % ROWS].tolist()
        assert (first >> 33, second >> 40) == (number, number)
        return first & 0xFFFFFFFF, first >> 32 & 1, second & 0xFFFFFFFFFF, number


@pytest.mark.parametrize("max_programs", [None, 1, 3])
def test_each_launch_reads_its_order(kernel_device: str, max_programs: int | None) -> None:
    work = Repeated(kernel_device, max_programs)
    id_nbytes = work.source.cache.nbytes(1)
    lists = [([1, 2], [3, 4]), ([8], [0]), ([], []), ([0, 3, 5, 7, 8], [8, 1, 2, 5, 6])]
    for number, (src, dst) in enumerate(lists, 1):
        work.launch(number + SLOTS, src, dst)
        work.moves(src, dst)
        assert work.counters[number] == len(src) * id_nbytes
        assert work.logged(number) == (number + SLOTS, 0, len(src), number)
    assert int(work.counters.sum()) == sum(len(src) for src, _ in lists) * id_nbytes


def test_imm_0_counts_nothing(kernel_device: str) -> None:
    work = Repeated(kernel_device, None)
    work.launch(0, [1, 2], [3, 4])
    work.moves([1, 2], [3, 4])
    assert not work.counters.any()
    assert work.logged(1) == (0, 0, 2, 1)


@pytest.mark.parametrize("max_programs", [None, 2])
@pytest.mark.parametrize("bad", [-1, NUM_BLOCKS, FAR])
@pytest.mark.parametrize("side", ["src", "dst"])
def test_a_bad_id_fails_one_launch_and_no_other(
    kernel_device: str, side: str, bad: int, max_programs: int | None
) -> None:
    work = Repeated(kernel_device, max_programs)
    src, dst = [1, 2, 3], [4, 5, 6]
    (src if side == "src" else dst)[1] = bad
    work.launch(3, src, dst)
    work.moves([1, 3], [4, 6])
    assert not work.counters.any()
    assert work.logged(1) == (3, 1, 3, 1)
    work.launch(4, [1], [2])
    work.moves([1], [2])
    assert work.counters[4] == work.source.cache.nbytes(1)


@pytest.mark.parametrize("count", [-1, 6, FAR, -FAR])
def test_a_number_of_ids_out_of_range_moves_nothing(kernel_device: str, count: int) -> None:
    work = Repeated(kernel_device, None)
    work.launch(3, [1, 2, 3], [4, 5, 6], count)
    work.moves([], [])
    assert not work.counters.any()
    assert work.logged(1) == (3, 1, 0, 1)


def test_nothing_passes_a_closed_gate(kernel_device: str) -> None:
    work = Repeated(kernel_device, None)
    work.gate[0] = 1
    work.launch(3, [1, 2, 3], [4, 5, 6])
    work.moves([], [])
    assert not work.counters.any()
    assert work.logged(1) == (3, 1, 0, 1)
