"""Copies between the slots of a verbs link and the memory that frames come from and go to.

Host memory is copied by NumPy or the kernel. A GPU's mover gathers straight into the
slot and scatters straight out of it: the slots are pinned for CUDA, as they are for the RDMA devices
(decision 0049).
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from ...errors import DeviceError
from ...staging.mover import gather, new_mover, scatter

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ...memory import iovec
    from ...staging.mover import Mover
    from ..base import PathHost
    from .slots import Slots

    Bytes = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)


class Movers:
    """Who copies for one link: the host, and a mover for each GPU. Thread-safe, but for `close`."""

    def __init__(self, link: PathHost, slots: Slots) -> None:
        self._link = link
        self._slots = slots
        self._lock = threading.Lock()
        self._movers: dict[int, tuple[Mover, threading.Lock]] = {}
        self._pinned_by: Mover | None = None

    def gather(self, into: Bytes, pieces: iovec.Iovec, device: int) -> None:
        """Copies pieces of a GPU's memory, or the host's for -1, one after the other into a slot.

        Raises:
            DeviceError: the GPU failed.
        """
        if device < 0:
            gather(pieces, into)
        elif len(into):
            mover, beginning = self._mover(device)
            with beginning:
                moved = mover.gather(pieces, int(into.ctypes.data))
            moved.wait()

    def scatter(self, out_of: Bytes, pieces: iovec.Iovec, device: int) -> None:
        """Copies what lies in a slot into the pieces. Raises DeviceError."""
        if device < 0:
            scatter(out_of, pieces)
        elif len(out_of):
            mover, beginning = self._mover(device)
            with beginning:
                moved = mover.scatter(int(out_of.ctypes.data), pieces)
            moved.wait()

    def warm(self) -> None:
        """Prepares what GPU memory that is registered already will need: making it later could
        wait for a stream that waits for us."""
        for device in self._link.core.regions.gpus():
            try:
                self._mover(device)
            except DeviceError as error:
                log.warning("kvferry: GPU %d cannot be staged: %s", device, error)

    def close(self) -> None:
        """Frees what it holds; nobody copies any more."""
        try:
            if self._pinned_by is not None:
                self._pinned_by.unpin(self._slots.address)
            for mover, _ in self._movers.values():
                mover.close()
        except DeviceError as error:  # the GPU is gone, and with it what it held
            log.warning("kvferry: staging is not freed: %s", error)
        self._movers.clear()

    def _mover(self, device: int) -> tuple[Mover, threading.Lock]:
        """A GPU's mover and the lock under which its work begins; made with the first call."""
        with self._lock:
            entry = self._movers.get(device)
            if entry is None:
                mover = new_mover(device, self._link.core.max_programs)
                try:
                    self._prepare(mover)
                except BaseException:
                    mover.close()
                    raise
                entry = self._movers[device] = (mover, threading.Lock())
            return entry

    def _prepare(self, mover: Mover) -> None:
        pins = self._pinned_by is None  # one registration serves all GPUs of the process
        if pins:
            mover.pin(self._slots.address, self._slots.nbytes)
        try:
            mover.warm(self._slots.spare)
        except BaseException:
            if pins:
                mover.unpin(self._slots.address)
            raise
        if pins:
            self._pinned_by = mover
