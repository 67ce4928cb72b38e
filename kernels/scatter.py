"""Scatter: contiguous staging into scattered blocks of a paged cache, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .copy import Side, launch_copy
from .paged import as_integers
from .runtime import kernels_run_on

if TYPE_CHECKING:
    import torch

    from .paged import PagedCache
    from .tiles import Tuning


def scatter_reference(staging: torch.Tensor, cache: PagedCache, ids: torch.Tensor) -> None:
    """The truth in plain PyTorch."""
    for view, part in zip(cache.tensor_views(), staging.flatten(0, 1), strict=True):
        view[ids.long()] = part


def scatter(
    staging: torch.Tensor,
    cache: PagedCache,
    ids: torch.Tensor,
    *,
    bad_ids: torch.Tensor | None = None,
    max_programs: int | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Copies `staging` into blocks `ids` of all layers and planes; the inverse of `gather`.

    On a GPU: stream-ordered on the current stream, no host read, no allocation (so a CUDA graph can
    hold it); the caller keeps all tensors alive until the stream has passed. On a CPU: done on
    return.

    Args:
        staging: contiguous `cache.staging_shape(len(ids))` of the cache's dtype, on its device or in
            pinned host memory.
        cache: destination; `cache.select_layers` for some layers alone.
        ids: int32 or int64 `[block]`, on the cache's device. A block that is named twice holds a
            mixture afterwards.
        bad_ids: int32 `[1]` on the device, set to 1 if an id is out of range; nothing is written
            for it.
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
        _scatter_on_cpu(staging, cache, ids)
        return
    launch_copy(
        Side(staging, None),
        Side(cache, ids),
        ids.numel(),
        bad_ids=bad_ids,
        max_programs=max_programs,
        tuning=tuning,
    )


def _scatter_on_cpu(staging: torch.Tensor, cache: PagedCache, ids: torch.Tensor) -> None:
    """One vectorised call for each layer and plane."""
    parts = as_integers(staging).flatten(0, 1)
    for view, part in zip(cache.integer_views(), parts, strict=True):
        view.index_copy_(0, ids.long(), part)
