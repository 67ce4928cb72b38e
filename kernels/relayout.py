"""Relayout: tokens of a request from the blocks of one cache into those of another, in one launch.

The two caches may differ in block size, in the order of heads and tokens, in the heads they hold and
in the type of their numbers. What moves is cut into *units* of tokens that never leave a block on
either side; a unit's place follows from its number and the two block tables alone, which the kernel
reads itself: the host computes nothing that grows with the request.

The kernel walks in the order of the destination's memory. Where a destination block holds several
units and keeps a head's tokens together (HND), units that lie side by side there are walked side by
side: 16 tokens of 128 bf16 are a run of 4 KiB alone, and of 16 KiB in a block of 64. Over NVLink
that is the difference between 133 and 366 GB/s; the reads, which are local, may be short.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .copy import MOST_GRID_Y, MOST_PROGRAMS
from .errors import ShapeError
from .runtime import jit
from .scaling import larger, saturated, signal_end, write_scales
from .tiles import default_tuning
from .walk import Walk, walk_constants

if TYPE_CHECKING:
    import triton.language as tl

    from .scaling import Scaling
    from .signal import Signal
    from .tiles import Tuning
else:
    from .runtime import tl


class Relayout(NamedTuple):
    """A launch without its request: where each entry (a plane of a layer) begins on both sides.

    Attributes:
        src_bases, dst_bases: int64 `[entry]` on the launching device.
        factors: float32 `[entry, 1 or heads]` there, by which numbers are multiplied; None where
            bits are moved. With several heads, `walk.head_axis` says which axis they are.
        scaling: where scales that differ from block to block are; None if there are none.
    """

    walk: Walk
    src_bases: torch.Tensor
    dst_bases: torch.Tensor
    factors: torch.Tensor | None
    scaling: Scaling | None = None


@jit()
def _block_in(
    table: tl.tensor, place: tl.tensor, wanted: tl.tensor, num_blocks: tl.tensor, bad_ids: tl.tensor
) -> Any:
    """Return the blocks at `place` in a table, and which may be touched; flags an id out of
    range."""
    block = tl.load(table + place, mask=wanted, other=0).to(tl.int64)
    good = wanted & (block >= 0) & (block < num_blocks)
    if bad_ids is not None:
        tl.store(bad_ids + place * 0, 1, mask=wanted & (good == 0))
    return block, good


@jit(
    fixed=(
        "counter",
        "nbytes",
        "num_entries",
        "first_block",
        "span_blocks",
        "first_unit",
        "num_units",
        "start",
        "stop",
        "src_blocks",
        "dst_blocks",
    ),
    unaligned=("src_table", "dst_table", "chosen", "bad_ids", "finished"),
)
def relayout_kernel(
    src_bases: tl.tensor,
    src_table: tl.tensor,
    dst_bases: tl.tensor,
    dst_table: tl.tensor,
    factors: tl.tensor,
    src_scales: tl.tensor,
    chosen: tl.tensor,
    bad_ids: tl.tensor,
    finished: tl.tensor,
    counter: tl.int64,
    nbytes: tl.int64,
    num_entries: tl.int64,
    first_block: tl.int64,
    span_blocks: tl.int64,
    first_unit: tl.int64,
    num_units: tl.int64,
    start: tl.int64,
    stop: tl.int64,
    src_blocks: tl.int64,
    dst_blocks: tl.int64,
    SRC_PER: tl.constexpr,
    SRC_BLOCK: tl.constexpr,
    SRC_SUB: tl.constexpr,
    SRC_OUTER: tl.constexpr,
    SRC_INNER: tl.constexpr,
    DST_PER: tl.constexpr,
    DST_BLOCK: tl.constexpr,
    DST_SUB: tl.constexpr,
    DST_OUTER: tl.constexpr,
    DST_INNER: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_AXIS: tl.constexpr,
    HEAD_AXIS: tl.constexpr,
    RUN_WORDS: tl.constexpr,
    RUN_CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SRC_UNIT: tl.constexpr,
    DST_UNIT: tl.constexpr,
    SRC_WORD: tl.constexpr,
    DST_WORD: tl.constexpr,
    LIMIT: tl.constexpr,
    ROUND: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    SCALE_HEAD: tl.constexpr,
    CHOSEN_HEADS: tl.constexpr,
    CHOSEN_SPLIT: tl.constexpr,
    FIND: tl.constexpr,
    LOOP: tl.constexpr,
) -> None:
    """Grid: `(tiles an entry, entries)`, or with LOOP any number of programs."""
    SRC_UNIT_WORDS: tl.constexpr = SRC_UNIT * 8 // SRC_WORD.primitive_bitwidth
    DST_UNIT_WORDS: tl.constexpr = DST_UNIT * 8 // DST_WORD.primitive_bitwidth
    tile = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1).to(tl.int64)
    entry_tiles = (num_units * (OUTER * INNER * RUN_CHUNKS) + CHUNKS - 1) // CHUNKS
    last = tile + 1
    step = tl.num_programs(0).to(tl.int64)
    if LOOP:
        last = entry_tiles * num_entries
    while tile < last:
        if LOOP:
            entry = tile // entry_tiles
        # Which unit, outer, inner and part of a run each chunk is. Shapes: [CHUNKS].
        chunk = tile % entry_tiles * CHUNKS + tl.arange(0, CHUNKS).to(tl.int64)
        run = chunk // RUN_CHUNKS
        first_word = chunk % RUN_CHUNKS * WORDS
        inner = run % INNER
        outer = run // (INNER * GROUP) % OUTER
        place = run // (INNER * GROUP * OUTER) * GROUP + run // INNER % GROUP
        unit = first_unit + place
        token = unit * TOKENS
        if TOKEN_AXIS == 1:
            token += outer
        if TOKEN_AXIS == 2:
            token += inner
        wanted = (place < num_units) & (token >= start) & (token < stop)
        src_block, src_good = _block_in(src_table, unit // SRC_PER, wanted, src_blocks, bad_ids)
        dst_block, dst_good = _block_in(dst_table, unit // DST_PER, wanted, dst_blocks, bad_ids)
        good = src_good & dst_good
        mask = good[:, None]
        src_units = src_block * SRC_BLOCK + unit % SRC_PER * SRC_SUB
        src_units += outer * SRC_OUTER + inner * SRC_INNER
        dst_units = dst_block * DST_BLOCK + unit % DST_PER * DST_SUB
        dst_units += outer * DST_OUTER + inner * DST_INNER
        # An address out of a table says nothing of its alignment: the hint makes wide accesses of it.
        src_start = tl.multiple_of(
            tl.load(src_bases + entry).to(tl.pointer_type(SRC_WORD)), SRC_UNIT
        )
        dst_start = tl.multiple_of(
            tl.load(dst_bases + entry).to(tl.pointer_type(DST_WORD)), DST_UNIT
        )
        # Shapes: [CHUNKS, WORDS].
        word = tl.arange(0, WORDS)[None, :]
        src = src_start + (src_units * SRC_UNIT_WORDS + first_word)[:, None] + word
        dst = dst_start + (dst_units * DST_UNIT_WORDS + first_word)[:, None] + word
        if RUN_WORDS % WORDS != 0:
            mask = mask & (first_word[:, None] + word < RUN_WORDS)
        value = tl.load(src, mask=mask)
        if factors is not None:
            number = value.to(tl.float32)
            if CHOSEN_HEADS == 0:
                if HEAD_AXIS == 0:
                    number = number * tl.load(factors + entry)
                elif HEAD_AXIS == 1:
                    number = number * tl.load(factors + entry * OUTER + outer)[:, None]
                else:
                    number = number * tl.load(factors + entry * INNER + inner)[:, None]
            else:
                head = chunk * 0
                if HEAD_AXIS == 1:
                    head = outer
                if HEAD_AXIS == 2:
                    head = inner
                factor = tl.load(factors + entry * HEADS + head)
                if src_scales is not None:
                    scales = tl.load(src_scales + entry).to(tl.pointer_type(tl.float32))
                    scales += src_block * SCALE_BLOCK + head * SCALE_HEAD
                    factor = factor * tl.load(scales, mask=good, other=1.0)
                if chosen is not None:
                    block = entry // CHOSEN_SPLIT * span_blocks + unit // DST_PER - first_block
                    place_of_scale = block * CHOSEN_HEADS
                    if CHOSEN_HEADS > 1:
                        place_of_scale += head
                    if FIND:
                        # Magnitudes are not negative: their bits are ordered as they are.
                        real = tl.abs(number * factor[:, None])
                        real = tl.where(mask & (real == real), real, 0.0)
                        largest = tl.reduce(tl.minimum(real, 3.4028234663852886e38), 1, larger)
                        words = chosen.to(tl.pointer_type(tl.int32), bitcast=True)
                        tl.atomic_max(
                            words + place_of_scale, largest.to(tl.int32, bitcast=True), mask=good
                        )
                    else:
                        scale = tl.load(chosen + place_of_scale, mask=good, other=1.0)
                        factor = tl.div_rn(factor, scale)
                number = number * factor[:, None]
            value = saturated(number, LIMIT, ROUND).to(DST_WORD)
        if not FIND:
            tl.store(dst, value, mask=mask)
        tile += step
    if finished is not None:
        signal_end(finished, bad_ids, counter, nbytes)


def relayout(
    move: Relayout,
    src_table: torch.Tensor,
    dst_table: torch.Tensor,
    start: int,
    stop: int,
    *,
    signal: Signal | None = None,
    bad_ids: torch.Tensor | None = None,
    max_programs: int | None = None,
    tuning: Tuning | None = None,
) -> int:
    """Move tokens `[start, stop)` of a request, on the current stream; return the bytes.

    Stream-ordered, no host read; no allocation either, unless scales are made for blocks. The caller
    keeps all tensors, and the mapping of the peer's memory, alive until the stream has passed. Needs
    a GPU (or Triton's interpreter).

    Args:
        src_table, dst_table: int32 or int64 `[block]` on the device: entry `i` holds tokens
            `[i * B, (i + 1) * B)`, for the block size `B` of its side. Entries outside the range
            are not read.
        start, stop: tokens; slots of the destination, where whole slots are moved. Must be whole
            units unless `walk.token_axis` is set.
        signal: the counter to which the last program adds the bytes of the whole launch, after they
            are visible. Not if an id was out of range.
        bad_ids: int32 `[1]` on the device, set to 1 if an id is out of range: such a block is
            neither read nor written. With a signal its own state is that flag.
        max_programs: upper bound on the programs that run at a time, to leave room for a model.
        tuning: how the work is cut up; chosen by size if None.

    Raises:
        ShapeError: a table is too short or of another type, or the range is not whole units.
    """
    walk = move.walk
    if not 0 <= start <= stop:
        raise ShapeError(f"tokens [{start}, {stop}) are no range")
    if not walk.token_axis and (start % walk.tokens or stop % walk.tokens):
        raise ShapeError(f"tokens [{start}, {stop}) are not whole units of {walk.tokens}")
    if start == stop:
        return 0
    first = start // walk.tokens // walk.group * walk.group
    last = -(-stop // walk.tokens)
    num_units = -(-(last - first) // walk.group) * walk.group
    for name, table, end in (("src", src_table, walk.src), ("dst", dst_table, walk.dst)):
        if table.dtype not in (torch.int32, torch.int64) or table.dim() != 1:
            raise ShapeError(f"{name}_table must be int32 or int64 [block], not {table.dtype}")
        if table.numel() * end.units < last:
            raise ShapeError(
                f"{name}_table has {table.numel()} blocks of {end.units * walk.tokens} tokens, "
                f"token {stop - 1} is asked for"
            )
    num_entries = move.src_bases.numel()
    outer = walk.outer if walk.token_axis != 1 else 1
    inner = walk.inner if walk.token_axis != 2 else 1
    per_token = outer * inner * walk.run * walk.dst.dtype.itemsize
    per_token = per_token if walk.token_axis else per_token // walk.tokens
    nbytes = num_entries * per_token * (stop - start)
    if not walk.token_axis:
        nbytes = num_entries * walk.unit_nbytes * (last - start // walk.tokens)
    tuning = tuning or default_tuning(nbytes, staged=False, capped=max_programs is not None)
    span = _Span(start, stop, first, num_units, max_programs, tuning)
    flags = bad_ids if signal is None else signal.state[1:]
    device = move.src_bases.device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        scaling = move.scaling
        chosen: torch.Tensor | None = None
        scales_nbytes = 0
        if scaling is not None and scaling.dst_bases is not None:
            block = walk.tokens * walk.dst.units
            if start % block:
                raise ShapeError(
                    f"token {start} is inside a block of {block} tokens, which has one scale"
                )
            first_block = start // block
            count = (-(-stop // block) - first_block) * scaling.dst_bases.numel() * scaling.heads
            chosen = torch.zeros(count, dtype=torch.float32, device=device)
            _launch(move, src_table, dst_table, span, 0, None, flags, chosen, find=True)
            scales_nbytes = write_scales(
                scaling,
                chosen,
                dst_table,
                first_block,
                walk.dst.num_blocks,
                walk.dst.dtype,
                signal=signal,
                bad_ids=flags,
            )
        _launch(move, src_table, dst_table, span, nbytes, signal, flags, chosen, find=False)
    return nbytes + scales_nbytes


class _Span(NamedTuple):
    """What of a request a launch walks, and how."""

    start: int
    stop: int
    first_unit: int
    num_units: int
    max_programs: int | None
    tuning: Tuning


def _launch(
    move: Relayout,
    src_table: torch.Tensor,
    dst_table: torch.Tensor,
    span: _Span,
    nbytes: int,
    signal: Signal | None,
    bad_ids: torch.Tensor | None,
    chosen: torch.Tensor | None,
    *,
    find: bool,
) -> None:
    walk, scaling, max_programs = move.walk, move.scaling, span.max_programs
    num_entries = move.src_bases.numel()
    constants = walk_constants(walk, move.factors is not None, span.tuning)
    entry_tiles = -(-span.num_units * constants.unit_chunks // constants.chunks)
    if num_entries > MOST_GRID_Y and max_programs is None:
        max_programs = MOST_PROGRAMS
    loop = max_programs is not None and max_programs < entry_tiles * num_entries
    grid = (max_programs, 1) if loop else (entry_tiles, num_entries)
    block = walk.tokens * walk.dst.units
    first_block = span.start // block
    relayout_kernel[grid](
        move.src_bases,
        src_table,
        move.dst_bases,
        dst_table,
        move.factors,
        None if scaling is None else scaling.src_bases,
        chosen,
        bad_ids,
        None if signal is None else signal.state,
        0 if signal is None else signal.counter_address,
        nbytes,
        num_entries,
        first_block,
        -(-span.stop // block) - first_block,
        span.first_unit,
        span.num_units,
        span.start,
        span.stop,
        walk.src.num_blocks,
        walk.dst.num_blocks,
        *constants.arguments,
        *scale_constants(move),
        find,
        loop,
        num_warps=span.tuning.num_warps,
    )


def scale_constants(move: Relayout) -> tuple[int, ...]:
    """Return the kernel's constants HEADS to CHOSEN_SPLIT."""
    heads = 1 if move.factors is None else move.factors.shape[1]
    if move.scaling is None:
        return heads, 0, 0, 0, 1
    scaling = move.scaling
    return heads, scaling.src_block, scaling.src_head, scaling.heads, scaling.split
