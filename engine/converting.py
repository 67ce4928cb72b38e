"""Numbers that change their type between host memories: gathered, converted, sent; or the other way.

Here is one chunk of a transfer; `conversion.py` cuts a transfer into them.

On the writing side they are gathered into staging, converted and sent from there; on the reading
side they arrive in staging, are converted and laid into the cache before the read ends. Where scales
differ from block to block, they travel beside the numbers.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import iovec
from .block_scales import SCALE_NBYTES, BlockScales, group_maxima
from .bound_pieces import NO_PIECES, BoundPieces, bind
from .convert import convert_bytes, real_maxima, scales_for
from .errors import EngineError, LinkError

if TYPE_CHECKING:
    import numpy.typing as npt

    from .bundles import Bundle
    from .copiers import Copiers
    from .token_pieces import Moves
    from .transfer_plan import TransferPlan
    from .transports.base import DataPath, Transfer

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]

log = logging.getLogger(__name__)


class Converting:
    """Some pieces of numbers that change their type, through staging of their own.

    The staging holds all of them and lives until they are moved. The pieces that go into one block
    whose scale is made are all here, or none.
    """

    def __init__(self, plan: TransferPlan, parts: list[Part]) -> None:
        self._plan = plan
        self._parts = parts
        self._src = _tables(self._parts, source=True)
        self._dst = _tables(self._parts, source=False)
        scales = (self._dst if plan.writes else self._src).values()
        self.wire_nbytes = sum(part.wire_nbytes(plan.writes) for part in self._parts)
        self.wire_nbytes += sum(len(table.values) * SCALE_NBYTES for table in scales)
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
        """Room in the staging for all that travels; filled, on the writing side."""
        writes = self._plan.writes
        if writes:
            for table in self._src.values():
                table.values[:] = _gather(self._here(table), SCALE_NBYTES).view(np.float32)[:, 0]
            self._choose_scales([self._gathered(part) for part in self._parts])
        columns: list[tuple[Ids, Ids, Ids, Ids]] = []
        base, used = int(self._staging.ctypes.data), 0

        def place(rows: int, size: int, region: Ids, offset: Ids) -> Bytes:
            nonlocal used
            room = self._staging[used : used + size].reshape(rows, -1)
            each = size // rows
            places = base + used + np.arange(rows) * each
            columns.append((places, np.full(rows, each, np.int64), region, offset))
            used += size
            return room

        for part in self._parts:
            pieces = part.moves.pieces
            region = pieces.dst_region if writes else pieces.src_region
            offset = pieces.dst_offset if writes else pieces.src_offset
            room = place(
                len(part.rows), part.wire_nbytes(writes), region[part.rows], offset[part.rows]
            )
            if writes:
                room[...] = self._convert(part, self._gathered(part))
        for table in (self._dst if writes else self._src).values():
            size = len(table.values) * SCALE_NBYTES
            room = place(len(table.values), size, table.region, table.offset)
            room[...] = table.values.view(np.uint8).reshape(-1, SCALE_NBYTES)
        if not columns:
            return NO_PIECES
        merged = [np.concatenate(column) for column in zip(*columns, strict=True)]
        return bind(merged[0], merged[1], merged[2], merged[3], self._plan.remote.regions)

    def _land(self) -> None:
        """Lays what was read into the cache."""
        data, used = [], 0
        for part in self._parts:
            size = part.wire_nbytes(False)
            data.append(self._staging[used : used + size].reshape(len(part.rows), -1))
            used += size
        for table in self._src.values():
            size = len(table.values) * SCALE_NBYTES
            table.values[:] = self._staging[used : used + size].view(np.float32)
            used += size
        self._choose_scales(data)
        for part, rows in zip(self._parts, data, strict=True):
            pieces = part.moves.pieces
            here = self._plan.addresses[pieces.dst_region] + pieces.dst_offset
            _scatter(here[part.rows], self._convert(part, rows))
        for table in self._dst.values():
            _scatter(self._here(table), table.values.view(np.uint8).reshape(-1, SCALE_NBYTES))

    def _gathered(self, part: Part) -> Bytes:
        pieces = part.moves.pieces
        here = self._plan.addresses[pieces.src_region] + pieces.src_offset
        return _gather(here[part.rows], part.elements * part.moves.bundle.src_elem)

    def _here(self, table: _ScaleTable) -> Ids:
        addresses: Ids = self._plan.addresses[table.region] + table.offset
        return addresses

    def _choose_scales(self, data: list[Bytes]) -> None:
        """The scale of each block that is written, from all numbers that go into it."""
        for bundle, table in self._dst.items():
            largest = np.zeros(len(table.values), np.float32)
            for part, rows in zip(self._parts, data, strict=True):
                if part.moves.bundle is bundle:
                    maxima = real_maxima(rows, self._factor(part), bundle.src_dtype)
                    found = group_maxima(table.rows(part), len(largest), maxima)
                    np.maximum(largest, found, out=largest)
            table.values[:] = scales_for(largest, bundle.dst_dtype)

    def _factor(self, part: Part) -> Floats:
        """What a part's numbers are multiplied by to be real, but for the scales that are chosen."""
        assert part.moves.factor is not None
        factor: Floats = part.moves.factor[part.rows]
        table = self._src.get(part.moves.bundle)
        return factor if table is None else factor * table.values[table.rows(part)]

    def _convert(self, part: Part, data: Bytes) -> Bytes:
        """Rows of the source's bytes as the destination's."""
        bundle = part.moves.bundle
        if part.moves.factor is None:
            return data
        factor = self._factor(part)
        table = self._dst.get(bundle)
        if table is not None:
            factor = factor / table.values[table.rows(part)]
        return convert_bytes(np.ascontiguousarray(data), factor, bundle.src_dtype, bundle.dst_dtype)


