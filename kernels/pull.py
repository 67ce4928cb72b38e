"""Pull: scattered blocks of a peer into scattered blocks here, by one launch that also signals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .copy import Side, launch_copy
from .pair import check_pair, copy_on_cpu
from .runtime import kernels_run_on
from .signal import check_signal

if TYPE_CHECKING:
    import torch

    from .paged import PagedCache
    from .signal import Signal
    from .tiles import Tuning


def pull_reference(
    dst: PagedCache, dst_ids: torch.Tensor, src: PagedCache, src_ids: torch.Tensor
) -> None:
    """The truth in plain PyTorch."""
    for here, there in zip(dst.tensor_views(), src.tensor_views(), strict=True):
        here[dst_ids.long()] = there[src_ids.long()]


def pull(
    dst: PagedCache,
    dst_ids: torch.Tensor,
    src: PagedCache,
    src_ids: torch.Tensor,
    *,
    signal: Signal | None = None,
    bad_ids: torch.Tensor | None = None,
    max_programs: int | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Copies block `src_ids[i]` of a peer's every layer and plane into our block `dst_ids[i]`.

    On a GPU: stream-ordered on the current stream, no host read, no allocation (so a CUDA graph can
    hold it); the caller keeps all tensors, and the mapping of the peer's memory, alive until the
    stream has passed. On a CPU: done on return.

    Args:
        dst: ours, on the launching device.
        dst_ids: int32 or int64 `[block]`, on that device. A block that is named twice holds a
            mixture afterwards.
        src: the peer's, `PagedCache.from_addresses` on the launching device. Strides may differ from
            those of `dst`; shapes may not.
        src_ids: as `dst_ids`, and as many.
        signal: the counter to which the last program adds the bytes of the whole launch: at the peer
            it says that its blocks were read and may be reused. Not if an id was out of range.
        bad_ids: int32 `[1]` on the device, set to 1 if an id is out of range: such a block is
            neither read nor written. With a signal its own state is that flag.
        max_programs: upper bound on the programs that run at a time, to leave room for a model.
        tuning: how the work is cut up; chosen by size if None.

    Raises:
        ShapeError: names the dimension that is wrong.
        BlockIdError: an id in host memory is out of range.
    """
    dst_ids = dst.check_ids(dst_ids, "dst_ids")
    src_ids = src.check_ids(src_ids, "src_ids")
    check_pair(src, dst, src_ids.numel(), dst_ids.numel())
    dst.check_flag(bad_ids)
    check_signal(dst, signal, bad_ids)
    if not kernels_run_on(dst.device):
        copy_on_cpu(src, src_ids, dst, dst_ids)
        return
    launch_copy(
        Side(src, src_ids),
        Side(dst, dst_ids),
        src_ids.numel(),
        bad_ids=bad_ids,
        signal=signal,
        max_programs=max_programs,
        tuning=tuning,
    )
