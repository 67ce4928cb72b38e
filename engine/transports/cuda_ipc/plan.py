"""A transfer plan as kernel launches: base addresses on the GPU, made once and used for ever.

A plan's template holds the pieces of one block: where each lies at block 0 and what a block id adds,
on both sides. Pieces of one size and one pair of strides are one launch, whatever the layouts are;
of two ordinary caches that is all of them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ....kernels.launch import LoadedCopy
from ....kernels.paged import Geometry, PagedCache
from ...memory.cuda_driver import driver
from ...transfer.device_counters import NUM_SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from ...layout.kv_layout import KVLayout
    from ...transfer.plan import TransferPlan


MANY_IDS = 1 << 30  # more work than any cap: what is loaded for them is loaded for all


class CudaPlan(NamedTuple):
    """All launches of a plan for some of its layers.

    Attributes:
        key: by which it is found: the plan's id, and the layers.
        plan: kept, so that its id stays its own.
        copies: the launches.
        counters: address of the peer's counters, as kernels here see it.
        counted: whether they may add to those; if not, the address is of words that nobody reads.
        check_local: raises RegionGone if memory of the cache here that is moved was freed or resized.
    """

    key: tuple[int, tuple[int, ...] | None]
    plan: TransferPlan
    copies: tuple[LoadedCopy, ...]
    counters: int
    counted: bool
    check_local: Callable[[], None]


def compile_plan(
    plan: TransferPlan,
    layers: Sequence[int] | None,
    remote_addresses: npt.NDArray[np.int64],
    counters: int,
    device: int,
    max_programs: int | None,
    *,
    counted: bool = True,
) -> CudaPlan:
    """Make the tables on `device`.

    Args:
        remote_addresses: of the peer's regions, as kernels on `device` see them.
        counters, counted: as in the plan.
        max_programs: upper bound on the programs that run at a time.
    """
    template = plan.plan.template(layers=layers)
    local_addresses = np.array([region.address for region in plan.local.regions], np.int64)
    if plan.writes:
        src_addresses, dst_addresses = local_addresses, remote_addresses
    else:
        src_addresses, dst_addresses = remote_addresses, local_addresses
    src = src_addresses[template.src_region] + template.src_offset
    dst = dst_addresses[template.dst_region] + template.dst_offset
    keys = np.stack([template.nbytes, template.src_stride, template.dst_stride], axis=1)
    kinds, kind_of = np.unique(keys, axis=0, return_inverse=True)
    copies = []
    for kind, (nbytes, src_stride, dst_stride) in enumerate(kinds.tolist()):
        rows = kind_of.ravel() == kind
        copies.append(
            LoadedCopy(
                _side(src[rows], nbytes, src_stride, plan.plan.src, device),
                _side(dst[rows], nbytes, dst_stride, plan.plan.dst, device),
                max_programs=max_programs,
                num_slots=NUM_SLOTS,
            )
        )
    key = (id(plan), None if layers is None else tuple(layers))
    moved = template.src_region if plan.writes else template.dst_region
    check_local = plan.local.watch(np.unique(moved).tolist())
    return CudaPlan(key, plan, tuple(copies), counters, counted, check_local)


def load_kernels(plan: TransferPlan, max_programs: int | None) -> None:
    """Compile the kernels of a plan whose remote cache is as the local one, without a link.

    Triton keeps them: a plan of the same shapes finds them.
    """
    device = plan.local.device
    if not plan.blocks_pair:
        return
    with driver().beside_captures(), torch.cuda.device(device):
        copies = compile_plan(plan, None, plan.addresses, 0, device, max_programs).copies
        for copy, dtype, num_ids in itertools.product(
            copies, (torch.int32, torch.int64), (1, MANY_IDS)
        ):
            copy.load(dtype, dtype, num_ids)


def _side(
    addresses: npt.NDArray[np.int64], nbytes: int, stride: int, layout: KVLayout, device: int
) -> PagedCache:
    """Each piece of the template as an entry of its own whose block is one run of bytes."""
    geometry = Geometry(
        num_blocks=layout.regions[layout.groups[0].regions[0]].num_slots,
        outer=1,
        inner=1,
        dim_nbytes=nbytes,
        block_stride_nbytes=stride,
        outer_stride_nbytes=nbytes,
        inner_stride_nbytes=nbytes,
        alignment_nbytes=1,
    )
    return PagedCache.from_addresses(addresses.tolist(), geometry, torch.device("cuda", device))