class Part(NamedTuple):
    """Pieces of one size: some rows of `moves`."""

    moves: Moves
    rows: Ids
    elements: int

    def wire_nbytes(self, writes: bool) -> int:
        """What travels: the destination's numbers of a write, the source's of a read."""
        bundle = self.moves.bundle
        return len(self.rows) * self.elements * (bundle.dst_elem if writes else bundle.src_elem)


class _ScaleTable:
    """The scales of one bundle on one side that a transfer needs, each once.

    Attributes:
        values: float32, one each.
        region, offset: where each lies.
    """

    def __init__(self, scales: BlockScales, parts: list[Part], *, source: bool) -> None:
        self._source = source
        self._by_head = scales.shape.head_stride > 0
        keys = [self._key(part) for part in parts]
        self._keys = np.unique(np.concatenate(keys))
        block, rest = self._keys & 0xFFFFFFFF, self._keys >> 32
        head, entry = rest & 0xFFFF, rest >> 16
        self.values = np.ones(len(self._keys), np.float32)
        self.region: Ids = scales.region[entry]
        self.offset: Ids = scales.offsets(entry, head, block)

    def _key(self, part: Part) -> Ids:
        moves, rows = part.moves, part.rows
        block = moves.src_block if self._source else moves.dst_block
        key: Ids = (moves.entry[rows] << 48) | block[rows]
        return key | (moves.head[rows] << 32) if self._by_head else key

    def rows(self, part: Part) -> Ids:
        """Which of the scales each piece of a part has."""
        rows: Ids = np.searchsorted(self._keys, self._key(part))
        return rows


def _tables(parts: list[Part], *, source: bool) -> dict[Bundle, _ScaleTable]:
    found: dict[Bundle, list[Part]] = {}
    for part in parts:
        found.setdefault(part.moves.bundle, []).append(part)
    tables = {}
    for bundle, some in found.items():
        scales = bundle.src_scales if source else bundle.dst_scales
        if scales is not None:
            tables[bundle] = _ScaleTable(scales, some, source=source)
    return tables


def parts_of(moves: Moves) -> list[Part]:
    """All pieces of one list, by their size."""
    elements = moves.pieces.nbytes // moves.bundle.dst_elem
    return [
        Part(moves, np.flatnonzero(elements == size), size) for size in np.unique(elements).tolist()
    ]


def _memory(addresses: Ids, nbytes: int) -> tuple[Bytes, Ids]:
    """The memory that equal pieces span as overlapping rows of one piece, and the row of each."""
    first, last = int(addresses.min()), int(addresses.max())
    raw = iovec.bytes_at(first, last - first + nbytes)
    rows = np.lib.stride_tricks.as_strided(raw, (last - first + 1, nbytes), (1, 1))
    return rows, addresses - first


def _gather(addresses: Ids, nbytes: int) -> Bytes:
    rows, index = _memory(addresses, nbytes)
    gathered: Bytes = rows[index]
    return gathered


def _scatter(addresses: Ids, data: Bytes) -> None:
    rows, index = _memory(addresses, data.shape[1])
    rows[index] = data
