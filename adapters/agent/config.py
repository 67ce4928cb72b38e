"""What an agent checks and works out before anything happens: ids, its cache in numbers, its engine."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.errors import BlockOutOfRange, OverlappingBlocks, PlanError
from ...engine.plan.block_plan import FEW_IDS
from ...engine.transfer_engine import TransferEngine
from ...engine.transports.selection import TRANSPORTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ...engine.layout.kv_layout import KVLayout

    BlockIds = Sequence[int] | npt.NDArray[np.integer]


def pack_block_ids(num_blocks: int, block_ids: BlockIds, *, dst_of: str = "") -> bytes:
    """One table as messages carry it: the ids as little-endian int32, checked.

    Args:
        num_blocks: of the cache.
        dst_of: the request whose destination they are, if they are one: each is named only once.

    Raises:
        BlockOutOfRange, PlanError: an id is not a block of the cache; these are no ids.
        OverlappingBlocks: one is named twice.
    """
    if type(block_ids) is list and len(block_ids) <= FEW_IDS and {*map(type, block_ids)} == {int}:
        few = sorted(block_ids)
        if few[0] >= 0 and few[-1] < num_blocks:
            if dst_of and len(set(few)) != len(few):
                raise _named_twice(dst_of)
            return struct.pack(f"<{len(few)}i", *block_ids)
    ids = np.asarray(block_ids)
    if ids.size == 0:
        return b""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise PlanError(
            f"block ids must be one row of integers, not {ids.dtype} of shape {ids.shape}",
            operation="plan",
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_blocks:
        raise BlockOutOfRange(
            f"block id {low if low < 0 else high} is not in a cache of {num_blocks} blocks",
            operation="plan",
        )
    if dst_of and len(np.unique(ids)) != len(ids):
        raise _named_twice(dst_of)
    return ids.astype("<i4").tobytes()


def _named_twice(request_id: str) -> OverlappingBlocks:
    return OverlappingBlocks(
        f"a destination block id of {request_id} is named twice", operation="receive"
    )


def describe_cache(layout: KVLayout) -> dict[str, Any]:
    """A cache in the numbers that placement reckons with, as fields of `Registration`."""
    tokens = max((region.tokens_per_slot for region in layout.regions), default=0)
    return {
        "layout_digest": layout.digest()[:256],
        "num_blocks": layout.num_blocks,
        "tokens_per_block": tokens,
        "token_nbytes": layout.block_nbytes // tokens if tokens else 0,
    }


def make_engine(
    name: str,
    bind: str,
    transports: Sequence[str] | None,
    *,
    verify: bool,
    max_programs: int | None,
    advertise_host: str,
) -> TransferEngine:
    """An engine that listens where the agent does."""
    host = "127.0.0.1"
    if bind.startswith("tcp://"):
        host = bind[len("tcp://") :].rpartition(":")[0] or host
    host = "0.0.0.0" if host == "*" else host.strip("[]")
    return TransferEngine(
        name=name,
        host=host,
        advertise_host=advertise_host,
        transports=tuple(transports or TRANSPORTS),
        verify=verify,
        max_programs=max_programs,
        require_tokens=True,
    )
