"""Pieces bound to memory: where each one lies here, and where at the peer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import PlanError
from ..memory import iovec
from ..memory.regions import check_ranges
from ..plan.block_tables import as_row

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ..memory.descriptors import RegionDescriptor

    Offsets = int | Sequence[int] | npt.NDArray[np.integer]

MAX_PIECE_NBYTES = 4 << 20  # longer pieces are cut, so that rails and copiers can share them


class BoundPieces(NamedTuple):
    """Pieces as columns; row i moves `nbytes[i]` bytes. Not to be changed once they are submitted.

    Attributes:
        local: addresses and lengths in this process.
        nbytes: the lengths again, signed.
        remote_index: each piece's position in the transfer's tuple of remote regions.
        remote_offset: bytes from that region's start.
        total_nbytes: of all pieces together.
    """

    local: iovec.Iovec
    nbytes: npt.NDArray[np.int64]
    remote_index: npt.NDArray[np.int64]
    remote_offset: npt.NDArray[np.int64]
    total_nbytes: int


_none = np.zeros(0, np.int64)
NO_PIECES = BoundPieces(np.zeros((0, 2), np.uint64), _none, _none, _none, 0)


def as_columns(
    local: Offsets, remote: Offsets, nbytes: Offsets
) -> tuple[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Equally long int64 columns out of ints and arrays: local offsets and lengths, remote offsets.

    Raises:
        PlanError: they are no numbers, or do not go together.
    """
    columns = [
        as_row(name, np.atleast_1d(np.asarray(column)), operation="transfer")
        for name, column in (
            ("local offsets", local),
            ("remote offsets", remote),
            ("nbytes", nbytes),
        )
    ]
    try:
        here, there, sizes = np.broadcast_arrays(*columns)
    except ValueError as error:
        raise PlanError(
            f"{len(columns[0])} local offsets, {len(columns[1])} remote offsets and "
            f"{len(columns[2])} lengths do not go together",
            operation="transfer",
        ) from error
    return (here.astype(np.int64), sizes.astype(np.int64)), there.astype(np.int64)


def bind(
    addresses: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    remote_index: npt.NDArray[np.int64],
    remote_offset: npt.NDArray[np.int64],
    remote_regions: Sequence[RegionDescriptor],
) -> BoundPieces:
    """Check every remote range, cuts long pieces and drops empty ones.

    Args:
        addresses: of the pieces in this process, checked by the caller.

    Raises:
        OutOfRange: a piece leaves its remote region.
    """
    if not len(nbytes):
        return NO_PIECES
    limits = np.array([region.nbytes for region in remote_regions], np.int64)
    check_ranges(remote_offset, nbytes, limits[remote_index], "remote")
    if int(nbytes.max()) > MAX_PIECE_NBYTES or not bool(nbytes.all()):
        addresses, nbytes, remote_index, remote_offset = _cut(
            addresses, nbytes, remote_index, remote_offset
        )
    local = iovec.make(addresses, nbytes)
    return BoundPieces(local, nbytes, remote_index, remote_offset, int(nbytes.sum()))


def _cut(
    addresses: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    index: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
) -> tuple[
    npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]
]:
    """Cut long pieces into equal ones of at most `MAX_PIECE_NBYTES`, and drops empty ones."""
    parts = -(-nbytes // MAX_PIECE_NBYTES)
    row = np.repeat(np.arange(len(nbytes)), parts)
    first = np.cumsum(parts) - parts
    begin = (np.arange(len(row)) - first[row]) * MAX_PIECE_NBYTES
    cut = np.minimum(nbytes[row] - begin, MAX_PIECE_NBYTES)
    return addresses[row] + begin, cut, index[row], offset[row] + begin
