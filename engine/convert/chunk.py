"""Numbers that change their type on their way through staging: gathered, converted, sent; or back.

Here is one chunk of a transfer; `conversion.py` cuts a transfer into them, and a workspace of the
device that holds the cache here converts it (`workspace.py`).

On the writing side they are gathered into staging, converted and sent from there; on the reading
side they arrive in staging, are converted and laid into the cache before the read ends. Where scales
differ from block to block, they travel beside the numbers.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import EngineError, LinkError
from ..layout.block_scales import SCALE_NBYTES, BlockScales, group_maxima
from ..layout.dtypes import ElementType, scales_for
from ..transfer.pieces import NO_PIECES, BoundPieces, bind

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from ..plan.reconcile import CopyGroup
    from ..plan.template import Moves
    from ..runtime.copy_threads import Copiers
    from ..transfer.plan import TransferPlan
    from ..transfer.transfer import Transfer
    from .workspace import Workspace, Workspaces

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]

log = logging.getLogger(__name__)

_ALIGNED_NBYTES = 16  # of the staging's parts: numbers lie where kernels can read them


class ConvertChunk:
    """Some pieces of numbers that change their type, through staging of their own.

    The staging holds all of them and is lent until they are moved: `release` gives it back. The
    pieces that go into one block whose scale is made are all here, or none. As `Move`.
    """

    listed = None  # before its staging is there

    def __init__(self, plan: TransferPlan, parts: list[Part], workspaces: Workspaces) -> None:
        self.local, self.remote = plan.caches, plan.remote.regions
        self._plan = plan
        self._parts = parts
        self._workspaces = workspaces
        self._place: Workspace | None = None
        self._src = _tables(self._parts, source=True)
        self._dst = _tables(self._parts, source=False)
        self._travelling = list((self._dst if plan.writes else self._src).values())
        sizes = [part.wire_nbytes(plan.writes) for part in self._parts]
        sizes += [len(table.values) * SCALE_NBYTES for table in self._travelling]
        self.nbytes = sum(sizes)
        self._staging_nbytes = sum(map(_aligned, sizes))

    def start(
        self, begin: Callable[[Transfer], None], copiers: Copiers, transfer: Transfer
    ) -> None:
        """Begin the transfer; on a copier, since converting takes as long as moving.

        Args:
            begin: hands it to the path, once it is one of pieces.
        """
        workers = self._workspaces.workers
        if workers.enter():  # else the link has stopped the transfer, or is about to
            copiers.run(lambda: workers.run(lambda: self._start(begin, transfer)))

    def release(self) -> None:
        """Give the staging back: the transfer has ended."""
        place, self._place = self._place, None
        if place is not None:
            self._workspaces.give(self._plan.local.device, place)

    def _start(self, begin: Callable[[Transfer], None], transfer: Transfer) -> None:
        if not transfer.begin():
            return
        try:
            place = self._place = self._workspaces.take(self._plan.local.device)
            place.reserve(self._staging_nbytes)
            pieces = self._stage(place)
        except Exception as error:
            self._wait_for_begun()
            transfer.stop(failure(error))
        else:
            transfer.take(pieces, scratch=True)
            if not self._plan.writes:
                transfer.on_placed = lambda: self._land(place)
            begin(transfer)
        transfer.end(0)

    def _stage(self, place: Workspace) -> BoundPieces:
        """Room in the staging for all that travels; filled, on the writing side."""
        writes = self._plan.writes
        if writes:
            self._read_scales(place, None)
            self._choose_scales(place, None)
        columns: list[tuple[Ids, Ids, Ids, Ids]] = []
        rooms = self._rooms(place)
        for part, room in zip(self._parts, rooms, strict=False):
            pieces = part.moves.pieces
            region = pieces.dst_region if writes else pieces.src_region
            offset = pieces.dst_offset if writes else pieces.src_offset
            each = part.wire_nbytes(writes) // len(part.rows)
            sizes = np.full(len(part.rows), each, np.int64)
            columns.append((room, sizes, region[part.rows], offset[part.rows]))
            if writes:
                self._convert(place, part, self._cache_rows(part), room)
        for table, room in zip(self._travelling, rooms[len(self._parts) :], strict=True):
            sizes = np.full(len(room), SCALE_NBYTES, np.int64)
            columns.append((room, sizes, table.region, table.offset))
            if writes:
                place.put_floats(room, table.values)
        place.finish()
        if not columns:
            return NO_PIECES
        merged = [np.concatenate(column) for column in zip(*columns, strict=True)]
        return bind(merged[0], merged[1], merged[2], merged[3], self._plan.remote.regions)

    def _land(self, place: Workspace) -> None:
        """Lay what was read into the cache.

        Raises:
            EngineError: it cannot.
        """
        try:
            rooms = self._rooms(place)
            self._read_scales(place, rooms[len(self._parts) :])
            self._choose_scales(place, rooms[: len(self._parts)])
            for part, room in zip(self._parts, rooms, strict=False):
                self._convert(place, part, room, self._cache_rows(part))
            for table in self._dst.values():
                place.put_floats(self._here(table), table.values)
            place.finish()
        except Exception as error:
            self._wait_for_begun()
            if isinstance(error, EngineError):
                raise
            raise failure(error) from error

    def _wait_for_begun(self) -> None:
        """Wait for what was begun before something failed: it ends before anybody believes so."""
        if self._place is not None:
            with contextlib.suppress(EngineError):
                self._place.finish()

    def _rooms(self, place: Workspace) -> list[Ids]:
        """Return where in the staging each part's rows lie, and after them those of each table."""
        rooms: list[Ids] = []
        used = place.address
        counts = [(len(part.rows), part.wire_nbytes(self._plan.writes)) for part in self._parts]
        counts += [(len(t.values), len(t.values) * SCALE_NBYTES) for t in self._travelling]
        for rows, nbytes in counts:
            rooms.append(used + np.arange(rows) * (nbytes // max(1, rows)))
            used += _aligned(nbytes)
        return rooms

    def _cache_rows(self, part: Part) -> Ids:
        """Return where a part's rows lie in the cache here."""
        pieces = part.moves.pieces
        region, offset = (
            (pieces.src_region, pieces.src_offset)
            if self._plan.writes
            else (pieces.dst_region, pieces.dst_offset)
        )
        rows: Ids = self._plan.addresses[region[part.rows]] + offset[part.rows]
        return rows

    def _here(self, table: _ScaleTable) -> Ids:
        addresses: Ids = self._plan.addresses[table.region] + table.offset
        return addresses

    def _read_scales(self, place: Workspace, rooms: list[Ids] | None) -> None:
        """The scales of the source: out of the cache, or where they have arrived."""
        for number, table in enumerate(self._src.values()):
            table.values[:] = place.floats(self._here(table) if rooms is None else rooms[number])

    def _choose_scales(self, place: Workspace, rooms: list[Ids] | None) -> None:
        """The scale of each block that is written, from all numbers that go into it: in the cache,
        or where they have arrived."""
        for copy_group, table in self._dst.items():
            largest = np.zeros(len(table.values), np.float32)
            for number, part in enumerate(self._parts):
                if part.moves.copy_group is copy_group:
                    rows = self._cache_rows(part) if rooms is None else rooms[number]
                    of, factor = element_types_of(copy_group)[0], self._factor(part)
                    maxima = place.maxima(rows, part.elements, of, factor)
                    found = group_maxima(table.rows(part), len(largest), maxima)
                    np.maximum(largest, found, out=largest)
            table.values[:] = scales_for(largest, copy_group.dst_dtype)

    def _factor(self, part: Part) -> Floats:
        """Return what a part's numbers are multiplied by to be real, but for the scales that are
        chosen."""
        assert part.moves.factor is not None
        factor: Floats = part.moves.factor[part.rows]
        table = self._src.get(part.moves.copy_group)
        return factor if table is None else factor * table.values[table.rows(part)]

    def _convert(self, place: Workspace, part: Part, src: Ids, dst: Ids) -> None:
        """A part's rows, as the source's numbers, into rows of the destination's."""
        copy_group = part.moves.copy_group
        factor: Floats | None = None
        if part.moves.factor is not None:
            factor = self._factor(part)
            table = self._dst.get(copy_group)
            if table is not None:
                factor = factor / table.values[table.rows(part)]
        place.convert(src, dst, part.elements, element_types_of(copy_group), factor)


def element_types_of(copy_group: CopyGroup) -> tuple[ElementType, ElementType]:
    """Return what its rows are made of at the source and at the destination."""
    return (
        ElementType(copy_group.src_dtype, copy_group.src_elem),
        ElementType(copy_group.dst_dtype, copy_group.dst_elem),
    )


def failure(error: Exception) -> EngineError:
    """Return what a transfer ends with when converting raised `error`."""
    if isinstance(error, EngineError):
        return error
    log.error("kvferry: converting failed; please report this", exc_info=error)
    return LinkError(f"converting failed: {error}", operation="convert")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED_NBYTES) * _ALIGNED_NBYTES


class Part(NamedTuple):
    """Pieces of one size: some rows of `moves`."""

    moves: Moves
    rows: Ids
    elements: int

    def wire_nbytes(self, writes: bool) -> int:
        """Return what travels: the destination's numbers of a write, the source's of a read."""
        copy_group = self.moves.copy_group
        return (
            len(self.rows)
            * self.elements
            * (copy_group.dst_elem if writes else copy_group.src_elem)
        )


class _ScaleTable:
    """The scales of one copy group on one side that a transfer needs, each once.

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
        """Return which of the scales each piece of a part has."""
        rows: Ids = np.searchsorted(self._keys, self._key(part))
        return rows


def _tables(parts: list[Part], *, source: bool) -> dict[CopyGroup, _ScaleTable]:
    found: dict[CopyGroup, list[Part]] = {}
    for part in parts:
        found.setdefault(part.moves.copy_group, []).append(part)
    tables = {}
    for copy_group, some in found.items():
        scales = copy_group.src_scales if source else copy_group.dst_scales
        if scales is not None:
            tables[copy_group] = _ScaleTable(scales, some, source=source)
    return tables


def parts_of(moves: Moves) -> list[Part]:
    """Return all pieces of one list, by their size."""
    elements = moves.pieces.nbytes // moves.copy_group.dst_elem
    return [
        Part(moves, np.flatnonzero(elements == size), size) for size in np.unique(elements).tolist()
    ]
