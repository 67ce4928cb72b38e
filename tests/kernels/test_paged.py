"""What the kernels know of a cache, and which two caches they copy between."""

from __future__ import annotations

import pytest
import torch

from kvferry.kernels.errors import KernelError, ShapeError
from kvferry.kernels.launch import LoadedCopy
from kvferry.kernels.paged import Geometry, PagedCache

GEOMETRY = Geometry(9, 4, 3, 16, 192, 48, 16, 1)


def test_addresses_say_how_aligned_they_are() -> None:
    cache = PagedCache.from_addresses([4096, 8200], GEOMETRY, "cpu")
    assert cache.bases.tolist() == [4096, 8200]
    assert cache.bases.dtype == torch.int64
    assert cache.geometry == GEOMETRY._replace(alignment_nbytes=8)
    assert cache.num_entries == 2
    assert cache.nbytes(5) == 2 * 5 * 192


@pytest.mark.parametrize(
    ("entries", "changed", "name"),
    [
        (1, {}, "entry"),
        (2, {"outer": 5}, "outer"),
        (2, {"inner": 2}, "inner"),
        (2, {"dim_nbytes": 18}, "dim"),
    ],
)
def test_caches_of_two_shapes_are_refused_by_name(
    entries: int, changed: dict[str, int], name: str
) -> None:
    src = PagedCache.from_addresses([4096, 8192], GEOMETRY, "cpu")
    dst = PagedCache.from_addresses([4096, 8192][:entries], GEOMETRY._replace(**changed), "cpu")
    with pytest.raises(ShapeError, match=rf"dim '{name}' is \d+ in src and \d+ in dst"):
        LoadedCopy(src, dst, max_programs=None, num_slots=1)


def test_tables_on_two_devices_are_refused() -> None:
    src = PagedCache.from_addresses([4096], GEOMETRY, "cpu")
    dst = PagedCache.from_addresses([4096], GEOMETRY, "meta")
    with pytest.raises(ShapeError, match="the tables of src are on cpu, those of dst on meta"):
        LoadedCopy(src, dst, max_programs=None, num_slots=1)


def test_strides_of_the_two_may_differ() -> None:
    src = PagedCache.from_addresses([4096], GEOMETRY, "cpu")
    dst = PagedCache.from_addresses([4096], GEOMETRY._replace(block_stride_nbytes=999), "cpu")
    assert LoadedCopy(src, dst, max_programs=None, num_slots=1).id_nbytes == 192


def test_every_error_is_a_kernel_error_and_a_builtin_one() -> None:
    assert issubclass(ShapeError, KernelError)
    assert issubclass(ShapeError, ValueError)
