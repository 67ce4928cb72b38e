"""From a transfer's pieces to work requests: joined where the peer's side is contiguous, split over
queues in equal shares. NumPy throughout: O(shares) Python steps until they are posted.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...memory.regions import RegisteredCache

if TYPE_CHECKING:
    import numpy.typing as npt

    from ...memory.regions import MemoryRegion
    from ...transfer.transfer import Transfer

    Ints = npt.NDArray[np.int64]

SHARE_ALIGN_NBYTES = 8 << 10
MIN_SHARE_NBYTES = 64 << 10  # less is not worth a second queue
# A device takes 2 GiB at most; shorter ones let a long transfer stop soon, and others come in between.
MAX_REQUEST_NBYTES = 4 << 20
BATCH = 32  # work requests a doorbell
BATCH_NBYTES = 16 << 20
MAX_JOINED_NBYTES = 64 << 10  # longer pieces gain nothing from sharing a work request


class Pieces(NamedTuple):
    """Columns of pieces, one row each.

    Attributes:
        local, remote: addresses in this process and in the peer's.
        owner: position of the piece in the peer's regions of the transfer.
        source: position in `own_regions` of the transfer.
    """

    local: Ints
    remote: Ints
    nbytes: Ints
    owner: Ints
    source: Ints


def own_regions(transfer: Transfer) -> list[MemoryRegion]:
    """This side's regions of a transfer: those that it names, and all of each cache that it names."""
    regions: list[MemoryRegion] = []
    for each in transfer.local_regions:
        regions += each.regions if isinstance(each, RegisteredCache) else (each,)
    return regions


def pieces_of(transfer: Transfer) -> Pieces:
    """Return a transfer's pieces with their addresses and regions."""
    local = transfer.local[:, 0].astype(np.int64)
    bases = np.array([region.address for region in transfer.remote_regions], np.int64)
    remote = bases[transfer.remote_index] + transfer.remote_offset
    source = _regions_of(transfer, local)
    return _short(Pieces(local, remote, transfer.nbytes, transfer.remote_index, source))


def _short(pieces: Pieces) -> Pieces:
    """Return the same bytes in pieces that a work request may have."""
    if int(pieces.nbytes.max()) <= MAX_REQUEST_NBYTES:
        return pieces
    row, begin, nbytes = cuts(pieces.nbytes, MAX_REQUEST_NBYTES)
    return Pieces(
        pieces.local[row] + begin,
        pieces.remote[row] + begin,
        nbytes,
        pieces.owner[row],
        pieces.source[row],
    )


