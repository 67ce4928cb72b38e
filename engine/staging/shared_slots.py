"""Memory that two processes of one host share: slots that one fills and the other empties.

The owner makes a memory file without a name and tells its peer the number of the descriptor; the
peer opens it under /proc, which the kernel allows to processes of one user. Nothing is left behind
when either dies. The file is sealed, so that no peer can cut memory away under the other's kernels.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np

from ..errors import ProtocolError, TransportUnavailable
from .mover import Movers

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
MAX_NBYTES = 4 << 30


class SharedSlots:
    """Slots of equal size in shared memory.

    Attributes:
        num_slots, slot_nbytes: how many, and how large.
        descriptor: the owner's file descriptor; -1 at the peer's.
        movers: copy in and out of them, for each device.
    """

    def __init__(self, descriptor: int, num_slots: int, slot_nbytes: int, *, owned: bool) -> None:
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self.descriptor = descriptor if owned else -1
        self._map = mmap.mmap(descriptor, num_slots * slot_nbytes)
        self._address = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        self.movers = Movers(self._address, num_slots * slot_nbytes)

    @classmethod
    def make(cls, num_slots: int, slot_nbytes: int) -> SharedSlots:
        """New ones, owned by this process."""
        descriptor = os.memfd_create("kvferry-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, num_slots * slot_nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return cls(descriptor, num_slots, slot_nbytes, owned=True)

    @classmethod
    def open(cls, pid: int, descriptor: int, num_slots: int, slot_nbytes: int) -> SharedSlots:
        """Those that another process has made.

        Raises:
            TransportUnavailable: the kernel does not let this process open them.
            ProtocolError: they are not what the peer says.
            FileNotFoundError, ProcessLookupError: the peer has closed them, or has ended.
        """
        if not (num_slots and slot_nbytes and num_slots * slot_nbytes <= MAX_NBYTES):
            raise ProtocolError(f"{num_slots} slots of {slot_nbytes} bytes are no staging")
        try:
            mine = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise
        except OSError as error:
            raise TransportUnavailable(
                f"the peer's staging cannot be opened ({error.strerror}): run both engines as one "
                "user and in one process namespace, or use tcp",
                operation="receive",
            ) from error
        try:
            sealed = fcntl.fcntl(mine, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if not sealed or os.fstat(mine).st_size != num_slots * slot_nbytes:
                raise ProtocolError("the peer's staging is not what it says")
            return cls(mine, num_slots, slot_nbytes, owned=False)
        except OSError as error:
            raise ProtocolError(
                f"the peer's staging is no memory file ({error.strerror})"
            ) from error
        finally:
            os.close(mine)

    def slot(self, number: int) -> int:
        """Return a slot's address in this process."""
        return self._address + number * self.slot_nbytes

    def close(self) -> None:
        """End this process's use of them, and their movers: nobody copies any more."""
        self.movers.close()
        self._map.close()  # it holds a descriptor of its own
        if self.descriptor >= 0:
            os.close(self.descriptor)
