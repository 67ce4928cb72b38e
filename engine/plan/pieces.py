"""Pieces as columns: what a plan comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Pieces(NamedTuple):
    """Pieces as columns; row i moves `nbytes[i]` bytes. Regions are positions in the layouts."""

    src_region: npt.NDArray[np.int64]
    src_offset: npt.NDArray[np.int64]
    dst_region: npt.NDArray[np.int64]
    dst_offset: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]

    @property
    def total_nbytes(self) -> int:
        """Bytes of all pieces together."""
        return int(self.nbytes.sum())
