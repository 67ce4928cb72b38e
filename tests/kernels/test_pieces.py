"""The table of pieces: rows that cover every byte once, and the widest word that divides them."""

from __future__ import annotations

import numpy as np
import pytest

from kvferry.kernels.errors import ShapeError
from kvferry.kernels.pieces import ROW_NBYTES, make_table


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
