"""A plan for tokens as kernel launches: one for each copy group of planes that lie alike.

Of two ordinary caches that is one launch, whatever they differ in. The tables that a launch needs
beside the request's own block tables (where each plane of a layer begins) are made once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ....kernels.relayout import Relayout, relayout
from ....kernels.scaling import Scaling
from ....kernels.signal import Signal
from ....kernels.tiles import default_tuning
from ....kernels.walk import End, Walk
from ...errors import PlanError
from ...plan.token_plan import window_start
from .lane import Launched

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ...plan.reconcile import CopyGroup, Step, TablePair
    from ...plan.token_plan import TokenPlan
    from ...transfer.moves import TokenMove
    from ...transfer.transfer import Transfer
    from .lane import Lane

    Ids = npt.NDArray[np.int64]


class TokenLaunch(NamedTuple):
    """One launch of a plan, without its request."""

    pair: TablePair
    move: Relayout
    whole: bool  # by slots of the destination, not by tokens


class Span(NamedTuple):
    """What one launch moves of a request: tokens, or slots of the destination."""

    start: int
    stop: int


def compile_tokens(
    tokens: TokenPlan,
    layers: Sequence[int] | None,
    src_addresses: Ids,
    dst_addresses: Ids,
    device: torch.device,
) -> tuple[TokenLaunch, ...]:
    """Make the tables on `device`.

    Args:
        src_addresses, dst_addresses: of the layouts' regions, as kernels on `device` see them.
    """
    found = []
    for pair in tokens.pairs:
        for copy_group in pair.copy_groups:
            chosen = (
                np.ones(len(copy_group.layer), bool)
                if layers is None
                else copy_group.chosen(layers)
            )
            if not chosen.any():
                continue
            src = src_addresses[copy_group.src_region[chosen]] + copy_group.src_start[chosen]
            dst = dst_addresses[copy_group.dst_region[chosen]] + copy_group.dst_start[chosen]
            factors = None if copy_group.factors is None else copy_group.factors[chosen]
            scales = [
                None if held is None else addresses[held.region[chosen]] + held.start[chosen]
                for held, addresses in (
                    (copy_group.src_scales, src_addresses),
                    (copy_group.dst_scales, dst_addresses),
                )
            ]
            move = _relayout(pair, copy_group, src, dst, factors, scales, device)
            found.append(TokenLaunch(pair, move, copy_group.token is None))
    return tuple(found)


def span_of(launch: TokenLaunch, start: int, stop: int, num_states: int) -> Span:
    """Return what a launch moves of tokens `[start, stop)`, or of so many pages of state."""
    pair = launch.pair
    if not pair.unit:
        return Span(0, num_states)
    first = min(window_start(pair, start, stop), stop)
    if launch.whole and first < stop:
        return Span(first // pair.dst_tokens, -(-stop // pair.dst_tokens))
    return Span(first, stop)


def _relayout(
    pair: TablePair,
    copy_group: CopyGroup,
    src: Ids,
    dst: Ids,
    factors: npt.NDArray[np.float32] | None,
    scales: Sequence[Ids | None],
    device: torch.device,
) -> Relayout:
    steps = list(copy_group.steps)
    token = copy_group.token
    if token is not None and pair.unit > 1:
        steps.append(token._replace(size=pair.unit))
    by_head = copy_group.by_head
    if factors is not None and by_head:
        heads = max([step.size for step in steps if step.name == "head"], default=1)
        factors = np.broadcast_to(factors, (len(factors), heads)).copy()
    rest, run = _merged(copy_group, steps, by_head)
    split = 1
    while len(rest) > 2:  # what two axes cannot walk becomes entries
        extra = next(step for step in reversed(rest) if step.name not in ("token", "head"))
        rest.remove(extra)
        split *= extra.size
        src, dst = (
            (starts[:, None] + np.arange(extra.size) * stride).ravel()
            for starts, stride in ((src, extra.src_stride), (dst, extra.dst_stride))
        )
        factors = None if factors is None else np.repeat(factors, extra.size, axis=0)
    inner = rest[0] if rest else None
    outer = rest[1] if len(rest) > 1 else None
    axis = {step.name: 2 if step is inner else 1 for step in rest}
    walk = Walk(
        src=_end(pair, copy_group, 0, outer, inner, src),
        dst=_end(pair, copy_group, 1, outer, inner, dst),
        outer=outer.size if outer else 1,
        inner=inner.size if inner else 1,
        run=run,
        tokens=1 if token is None else pair.unit,
        token_axis=axis.get("token", 0),
        head_axis=axis.get("head", 0) if by_head else 0,
        group=_group(pair, token, rest),
    )
    return Relayout(
        walk,
        torch.from_numpy(src).to(device),
        torch.from_numpy(dst).to(device),
        None if factors is None else torch.from_numpy(np.ascontiguousarray(factors)).to(device),
        _scaling(copy_group, scales, split, device),
    )


def _scaling(
    copy_group: CopyGroup, scales: Sequence[Ids | None], split: int, device: torch.device
) -> Scaling | None:
    """Return where a copy group's scales are, as a kernel reads and writes them."""
    src, dst = scales
    if src is None and dst is None:
        return None
    strides: list[int] = []
    for side, held, starts in zip(
        ("source", "destination"),
        (copy_group.src_scales, copy_group.dst_scales),
        scales,
        strict=True,
    ):
        if held is None or starts is None:
            strides += [0, 0]
            continue
        shape = held.shape
        ragged = (shape.slot_stride | shape.head_stride | int(np.bitwise_or.reduce(starts))) % 4
        if ragged:
            raise PlanError(
                f"scales of the {side} do not lie at multiples of 4 bytes, where a kernel could "
                "read them"
            )
        strides += [shape.slot_stride // 4, shape.head_stride // 4]
    return Scaling(
        None if src is None else torch.from_numpy(np.repeat(src, split)).to(device),
        strides[0],
        strides[1],
        None if dst is None else torch.from_numpy(dst).to(device),
        strides[2],
        strides[3],
        max(1, copy_group.scales_per_block),
        split,
    )


def _merged(copy_group: CopyGroup, steps: list[Step], by_head: bool) -> tuple[list[Step], int]:
    """Return the axes left to walk, innermost at the destination first, and the numbers of one
    run."""
    run = copy_group.elements
    steps.sort(key=lambda step: (step.dst_stride, step.src_stride))
    for number, step in enumerate(steps):
        dense = (run * copy_group.src_elem, run * copy_group.dst_elem)
        if step.name == "token" or (by_head and step.name == "head"):
            return steps[number:], run
        if (step.src_stride, step.dst_stride) != dense:
            return steps[number:], run
        run *= step.size
    return [], run


def _group(pair: TablePair, token: Step | None, rest: list[Step]) -> int:
    """Return how many units the destination interleaves with another axis: all of a block, or
    one."""
    if token is None:
        return 1
    inside = any(step.name != "token" and step.dst_stride > token.dst_stride for step in rest)
    return pair.dst_tokens // pair.unit if inside else 1


def _end(
    pair: TablePair,
    copy_group: CopyGroup,
    side: int,
    outer: Step | None,
    inner: Step | None,
    bases: Ids,
) -> End:
    strides = [0 if step is None else step[2:][side] for step in (outer, inner)]
    units, unit_stride = 1, 0
    if copy_group.token is not None:
        units = (pair.src_tokens, pair.dst_tokens)[side] // pair.unit
        unit_stride = pair.unit * copy_group.token[2:][side]
    elif pair.unit and not side:
        units = pair.src_tokens // pair.dst_tokens  # slots of one value a block may be shared
    alignment = int(np.bitwise_or.reduce(bases)) | 16
    return End(
        num_blocks=(pair.src_slots, pair.dst_slots)[side],
        units=units,
        block_stride=(copy_group.src_slot_stride, copy_group.dst_slot_stride)[side],
        unit_stride=unit_stride,
        outer_stride=strides[0],
        inner_stride=strides[1],
        dtype=_dtype(
            (copy_group.src_dtype, copy_group.dst_dtype)[side],
            (copy_group.src_elem, copy_group.dst_elem)[side],
        ),
        alignment=alignment & -alignment,
    )


def _dtype(name: str, nbytes: int) -> torch.dtype:
    """Return the type of numbers; of bits that torch has no type for, an integer of their size."""
    dtype = getattr(torch, name, None)
    if isinstance(dtype, torch.dtype) and dtype.itemsize == nbytes:
        return dtype
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[nbytes]


def launch_tokens(
    lane: Lane,
    transfer: Transfer,
    move: TokenMove,
    launches: Sequence[TokenLaunch],
    counter: int | None,
    max_programs: int | None,
) -> None:
    """Enqueue a transfer of tokens on a lane: one launch for each copy_group.

    Args:
        launches: from `compile_tokens`, for these layers.
        counter: address of the peer's device counter; None if nobody counts there.
    """
    tokens = move.plan.tokens
    pairs = tokens.pairs
    rows: Ids | None = None
    places: list[tuple[slice, slice]] = []
    if not move.on_gpu:
        tables = [
            tokens.check(pair, move.src_tables, move.dst_tables, move.start, move.stop)
            for pair in pairs
        ]
        row, places = _flat(tables)
        rows = row[None]

    def kernels(uploaded: torch.Tensor | None) -> Launched:
        state = lane.state if uploaded is not None else torch.zeros(2, dtype=torch.int32, device=lane.device)  # fmt: skip
        signal = None if counter is None else Signal(state, counter)
        bad_ids = state[1:] if signal is None and uploaded is None else None
        for launch in launches:
            if uploaded is None:
                src = move.src_tables[launch.pair.src_group]
                dst = move.dst_tables[launch.pair.dst_group]
            else:
                here, there = places[pairs.index(launch.pair)]
                src, dst = uploaded[0, here], uploaded[0, there]
            start, stop = span_of(launch, move.start, move.stop, len(dst))
            relayout(
                launch.move,
                src,
                dst,
                start,
                stop,
                signal=signal,
                bad_ids=bad_ids,
                max_programs=max_programs,
            )
        keep = (uploaded, move, launches)
        return Launched(keep, None if uploaded is not None else state[1])

    lane.launch(transfer, transfer.total_nbytes, rows, kernels)


def warm_tokens(
    launches: Sequence[TokenLaunch], max_programs: int | None, device: torch.device
) -> None:
    """Load the kernels of a plan by moving tokens of blocks that do not exist. May take seconds."""
    state = torch.zeros(2, dtype=torch.int32, device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    many = 1 << 16  # more work than any sensible cap, so that the capped kernel is loaded
    nowhere = torch.full((many,), -1, dtype=torch.int64, device=device)
    tunings = [
        default_tuning(nbytes, staged=False, capped=max_programs is not None)
        for nbytes in (1, 1 << 40)
    ]
    for launch, tuning in itertools.product(launches, tunings):
        walk = launch.move.walk
        per = walk.tokens * max(walk.src.units, walk.dst.units)
        for signal in (Signal(state, counter.data_ptr()), None):
            for blocks in (1,) if max_programs is None else (1, many):
                relayout(
                    launch.move,
                    nowhere,
                    nowhere,
                    0,
                    min(per * blocks, many),
                    signal=signal,
                    bad_ids=None if signal is not None else state[1:],
                    max_programs=max_programs,
                    tuning=tuning,
                )
    torch.cuda.current_stream(device).synchronize()


def _flat(tables: Sequence[tuple[Ids, Ids]]) -> tuple[Ids, list[tuple[slice, slice]]]:
    """Return the block tables of all pairs in one row, and where those of each pair lie in it."""
    parts: list[Ids] = []
    places = []
    used = 0
    for src, dst in tables:
        here = slice(used, used + len(src))
        there = slice(here.stop, here.stop + len(dst))
        parts += [src, dst]
        places.append((here, there))
        used = there.stop
    return np.concatenate(parts), places
