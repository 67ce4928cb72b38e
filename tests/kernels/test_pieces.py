"""The table of pieces: rows that cover every byte once, and the widest word that divides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvferry.kernels import rows as rows_module
from kvferry.kernels.errors import ShapeError
from kvferry.kernels.pieces import FEWEST_SHORT_ROWS, ROW_NBYTES, copy_pieces, make_table


def test_rows_cover_every_byte_of_every_piece_once() -> None:
    src = np.array([1 << 40, 7, 3 << 33], np.int64)
    dst = np.array([5, 2 << 40, 9], np.int64)
    nbytes = np.array([ROW_NBYTES * 2 + 3, 1, ROW_NBYTES], np.int64)
    table = make_table(src, dst, nbytes)
    assert (table.word_nbytes, table.nbytes) == (1, nbytes.sum())
    assert table.columns.tolist() == [
        [1 << 40, (1 << 40) + ROW_NBYTES, (1 << 40) + 2 * ROW_NBYTES, 7, 3 << 33],
        [5, 5 + ROW_NBYTES, 5 + 2 * ROW_NBYTES, 2 << 40, 9],
        [ROW_NBYTES, ROW_NBYTES, 3, 1, ROW_NBYTES],
    ]


@pytest.mark.parametrize(
    ("odd", "unit", "word"), [(0, 16, 8), (8, 8, 8), (4, 4, 4), (2, 2, 2), (1, 1, 1), (96, 16, 8)]
)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_the_word_divides_every_address_and_size(
    odd: int, unit: int, word: int, where: int
) -> None:
    columns = [np.array([1 << 30, 1 << 20], np.int64) for _ in range(3)]
    columns[2][:] = 4096
    columns[where][1] += odd
    table = make_table(*columns)
    assert (table.unit_nbytes, table.word_nbytes) == (unit, word)
    assert int(table.columns[2].sum()) * word == table.nbytes


def test_empty_pieces_take_no_row() -> None:
    empty = np.zeros(0, np.int64)
    assert make_table(empty, empty, empty).columns.shape == (3, 0)
    zeros = np.zeros(4, np.int64)
    assert make_table(zeros, zeros, zeros).columns.shape == (3, 0)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ShapeError):
        make_table(np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros(3, np.int64))


def test_neighbours_at_both_ends_are_one_row() -> None:
    nbytes = np.full(40, 100, np.int64)
    there = 1000 + np.arange(40) * 100
    assert make_table(there + 7, there, nbytes).columns.tolist() == [[1007], [1000], [4000]]
    apart = there + (np.arange(40) >= 20) * 8
    table = make_table(apart, there, nbytes)
    assert table.columns.tolist() == [[1000, 3008], [1000, 3000], [250, 250]]
    assert table.nbytes == 4000


@pytest.mark.parametrize("max_programs", [None, 3])
@pytest.mark.parametrize(
    ("sizes", "grain", "short"),
    [
        ([48] * 40, 16, True),
        ([48] * 40, 1, True),
        ([8] * FEWEST_SHORT_ROWS, 8, True),
        ([8] * (FEWEST_SHORT_ROWS - 1), 8, False),
        ([48] * 39 + [47], 1, False),
        ([4096] * 20, 16, False),
    ],
)
def test_pieces_land_and_nothing_else(
    kernel_device: str,
    sizes: list[int],
    grain: int,
    short: bool,
    max_programs: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows_module, "TILE_WORDS", 256)
    draw = np.random.default_rng(3)
    nbytes = np.array(sizes, np.int64)
    ends = []
    for _ in range(2):
        gaps = draw.integers(1, 5, len(sizes)) * grain
        offsets = np.cumsum(nbytes + gaps) - nbytes
        ends.append(offsets[draw.permutation(len(sizes))] if len(set(sizes)) == 1 else offsets)
    span = int((nbytes + 5 * grain).sum()) + 16
    src = torch.randint(0, 256, (span,), dtype=torch.uint8).to(kernel_device)
    dst = torch.full((span,), 0x5A, dtype=torch.uint8, device=kernel_device)
    expected = dst.cpu().clone()
    for a, b, n in zip(ends[0], ends[1], sizes, strict=True):
        expected[b : b + n] = src[a : a + n].cpu()
    table = make_table(src.data_ptr() + ends[0], dst.data_ptr() + ends[1], nbytes)
    assert table.short is short
    columns = torch.from_numpy(table.columns).to(kernel_device)
    copy_pieces(table, columns, max_programs=max_programs)
    assert torch.equal(dst.cpu(), expected)
