"""Where one chunk of a transfer is converted: staging for it, and who walks between that and the cache.

A workspace serves one chunk at a time and keeps its staging for the next one. The host's is here;
a GPU's is in `gpu_workplace.py`, and its staging is GPU memory, which then moves like a cache's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ..layout.block_scales import SCALE_NBYTES
from ..layout.dtypes import convert_bytes, real_maxima
from ..staging.mover import put_rows, rows_at

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]


class ElementType(NamedTuple):
    """What rows are made of at one end: a type's name, and the bytes of one number."""

    dtype: str
    nbytes: int


class Workspace(Protocol):
    """Converts rows of numbers in the memory of one device. Not thread-safe.

    Rows are named by their addresses, int64; all of a call have `elements` numbers.
    """

    address: int
    """Of its staging, at a multiple of 16."""

    def reserve(self, nbytes: int) -> None:
        """Makes the staging at least so large; what it held is lost. Raises DeviceError."""

    def floats(self, addresses: Ids) -> Floats:
        """float32 that lie there. Raises DeviceError."""

    def put_floats(self, addresses: Ids, values: Floats) -> None:
        """Writes float32 there. Raises DeviceError."""

    def maxima(self, addresses: Ids, elements: int, of: ElementType, factor: Floats) -> Floats:
        """The largest magnitude of each row, times the row's factor. Raises DeviceError."""

    def convert(
        self,
        src: Ids,
        dst: Ids,
        elements: int,
        types: tuple[ElementType, ElementType],
        factor: Floats | None,
    ) -> None:
        """Begins to write rows as numbers of another type; bits, if there is no factor.

        Raises:
            DeviceError, PlanError: the GPU failed; or a number lies where none could be read.
        """

    def finish(self) -> None:
        """Returns when everything that was begun is visible. Raises DeviceError."""

    def try_out(
        self, types: tuple[ElementType, ElementType], *, converts: bool, scaled: bool
    ) -> None:
        """Does beforehand what the first rows of these types would have to do, in 16 KiB of staging.

        Raises:
            DeviceError: the GPU failed.
        """

    def close(self) -> None:
        """Frees what it holds: nothing is in flight."""


class HostWorkspace:
    """Converts in host memory, by NumPy and PyTorch; done on return."""

    def __init__(self) -> None:
        self.address = 0
        self._staging: Bytes = np.zeros(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        """Allocates, if what is there is too small."""
        if len(self._staging) < nbytes + 16:
            self._staging = np.empty(nbytes + 16, np.uint8)
        self.address = -(-int(self._staging.ctypes.data) // 16) * 16

    def floats(self, addresses: Ids) -> Floats:
        """A copy."""
        values: Floats = rows_at(addresses, SCALE_NBYTES).view(np.float32)[:, 0].copy()
        return values

    def put_floats(self, addresses: Ids, values: Floats) -> None:
        """Writes them."""
        put_rows(addresses, SCALE_NBYTES, data=np.ascontiguousarray(values).view(np.uint8))

    def maxima(self, addresses: Ids, elements: int, of: ElementType, factor: Floats) -> Floats:
        """By PyTorch."""
        return real_maxima(rows_at(addresses, elements * of.nbytes), factor, of.dtype)

    def convert(
        self,
        src: Ids,
        dst: Ids,
        elements: int,
        types: tuple[ElementType, ElementType],
        factor: Floats | None,
    ) -> None:
        """By PyTorch's own cast."""
        here, there = types
        data = rows_at(src, elements * here.nbytes)
        if factor is not None:
            data = convert_bytes(data, factor, here.dtype, there.dtype)
        put_rows(dst, data.shape[1], data=data.reshape(-1))

    def finish(self) -> None:
        """Nothing: all is done."""

    def try_out(
        self, types: tuple[ElementType, ElementType], *, converts: bool, scaled: bool
    ) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing: the memory is Python's."""
