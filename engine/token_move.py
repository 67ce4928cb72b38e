"""Tokens of one request between two caches, bound to memory: what is asked for, and by which way.

Over host memory, bits go as pieces from cache to cache. Numbers that change their type go through
staging: on the writing side they are gathered, converted and sent from there; on the reading side
they arrive there, are converted and laid into the cache before the read ends.
"""

from __future__ import annotations

import ctypes
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .bound_pieces import NO_PIECES, BoundPieces, bind
from .convert import convert_bytes
from .errors import EngineError, LinkError, PlanError

if TYPE_CHECKING:
    import numpy.typing as npt

    from .copiers import Copiers
    from .reblock import Moves
    from .transfer_plan import TransferPlan
    from .transports.base import DataPath, Transfer

    Bytes = npt.NDArray[np.uint8]
    Ids = npt.NDArray[np.int64]

log = logging.getLogger(__name__)


class TokenMove(NamedTuple):
    """What of a request is moved.

    Attributes:
        src_tables, dst_tables: a block table for each group of the side's layout, from the
            request's first token on; over `cuda_ipc` also tensors on the GPU.
        start, stop: tokens `[start, stop)`.
        layers: global layer indices; all if None.
    """

    src_tables: tuple[Any, ...]
    dst_tables: tuple[Any, ...]
    start: int
    stop: int
    layers: tuple[int, ...] | None = None


def as_tables(tables: Any) -> tuple[Any, ...]:
    """Block tables as a tuple; a single table may be given as it is."""
    if hasattr(tables, "ndim") and hasattr(tables, "shape"):
        return (tables,)
    several: tuple[Any, ...] = tuple(tables)
    one = all(isinstance(entry, int | np.integer) for entry in several)
    return (several,) if one else several


def states_of(plan: TransferPlan, move: TokenMove) -> int:
    """How many pages of state the destination's tables name."""
    counts = {
        len(move.dst_tables[pair.dst_group])
        - int(
            pair.dst_null is not None
            and np.count_nonzero(np.asarray(move.dst_tables[pair.dst_group]) == pair.dst_null)
        )
        for pair in plan.tokens.pairs
        if not pair.unit and pair.dst_group < len(move.dst_tables)
    }
    if len(counts) > 1:
        raise PlanError(f"groups of state have {sorted(counts)} pages", operation="plan")
    return counts.pop() if counts else 1


def check_move(plan: TransferPlan, move: TokenMove) -> int:
    """Checks tables that are in host memory; returns the bytes that they move.

    Raises:
        BlockOutOfRange, OverlappingBlocks, PlanError: as for `TokenPlan.moves`.
    """
    tokens = plan.tokens
    on_gpu = [getattr(table, "is_cuda", False) for table in (*move.src_tables, *move.dst_tables)]
    if not any(on_gpu):
        for pair in tokens.pairs:
            tokens.check(pair, move.src_tables, move.dst_tables, move.start, move.stop)
    elif not all(on_gpu) or any(not pair.unit or pair.aligned for pair in tokens.pairs):
        raise PlanError(
            "block tables on a GPU must all be there, and name blocks of tokens: give tables of "
            "state in host memory",
            operation="plan",
        )
    states = 1 if any(on_gpu) else states_of(plan, move)
    return tokens.nbytes(move.start, move.stop, layers=move.layers, states=states)


def bind_tokens(plan: TransferPlan, move: TokenMove) -> BoundPieces:
    """Every piece of a plan that moves bits, its addresses here and its ranges there.

    Raises:
        BlockOutOfRange, OverlappingBlocks, PlanError: as for `TokenPlan.pieces`.
    """
    src_tables, dst_tables, start, stop, layers = move
    pieces = plan.tokens.pieces(src_tables, dst_tables, start, stop, layers=layers)
    here, here_offset = pieces.src_region, pieces.src_offset
    there, there_offset = pieces.dst_region, pieces.dst_offset
    if not plan.writes:
        here, here_offset, there, there_offset = there, there_offset, here, here_offset
    return bind(
        plan.addresses[here] + here_offset, pieces.nbytes, there, there_offset, plan.remote.regions
    )


