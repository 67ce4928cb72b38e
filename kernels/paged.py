"""A paged cache as the kernels see it: a table of base addresses, and one set of strides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from .errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDEST_NBYTES = 16  # the widest access of one thread


class Geometry(NamedTuple):
    """The shape of a cache, in bytes; hashable, so that launch plans are cached by it.

    One block of one entry is `outer` x `inner` runs of `dim_nbytes` contiguous bytes.
    """

    num_blocks: int
    outer: int
    inner: int
    dim_nbytes: int
    block_stride_nbytes: int
    outer_stride_nbytes: int
    inner_stride_nbytes: int
    alignment_nbytes: int  # of every base address, at most WIDEST_NBYTES

    @property
    def block_entry_nbytes(self) -> int:
        """Bytes of one block of one entry."""
        return self.outer * self.inner * self.dim_nbytes


class PagedCache(NamedTuple):
    """Where the blocks of a cache lie. Owns none of that memory, which may be a peer's.

    Attributes:
        bases: int64 `[entry]` on the launching device: where block 0 of each entry (a plane of a
            layer, say) begins. Entries may be separate allocations.
        geometry: shape and strides, the same for every entry.
    """

    bases: torch.Tensor
    geometry: Geometry

    @classmethod
    def from_addresses(
        cls, addresses: Sequence[int], geometry: Geometry, device: torch.device | str
    ) -> PagedCache:
        """Describe memory by its addresses.

        Args:
            addresses: of block 0 of each entry, as `device` sees them. The caller keeps them mapped
                for as long as launches may run.
            geometry: its alignment is found anew from the addresses.
            device: the GPU that launches, not the one that owns the memory.
        """
        alignment = math.gcd(WIDEST_NBYTES, *addresses)
        bases = torch.tensor(addresses, dtype=torch.int64).to(device)
        return cls(bases, geometry._replace(alignment_nbytes=alignment))

    @property
    def num_entries(self) -> int:
        """How many entries there are."""
        return len(self.bases)

    def nbytes(self, num_ids: int) -> int:
        """Bytes of `num_ids` blocks of all entries."""
        return num_ids * self.num_entries * self.geometry.block_entry_nbytes


def check_pair(src: PagedCache, dst: PagedCache) -> None:
    """Raise ShapeError, by the name of the dimension, unless blocks of `src` fit into `dst`."""
    for name, here, there in (
        ("entry", src.num_entries, dst.num_entries),
        ("outer", src.geometry.outer, dst.geometry.outer),
        ("inner", src.geometry.inner, dst.geometry.inner),
        ("dim", src.geometry.dim_nbytes, dst.geometry.dim_nbytes),
    ):
        if here != there:
            raise ShapeError(f"dim '{name}' is {here} in src and {there} in dst")
    if src.bases.device != dst.bases.device:
        raise ShapeError(
            f"the tables of src are on {src.bases.device}, those of dst on {dst.bases.device}"
        )
