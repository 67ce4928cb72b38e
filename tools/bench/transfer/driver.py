"""What one library does at one end of `kvferry bench transfer`: a driver lives in a worker process.

Needs NumPy and nothing of kvferry: other libraries run this file in environments of their own.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvferry.tools.bench.transfer.workload import Pool, Shape

WRITE, READ = "write", "read"
TIMEOUT_S = 20.0  # what any one transfer may take


class Driver(abc.ABC):
    """One end. The `src` end writes, or serves reads; the `dst` end receives, or reads.

    A write is timed from before `transfer` to the later of its return and, where the library tells
    the receiver, the return of `arrived`. A read is timed around `transfer`.
    """

    notifies = True
    """Whether the library tells the receiver of a write that it is complete."""

    def __init__(self, end: str, pool: Pool, shapes: Sequence[Shape]) -> None:
        self.end = end
        self.pool = pool
        self.shapes = tuple(shapes)

    def publish(self) -> dict[str, Any]:
        """Return what the other end must know of this one, in JSON's types."""
        return {}

    def meet(self, other: dict[str, Any]) -> None:  # noqa: B027 - some have nobody to meet
        """Connect to the other end, which published `other`."""

    def select(self, shape: Shape) -> None:  # noqa: B027 - some prepare nothing
        """Prepare what a library may prepare once for a pair of caches. Not timed."""

    def prepare(self, shape: Shape, request: int) -> int:
        """Get the passive end ready for a request; return a token for `transfer`. Not
        timed."""
        del shape, request
        return 0

    @abc.abstractmethod
    def transfer(self, shape: Shape, request: int, operation: str, token: int) -> None:
        """Move a request; return once the library says that it is complete. Timed."""

    def arrived(self, shape: Shape, request: int) -> None:
        """The receiver's end of a write; returns once the library says that it has it all."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 - some hold nothing
        """Give everything back; the process ends right after."""


def poll_s(shape: Shape) -> float:
    """Seconds between two looks, for libraries that must be polled: 0.3 % of what they wait for."""
    return 200e-6 if shape.nbytes > 8 << 20 else 20e-6