class Converting:
    """One transfer of numbers that change their type, through staging of its own.

    The staging holds all that the transfer moves and lives as long as it.
    """

    def __init__(self, plan: TransferPlan, move: TokenMove) -> None:
        """Checks the tables; moves nothing yet.

        Raises:
            BlockOutOfRange, OverlappingBlocks, PlanError: as for `TokenPlan.moves`.
        """
        if {plan.local.kind, plan.remote_kind} != {"host"}:
            raise PlanError(
                "numbers change their type, which this transport does for host memory alone: "
                "connect GPUs of one host by cuda_ipc, or give both caches one dtype",
                operation="plan",
            )
        src_tables, dst_tables, start, stop, layers = move
        self._plan = plan
        found = plan.tokens.moves(src_tables, dst_tables, start, stop, layers=layers)
        self._parts = [part for moves in found for part in _parts(moves)]
        self.wire_nbytes = sum(part.wire_nbytes(plan.writes) for part in self._parts)
        self._staging: Bytes = np.zeros(0, np.uint8)

    def start(self, path: DataPath, copiers: Copiers, transfer: Transfer) -> None:
        """Begins the transfer; on a copier, since converting takes as long as moving."""
        copiers.run(lambda: self._start(path, transfer))

    def _start(self, path: DataPath, transfer: Transfer) -> None:
        if not transfer.begin():
            return
        try:
            self._staging = np.empty(self.wire_nbytes, np.uint8)
            pieces = self._stage()
        except EngineError as error:
            transfer.stop(error)
        except Exception as error:
            log.exception("kvferry: converting failed; please report this")
            transfer.stop(LinkError(f"converting failed: {error}", operation="convert"))
        else:
            transfer.take(pieces)
            transfer.start, transfer.keep = None, self  # from here on it is one of pieces
            if not self._plan.writes:
                transfer.on_placed = self._land
            path.submit(transfer)
        transfer.end(0)

    def _stage(self) -> BoundPieces:
        """Room in the staging for every piece; filled, on the writing side."""
        writes, addresses = self._plan.writes, self._plan.addresses
        columns: list[tuple[Ids, Ids, Ids, Ids]] = []
        base, used = int(self._staging.ctypes.data), 0
        for part in self._parts:
            pieces, bundle, size = part.moves.pieces, part.moves.bundle, part.wire_nbytes(writes)
            each = size // len(part.rows)
            room = self._staging[used : used + size].reshape(-1, each)
            if writes:
                here = addresses[pieces.src_region] + pieces.src_offset
                data = _gather(here[part.rows], part.elements * bundle.src_elem)
                room[...] = part.convert(data)
                there, there_offset = pieces.dst_region, pieces.dst_offset
            else:
                there, there_offset = pieces.src_region, pieces.src_offset
            places = base + used + np.arange(len(part.rows)) * each
            sizes = np.full(len(part.rows), each, np.int64)
            columns.append((places, sizes, there[part.rows], there_offset[part.rows]))
            used += size
        if not columns:
            return NO_PIECES
        merged = [np.concatenate(column) for column in zip(*columns, strict=True)]
        return bind(merged[0], merged[1], merged[2], merged[3], self._plan.remote.regions)

    def _land(self) -> None:
        """Lays what was read into the cache."""
        used = 0
        for part in self._parts:
            pieces, size = part.moves.pieces, part.wire_nbytes(False)
            data = self._staging[used : used + size].reshape(len(part.rows), -1)
            here = self._plan.addresses[pieces.dst_region] + pieces.dst_offset
            _scatter(here[part.rows], part.convert(np.ascontiguousarray(data)))
            used += size


class _Part(NamedTuple):
    """Pieces of one size."""

    moves: Moves
    rows: Ids
    elements: int

    def wire_nbytes(self, writes: bool) -> int:
        """What travels: the destination's numbers of a write, the source's of a read."""
        bundle = self.moves.bundle
        return len(self.rows) * self.elements * (bundle.dst_elem if writes else bundle.src_elem)

    def convert(self, data: Bytes) -> Bytes:
        """Rows of the source's bytes as the destination's."""
        factor, bundle = self.moves.factor, self.moves.bundle
        if factor is None:
            return data
        return convert_bytes(data, factor[self.rows], bundle.src_dtype, bundle.dst_dtype)


def _parts(moves: Moves) -> list[_Part]:
    elements = moves.pieces.nbytes // moves.bundle.dst_elem
    return [
        _Part(moves, np.flatnonzero(elements == size), size)
        for size in np.unique(elements).tolist()
    ]


def _memory(addresses: Ids, nbytes: int) -> tuple[Bytes, Ids]:
    """The memory that equal pieces span as overlapping rows of one piece, and the row of each."""
    first, last = int(addresses.min()), int(addresses.max())
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * (last - first + nbytes)).from_address(first))
    rows = np.lib.stride_tricks.as_strided(raw, (last - first + 1, nbytes), (1, 1))
    return rows, addresses - first


def _gather(addresses: Ids, nbytes: int) -> Bytes:
    rows, index = _memory(addresses, nbytes)
    gathered: Bytes = rows[index]
    return gathered


def _scatter(addresses: Ids, data: Bytes) -> None:
    rows, index = _memory(addresses, data.shape[1])
    rows[index] = data
