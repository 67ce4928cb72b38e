"""Gather, scatter and push by the kernel that links launch, through Triton's own way in.

Links launch it through `kernels/launch.py`, which is quicker and leaves nothing to choose. Here the
tuning, the bound on programs and dense staging can be.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvferry.kernels import copy as copy_module  # tests put an interpreter into it
from kvferry.kernels.paged import WIDEST_NBYTES, PagedCache
from kvferry.kernels.tiles import default_tuning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvferry.kernels.paged import Geometry
    from kvferry.kernels.signal import Signal
    from kvferry.kernels.tiles import Tuning


class Side(NamedTuple):
    """One end of a copy: a paged cache with ids on its device, or dense staging with None."""

    memory: PagedCache | torch.Tensor
    ids: torch.Tensor | None


def copy_blocks(
    src: Side,
    dst: Side,
    num_ids: int,
    *,
    bad_ids: torch.Tensor | None = None,
    signal: Signal | None = None,
    max_programs: int | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Launch the kernel on the current stream; trusts its arguments.

    Reads nothing of the device and allocates nothing, so that a CUDA graph can hold it.
    """
    cache = src.memory if isinstance(src.memory, PagedCache) else dst.memory
    assert isinstance(cache, PagedCache)
    nbytes = cache.nbytes(num_ids)
    if nbytes == 0:
        return
    src_geometry, src_bases, src_blocks, src_alignment = _arguments(src)
    dst_geometry, dst_bases, dst_blocks, dst_alignment = _arguments(dst)
    staged = src.ids is None or dst.ids is None
    tuning = tuning or default_tuning(nbytes, staged=staged, capped=max_programs is not None)
    alignment = min(src_alignment, dst_alignment)
    constants = copy_module.kernel_constants(src_geometry, dst_geometry, alignment, tuning)
    num_entries = cache.num_entries
    entry_tiles = -(-num_ids * constants.block_chunks // constants.chunks)
    if num_entries > copy_module.MOST_GRID_Y and max_programs is None:
        max_programs = copy_module.MOST_PROGRAMS
    loop = max_programs is not None and max_programs < entry_tiles * num_entries
    grid = (max_programs,) if loop else (entry_tiles, num_entries)
    copy_module.copy_kernel[grid](
        src_bases,
        src.ids,
        dst_bases,
        dst.ids,
        bad_ids,
        None if signal is None else signal.state.view(torch.int64),
        None,
        None,
        None,
        0 if signal is None else signal.counter_address,
        nbytes,
        num_entries,
        num_ids,
        src_blocks,
        dst_blocks,
        *constants.arguments,
        loop,
        1,
        1,
        num_warps=tuning.num_warps,
    )


def gather_reference(views: Sequence[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Return the truth in plain PyTorch: of each entry `[block, …]` these blocks, one after the
    other."""
    return torch.stack([view[ids.long()] for view in views])


def scatter_reference(
    staging: torch.Tensor, views: Sequence[torch.Tensor], ids: torch.Tensor
) -> None:
    """The inverse of `gather_reference`."""
    for view, part in zip(views, staging, strict=True):
        view[ids.long()] = part


def push_reference(
    src: Sequence[torch.Tensor],
    src_ids: torch.Tensor,
    dst: Sequence[torch.Tensor],
    dst_ids: torch.Tensor,
) -> None:
    """Blocks of one cache into blocks of another."""
    scatter_reference(gather_reference(src, src_ids), dst, dst_ids)


def _arguments(side: Side) -> tuple[Geometry | None, torch.Tensor | int, int, int]:
    """Geometry (None if dense), bases, number of blocks, alignment of the dense address."""
    memory = side.memory
    if isinstance(memory, PagedCache):
        return memory.geometry, memory.bases, memory.geometry.num_blocks, WIDEST_NBYTES
    address = memory.data_ptr()
    return None, address, 0, math.gcd(WIDEST_NBYTES, address)
