"""Block ids as a transport takes them: checked, and wherever they lie."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import PlanError
from ..memory.cuda_driver import driver
from ..plan.block_tables import are_few

if TYPE_CHECKING:
    import torch

    from .plan import TransferPlan


class UploadedIds:
    """Pairs of block ids that were checked, ordered and copied to a GPU once, to be used often.

    Made by `Link.upload_ids`; give it to `write_blocks` or `read_blocks` in place of both lists, as
    often as you like (layer by layer, say). Holds its GPU memory; nobody writes it. Thread-safe.

    Attributes:
        plan: the plan that they were checked against; they serve no other.
        num_blocks: how many pairs.
    """

    def __init__(self, plan: TransferPlan, rows: torch.Tensor) -> None:
        self.plan = plan
        self.num_blocks = int(rows.shape[1])
        self._checked = CheckedIds(rows[0], rows[1], True, self.num_blocks)

    def __len__(self) -> int:
        return self.num_blocks


class CheckedIds(NamedTuple):
    """Ids of a `BlockMove`.

    Attributes:
        src, dst: int64 rows in host memory, lists of a few Python numbers, or int32 or int64
            tensors on the GPU.
        on_gpu: which of the two.
        num_blocks: how many.
    """

    src: Any
    dst: Any
    on_gpu: bool
    num_blocks: int


def check_ids(plan: TransferPlan, src: Any, dst: Any) -> CheckedIds:
    """Check block ids of any kind: lists, rows, tensors on a GPU, or `UploadedIds` and None.

    Those in host memory are looked at, and come back in order of their destination if the plan's
    pieces are so small that it matters; two tensors on a GPU stay where they are, unread.

    Raises:
        BlockOutOfRange, OverlappingBlocks, PlanError: as for `BlockPlan.pieces`.
    """
    if are_few(src) and are_few(dst):
        few = plan.plan.order_few(src, dst)
        if few is not None:
            return CheckedIds(*few, False, len(few[1]))
    if type(src) is UploadedIds:
        if dst is not None or src.plan is not plan:
            raise PlanError(
                "uploaded ids stand for both lists, and for the plan they were uploaded for"
            )
        return src._checked
    if dst is None:
        raise PlanError("destination block ids are missing")
    if not (is_on_gpu(src) or is_on_gpu(dst)):
        rows_src, rows_dst = plan.plan.check_ids(src, dst, ordered=plan.wants_order)
        return CheckedIds(rows_src, rows_dst, False, len(rows_dst))
    return CheckedIds(src, dst, True, check_on_gpu(plan, src, dst))


def upload_ids(plan: TransferPlan, src: Any, dst: Any) -> UploadedIds:
    """Check block ids, order them as `check_ids` does and copy them to the plan's GPU. Waits for it.

    Raises:
        BlockOutOfRange, OverlappingBlocks, PlanError: as for `check_ids`.
    """
    import torch

    ids = check_ids(plan, src, dst)
    device = torch.device("cuda", plan.local.device)
    with driver().beside_captures():
        if ids.on_gpu:
            order = torch.argsort(ids.dst)
            rows = torch.stack([ids.src[order].long(), ids.dst[order].long()])
        else:
            rows = torch.from_numpy(np.stack([ids.src, ids.dst])).to(device)
        torch.cuda.current_stream(device).synchronize()
    return UploadedIds(plan, rows)


def is_on_gpu(ids: Any) -> bool:
    """Say whether ids, or a block table, are a tensor on a GPU."""
    return getattr(ids, "is_cuda", False)


def check_on_gpu(plan: TransferPlan, src: Any, dst: Any) -> int:
    """Check everything of two tensors of ids but their values; return how many there are.

    Raises:
        PlanError: they are not two equally long rows of integers on the GPU of the cache.
    """
    device = plan.local.device
    try:
        count: int = src.numel()
        if (
            src.get_device() == device
            and dst.get_device() == device
            and dst.numel() == count
            and src.dim() == 1
            and dst.dim() == 1
            and src.is_contiguous()
            and dst.is_contiguous()
            and src.dtype in _dtypes()
            and dst.dtype in _dtypes()
        ):
            return count
    except AttributeError:
        pass  # one of them is no tensor
    raise PlanError(
        "block ids on a GPU must be two equally long contiguous rows of int32 or int64, both on "
        f"GPU {device}, where the cache is; these are {_describe(src)} and {_describe(dst)}"
    )


@functools.cache
def _dtypes() -> tuple[torch.dtype, torch.dtype]:
    import torch  # whoever has no GPU need not load it

    return torch.int64, torch.int32


def _describe(ids: Any) -> str:
    if not hasattr(ids, "get_device"):
        return f"a {type(ids).__name__}"
    return f"{ids.dtype} {list(ids.shape)} with strides {list(ids.stride())} on {ids.device}"
