"""The kernel that moves blocks from one side to the other, in one launch: a push, or a pull.

A side is *paged* (a table of base addresses and block ids) or *dense* (staging, one block after the
other, entries outermost: a gather, or a scatter). The grid walks entry, block and chunk; Triton drops
what an operation does not use. Offsets are int64 throughout.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from .runtime import jit
from .tiles import plan_tiles

if TYPE_CHECKING:
    import triton.language as tl

    from .paged import Geometry
    from .tiles import Tuning
else:
    from .runtime import tl

MOST_GRID_Y = 65535
MOST_PROGRAMS = (1 << 31) - 1


@jit()
def _either(one: tl.tensor, other: tl.tensor) -> Any:
    return one | other


@jit()
def _block_of(ids: tl.tensor, place: tl.tensor, exists: tl.tensor, num_blocks: tl.tensor) -> Any:
    """Return the blocks at `place` in the ids, and which may be touched.

    Ids on the device are never read by the host, so this is where they are checked: such a block is
    neither read nor written.
    """
    block = place
    good = exists
    if ids is not None:
        block = tl.load(ids + place, mask=exists, other=0).to(tl.int64)
        good = exists & (block >= 0) & (block < num_blocks)
    return block, good


@jit()
def _base_of(bases: tl.tensor, ids: tl.tensor, entry: tl.tensor, dense_nbytes: tl.tensor) -> Any:
    """Return the address of block 0 of a layer and plane."""
    return bases + entry * dense_nbytes if ids is None else tl.load(bases + entry)


@jit()
def _signal(
    finished: tl.tensor,
    bad: tl.tensor,
    bad_ids: tl.tensor,
    order: tl.tensor,
    gate: tl.tensor,
    log: tl.tensor,
    counter: tl.tensor,
    nbytes: tl.tensor,
    imm: tl.tensor,
    count: tl.tensor,
    SLOTS: tl.constexpr,
    LOG_ROWS: tl.constexpr,
) -> None:
    """The last program to finish adds `nbytes` to the counter; one remote atomic a launch.

    The barrier puts this program's stores before its increment, the increments are acquire and
    release on this GPU, and causality is transitive: the last program's release to the whole system
    covers the stores of all (bytes are visible before they are counted). Programs that met a bad id
    count in the upper half of the word: with one of them the counter stays, since what was named was
    not all moved.
    """
    tl.debug_barrier()
    programs = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64)
    mine = (bad << 32) + 1
    total = tl.atomic_add(finished, mine, sem="acq_rel", scope="gpu") + mine
    if (total & 0xFFFFFFFF) == programs:
        if order is not None:
            tl.store(finished, 0)
            if (total == programs) & (imm != 0):
                word = counter + imm % SLOTS * 8
                tl.atomic_add(
                    word.to(tl.pointer_type(tl.int64)), nbytes * count, sem="release", scope="sys"
                )
            # Each half of a row carries its number, so the host needs no order between the two.
            number = tl.load(gate + 1) + 1
            tl.store(gate + 1, number)
            row = log + number % LOG_ROWS * 2
            failed = (total != programs).to(tl.int64)
            tl.store(row, (number << 33) | (failed << 32) | imm)
            tl.store(row + 1, (number << 40) | count)
        else:
            if bad_ids is not None:
                tl.store(finished, 0)  # for the next launch
                if total != programs:
                    tl.store(bad_ids, 1)
            else:
                tl.store(finished, total - programs)
            if (total == programs) & (counter != 0):
                tl.atomic_add(
                    counter.to(tl.pointer_type(tl.int64)), nbytes, sem="release", scope="sys"
                )


@jit(
    fixed=("num_entries", "num_ids", "src_blocks", "dst_blocks", "counter", "nbytes"),
    unaligned=("src_ids", "dst_ids", "bad_ids", "finished", "order", "gate", "log"),
)
def copy_kernel(
    src_bases: tl.tensor,
    src_ids: tl.tensor,
    dst_bases: tl.tensor,
    dst_ids: tl.tensor,
    bad_ids: tl.tensor,
    finished: tl.tensor,
    order: tl.tensor,
    gate: tl.tensor,
    log: tl.tensor,
    counter: tl.int64,
    nbytes: tl.int64,
    num_entries: tl.int64,
    num_ids: tl.int64,
    src_blocks: tl.int64,
    dst_blocks: tl.int64,
    SRC_BLOCK: tl.constexpr,
    SRC_OUTER: tl.constexpr,
    SRC_INNER: tl.constexpr,
    DST_BLOCK: tl.constexpr,
    DST_OUTER: tl.constexpr,
    DST_INNER: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    PIECE_WORDS: tl.constexpr,
    PIECE_CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    WORD: tl.constexpr,
    LOOP: tl.constexpr,
    SLOTS: tl.constexpr,
    LOG_ROWS: tl.constexpr,
) -> None:
    """Grid: `(tiles a plane, layers * planes)`, or with LOOP any number of programs.

    A paged side has a table as `bases` and ids; a dense side has its address and None. With an
    `order`, an imm and a number of ids on the device, `num_ids` is the most that number may be,
    `nbytes` what one id takes, and `counter` where the array of `SLOTS` counters begins.
    """
    UNIT_WORDS: tl.constexpr = UNIT * 8 // WORD.primitive_bitwidth
    tile = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1).to(tl.int64)
    imm = counter * 0
    count = num_ids
    bad = imm
    if order is not None:
        imm = tl.load(order)
        count = tl.load(order + 1)
        imm = tl.where((imm >= 0) & (imm < 4294967296), imm, 0)
        fits = (count >= 0) & (count <= num_ids)
        if (tl.load(gate, volatile=True) != 0) | (fits == 0):
            count = counter * 0
            bad = count + 1
    # One tile; with LOOP every so many of all planes. Of the loop of one turn the compiler leaves nothing.
    step = 1
    last = tile + 1
    if LOOP:
        plane_tiles = (count * (OUTER * INNER * PIECE_CHUNKS) + CHUNKS - 1) // CHUNKS
        step = tl.num_programs(0)
        last = plane_tiles * num_entries
    while tile < last:
        of_plane = tile
        if LOOP:
            entry = tile // plane_tiles
            of_plane = tile % plane_tiles
        # Which block, outer, inner and part of a piece each chunk is. Shapes: [CHUNKS].
        chunk = of_plane * CHUNKS + tl.arange(0, CHUNKS).to(tl.int64)
        piece = chunk // PIECE_CHUNKS
        first_word = chunk % PIECE_CHUNKS * WORDS
        inner = piece % INNER
        outer = piece // INNER % OUTER
        place = piece // (INNER * OUTER)
        exists = place < count
        src_block, src_good = _block_of(src_ids, place, exists, src_blocks)
        dst_block, dst_good = _block_of(dst_ids, place, exists, dst_blocks)
        src_units = src_block * SRC_BLOCK + outer * SRC_OUTER + inner * SRC_INNER
        dst_units = dst_block * DST_BLOCK + outer * DST_OUTER + inner * DST_INNER
        # An address out of a table says nothing of its alignment: the hint makes 16-byte accesses of it.
        plane_nbytes = count * (OUTER * INNER * PIECE_WORDS * (WORD.primitive_bitwidth // 8))
        src_base = _base_of(src_bases, src_ids, entry, plane_nbytes)
        dst_base = _base_of(dst_bases, dst_ids, entry, plane_nbytes)
        src_start = tl.multiple_of(src_base.to(tl.pointer_type(WORD)), UNIT)
        dst_start = tl.multiple_of(dst_base.to(tl.pointer_type(WORD)), UNIT)
        # Shapes: [CHUNKS, WORDS].
        word = tl.arange(0, WORDS)[None, :]
        src = src_start + (src_units * UNIT_WORDS + first_word)[:, None] + word
        dst = dst_start + (dst_units * UNIT_WORDS + first_word)[:, None] + word
        src_mask = src_good[:, None]
        # A bad id in the source leaves zeros in staging, which is ours, and nothing in a cache.
        dst_mask = dst_good[:, None]
        if dst_ids is not None:
            dst_mask = dst_mask & src_mask
        if PIECE_WORDS % WORDS != 0:
            inside = first_word[:, None] + word < PIECE_WORDS
            src_mask = src_mask & inside
            dst_mask = dst_mask & inside
        tl.store(dst, tl.load(src, mask=src_mask, other=0), mask=dst_mask)
        bad |= tl.reduce((exists & ((src_good & dst_good) == 0)).to(tl.int64), 0, _either)
        tile += step
    if finished is not None:
        _signal(
            finished, bad, bad_ids, order, gate, log, counter, nbytes, imm, count, SLOTS, LOG_ROWS
        )
    elif bad_ids is not None:
        tl.store(bad_ids, 1, mask=bad != 0)


class KernelConstants(NamedTuple):
    """Chunks of a block of one layer and plane, chunks of a tile, and SRC_BLOCK to WORD."""

    block_chunks: int
    chunks: int
    arguments: tuple[object, ...]


@functools.lru_cache(maxsize=1024)
def kernel_constants(
    src: Geometry | None, dst: Geometry | None, alignment_nbytes: int, tuning: Tuning
) -> KernelConstants:
    """Return the kernel's constants for a pair of sides; None is dense staging."""
    plan = plan_tiles(src, dst, alignment_nbytes, tuning)
    arguments = (
        *plan.src,
        *plan.dst,
        plan.outer,
        plan.inner,
        plan.piece_words,
        plan.piece_chunks,
        plan.words,
        plan.chunks,
        plan.unit_nbytes,
        {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[plan.word_nbytes],
    )
    return KernelConstants(plan.block_chunks, plan.chunks, arguments)