def cuts(nbytes: Ints, limit_nbytes: int) -> tuple[Ints, Ints, Ints]:
    """Pieces cut to a limit: for each part which piece it is of, where in it it begins, its bytes."""
    parts = -(-nbytes // limit_nbytes)
    row = np.repeat(np.arange(len(parts)), parts)
    begin = (np.arange(len(row)) - (np.cumsum(parts) - parts)[row]) * limit_nbytes
    return row, begin, np.minimum(nbytes[row] - begin, limit_nbytes)


def _regions_of(transfer: Transfer, local: Ints) -> Ints:
    """Return which of the transfer's own regions each piece lies in."""
    regions = own_regions(transfer)
    if len(regions) == 1:
        return np.zeros(len(local), np.int64)
    starts = np.array([region.address for region in regions], np.int64)
    ends = starts + np.array([region.nbytes for region in regions], np.int64)
    order = np.argsort(starts, kind="stable")
    found: Ints = order[np.searchsorted(starts[order], local, side="right") - 1]
    outside = np.flatnonzero(local + transfer.nbytes > ends[found])
    for row in outside.tolist():  # only where regions lie within each other
        stop = int(local[row] + transfer.nbytes[row])
        found[row] = int(np.flatnonzero((starts <= local[row]) & (ends >= stop))[0])
    return found


def starts_of_requests(pieces: Pieces, max_entries: int) -> Ints:
    """Index of each work request's first piece: neighbours at the peer share one."""
    count = len(pieces.local)
    if count < 2 or max_entries < 2:
        return np.arange(count, dtype=np.int64)
    joins = (
        (pieces.remote[1:] == pieces.remote[:-1] + pieces.nbytes[:-1])
        & (pieces.owner[1:] == pieces.owner[:-1])
        & (pieces.nbytes[1:] <= MAX_JOINED_NBYTES)
        & (pieces.nbytes[:-1] <= MAX_JOINED_NBYTES)
    )
    if not bool(joins.any()):
        return np.arange(count, dtype=np.int64)
    index = np.arange(count, dtype=np.int64)
    begins = np.concatenate(([True], ~joins))
    run_start = np.maximum.accumulate(np.where(begins, index, 0))
    return np.flatnonzero((index - run_start) % max_entries == 0)


def split(pieces: Pieces, parts: int) -> list[Pieces]:
    """Cut pieces into `parts` shares of equal bytes, at multiples of 8 KiB within a piece; fewer
    shares where they would be too small to be worth it."""
    ends = np.cumsum(pieces.nbytes)
    total = int(ends[-1])
    parts = max(1, min(parts, total // MIN_SHARE_NBYTES))
    shares = []
    row, inside = 0, 0  # where the next share begins
    for part in range(1, parts + 1):
        if part == parts:
            stop, until = len(ends), 0
        else:
            goal = total * part // parts
            stop = int(np.searchsorted(ends, goal, side="right"))
            begin = int(ends[stop] - pieces.nbytes[stop])
            until = (goal - begin) // SHARE_ALIGN_NBYTES * SHARE_ALIGN_NBYTES
        if (stop, until) > (row, inside):
            shares.append(_cut(pieces, row, inside, stop, until))
            row, inside = stop, until
    return shares


def _cut(pieces: Pieces, row: int, inside: int, stop: int, until: int) -> Pieces:
    """From byte `inside` of piece `row` to byte `until` of piece `stop`."""
    last = stop + (1 if until else 0)
    local, remote, nbytes, owner, source = (column[row:last].copy() for column in pieces)
    if until:
        nbytes[-1] = until
    local[0] += inside
    remote[0] += inside
    nbytes[0] -= inside
    return Pieces(local, remote, nbytes, owner, source)


class Share:
    """One queue's part of a transfer: work requests, of which the first `done` are posted.

    Attributes:
        batch: how many of them may be posted at once.
    """

    def __init__(
        self, transfer: Transfer, pieces: Pieces, max_entries: int, keys: tuple[Ints, Ints]
    ) -> None:
        """`keys`: this side's and the peer's, by region of the transfer, for the queue's device."""
        self.transfer = transfer
        self.starts = np.append(starts_of_requests(pieces, max_entries), len(pieces.local))
        self.ends = np.concatenate(([0], np.cumsum(pieces.nbytes)))
        local_keys, remote_keys = keys
        self._columns = (
            pieces.remote,
            remote_keys[pieces.owner],
            pieces.local,
            pieces.nbytes,
            local_keys[pieces.source],
        )
        self.count = len(self.starts) - 1
        longest_nbytes = int(np.diff(self.ends[self.starts]).max())
        self.batch = max(1, min(BATCH, BATCH_NBYTES // longest_nbytes))
        self.done = 0

    @property
    def left(self) -> int:
        """Work requests that are not posted."""
        return self.count - self.done

    def take(self, count: int) -> tuple[list[list[int]], int]:
        """Return the next work requests as rows for `verbs_qp.post`, and their bytes."""
        first, last = int(self.starts[self.done]), int(self.starts[self.done + count])
        nbytes = int(self.ends[last] - self.ends[first])
        rows: list[list[int]] = np.stack([c[first:last] for c in self._columns], axis=1).tolist()
        if last - first > count:
            cuts = (self.starts[self.done : self.done + count + 1] - first).tolist()
            rows = [_joined(rows[a:b]) for a, b in itertools.pairwise(cuts)]
        self.done += count
        return rows, nbytes


def _joined(rows: list[list[int]]) -> list[int]:
    """Neighbours at the peer as one work request with an entry each."""
    return rows[0][:2] + [value for row in rows for value in row[2:]]
