"""Gather: scattered blocks of a paged cache into contiguous staging, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .copy import Side, launch_copy
from .paged import as_integers
from .runtime import kernels_run_on

if TYPE_CHECKING:
    from .paged import PagedCache
    from .tiles import Tuning


def gather_reference(cache: PagedCache, ids: torch.Tensor) -> torch.Tensor:
    """The truth in plain PyTorch: a new `[layer, plane, block, outer, inner, dim]`."""
    blocks = torch.stack([view[ids.long()] for view in cache.tensor_views()])
    return blocks.reshape(cache.staging_shape(ids.numel()))


def gather(
    cache: PagedCache,
    ids: torch.Tensor,
    staging: torch.Tensor,
    *,
    bad_ids: torch.Tensor | None = None,
    max_programs: int | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Copies blocks `ids` of all layers and planes into `staging`.

    On a GPU: stream-ordered on the current stream, no host read, no allocation (so a CUDA graph can
    hold it); the caller keeps all tensors alive until the stream has passed. On a CPU: done on
    return.

    Args:
        cache: source; `cache.select_layers` for some layers alone.
        ids: int32 or int64 `[block]`, on the cache's device. The same id may come twice.
        staging: contiguous `cache.staging_shape(len(ids))` of the cache's dtype, on its device or in
            pinned host memory.
        bad_ids: int32 `[1]` on the device, set to 1 if an id is out of range; its part of the
            staging becomes zeros.
        max_programs: upper bound on the programs that run at a time, to leave room for a model.
        tuning: how the work is cut up; chosen by size if None.

    Raises:
        ShapeError: names the dimension that is wrong.
        BlockIdError: an id in host memory is out of range.
    """
    ids = cache.check_ids(ids)
    cache.check_staging(staging, ids.numel())
    cache.check_flag(bad_ids)
    if not kernels_run_on(cache.device):
        _gather_on_cpu(cache, ids, staging)
        return
    launch_copy(
        Side(cache, ids),
        Side(staging, None),
        ids.numel(),
        bad_ids=bad_ids,
        max_programs=max_programs,
        tuning=tuning,
    )


def _gather_on_cpu(cache: PagedCache, ids: torch.Tensor, staging: torch.Tensor) -> None:
    """One vectorised call for each layer and plane."""
    parts = as_integers(staging).flatten(0, 1)
    for view, part in zip(cache.integer_views(), parts, strict=True):
        torch.index_select(view, 0, ids, out=part)
