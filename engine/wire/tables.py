"""Tables of regions and pieces as they cross a link, and their admission on arrival.

A region row is its number and its key; a piece row is a position in the region table, an offset and
a length. Nothing of a table is believed before `admit` has checked it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import NotRegistered, OutOfRange, ProtocolError
from ..memory import iovec
from ..memory.descriptors import KEY_NBYTES, RegionDescriptor
from ..memory.regions import MemoryRegion, RegionTable, check_ranges

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..transfer.transfer import Transfer

REGION_ROW = np.dtype([("region", "<u4"), ("unused", "<u4"), ("key", "u1", (KEY_NBYTES,))])
PIECE_ROW = np.dtype([("region", "<u4"), ("unused", "<u4"), ("offset", "<u8"), ("nbytes", "<u8")])
MAX_REGIONS = 4096
MAX_PIECES = 8192


class Admitted(NamedTuple):
    """Pieces of this process's own memory, checked and in use until `release`."""

    regions: tuple[MemoryRegion, ...]
    iov: iovec.Iovec
    nbytes: int
    device: int = -1  # the GPU that holds all of them; -1 for host memory

    @property
    def closing(self) -> bool:
        """Whether any of it is being taken back."""
        return any(region.closing for region in self.regions)

    def release(self) -> None:
        """End the use."""
        for region in self.regions:
            region.release()


def region_rows(regions: tuple[RegionDescriptor, ...]) -> npt.NDArray[np.void]:
    """Return the region table of descriptors that a peer gave us."""
    rows = np.zeros(len(regions), REGION_ROW)
    rows["region"] = [region.region_id for region in regions]
    keys = b"".join(region.key for region in regions)
    rows["key"] = np.frombuffer(keys, np.uint8).reshape(-1, KEY_NBYTES)
    return rows


def piece_rows(transfer: Transfer, part: slice) -> npt.NDArray[np.void]:
    """Return the remote side of some of a transfer's pieces."""
    offsets = transfer.remote_offset[part]
    rows = np.zeros(len(offsets), PIECE_ROW)
    rows["region"] = transfer.remote_index[part]
    rows["offset"] = offsets
    rows["nbytes"] = transfer.nbytes[part]
    return rows


def admit(
    table: RegionTable, region_data: bytes, piece_data: bytes, *, staged: bool = False
) -> Admitted:
    """Check keys and ranges and marks the regions as in use.

    Args:
        staged: whether the caller has staging for GPU memory.

    Raises:
        ProtocolError: these are no tables.
        NotRegistered, RegionGone, OutOfRange: the peer may not touch that; nothing is in use then.
    """
    if len(region_data) % REGION_ROW.itemsize or len(piece_data) % PIECE_ROW.itemsize:
        raise ProtocolError("a region or piece table has a broken row")
    rows = np.frombuffer(region_data, REGION_ROW)
    pieces = np.frombuffer(piece_data, PIECE_ROW)
    if len(rows) > MAX_REGIONS or len(pieces) > MAX_PIECES:
        raise ProtocolError(
            f"{len(rows)} regions and {len(pieces)} pieces are more than {MAX_REGIONS} and "
            f"{MAX_PIECES}"
        )
    index = pieces["region"].astype(np.int64)
    if len(index) and int(index.max()) >= len(rows):
        raise ProtocolError("a piece names a region that its table lacks")
    regions = tuple(table.admit(int(row["region"]), row["key"].tobytes()) for row in rows)
    # Lengths are unsigned on the wire: what does not fit an int64 is certainly out of range.
    if len(pieces) and (int(pieces["offset"].max()) | int(pieces["nbytes"].max())) >> 63:
        raise OutOfRange("a range beyond 2**63 leaves every region", operation="access")
    offsets, nbytes = pieces["offset"].astype(np.int64), pieces["nbytes"].astype(np.int64)
    devices = {region.device for region in regions} or {-1}
    if len(devices) > 1:
        raise NotRegistered(
            "these regions are on several GPUs, or partly in host memory: make one transfer for "
            "each",
            operation="access",
        )
    (device,) = devices
    if device >= 0 and not staged:
        raise NotRegistered(
            f"region {regions[0].region_id} is GPU memory, which this operation does not reach",
            operation="access",
        )
    limits = np.array([region.nbytes for region in regions], np.int64)[index]
    check_ranges(offsets, nbytes, limits, "remote")
    used: list[MemoryRegion] = []
    try:
        for region in regions:
            region.acquire()
            used.append(region)
    except BaseException:
        for region in used:
            region.release()
        raise
    bases = np.array([region.address for region in regions], np.int64)[index]
    return Admitted(regions, iovec.make(bases + offsets, nbytes), int(nbytes.sum()), device)
