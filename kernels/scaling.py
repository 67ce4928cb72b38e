"""Scales that differ from block to block: where a launch reads them, and how it makes them.

Whoever makes numbers that need a scale finds the largest magnitude that goes into each block, makes
it the largest that the type can hold, and converts with that: three launches, of which this file has
the one in the middle and `relayout.py` the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .cast import LIMITS
from .runtime import jit

if TYPE_CHECKING:
    import triton.language as tl

    from .signal import Signal
else:
    from .runtime import tl

_SIZE = 256  # scales a program: a request has some thousands, in all its layers


class Scaling(NamedTuple):
    """The scales of a launch's blocks; float32, strides in scales.

    Attributes:
        src_bases: int64 `[entry]` on the launching device, the scale of block 0 and the first head;
            None where the source has none.
        src_block, src_head: strides.
        dst_bases: int64 `[row]`, likewise; None where none are made.
        dst_block, dst_head: strides.
        heads: scales of one block at the destination; 1 where heads share one.
        split: entries that share a row: parts of one plane of one layer.
    """

    src_bases: torch.Tensor | None
    src_block: int
    src_head: int
    dst_bases: torch.Tensor | None
    dst_block: int
    dst_head: int
    heads: int
    split: int


def scales_reference(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the scales with which these magnitudes become the largest that a type can hold.

    1 where there is nothing to scale. `largest` is float32 and finite.
    """
    scales = largest * torch.tensor(1.0 / LIMITS[dtype], dtype=torch.float32)
    return torch.where(scales > 0, scales, torch.ones_like(scales))


@jit(
    fixed=("counter", "nbytes", "first_block", "span_blocks", "dst_blocks", "num_scales"),
    unaligned=("chosen", "dst_table", "bad_ids", "finished"),
)
def scales_kernel(
    chosen: tl.tensor,
    dst_bases: tl.tensor,
    dst_table: tl.tensor,
    bad_ids: tl.tensor,
    finished: tl.tensor,
    counter: tl.int64,
    nbytes: tl.int64,
    first_block: tl.int64,
    span_blocks: tl.int64,
    dst_blocks: tl.int64,
    num_scales: tl.int64,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    SCALE: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Grid: one program for SIZE scales. `chosen` holds magnitudes, and scales afterwards."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE).to(tl.int64)
    mask = index < num_scales
    head = index % HEADS
    place = index // HEADS % span_blocks
    row = index // HEADS // span_blocks
    scale = tl.load(chosen + index, mask=mask, other=0.0) * SCALE
    scale = tl.where(scale > 0, scale, 1.0)
    block = tl.load(dst_table + first_block + place, mask=mask, other=0).to(tl.int64)
    good = mask & (block >= 0) & (block < dst_blocks)
    if bad_ids is not None:
        tl.store(bad_ids + index * 0, 1, mask=mask & (good == 0))
    there = tl.load(dst_bases + row, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    tl.store(there + block * BLOCK + head * HEAD, scale, mask=good)
    tl.store(chosen + index, scale, mask=mask)
    if finished is not None:
        signal_end(finished, bad_ids, counter, nbytes)


@jit()
def larger(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    """For reductions: `tl.max` is not there in Triton's interpreter."""
    return tl.maximum(one, other)


@jit()
def saturated(number: tl.tensor, LIMIT: tl.constexpr, ROUND: tl.constexpr) -> tl.tensor:
    """Real numbers as a type of this limit (0: none) can hold them, rounded if that has no fractions."""
    if LIMIT > 0:
        number = tl.clamp(number, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:
        # Adding 1.5 * 2**23 leaves no room for a fraction: ties go to even.
        number = tl.where(number == number, number, 0.0)
        number = (number + 12582912.0) - 12582912.0
    return number


@jit()
def signal_end(
    finished: tl.tensor, bad_ids: tl.tensor, counter: tl.tensor, nbytes: tl.tensor
) -> None:
    """As in `copy.py`: the last program to finish adds the bytes, unless an id was bad."""
    tl.debug_barrier()
    before = tl.atomic_add(finished, 1, sem="acq_rel", scope="sys")
    if before == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(finished, 0)  # for the next launch
        if tl.load(bad_ids, volatile=True) == 0:
            tl.atomic_add(counter.to(tl.pointer_type(tl.int64)), nbytes, sem="release", scope="sys")


def write_scales(
    scaling: Scaling,
    chosen: torch.Tensor,
    dst_table: torch.Tensor,
    first_block: int,
    num_blocks: int,
    dtype: torch.dtype,
    *,
    signal: Signal | None = None,
    bad_ids: torch.Tensor | None = None,
) -> int:
    """Make scales of magnitudes, and write them beside the blocks; return the bytes.

    Args:
        chosen: float32 `[row, block, head]` on the device, flat: magnitudes, and scales afterwards.
        dst_table: of the request; its blocks from `first_block` on are the scales'.
        num_blocks: block ids that exist at the destination.
        dtype: of the numbers.
        signal, bad_ids: as for `relayout`.
    """
    assert scaling.dst_bases is not None
    count = chosen.numel()
    span = count // (scaling.dst_bases.numel() * scaling.heads)
    state: Any = None if signal is None else signal.state
    nbytes = count * chosen.element_size()
    scales_kernel[(-(-count // _SIZE), 1)](
        chosen,
        scaling.dst_bases,
        dst_table,
        bad_ids if state is None else state[1:],
        state,
        0 if signal is None else signal.counter_address,
        nbytes,
        first_block,
        span,
        num_blocks,
        count,
        scaling.heads,
        scaling.dst_block,
        scaling.dst_head,
        1.0 / LIMITS[dtype],
        _SIZE,
    )
    return nbytes
